"""For these tests: no second is spent on waiting that a standard or a courtesy asks for."""

import pytest


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ticks and back-offs."""
    monkeypatch.setattr("iscsifuse.initiator.revival.FIRST_BACK_OFF", 0.002)
    monkeypatch.setattr("iscsifuse.initiator.revival.LAST_BACK_OFF", 0.02)
    monkeypatch.setattr("iscsifuse.initiator.session._TICK", 0.02)
