"""What every message has to be, whatever made it."""

from collections.abc import Iterable

__all__ = ["check_message"]

_LONGEST = 2000


def check_message(message: object, *, secrets: Iterable[str] = ()) -> None:
    """One line of a terminal, of bounded length, that tells no secret."""
    text = str(message)
    assert text
    assert text.isprintable(), f"not fit for a terminal: {text!r}"
    assert len(text) < _LONGEST, f"a message of {len(text)} characters"
    assert not any(secret in text for secret in secrets), "a secret was repeated"
