"""With the short cuts in C, and without them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest

from iscsifuse import quick

_USERS = [
    ("iscsifuse.iscsi.connection", "start_read"),
    ("iscsifuse.iscsi.incoming", "take_reads"),
    ("iscsifuse.initiator.session", "end_reads"),
    ("iscsifuse.cache.cache", "take_stray"),
]

needs_quick = pytest.mark.skipif(
    quick.start_read is None, reason="iscsifuse was installed without its compiled module"
)


@contextmanager
def pure() -> Iterator[None]:
    """What is made meanwhile, and what runs meanwhile, does it all in Python."""
    with ExitStack() as stack:
        for module, name in _USERS:
            stack.enter_context(mock.patch(f"{module}.{name}", None))
        yield
