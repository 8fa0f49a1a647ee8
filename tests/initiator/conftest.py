"""For all tests of the initiator: no second is spent on waiting that a standard or a courtesy asks for."""

import pytest


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ticks and back-offs; the wait before a new login is the target's to ask for, and ours asks for none."""
    monkeypatch.setattr("iscsifuse.initiator.revival.FIRST_BACK_OFF", 0.01)
    monkeypatch.setattr("iscsifuse.initiator.revival.LAST_BACK_OFF", 0.05)
    monkeypatch.setattr("iscsifuse.initiator.session._TICK", 0.02)
