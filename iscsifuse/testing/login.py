"""The login phase, as a target.

::

    first request ── names? ── redirected? ──┬─ CSG 0: security ──T──┬─ CSG 1: operational ──T──> full feature phase
                                             └───────────────────────┘        (or from CSG 0 at once)

Text that comes with C=1 is answered with an empty response until it is whole. What this target has to say goes out in
one response, unless it is told to be long-winded (``login_chunk``, ``login_keys``). A request that is refused gets a
response with a status, and the connection ends. What was agreed takes effect after the last response, which this
module makes and its caller sends: between the two the caller replaces the session that this one reinstates.

Source: RFC 7143 §6.3 (login), §11.12, §11.13 (fields and statuses), §12 (security keys).
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from iscsifuse.errors import FormatError
from iscsifuse.iscsi import serial, text
from iscsifuse.iscsi.request import LoginRequest, Stage
from iscsifuse.iscsi.response import LoginResponse
from iscsifuse.iscsi.text import Pair
from iscsifuse.testing.chap_target import ChapRefusedError, ChapTarget
from iscsifuse.testing.config import ChapPolicy, TargetConfig, TargetNode
from iscsifuse.testing.keys import Agreed, OperationalKeys
from iscsifuse.testing.session import SessionIdentity
from iscsifuse.testing.wire import Wire, WireClosedError

__all__ = ["LoggedIn", "LoginPhase"]

_INITIATOR_ERROR = 0x0200
_AUTHENTICATION_FAILURE = 0x0201
_NOT_FOUND = 0x0203
_UNSUPPORTED_VERSION = 0x0205
_TOO_MANY_CONNECTIONS = 0x0206
_MISSING_PARAMETER = 0x0207
_SESSION_TYPE_NOT_SUPPORTED = 0x0209
_INVALID_REQUEST = 0x020B
_MOVED_TEMPORARILY = 0x0101
_MOVED_PERMANENTLY = 0x0102

# Keys that say who is there, or that are read elsewhere than in the negotiation.
_NAMES = frozenset({"InitiatorName", "InitiatorAlias", "TargetName", "SessionType"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedIn:
    """A login that succeeded.

    Attributes:
        identity: who it is.
        agreed: what was negotiated.
        node: the target, or None in a discovery session.
        cmd_sn: CmdSN of the first command.
        stat_sn: StatSN of the first response after the login.
        final: the last response, which has to be sent.
    """

    identity: SessionIdentity
    agreed: Agreed
    node: TargetNode | None
    cmd_sn: int
    stat_sn: int
    final: LoginResponse


class LoginPhase:
    """One login.

    Args:
        wire: its connection.
        config: how to behave.
        new_tsih: gives the handle of a new session.
        redirected: how often each target has redirected a login; counted here.
    """

    def __init__(
        self, wire: Wire, *, config: TargetConfig, new_tsih: Callable[[], int], redirected: Counter[str]
    ) -> None:
        self._wire = wire
        self._config = config
        self._new_tsih = new_tsih
        self._redirected = redirected
        self._stat_sn = config.initial_stat_sn
        self._assembler = text.Assembler()
        self._initiator_name = ""
        self._node: TargetNode | None = None
        self._discovery = False
        self._policy: ChapPolicy | None = None
        self._chap: ChapTarget | None = None
        self._method = ""
        self._keys: OperationalKeys | None = None
        # What is still to be told: pieces of text, and whether the text goes on after each.
        self._unsaid: deque[tuple[bytes, bool]] = deque()

    async def run(self) -> LoggedIn:
        """Carry the login through.

        Raises:
            WireClosedError: the login was refused (and said so), or the connection ended.
        """
        while True:
            pdu = (await self._wire.receive()).pdu
            if not isinstance(pdu, LoginRequest):
                raise WireClosedError(f"{pdu.OPCODE.name} during the login")
            try:
                pairs = self._assembler.add(pdu.data, cont=pdu.cont)
                if pairs is None:
                    self._wire.send(self._response(pdu))
                    continue
                done = await self._act(pdu, pairs)
            except FormatError as error:
                self._wire.validator.note(f"login: {error}")
                await self._refuse(pdu, _INITIATOR_ERROR)
            if done is not None:
                return done

    async def _act(self, pdu: LoginRequest, pairs: list[Pair]) -> LoggedIn | None:
        """One whole text: answer it, and tell whether that ends the login."""
        answers: list[Pair] = []
        keys = self._keys
        if keys is None:
            keys = self._keys = await self._begin(pdu, dict(pairs))
            if self._node is not None:
                answers.append(("TargetPortalGroupTag", str(self._node.tag)))
        rest = [(key, value) for key, value in pairs if key not in _NAMES]
        transit = pdu.transit
        if pdu.csg == Stage.SECURITY_NEGOTIATION:
            answers += await self._security(pdu, dict(rest))
            transit = transit and self._authenticated
        else:
            if not self._authenticated:
                await self._refuse(pdu, _AUTHENTICATION_FAILURE)
            # What this target proposes has to be answered before the stage can end.
            proposes = bool(self._config.keys.extra) and not keys.seen
            answers += keys.answer(rest)
            transit = transit and not proposes
        redirect = self._node.redirect if self._node is not None else None
        if redirect is not None and redirect.after_chap and self._authenticated:
            await self._redirect(pdu)
        self._unsaid.extend(self._pieces(answers))
        data, cont = self._unsaid.popleft() if self._unsaid else (b"", False)
        transit = transit and not cont and not self._unsaid
        if not (transit and pdu.nsg == Stage.FULL_FEATURE_PHASE):
            self._wire.send(self._response(pdu, data, cont=cont, transit=transit))
            return None
        identity = SessionIdentity(
            initiator_name=self._initiator_name,
            isid=pdu.isid,
            target_name=self._node.name if self._node else "",
            tsih=self._new_tsih(),
            cid=pdu.cid,
        )
        final = self._response(pdu, data, transit=True, tsih=identity.tsih)
        return LoggedIn(
            identity=identity,
            agreed=keys.finish(),
            node=self._node,
            cmd_sn=pdu.cmd_sn,
            stat_sn=self._stat_sn,
            final=final,
        )

    # -- who is there ----------------------------------------------------------------------------------------------

    async def _begin(self, pdu: LoginRequest, pairs: dict[str, str]) -> OperationalKeys:
        """The first request: names, session type, redirection."""
        if pdu.version_min > 0:
            await self._refuse(pdu, _UNSUPPORTED_VERSION)
        if pdu.tsih:
            # Only one connection in a session, and no recovery of one.
            await self._refuse(pdu, _TOO_MANY_CONNECTIONS)
        session_type = pairs.get("SessionType", "Normal")
        if session_type not in ("Normal", "Discovery"):
            await self._refuse(pdu, _SESSION_TYPE_NOT_SUPPORTED)
        self._discovery = session_type == "Discovery"
        if "InitiatorName" not in pairs or not (self._discovery or "TargetName" in pairs):
            self._wire.validator.note("login: a name is missing in the first request")
            await self._refuse(pdu, _MISSING_PARAMETER)
        self._initiator_name = pairs["InitiatorName"]
        self._policy = self._config.chap
        if not self._discovery:
            name = pairs["TargetName"]
            self._node = next((node for node in self._config.nodes if node.name == name), None)
            if self._node is None:
                await self._refuse(pdu, _NOT_FOUND)
            self._policy = self._node.chap or self._policy
            if self._node.redirect is not None and not self._node.redirect.after_chap:
                await self._redirect(pdu)
        return OperationalKeys(self._config.keys, discovery=self._discovery)

    async def _redirect(self, pdu: LoginRequest) -> None:
        """Send the initiator elsewhere, unless that was done often enough."""
        node = self._node
        if node is None or node.redirect is None:
            return
        redirect = node.redirect
        if redirect.times and self._redirected[node.name] >= redirect.times:
            return
        self._redirected[node.name] += 1
        status = _MOVED_PERMANENTLY if redirect.permanent else _MOVED_TEMPORARILY
        await self._refuse(pdu, status, [("TargetAddress", redirect.address)])

    # -- security --------------------------------------------------------------------------------------------------

    @property
    def _authenticated(self) -> bool:
        if self._policy is None:
            return True
        if self._method == "None":
            return not self._policy.required
        return self._chap is not None and self._chap.done if self._method else not self._policy.required

    async def _security(self, pdu: LoginRequest, pairs: dict[str, str]) -> list[Pair]:
        if "AuthMethod" in pairs and not self._method:
            return await self._choose_method(pdu, pairs["AuthMethod"].split(","))
        if self._chap is not None and any(key.startswith("CHAP_") for key in pairs):
            try:
                return self._chap.receive(pairs)
            except ChapRefusedError:
                await self._refuse(pdu, _AUTHENTICATION_FAILURE)
        return [(key, "NotUnderstood") for key in pairs]

    async def _choose_method(self, pdu: LoginRequest, offered: list[str]) -> list[Pair]:
        policy = self._policy
        if policy is not None and "CHAP" in offered:
            self._method, self._chap = "CHAP", ChapTarget(policy)
        elif "None" in offered and (policy is None or not policy.required):
            self._method = "None"
        else:
            await self._refuse(pdu, _AUTHENTICATION_FAILURE)
        return [("AuthMethod", self._method)]

    # -- answering -------------------------------------------------------------------------------------------------

    def _pieces(self, answers: list[Pair]) -> list[tuple[bytes, bool]]:
        """The answers as they travel: all at once, a few keys at a time, or cut into segments that end with C=1."""
        # The keys of one step of CHAP belong together.
        at_once = self._config.login_keys if not any(key.startswith("CHAP_") for key, _ in answers) else 0
        step = at_once or max(1, len(answers))
        pieces = []
        for start in range(0, len(answers), step):
            cut = text.split(text.encode(answers[start : start + step]), self._config.login_chunk)
            pieces += [(piece, True) for piece in cut[:-1]] + [(cut[-1], False)]
        return pieces

    def _response(
        self,
        pdu: LoginRequest,
        data: bytes = b"",
        *,
        cont: bool = False,
        transit: bool = False,
        tsih: int = 0,
        status: int = 0,
    ) -> LoginResponse:
        response = LoginResponse(
            itt=pdu.itt,
            transit=transit,
            cont=cont,
            csg=pdu.csg,
            nsg=pdu.nsg if transit else 0,
            isid=pdu.isid,
            tsih=tsih or pdu.tsih,
            stat_sn=self._stat_sn,
            exp_cmd_sn=pdu.cmd_sn,
            max_cmd_sn=serial.add(pdu.cmd_sn, self._config.window - 1),
            status_class=status >> 8,
            status_detail=status & 0xFF,
            data=data,
        )
        self._stat_sn = serial.add(self._stat_sn, 1)
        return response

    async def _refuse(self, pdu: LoginRequest, status: int, answers: list[Pair] | None = None) -> NoReturn:
        """Send a response with this status, and end the connection."""
        self._wire.send(self._response(pdu, text.encode(answers or []), status=status))
        await self._wire.drain()
        self._wire.close()
        raise WireClosedError(f"login refused with status {status:#06x}")
