"""Connect and log in: the trio side of the login phase.

One attempt: connect, play the `LoginMachine` against the stream until it is done, follow a few redirects. Everything
in one time limit; whatever goes wrong is one exception, and the socket is closed.

Source: RFC 7143 §6.3, §11.12-11.13.
"""

import secrets

import trio

from iscsifuse.errors import (
    ConnectError,
    FormatError,
    LoginError,
    LoginTimeoutError,
    NegotiationError,
    NothingFoundError,
    ProtocolError,
    SessionLostError,
)
from iscsifuse.initiator.settings import DEFAULT_PORT, Portal, SessionSettings
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi.chap import ChallengeMemory
from iscsifuse.iscsi.login import LoginMachine, LoginResult
from iscsifuse.iscsi.parameters import LoginConfig
from iscsifuse.iscsi.pdu import Pdu, decode_stream

__all__ = ["LoggedIn", "log_in", "login_config", "make_isid"]

MAX_REDIRECTS = 4
MAX_LOGIN_DATA = 65536
"""Longest data segment in a login response, in bytes: 8192 is the standard's default (RFC 7143 §13.12)."""

_CHUNK = 65536
_challenges = ChallengeMemory()
"""CHAP challenges that we have out, in this process: none may come back to us (RFC 7143 §9.2.1)."""


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
            return Portal(there.host, there.port or DEFAULT_PORT)
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
