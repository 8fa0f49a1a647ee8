import pytest
import trio

from iscsifuse.errors import ConnectError, SessionLostError
from iscsifuse.initiator.groups import plain_errors


async def _fail(error: BaseException) -> None:
    raise error


async def test_groups_first_of_a_nursery() -> None:
    with pytest.raises(ConnectError, match="first"), plain_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_fail, ConnectError("first"))


def test_groups_nested_groups_are_unwrapped() -> None:
    inner = ExceptionGroup("in", [SessionLostError("x")])
    with pytest.raises(SessionLostError, match="x"), plain_errors():
        raise ExceptionGroup("out", [ExceptionGroup("between", [inner]), ConnectError("y")])


def test_groups_a_plain_exception_passes_unchanged() -> None:
    error = ConnectError("x")
    with pytest.raises(ConnectError) as caught, plain_errors():
        raise error
    assert caught.value is error


def test_groups_the_cause_is_kept_and_the_group_is_not_told_of() -> None:
    cause = OSError("refused")
    error = ConnectError("x")
    error.__cause__ = cause
    with pytest.raises(ConnectError) as caught, plain_errors():
        raise ExceptionGroup("g", [error])
    assert caught.value.__cause__ is cause
    assert caught.value.__suppress_context__


async def test_groups_cancellations_belong_to_their_scope() -> None:
    with trio.CancelScope() as scope, plain_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_groups_an_error_goes_before_cancellations() -> None:
    scope = trio.CancelScope()

    async def both() -> None:
        with plain_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_fail, ConnectError("x"))
                scope.cancel()
                await trio.sleep_forever()

    with scope, pytest.raises(ConnectError):
        await both()


@pytest.mark.parametrize("urgent", [KeyboardInterrupt, SystemExit])
def test_groups_the_user_goes_before_errors(urgent: type[BaseException]) -> None:
    with pytest.raises(urgent), plain_errors():
        raise BaseExceptionGroup("g", [ConnectError("x"), BaseExceptionGroup("in", [urgent()])])


def test_groups_no_exception_no_effect() -> None:
    with plain_errors():
        pass
