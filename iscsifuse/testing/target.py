"""The loopback target: portals, connections, sessions, and how to run them.

One task serves one connection: it logs in, becomes a session, and ends with it. A failure of a connection stays its
own. A new session with the initiator name, ISID and target name of an old one replaces it (reinstatement): the old
connection is dropped and its tasks end unexecuted, before the login is answered.

Three ways to run it::

    async with LoopbackTarget(config).serve() as target: ...     # in a trio program, in its own nursery
    await nursery.start(target.run)                              # in a nursery of yours
    with target.in_thread(): ...                                 # beside a program that isn't trio's

In memory, without any socket: :meth:`LoopbackTarget.connect` gives the initiator's end of a new connection.

Source: RFC 7143 §6.3.5 (reinstatement), Appendix C (SendTargets).
"""

import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TypeVar

import trio
import trio.testing

from iscsifuse.iscsi import text
from iscsifuse.testing.config import LoginAttention, TargetConfig, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.login import LoginPhase
from iscsifuse.testing.script import Channel, Script
from iscsifuse.testing.scsi_engine import LedgerEntry, ScsiEngine
from iscsifuse.testing.session import Session, SessionIdentity
from iscsifuse.testing.validator import Validator
from iscsifuse.testing.wire import Wire, WireClosedError

__all__ = ["LoopbackTarget"]

_POWER_ON = (0x29, 0x00)
_NEXUS_LOSS = (0x29, 0x07)

T = TypeVar("T")


