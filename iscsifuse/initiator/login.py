"""Connect and log in: the trio side of the login phase.

One attempt: connect, play the `LoginMachine` against the stream until it is done, follow a few redirects. Everything
in one time limit; whatever goes wrong is one exception, and the socket is closed.

A redirect begins anew: the next portal gets a machine of its own, which asks for the same target and has to pass the
same CHAP. Nothing that one portal proved or learned counts at another.

Source: RFC 7143 §6.3, §11.12-11.13.
"""

import logging
import secrets
from collections.abc import Sequence

import trio

from iscsifuse.errors import (
    AuthenticationError,
    ConnectError,
    FormatError,
    IscsifuseError,
    LoginError,
    LoginTimeoutError,
    NegotiationError,
    NothingFoundError,
    ProtocolError,
    SessionLostError,
)
from iscsifuse.initiator.settings import Portal, SessionSettings
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.chap import ChallengeMemory
from iscsifuse.iscsi.login import LoginMachine, LoginResult
from iscsifuse.iscsi.parameters import LoginConfig
from iscsifuse.iscsi.pdu import Pdu, decode_stream

__all__ = ["LoggedIn", "log_in", "log_in_somewhere", "login_config", "make_isid", "refuses_us"]

log = logging.getLogger(__name__)

MAX_REDIRECTS = 4
MAX_LOGIN_DATA = 65536
"""Longest data segment in a login response, in bytes: 8192 is the standard's default (RFC 7143 §13.12)."""

_CHUNK = 65536
_INITIATOR_ERROR = 2
"""A status class. Source: RFC 7143 §11.13.5."""
_challenges = ChallengeMemory()
"""CHAP challenges that we have out, in this process: none may come back to us (RFC 7143 §9.2.1)."""
_strangers: set[tuple[str, Portal, int]] = set()
"""Targets, portals and portal groups of which we have said that they don't belong together: once is enough."""


class LoggedIn:
    """What a login leaves behind.

    Attributes:
        transport: the open connection.
        result: what was agreed on.
        received: bytes that came behind the last Login Response.
        portal: where the login ended up, after redirects.
    """

    __slots__ = ("portal", "received", "result", "transport")

    def __init__(self, transport: Transport, result: LoginResult, received: bytes) -> None:
        self.transport = transport
        self.portal = transport.portal
        self.result = result
        self.received = received


def refuses_us(error: IscsifuseError) -> bool:
    """Whether a target refused a login by a status of class 2, so that the same one must not be tried there again."""
    return isinstance(error, LoginError) and error.status is not None and error.status >> 8 == _INITIATOR_ERROR


def make_isid() -> bytes:
    """A fresh ISID of the "random" type: 6 bytes, the qualifier 0. Source: RFC 7143 §11.12.5."""
    return b"\x80" + secrets.token_bytes(3) + bytes(2)


def login_config(settings: SessionSettings, target_name: str | None) -> LoginConfig:
    """What the login offers, for a discovery session where ``target_name`` is None.

    Digests are asked for on the sessions that carry data. Targets commonly have them configured for each target and
    refuse them on discovery sessions, where a name that was damaged on the way would only fail to log in.
    """
    return LoginConfig(
        initiator_name=settings.initiator_name,
        target_name=target_name,
        header_digest=settings.header_digest and target_name is not None,
        data_digest=settings.data_digest and target_name is not None,
        chap=settings.chap,
    )


async def log_in_somewhere(portals: Sequence[Portal], config: LoginConfig, *, isid: bytes, limit: float) -> LoggedIn:
    """The first login that works, portal by portal; ``limit`` is for each of them.

    A portal that is dead, confused or overloaded makes room for the next one. A target that says no is believed, and
    one that can't be authenticated is a reason to stop, not to look for a place where it can.

    Raises:
        IscsifuseError: as `log_in`; of the last portal, where none worked.
    """
    for portal in portals[:-1]:
        try:
            return await log_in(portal, config, isid=isid, limit=limit)
        except IscsifuseError as error:
            if isinstance(error, AuthenticationError | NegotiationError) or refuses_us(error):
                raise
            log.warning("%s; trying the next portal", error)
    return await log_in(portals[-1], config, isid=isid, limit=limit)


