"""Having the kernel forget: what is done, when, and when not any more."""

from collections.abc import Callable

import pyfuse3
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from iscsifuse.mount.invalidation import Invalidations


class Kernel:
    """Threads that enter the kernel, without either.

    Attributes:
        forgotten: inodes.
        threads: whether there can be any.
        open: they leave it again.
    """

    def __init__(self) -> None:
        self.forgotten: list[int] = []
        self.threads = True
        self.open = trio.Event()

    async def run_sync(self, job: Callable[[], object], *, abandon_on_cancel: bool) -> None:
        assert abandon_on_cancel
        await trio.lowlevel.checkpoint()
        if not self.threads:
            raise RuntimeError("can't start new thread")
        job()
        await self.open.wait()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(trio.to_thread, "run_sync", made.run_sync)
    monkeypatch.setattr(pyfuse3, "invalidate_inode", made.forgotten.append)
    return made


@pytest.mark.expect_log("the kernel still remembers inode 5 as it was: can't start new thread")
async def test_what_no_thread_can_be_had_for_is_tried_again(kernel: Kernel, autojump_clock: MockClock) -> None:
    made = Invalidations()
    kernel.threads = False
    kernel.open.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        made.forget(5)
        await trio.sleep(2.5)  # between two attempts
        assert kernel.forgotten == []
        assert not made.under_way
        kernel.threads = True
        await trio.sleep(2)
        assert autojump_clock.current_time() > 4
        assert kernel.forgotten == [5]
        assert not made.under_way
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), ZeroDivisionError("a mistake")], ids=repr)
@pytest.mark.usefixtures("kernel")
async def test_a_mistake_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(pyfuse3, "invalidate_inode", fail)
    made = Invalidations()
    made.forget(5)
    with pytest.raises(type(error), match="a mistake"):
        await made.run()
    assert not made.under_way


async def test_after_the_end_no_thread_enters_the_kernel(kernel: Kernel) -> None:
    """Neither for what was wanted before, nor for what is wanted while the last one is still inside."""
    made = Invalidations()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        made.forget(5)
        made.forget(6)
        await trio.testing.wait_all_tasks_blocked()
        first = list(kernel.forgotten)
        assert len(first) == 1
        made.end()
        assert made.under_way
        made.forget(7)
        kernel.open.set()
        await made.wait_done()
        made.forget(8)
    # ``run`` has come to its end, too.
    assert kernel.forgotten == first
    assert not made.under_way
