import dataclasses

import pytest

from iscsifuse.initiator.settings import DEFAULT_PORT, Portal, SessionSettings, TargetPortal
from iscsifuse.iscsi.chap import ChapCredentials


@pytest.mark.parametrize(
    ("portal", "words"),
    [
        (Portal("san.example"), "san.example:3260"),
        (Portal("10.0.0.1", 3261), "10.0.0.1:3261"),
        (Portal("fe80::1"), "[fe80::1]:3260"),
    ],
)
def test_settings_portal_as_text(portal: Portal, words: str) -> None:
    assert str(portal) == words
    assert str(TargetPortal(portal, 2)) == f"{words},2"


def test_settings_defaults_are_careful() -> None:
    settings = SessionSettings(initiator_name="iqn.2026-11.io.github.iscsifuse:tests")
    assert settings.read_only
    assert (settings.timeout, settings.login_timeout, settings.reconnect_timeout) == (60.0, 15.0, 120.0)
    assert DEFAULT_PORT == 3260


def test_settings_secrets_are_not_shown() -> None:
    chap = ChapCredentials(user="u", secret=b"very secret indeed")
    settings = SessionSettings(initiator_name="iqn.2026-11.io.github.iscsifuse:tests", chap=chap)
    assert "secret indeed" not in repr(settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.chap = None  # type: ignore[misc]
