import pytest

from iscsifuse.scsi.status import Status, words


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0x00, "GOOD"),
        (0x02, "CHECK CONDITION"),
        (0x04, "CONDITION MET"),
        (0x08, "BUSY"),
        (0x18, "RESERVATION CONFLICT"),
        (0x28, "TASK SET FULL"),
        (0x30, "ACA ACTIVE"),
        (0x40, "TASK ABORTED"),
        (0x99, "status 0x99"),
    ],
)
def test_words(number: int, text: str) -> None:
    assert words(number) == text


def test_members_are_the_bytes_of_the_standard() -> None:
    assert sorted(Status) == [0x00, 0x02, 0x04, 0x08, 0x18, 0x28, 0x30, 0x40]
