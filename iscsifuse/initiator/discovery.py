"""Which targets a portal offers: a discovery session of login, SendTargets=All, logout.

Source: RFC 7143 §4.3, Appendix C.
"""

import logging
from dataclasses import replace

import trio

from iscsifuse.errors import (
    AuthenticationError,
    ConnectError,
    LoginTimeoutError,
    NoChapError,
    ProtocolError,
    SessionLostError,
)
from iscsifuse.initiator.login import LoggedIn, log_in, login_config, make_isid
from iscsifuse.initiator.settings import DiscoveredTarget, Portal, SessionSettings, TargetPortal
from iscsifuse.initiator.transport import Transport
from iscsifuse.iscsi import sendtargets
from iscsifuse.iscsi.connection import Connection
from iscsifuse.iscsi.incoming import Event
from iscsifuse.iscsi.names import printable
from iscsifuse.iscsi.request import LogoutRequest
from iscsifuse.iscsi.response import AsyncMessage, LogoutResponse, NopIn, Reject, TextResponse

__all__ = ["discover"]

log = logging.getLogger(__name__)

_LOGOUT_LIMIT = 3.0


async def discover(portal: Portal, settings: SessionSettings) -> list[DiscoveredTarget]:
    """Ask a portal for its targets.

    Args:
        portal: where to ask.
        settings: how to log in; ``login_timeout`` bounds the login, and the question as well.

    Returns:
        Targets and their portals, in the order in which the portal lists them.

    Raises:
        ConnectError: no connection.
        LoginError: the portal refused; see its subclasses.
        ProtocolError: the answer breaks the standard.
    """
    limit = settings.login_timeout
    login = await _log_in(portal, settings)
    try:
        with trio.move_on_after(limit) as scope:
            talk = _Conversation(login)
            pairs = await _ask(talk)
        if scope.cancelled_caught:
            raise LoginTimeoutError(f"{login.portal} did not answer SendTargets within {limit:g} seconds")
        await _log_out(talk)
    except SessionLostError as error:
        raise ConnectError(f"{login.portal} ended the discovery session: {error}") from error
    finally:
        login.transport.close()
    return _targets(pairs, login.portal)


async def _log_in(portal: Portal, settings: SessionSettings) -> LoggedIn:
    """Log in for discovery: with CHAP where the user gave a secret, and else without.

    Many targets have accounts for their disks and none for discovery, and refuse CHAP there. A list of names is no
    secret, and each target on it still has to pass the user's CHAP before it gets a command. But one that takes part
    in CHAP and does it wrong (it can't prove itself, or reflects our challenge) is asked for nothing any more.
    """
    config = login_config(settings, None)
    try:
        return await log_in(portal, config, isid=make_isid(), limit=settings.login_timeout)
    except AuthenticationError as refused:
        if settings.chap is None or not (refused.status or isinstance(refused, NoChapError)):
            raise
        log.info("%s; asking it for its targets without", refused)
        try:
            plain = replace(config, chap=None)
            return await log_in(portal, plain, isid=make_isid(), limit=settings.login_timeout)
        except AuthenticationError:
            raise refused from None


class _Conversation:
    """A connection that carries one request at a time: all that discovery needs."""

    def __init__(self, login: LoggedIn) -> None:
        result = login.result
        self.transport: Transport = login.transport
        self.connection = Connection(
            result.parameters,
            cmd_sn=result.next_cmd_sn,
            exp_stat_sn=result.exp_stat_sn,
            exp_cmd_sn=result.exp_cmd_sn,
            max_cmd_sn=result.max_cmd_sn,
        )
        self._events: list[Event] = self.connection.feed(login.received)

    async def next_event(self) -> Event:
        """Send what there is to send, and wait for what the target says next."""
        connection, transport = self.connection, self.transport
        while True:
            output, connection.output = connection.output, []
            transport.send(output)
            await transport.flush()
            if self._events:
                return self._events.pop(0)
            # A portal that always has something to say must not talk us past the time limit.
            await trio.lowlevel.checkpoint()
            count = transport.receive_now(connection.buffers())
            if count is None:
                await transport.wait_readable()
            elif count == 0:
                raise SessionLostError("the connection was closed")
            else:
                self._events += connection.received(count)


async def _ask(talk: _Conversation) -> list[tuple[str, str]]:
    """SendTargets=All; the pairs of the answer."""
    exchange = sendtargets.TextExchange([("SendTargets", "All")], itt=talk.connection.new_itt())
    talk.connection.request(exchange.start())
    while not exchange.done:
        event = await talk.next_event()
        if isinstance(event, TextResponse | Reject):
            more = exchange.receive(event)
            if more is not None:
                talk.connection.request(more)
        elif not isinstance(event, NopIn | AsyncMessage):  # what a message wants is done soon: we log out
            raise ProtocolError(f"the target sent a {type(event).__name__} in a discovery session")
    for key, value in exchange.pairs:
        if key == "SendTargets":  # not a key of an answer, but the answer itself: Reject, NotUnderstood, Irrelevant
            said = printable(value, limit=80)
            raise ProtocolError(f"{talk.transport.portal} doesn't tell its targets: it answered SendTargets={said}")
    return exchange.pairs


async def _log_out(talk: _Conversation) -> None:
    """The answer is there: a target that is slow or clumsy about the logout takes nothing away from it."""
    with trio.move_on_after(_LOGOUT_LIMIT):
        try:
            talk.connection.request(LogoutRequest())
            while not isinstance(await talk.next_event(), LogoutResponse):
                pass
        except (ProtocolError, SessionLostError) as error:
            log.info("the logout from %s: %s", talk.transport.portal, error)


def _targets(pairs: list[tuple[str, str]], portal: Portal) -> list[DiscoveredTarget]:
    default = sendtargets.TargetAddress(host=portal.host, port=portal.port, tag=None)
    records, warnings = sendtargets.parse(pairs, default=default)
    for warning in warnings:
        log.warning("%s", warning)
    return [
        DiscoveredTarget(record.name, tuple(_portal(address) for address in record.addresses)) for record in records
    ]


def _portal(address: sendtargets.TargetAddress) -> TargetPortal:
    """A portal as it was listed; where its group wasn't told, it is shown as group 1, and expected in any."""
    portal = Portal(address.host, address.port, address.tag)
    return TargetPortal(portal, 1 if address.tag is None else address.tag)
