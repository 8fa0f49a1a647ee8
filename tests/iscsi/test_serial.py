import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.iscsi import serial

numbers = st.integers(0, 0xFFFFFFFF)


@pytest.mark.conformance(49)
@pytest.mark.parametrize(
    ("number", "increment", "result"),
    [(0, 1, 1), (0xFFFFFFFF, 1, 0), (0, -1, 0xFFFFFFFF), (0xFFFFFFF0, 0x20, 0x10), (5, 1 << 32, 5)],
)
def test_add(number: int, increment: int, result: int) -> None:
    assert serial.add(number, increment) == result


@pytest.mark.parametrize(
    ("start", "end", "result"),
    [
        (0, 0, 0),
        (0xFFFFFFF0, 0x10, 0x20),
        (0x10, 0xFFFFFFF0, -0x20),
        (0, 0x7FFFFFFF, 0x7FFFFFFF),
        (0, 0x80000000, -0x80000000),
        (0x80000000, 0, -0x80000000),
    ],
)
def test_distance(start: int, end: int, result: int) -> None:
    assert serial.distance(start, end) == result


@pytest.mark.conformance(49)
@pytest.mark.parametrize(
    ("first", "second", "less", "less_or_equal"),
    [
        (1, 2, True, True),
        (2, 2, False, True),
        (2, 1, False, False),
        (0xFFFFFFFF, 0, True, True),
        (0, 0xFFFFFFFF, False, False),
        (0, 0x7FFFFFFF, True, True),
    ],
)
def test_order(first: int, second: int, less: bool, less_or_equal: bool) -> None:
    assert serial.less(first, second) is less
    assert serial.less_or_equal(first, second) is less_or_equal


@pytest.mark.conformance(50)
@given(numbers)
def test_a_jump_of_half_the_numbers_is_never_progress(number: int) -> None:
    other = serial.add(number, 1 << 31)
    assert not serial.less(number, other)
    assert not serial.less(other, number)
    assert not serial.less_or_equal(number, other)
    assert not serial.less_or_equal(other, number)


@given(numbers, st.integers(1, (1 << 31) - 1))
def test_what_was_added_lies_ahead(number: int, increment: int) -> None:
    later = serial.add(number, increment)
    assert serial.distance(number, later) == increment
    assert serial.distance(later, number) == -increment
    assert serial.less(number, later)
    assert not serial.less(later, number)
