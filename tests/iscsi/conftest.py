"""What the protocol's tests share."""

from collections.abc import Iterator

import pytest

from support.quick import needs_quick, pure


@pytest.fixture(scope="module", params=["pure", pytest.param("quick", marks=needs_quick)])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once with the short cuts of `iscsifuse.quick`, once without."""
    if request.param == "quick":
        yield
    else:
        with pure():
            yield
