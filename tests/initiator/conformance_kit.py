"""What the conformance tests of login and discovery share: to hear an initiator, and to change what a target says.

Responses are counted over the whole test. A login without CHAP gets two, `SECURITY` and `OPERATIONAL`; one with CHAP
gets four: `METHOD`, `CHALLENGE`, `PROOF` and `AFTER_CHAP`.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import trio
from initiator_kit import DEFAULT_TARGET_NAME, LUN_0, config_of, pattern, portal_of, serving, settings_of, until

from iscsifuse.errors import IscsifuseError
from iscsifuse.initiator.login import LoggedIn, log_in, login_config, make_isid
from iscsifuse.initiator.nexus import Nexus, open_nexus
from iscsifuse.initiator.session import Session
from iscsifuse.initiator.settings import Portal, SessionSettings
from iscsifuse.initiator.statistics import CommandStatistics
from iscsifuse.iscsi import text
from iscsifuse.iscsi.chap import ChapCredentials
from iscsifuse.iscsi.pdu import Opcode, Pdu
from iscsifuse.iscsi.request import LoginRequest
from iscsifuse.iscsi.response import LoginResponse
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi.status import Status
from iscsifuse.testing.actions import Change
from iscsifuse.testing.config import ChapPolicy, Redirect, TargetConfig, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import IN, OUT, Rule, anything, is_a
from iscsifuse.testing.target import LoopbackTarget

__all__ = [
    "AFTER_CHAP",
    "CHALLENGE",
    "CHAP",
    "IN_RECOVERY",
    "LOGIN_RESPONSE",
    "METHOD",
    "OPERATIONAL",
    "POLICY",
    "PROOF",
    "SECRET",
    "SECURITY",
    "answer",
    "is_refused",
    "listen",
    "log_in_to",
    "note_answers",
    "one_disk",
    "opened",
    "reads",
    "respond",
    "said",
    "status",
    "use",
]

IN_RECOVERY = pytest.mark.expect_log("session lost|logged in again|can't log in again|no more logins")
SECRET = b"a secret of sixteen"
CHAP = settings_of(chap=ChapCredentials(user="me", secret=SECRET))
POLICY = ChapPolicy(users={"me": SECRET})
SECURITY, OPERATIONAL = 1, 2
METHOD, CHALLENGE, PROOF, AFTER_CHAP = 1, 2, 3, 4
LOGIN_RESPONSE = is_a(Opcode.LOGIN_RESPONSE)


def listen(config: TargetConfig) -> list[Pdu]:
    """A list that fills with all that initiators send from now on, before the target does anything about it."""
    heard: list[Pdu] = []

    def hear(pdu: Pdu) -> Pdu:
        heard.append(pdu)
        return pdu

    config.script.add(Rule(IN, Change(hear), anything, times=0))
    return heard


def said(heard: Iterable[Pdu]) -> list[dict[str, str]]:
    """The keys of each Login Request that was heard."""
    return [dict(text.decode(pdu.data)) for pdu in heard if isinstance(pdu, LoginRequest)]


def note_answers(config: TargetConfig) -> list[dict[str, str]]:
    """A list that fills with the keys of each Login Response, as long as no other rule changes it."""
    answers: list[dict[str, str]] = []

    def note(pdu: Pdu) -> Pdu:
        answers.append(dict(text.decode(pdu.data)))
        return pdu

    config.script.add(Rule(OUT, Change(note), LOGIN_RESPONSE, times=0))
    return answers


def respond(
    config: TargetConfig,
    nth: int,
    change: Callable[[LoginResponse], Pdu] | None = None,
    *,
    times: int = 1,
    **fields: Any,
) -> None:
    """Have the nth Login Response changed by a function, or in some of its fields."""
    function = change or (lambda pdu: replace(pdu, **fields))
    config.script.add(Rule(OUT, Change(cast("Callable[[Pdu], Pdu]", function)), LOGIN_RESPONSE, nth=nth, times=times))


def answer(config: TargetConfig, nth: int, keys: Mapping[str, str | None], *, more: bytes = b"") -> None:
    """Have the nth Login Response say these keys as well, or otherwise, or (None) not at all; and then more text."""

    def change(pdu: LoginResponse) -> LoginResponse:
        pairs = {**dict(text.decode(pdu.data)), **keys}
        return replace(
            pdu, data=text.encode((key, value) for key, value in pairs.items() if value is not None) + more
        )

    respond(config, nth, change)


async def log_in_to(
    where: LoopbackTarget | Portal, settings: SessionSettings | None = None, *, limit: float = 5.0
) -> LoggedIn:
    portal = portal_of(where) if isinstance(where, LoopbackTarget) else where
    config = login_config(settings or settings_of(), DEFAULT_TARGET_NAME)
    with trio.fail_after(limit + 5):
        return await log_in(portal, config, isid=make_isid(), limit=limit)


async def is_refused(
    config: TargetConfig,
    kind: type[IscsifuseError],
    words: str,
    settings: SessionSettings | None = None,
    *,
    limit: float = 5.0,
    heard: list[Pdu] | None = None,
) -> IscsifuseError:
    """A login that we end: by this error in one line, the connection closed, and nothing sent but Login Requests."""
    heard = listen(config) if heard is None else heard
    async with serving(config) as target:
        with pytest.raises(kind, match=words) as caught:
            await log_in_to(target, settings, limit=limit)
        await until(lambda: target.connections == 0)
    assert heard
    assert all(isinstance(pdu, LoginRequest) for pdu in heard)
    assert str(caught.value).isprintable()
    return caught.value


async def use(
    target: LoopbackTarget, login: LoggedIn, *, blocks: int = 1, settings: SessionSettings | None = None
) -> None:
    """Write some blocks and read them again on the session that a login began; log out."""
    session = Session(login, settings or settings_of(), CommandStatistics())
    data, back = pattern(blocks * 512, seed=4711), memoryview(bytearray(blocks * 512))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            write = cdbs.write(lba=3, blocks=blocks)
            task = await session.execute(write, lun=LUN_0, buffer_out=memoryview(data), exact=True)
            assert task.status == Status.GOOD
            read = cdbs.read(lba=3, blocks=blocks)
            await session.execute(read, lun=LUN_0, buffer_in=back, exact=True)
            await session.logout()
    assert bytes(back) == data == target.disk().contents(lba=3, blocks=blocks)
    assert [entry.name for entry in target.ledger] == ["WRITE(10)", "READ(10)"]


def one_disk(*, redirect: Redirect | None = None, tag: int = 1, **changes: Any) -> TargetConfig:
    """A target with a disk of a known content."""
    config = config_of(**changes)
    config.nodes = [TargetNode(disks=[Disk.from_bytes(pattern(4096 * 512))], redirect=redirect, tag=tag)]
    return config


def status(number: int, **fields: Any) -> Callable[[object], LoginResponse]:
    """Makes Login Responses with this status."""
    return lambda _: LoginResponse(status_class=number >> 8, status_detail=number & 0xFF, **fields)


@asynccontextmanager
async def opened(portals: Sequence[Portal], **changes: Any) -> AsyncIterator[Nexus]:
    """A session that survives its connections."""
    with trio.fail_after(20):
        async with open_nexus(DEFAULT_TARGET_NAME, portals, settings_of(**changes)) as nexus:
            yield nexus


async def reads(nexus: Nexus) -> bool:
    """Whether a block can be read, and is right."""
    memory = memoryview(bytearray(512))
    await nexus.execute(cdbs.read(lba=1, blocks=1), lun=LUN_0, buffer_in=memory, exact=True)
    return bytes(memory) == pattern(1024)[512:]