async def log_in(portal: Portal, config: LoginConfig, *, isid: bytes, limit: float) -> LoggedIn:
    """Connect to a portal and log in.

    Args:
        portal: where to begin; redirects may lead elsewhere.
        config: what to offer.
        isid: 6 bytes; the same as before re-instates a session.
        limit: seconds for all of it.

    Raises:
        ConnectError: no connection, within the limit too.
        LoginError: the target, or a rule of ours, ended the login; see its subclasses.
        ProtocolError: the target broke the standard.

    Cancellation: closes the socket.
    """
    place = portal
    reached = False
    with trio.move_on_after(limit):
        for _ in range(MAX_REDIRECTS + 1):
            reached = False
            transport = await Transport.connect(place)
            reached = True
            try:
                outcome = await _exchange(transport, config, isid=isid)
            except SessionLostError as error:
                transport.close()
                raise LoginError(f"{place} ended the connection during the login ({error})") from error
            except NothingFoundError:  # names its target by itself
                transport.close()
                raise
            except (LoginError, NegotiationError) as error:
                transport.close()
                raise _placed(error, f"{config.target_name or 'discovery'} at {place}") from error
            except BaseException:
                transport.close()
                raise
            if isinstance(outcome, LoggedIn):
                _check_group(config, outcome)
                return outcome
            transport.close()
            place = outcome
        raise LoginError(f"the target at {portal} redirected the login more than {MAX_REDIRECTS} times")
    if not reached:
        raise ConnectError(f"{place} did not take the connection within {limit:g} seconds")
    raise LoginTimeoutError(
        f"{place} took the connection, but did not answer the login within {limit:g} seconds "
        "(is that an iSCSI portal?)"
    )


def _check_group(config: LoginConfig, login: LoggedIn) -> None:
    """Say so, once, when a portal isn't in the portal group that it was said to be in. Source: RFC 7143 §6.3.1.

    It does no harm to us, who have one connection in a session, but somebody's list is wrong.
    """
    portal, tag = login.portal, login.result.parameters.target_portal_group_tag
    if config.target_name is None or portal.tag is None or tag is None or tag == portal.tag:
        return
    case = (config.target_name, portal, tag)
    if case not in _strangers:
        _strangers.add(case)
        log.warning(
            "%s: the portal %s says it is in portal group %d, but discovery or a redirection said %d",
            config.target_name,
            portal,
            tag,
            portal.tag,
        )


def _placed(error: LoginError | NegotiationError, where: str) -> LoginError | NegotiationError:
    """The same error, saying where it happened: of several targets, any may have refused."""
    sentence = f"{where}: {error}"
    return type(error)(sentence, status=error.status) if isinstance(error, LoginError) else type(error)(sentence)


async def _exchange(transport: Transport, config: LoginConfig, *, isid: bytes) -> LoggedIn | Portal:
    """Play the login machine against an open connection; a Portal means: go there."""
    machine = LoginMachine(
        config,
        isid=isid,
        itt=0,
        cmd_sn=1,
        random=secrets.token_bytes,
        challenges=_challenges,
    )
    received = bytearray()
    chunk = memoryview(bytearray(_CHUNK))
    requests = machine.start()
    while True:
        transport.send([request.encode() for request in requests])
        await transport.flush()
        while (decoded := _first(received, transport.portal)) is None:
            received += await _receive(transport, chunk)
        pdu, length = decoded
        del received[:length]
        requests = machine.receive(pdu)
        if machine.redirect is not None:
            there = machine.redirect
            return Portal(there.host, there.port, there.tag)
        if machine.done:
            return LoggedIn(transport, machine.result, bytes(received))


def _first(received: bytearray, portal: Portal) -> tuple[Pdu, int] | None:
    """The first PDU of what was received, if it is all there."""
    try:
        return decode_stream(received, max_data=MAX_LOGIN_DATA)
    except FormatError as error:
        raise ProtocolError(f"{portal} doesn't speak iSCSI ({error})") from error


async def _receive(transport: Transport, chunk: memoryview) -> memoryview:
    """The next bytes, at least one."""
    while True:
        count = transport.receive_now([chunk])
        if count is None:
            await transport.wait_readable()
        elif count == 0:
            raise SessionLostError("the connection was closed")
        else:
            return chunk[:count]
