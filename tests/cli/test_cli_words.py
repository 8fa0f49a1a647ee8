import json

import pytest

from iscsifuse.cli import words


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (67108864, "64.0 MiB"),
        (1 << 40, "1.0 TiB"),
        ((1 << 63) - 1, "8.0 EiB"),
        (1 << 75, "32768.0 EiB"),
    ],
)
def test_size(number: int, shown: str) -> None:
    assert words.size(number) == shown


def test_exact_size() -> None:
    assert words.exact_size(512) == "512 B"
    assert words.exact_size(67108864) == "64.0 MiB (67108864 bytes)"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0.00 µs"),
        (0.00000151, "1.51 µs"),
        (0.000085, "85.0 µs"),
        (0.00085, "850 µs"),
        (0.0009996, "1.00 ms"),
        (0.001, "1.00 ms"),
        (0.01236, "12.4 ms"),
        (0.1236, "124 ms"),
        (0.9996, "1.00 s"),
        (3.2101, "3.21 s"),
        (99.96, "100 s"),
        (754.0, "754 s"),
    ],
)
def test_duration(seconds: float, shown: str) -> None:
    assert words.duration(seconds) == shown


def test_count() -> None:
    assert [words.count(n, "disk") for n in (0, 1, 2)] == ["0 disks", "1 disk", "2 disks"]
    assert words.count(2, "retry", "retries") == "2 retries"


def test_yes_no() -> None:
    assert [words.yes_no(value) for value in (True, False, None)] == ["yes", "no", "-"]


def test_table() -> None:
    shown = words.table(("NAME", "LUN"), [("a", "1"), ("longer", "300")], right=("LUN",))
    assert shown == "NAME    LUN\na         1\nlonger  300"


def test_table_without_rows_and_blanks_at_the_end() -> None:
    assert words.table(("A", "B"), []) == "A  B"
    assert words.table(("A", "B"), [("x", "")]) == "A  B\nx"


def test_pairs() -> None:
    assert words.pairs("Title", {"a": "1", "long": ""}) == "Title\n  a     1\n  long"
    assert words.pairs("Title", {}) == "Title"


def test_json_has_a_schema_and_no_control_characters() -> None:
    text = words.json_text({"name": "a\x1b[31m\nü"})
    assert json.loads(text) == {"schema": 1, "name": "a\x1b[31m\nü"}
    assert "\x1b" not in text
    assert text.isascii()
