"""Running a coroutine as a fibre, in the midst of a test's tasks."""

from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

import trio

from iscsifuse.fibres import DOZE, OWN_TASK, SLEEP, here, run_ready
from iscsifuse.initiator.loop import Loop

__all__ = ["as_fibre", "sleep", "sleep_as_fibre"]

_T = TypeVar("_T")


class _Fibre(Generic[_T]):
    def __init__(self, coroutine: Coroutine[Any, Any, _T]) -> None:
        self.coroutine = coroutine
        self.stopped = trio.Event()  # it has ended, or needs a task
        self.ended = False
        self.value: _T
        self.error: BaseException | None = None

    def wake(self) -> None:
        here().ready.append(self)

    def go_on(self) -> None:
        here().fibre = self
        try:
            trap = self.coroutine.send(None)
        except StopIteration as end:
            self.value = end.value
            self.ended = True
        except BaseException as error:
            self.error = error
            self.ended = True
        else:
            assert trap in (OWN_TASK, SLEEP, DOZE), f"a fibre awaited {trap!r}"
            if trap != OWN_TASK:
                return
        finally:
            here().fibre = None
        self.stopped.set()


class _Rest(Generic[_T]):
    def __init__(self, coroutine: Coroutine[Any, Any, _T]) -> None:
        self.coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, _T]:
        return (yield from self.coroutine.__await__())


async def as_fibre(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Carry a coroutine out as a fibre, as long as it keeps the rule of fibres; the rest of it in this task."""
    assert Loop.current()  # which calls fibres that nobody else calls
    fibre = _Fibre(coroutine)
    fibre.go_on()
    with trio.CancelScope(shield=True):
        await fibre.stopped.wait()
    if not fibre.ended:
        return await _Rest(coroutine)
    if fibre.error is not None:
        raise fibre.error
    return fibre.value


class _Sleep:
    def __await__(self) -> Generator[str, None, None]:
        yield SLEEP


async def sleep() -> None:
    """In a fibre: stop until its `Fibre.wake` is called."""
    await _Sleep()


async def sleep_as_fibre(seconds: float) -> None:
    """What a device does that a fibre called."""
    fibre = here().fibre
    assert fibre is not None

    async def wake() -> None:
        await trio.sleep(seconds)
        fibre.wake()
        run_ready()

    trio.lowlevel.spawn_system_task(wake)
    await sleep()
