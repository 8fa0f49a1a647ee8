import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.iscsi.serial import MASK, add
from iscsifuse.iscsi.window import CommandWindow

BASES = [0, 1, 0x7FFFFFF8, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF]


def window(cmd_sn: int, *, room: int) -> CommandWindow:
    return CommandWindow(cmd_sn=cmd_sn, exp_cmd_sn=cmd_sn, max_cmd_sn=add(cmd_sn, room - 1))


@pytest.mark.conformance(44)
@pytest.mark.conformance(49)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("room", [1, 2, 100])
def test_takes_consecutive_numbers_until_it_is_closed(base: int, room: int) -> None:
    w = window(base, room=room)
    taken: list[int] = []
    while w.is_open:
        assert w.room == room - len(taken)
        taken.append(w.take())
    assert taken == [add(base, i) for i in range(room)]
    assert w.room == 0


@pytest.mark.conformance(46)
@pytest.mark.parametrize("base", BASES)
def test_closed_from_the_start_then_opened(base: int) -> None:
    w = window(base, room=0)
    assert w.is_open is False
    assert w.room == 0
    w.update(exp_cmd_sn=base, max_cmd_sn=add(base, -1))
    assert w.room == 0
    w.update(exp_cmd_sn=base, max_cmd_sn=base)
    assert w.room == 1


@pytest.mark.conformance(48)
@pytest.mark.parametrize("base", BASES)
def test_both_are_ignored_where_max_lies_more_than_one_below_exp(base: int) -> None:
    w = window(base, room=3)
    w.take()
    w.take()
    w.update(exp_cmd_sn=add(base, 2), max_cmd_sn=base)
    assert (w.exp_cmd_sn, w.max_cmd_sn) == (base, add(base, 2))
    w.update(exp_cmd_sn=add(base, 2), max_cmd_sn=add(base, 1))  # exactly one below is a closed window, no mistake
    assert (w.exp_cmd_sn, w.max_cmd_sn) == (add(base, 2), add(base, 2))


@pytest.mark.conformance(48)
@pytest.mark.parametrize("base", BASES)
def test_regressions_are_ignored(base: int) -> None:
    w = window(base, room=10)
    for _ in range(5):
        w.take()
    w.update(exp_cmd_sn=add(base, 5), max_cmd_sn=add(base, 14))
    w.update(exp_cmd_sn=add(base, 4), max_cmd_sn=add(base, 13))
    assert (w.exp_cmd_sn, w.max_cmd_sn) == (add(base, 5), add(base, 14))
    w.update(exp_cmd_sn=add(base, 4), max_cmd_sn=add(base, 15))  # one of them may be news
    assert (w.exp_cmd_sn, w.max_cmd_sn) == (add(base, 5), add(base, 15))


@pytest.mark.parametrize("base", BASES)
def test_a_target_can_not_have_received_what_was_not_sent(base: int) -> None:
    w = window(base, room=10)
    w.take()
    w.update(exp_cmd_sn=add(base, 2), max_cmd_sn=add(base, 20))
    assert w.exp_cmd_sn == base
    w.update(exp_cmd_sn=add(base, 1), max_cmd_sn=add(base, 20))
    assert w.exp_cmd_sn == add(base, 1)


@pytest.mark.conformance(48)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("exp", "last"),
    [
        (0, -2),  # more than one below
        (0, 0x7FFFFFFF + 20),  # too far ahead to be ahead
        (-100, -90),  # of another session
        (5000, 4000),
        (0x80000000, 0x80000000),
        (0, -1),  # simply closed
    ],
)
def test_no_numbers_of_a_login_keep_the_window_from_opening_later(base: int, exp: int, last: int) -> None:
    w = CommandWindow(cmd_sn=base, exp_cmd_sn=add(base, exp), max_cmd_sn=add(base, last))
    assert w.room == 0
    w.update(exp_cmd_sn=base, max_cmd_sn=add(base, 7))
    assert w.is_open
    assert w.room == 8
    assert w.exp_cmd_sn == base


@pytest.mark.parametrize("base", BASES)
def test_half_the_circle_ahead_is_not_ahead(base: int) -> None:
    w = window(base, room=1)
    w.update(exp_cmd_sn=base, max_cmd_sn=add(base, 0x80000000))
    assert w.room == 1
    w.max_cmd_sn = add(base, 0x80000000)
    assert w.room == 0
    w.max_cmd_sn = add(base, 0x7FFFFFFF)
    assert w.room == 0x80000000


class Endless:
    """The rule of RFC 7143 §4.2.2.1 with numbers that never wrap."""

    def __init__(self, number: int, room: int) -> None:
        self.cmd_sn = self.exp = number
        self.max = number + room - 1

    def update(self, exp: int, last: int) -> None:
        if last < exp - 1:
            return
        if self.exp < exp <= self.cmd_sn:
            self.exp = exp
        self.max = max(self.max, last)


@pytest.mark.conformance(49)
@given(
    base=st.sampled_from(BASES) | st.integers(0, MASK),
    room=st.integers(0, 50),
    steps=st.lists(st.none() | st.tuples(st.integers(-60, 60), st.integers(-60, 60)), max_size=30),
)
def test_wraps_like_numbers_that_never_do(base: int, room: int, steps: list[tuple[int, int] | None]) -> None:
    w = window(base, room=room)
    model = Endless(base + (1 << 32), room)
    for step in steps:
        if step is None:
            assert w.is_open == (model.cmd_sn <= model.max)
            if w.is_open:
                assert w.take() == model.cmd_sn & MASK
                model.cmd_sn += 1
        else:
            exp, last = model.cmd_sn + step[0], model.cmd_sn + step[1]
            w.update(exp_cmd_sn=exp & MASK, max_cmd_sn=last & MASK)
            model.update(exp, last)
        assert (w.cmd_sn, w.exp_cmd_sn, w.max_cmd_sn) == (model.cmd_sn & MASK, model.exp & MASK, model.max & MASK)
        assert w.room == max(0, model.max - model.cmd_sn + 1)
