import pytest

from iscsifuse.scsi import asc


@pytest.mark.parametrize(
    ("code", "qualifier", "text"),
    [
        (0x00, 0x00, "no additional sense information"),
        (0x04, 0x01, "logical unit is in process of becoming ready"),
        (0x04, 0x02, "logical unit not ready, initializing command required"),
        (0x0C, 0x0C, "write error - unexpected unsolicited data"),
        (0x11, 0x00, "unrecovered read error"),
        (0x20, 0x00, "invalid command operation code"),
        (0x21, 0x00, "logical block address out of range"),
        (0x24, 0x00, "invalid field in CDB"),
        (0x27, 0x00, "write protected"),
        (0x27, 0x07, "space allocation failed write protect"),
        (0x29, 0x00, "power on, reset, or bus device reset occurred"),
        (0x2A, 0x09, "capacity data has changed"),
        (0x3A, 0x00, "medium not present"),
        (0x3F, 0x0E, "reported LUNs data has changed"),
        (0x47, 0x05, "protocol service CRC error"),
        (0x47, 0x7F, "some commands cleared by iSCSI protocol event"),
        (0x40, 0x85, "diagnostic failure on component 85h"),
        (0x4D, 0x12, "tagged overlapped commands (task tag 12h)"),
        (0x80, 0x01, "ASC 80h ASCQ 01h, vendor specific"),
        (0x11, 0x81, "ASC 11h ASCQ 81h, vendor specific"),
        (0x7A, 0x01, "ASC 7Ah ASCQ 01h, not a code that is known"),
    ],
)
def test_words(code: int, qualifier: int, text: str) -> None:
    assert asc.words(code, qualifier) == text


def test_every_code_has_words() -> None:
    found = [asc.words(code, qualifier) for code in range(256) for qualifier in range(256)]
    assert all(text and text == text.strip() and text.isprintable() for text in found)
    named = [text for text in found if not text.startswith("ASC ")]
    # The diagnostic failures and task tags are made, the others are in the table.
    assert len(named) - 128 - 256 >= 390