class LoopbackTarget:
    """A target on this machine.

    Args:
        config: what to serve, and how.

    Attributes:
        config: likewise.
        violations: what the initiators did that RFC 7143 doesn't allow, one sentence each.
        sessions: those in the full feature phase.
        logins: how many sessions have begun, discovery included.
    """

    def __init__(self, config: TargetConfig) -> None:
        self.config = config
        self.violations: list[str] = []
        self.sessions: list[Session] = []
        self.logins = 0
        self._engines = {
            node.name: ScsiEngine.of(node.disks, record=config.record, hash_data=config.hash_data)
            for node in config.nodes
        }
        self._portals: list[tuple[str, int]] = []
        self._known_nexuses: set[object] = set()
        self._redirected: Counter[str] = Counter()
        self._tsih = 0
        self._wires: set[Wire] = set()
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None

    # -- running ---------------------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and serve until cancelled. Started as soon as every portal listens.

        Raises:
            OSError: a portal's address can't be listened on.
        """
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            port = self.config.port
            for host in self.config.hosts:
                listeners = await trio.open_tcp_listeners(port, host=host)
                # All portals have the port that the first one found free.
                port = listeners[0].socket.getsockname()[1]
                self._portals.append((host, port))
                nursery.start_soon(
                    partial(trio.serve_listeners, self._serve_stream, listeners, handler_nursery=nursery)
                )
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None
                for wire in list(self._wires):
                    wire.close()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator["LoopbackTarget"]:
        """Serve while the block runs."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.run)
            yield self
            nursery.cancel_scope.cancel()

    @contextlib.contextmanager
    def in_thread(self) -> Iterator["LoopbackTarget"]:
        """Serve from a thread of its own while the block runs. Change things through :meth:`call`.

        Raises:
            OSError: a portal's address can't be listened on.
        """
        ready = threading.Event()
        failures: list[BaseException] = []
        scope = trio.CancelScope()

        async def main() -> None:
            with scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.run)
                    ready.set()

        def thread() -> None:
            try:
                trio.run(main)
            except BaseException as error:
                failures.append(error)
            finally:
                ready.set()

        worker = threading.Thread(target=thread, name="loopback target", daemon=True)
        worker.start()
        ready.wait()
        try:
            if not failures:
                yield self
        finally:
            if worker.is_alive():
                self.call(scope.cancel)
            worker.join()
        if failures:
            raise failures[0]

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the target's own thread, and return what it returns. For :meth:`in_thread`.

        Raises:
            RuntimeError: the target doesn't run.
        """
        if self._token is None:
            raise RuntimeError("the target doesn't run")
        return trio.from_thread.run_sync(function, trio_token=self._token)

    def connect(self) -> trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]:
        """The initiator's end of a new connection in memory. The target has to be running.

        Raises:
            RuntimeError: it isn't.
        """
        if self._nursery is None:
            raise RuntimeError("the target doesn't run")
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._serve_stream, ours)
        return theirs

    # -- where it is -----------------------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        """Address of the first portal."""
        return self._portals[0][0]

    @property
    def port(self) -> int:
        """TCP port of the portals."""
        return self._portals[0][1]

    @property
    def portal(self) -> str:
        """The first portal: ``127.0.0.1:40123``, ``[::1]:40123``."""
        return _address(*self._portals[0])

    def url(self, *, target: str | None = None, lun: int | None = None) -> str:
        """The URL of the portal, of a target, or of a LUN (of the first target, if only a LUN is told)."""
        if target is None and lun is not None:
            target = self.config.nodes[0].name
        return "/".join(
            [f"iscsi://{self.portal}", *([target] if target else []), *([str(lun)] if lun is not None else [])]
        )

    # -- what is in it ---------------------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """How many connections are open, those that are logging in included."""
        return len(self._wires)

    @property
    def script(self) -> Script:
        """The faults."""
        return self.config.script

    def engine(self, target: str | None = None) -> ScsiEngine:
        """The disks of a target, of the first one if none is named."""
        return self._engines[target or self.config.nodes[0].name]

    def disk(self, lun: int = 0, *, target: str | None = None) -> Disk:
        """One disk."""
        return self.engine(target).disks[lun]

    @property
    def ledger(self) -> list[LedgerEntry]:
        """What was executed on the first target."""
        return self.engine().ledger

    # -- what can happen to it -------------------------------------------------------------------------------------

    def drop_connections(self, *, reset: bool = True) -> int:
        """End all connections at once.

        Returns:
            How many there were.
        """
        wires = list(self._wires)
        for wire in wires:
            wire.close(reset=reset)
        return len(wires)

    def power_cut(self) -> int:
        """Lose all connections, and what no disk has made stable; it is running again at once.

        Returns:
            How many blocks were lost.
        """
        self.drop_connections()
        self._known_nexuses.clear()
        return sum(disk.power_cut() for engine in self._engines.values() for disk in engine.disks.values())

    def set_window(self, window: int) -> None:
        """Another command window, for sessions that are there and to come; they are told at once."""
        self.config.window = window
        for session in self.sessions:
            session.numbers.window = window
            session.announce()

    def asynchronous(self, event: int, *, parameter1: int = 0, parameter2: int = 0, parameter3: int = 0) -> None:
        """Send an Asynchronous Message to every session. Source: RFC 7143 §11.9."""
        for session in self.sessions:
            session.asynchronous(event, parameter1=parameter1, parameter2=parameter2, parameter3=parameter3)

    def ping(self) -> None:
        """Send a ping to every session."""
        for session in self.sessions:
            session.ping()

    # -- serving ---------------------------------------------------------------------------------------------------

    async def _serve_stream(self, stream: trio.abc.Stream) -> None:
        """One connection, from its first byte to its last."""
        if isinstance(stream, trio.SocketStream):
            stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
        validator = Validator(self.violations)
        wire = Wire(stream, channel=Channel(self.config.script), validator=validator)
        self._wires.add(wire)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wire.run_writer)
                with contextlib.suppress(WireClosedError):
                    await self._serve_wire(wire)
                nursery.cancel_scope.cancel()
        finally:
            wire.close()
            self._wires.discard(wire)

    async def _serve_wire(self, wire: Wire) -> None:
        phase = LoginPhase(wire, config=self.config, new_tsih=self._new_tsih, redirected=self._redirected)
        result = await phase.run()
        node = result.node
        engine = None if node is None else self._engines[node.name]
        if engine is not None:
            self._replace_old(result.identity)
            wire.validator.know(lengths=lambda lun, cdb: engine.lengths(lun=lun, cdb=cdb))
            engine.login(result.identity.nexus, attention=self._attention(result.identity))
        session = Session(
            wire,
            config=self.config,
            identity=result.identity,
            agreed=result.agreed,
            engine=engine,
            cmd_sn=result.cmd_sn,
            stat_sn=result.stat_sn,
            listing=partial(self._listing, node=node),
        )
        wire.validator.full_feature(result.agreed)
        wire.send(result.final)
        # From the next PDU on, both ways.
        wire.header_digest, wire.data_digest = result.agreed.header_digest, result.agreed.data_digest
        self.logins += 1
        self.sessions.append(session)
        try:
            await session.run()
        finally:
            self.sessions.remove(session)
            if engine is not None and not any(
                other.identity.nexus == result.identity.nexus for other in self.sessions
            ):
                engine.logout(result.identity.nexus)

    def _replace_old(self, identity: SessionIdentity) -> None:
        """Session reinstatement. Source: RFC 7143 §6.3.5."""
        for session in self.sessions:
            if session.identity.nexus == identity.nexus:
                session.end()

    def _attention(self, identity: SessionIdentity) -> tuple[int, int] | None:
        known = identity.nexus in self._known_nexuses
        self._known_nexuses.add(identity.nexus)
        match self.config.login_attention:
            case LoginAttention.NONE:
                return None
            case LoginAttention.POWER_ON:
                return _POWER_ON
            case LoginAttention.STANDARD:
                return _NEXUS_LOSS if known else _POWER_ON

    def _new_tsih(self) -> int:
        self._tsih = self._tsih % 0xFFFF + 1
        return self._tsih

    def _listing(self, value: str, *, node: TargetNode | None) -> bytes | None:
        """The answer to SendTargets. Source: RFC 7143 Appendix C."""
        if node is None:
            nodes = [other for other in self.config.nodes if value in ("All", other.name)]
        elif value in ("", node.name):
            nodes = [node]
        else:
            return None
        pairs = []
        for found in nodes:
            pairs.append(("TargetName", found.name))
            addresses = found.addresses
            if addresses is None:
                addresses = tuple(f"{_address(*portal)},{found.tag}" for portal in self._portals)
            pairs += [("TargetAddress", address) for address in addresses]
        return text.encode(pairs)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
