"""The login phase of one connection: Login Requests out, Login Responses in, until full feature phase or an error.

The stages, and who moves between them (RFC 7143 §6.3)::

             we: AuthMethod=None, T=1 ──────────────────────────┐
    SECURITY_METHOD                                             ▼ target: T=1
             we: AuthMethod=CHAP, T=0 ──► CHAP ──► SECURITY_DONE ──► OPERATIONAL ──► FULL_FEATURE
                                 CHAP_A, T=0 │         ▲ T=1         offers, T=1   ▲ target: T=1
                                   CHAP_N/R, │ T=1     │                           │
                                             └─────────┘ (mutual: the target's proof was right)

    any state ── status class 1 ──► REDIRECTED        any state ── an exception ──► FAILED

How it thinks:

- The phase is in lock step: exactly one request is unanswered at any time. `receive` therefore gives one request,
  or none when the phase is over.
- Only the target makes the stage change, by T=1, and only when we asked for it by T=1 and agree on the next stage.
  We ask as soon as we have nothing left to say; when the target still has (T=0), we answer what it proposed and
  ask again.
- C=1 means that a text goes on. While the *target's* does, we send empty requests with T=0. While *ours* does (a
  target that takes tiny segments only), the target has to send empty responses.
- A status class other than 0 is looked at before anything else; no other field of such a response is trusted.
- CHAP is offered alone when it was asked for. There is then no answer of the target's that gets us to full feature
  phase without it.
- ITT, ISID, TSIH, CID, CmdSN and the version stay as they were in the first request.
- Bounds: `MAX_EXCHANGES` responses, `text.LOGIN_TEXT_LIMIT` bytes of text. Time is for the caller to bound.

Source: RFC 7143 §6.3, §11.12, §11.13.
"""

from collections import deque
from collections.abc import Callable, MutableSet
from dataclasses import dataclass
from enum import Enum
from typing import Final

from iscsifuse.errors import (
    AuthenticationError,
    FormatError,
    IscsifuseError,
    LoginError,
    NegotiationError,
    NoChapError,
    NothingFoundError,
    ProtocolError,
)
from iscsifuse.iscsi import serial, text
from iscsifuse.iscsi.chap import CHAP_KEYS, ChapAlgorithm, ChapInitiator
from iscsifuse.iscsi.names import printable
from iscsifuse.iscsi.negotiation import Negotiation
from iscsifuse.iscsi.parameters import LoginConfig, NegotiatedParameters
from iscsifuse.iscsi.pdu import Pdu
from iscsifuse.iscsi.request import LoginRequest, Stage
from iscsifuse.iscsi.response import LoginResponse
from iscsifuse.iscsi.sendtargets import TargetAddress, parse_address

__all__ = ["MAX_EXCHANGES", "STATUS_WORDS", "LoginMachine", "LoginResult", "LoginState", "Redirect"]

MAX_EXCHANGES: Final = 256
"""Responses in one login. Two to four are usual; one key in each PDU makes about twenty."""
_VERSION: Final = 0
_AUTH_METHOD: Final = "AuthMethod"
_AUTH_KEYS: Final = CHAP_KEYS | {_AUTH_METHOD}

_INITIATOR_ERROR: Final = 0x0200
_AUTHENTICATION_FAILURE: Final = 0x0201
_AUTHORIZATION_FAILURE: Final = 0x0202
_NOT_FOUND: Final = 0x0203
_MOVED_TEMPORARILY: Final = 0x0101
_MOVED_PERMANENTLY: Final = 0x0102

STATUS_WORDS: Final = {
    0x0000: "success",
    _MOVED_TEMPORARILY: "the target has moved temporarily",
    _MOVED_PERMANENTLY: "the target has moved permanently",
    _INITIATOR_ERROR: "the target calls our login wrong, without saying why",
    _AUTHENTICATION_FAILURE: "authentication failed",
    _AUTHORIZATION_FAILURE: "this initiator is not allowed to use the target",
    _NOT_FOUND: "there is no such target",
    0x0204: "the target has been removed, and no other address is known",
    0x0205: "the target speaks another version of iSCSI",
    0x0206: "the target has too many connections in this session",
    0x0207: "the target misses a parameter in our login",
    0x0208: "the target can't include this connection in the session",
    0x0209: "the target doesn't do sessions of this type",
    0x020A: "the target knows of no such session",
    0x020B: "the target calls our login invalid",
    0x0300: "the target has an error of its own",
    0x0301: "the target's service is unavailable now",
    0x0302: "the target is out of resources",
}
"""Status-Class and Status-Detail in words. Source: RFC 7143 §11.13.5."""

_CLASS_WORDS: Final = {
    1: "the target redirects us",
    2: "the target calls our login wrong",
    3: "the target can't take a login now",
}


class LoginState(Enum):
    """Where the login phase is; see the head of this file."""

    START = "not begun"
    SECURITY_METHOD = "the method of authentication was offered"
    CHAP = "CHAP is under way"
    SECURITY_DONE = "nothing is left to say about security"
    OPERATIONAL = "the operational keys were offered"
    FULL_FEATURE = "logged in"
    REDIRECTED = "sent to another portal"
    FAILED = "failed"


_OVER: Final = frozenset({LoginState.START, LoginState.FULL_FEATURE, LoginState.REDIRECTED, LoginState.FAILED})
"""States in which nothing is awaited from the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """Where the target sent us.

    Attributes:
        host: a host name, or an address without brackets.
        port: TCP port.
        tag: target portal group tag, or None.
        permanent: status 0102; a temporary one is to be forgotten with the session.
    """

    host: str
    port: int
    tag: int | None
    permanent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginResult:
    """What the full feature phase begins with.

    Attributes:
        parameters: what was agreed on.
        tsih: the session's handle, given by the target.
        next_cmd_sn: CmdSN of the first command: the login's own, as it was immediate.
        exp_stat_sn: the StatSN that comes next.
        exp_cmd_sn: of the last response, unchecked.
        max_cmd_sn: of the last response, unchecked.
    """

    parameters: NegotiatedParameters
    tsih: int
    next_cmd_sn: int
    exp_stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int


class LoginMachine:
    """The initiator's half of the login phase of one connection.

    Args:
        config: what to ask for.
        isid: 6 bytes.
        cid: connection ID.
        tsih: 0 for a new session.
        itt: Initiator Task Tag of all the requests.
        cmd_sn: CmdSN of all the requests.
        random: gives that many unpredictable bytes, such as ``secrets.token_bytes``.
        challenges: all CHAP challenges sent by this process, shared between all logins (see `chap.ChallengeMemory`).

    Attributes:
        state: where it is.
        redirect: where to go instead, once `state` is ``REDIRECTED``.

    Source: RFC 7143 §6.3.
    """

    def __init__(
        self,
        config: LoginConfig,
        *,
        isid: bytes,
        cid: int = 0,
        tsih: int = 0,
        itt: int,
        cmd_sn: int,
        random: Callable[[int], bytes],
        challenges: MutableSet[bytes],
    ) -> None:
        self.state = LoginState.START
        self.redirect: Redirect | None = None
        self._config = config
        self._isid = isid
        self._cid = cid
        self._tsih = tsih
        self._itt = itt
        self._cmd_sn = cmd_sn
        self._stage = Stage.SECURITY_NEGOTIATION
        self._exp_stat_sn: int | None = None
        self._negotiation = Negotiation(config)
        self._chap = None if config.chap is None else ChapInitiator(config.chap, random=random, challenges=challenges)
        self._assembler = text.Assembler(text.LOGIN_TEXT_LIMIT)
        self._exchanges = 0
        # What is left of a text of ours that takes several PDUs, and whether its last PDU asks for the next stage.
        self._pieces: deque[bytes] = deque()
        self._ask = False
        self._last = LoginRequest()
        self._method_answered = False
        self._result: LoginResult | None = None

    @property
    def done(self) -> bool:
        """Whether full feature phase has begun."""
        return self.state is LoginState.FULL_FEATURE

    @property
    def result(self) -> LoginResult:
        """What was agreed on.

        Raises:
            RuntimeError: the login isn't `done`.
        """
        if self._result is None:
            raise RuntimeError(f"no result of a login that is in state {self.state.name}")
        return self._result

    def start(self) -> list[LoginRequest]:
        """The request to send first. Source: RFC 7143 §6.3: names come in the first PDU."""
        self.state = LoginState.SECURITY_METHOD
        method = "None" if self._chap is None else "CHAP"
        pairs = [*self._negotiation.identity(), (_AUTH_METHOD, method)]
        return self._say(pairs, ask=self._chap is None)

    def receive(self, pdu: Pdu) -> list[LoginRequest]:
        """Take what the target sent.

        Args:
            pdu: should be a Login Response.

        Returns:
            The request to send next; nothing when the phase is over: look at `done` and `redirect`.

        Raises:
            AuthenticationError: CHAP failed, or the target wants another kind of authentication than we do.
            NothingFoundError: there is no such target.
            LoginError: the target refused the login; ``status`` says how. Class 3 (0x03..) may be tried again.
            ProtocolError: the target broke the rules, or negotiated something that was not offered. The connection
                must be closed.
        """
        if self.state in _OVER:
            raise ProtocolError(f"a {type(pdu).__name__} for a login in state {self.state.name}")
        try:
            return self._receive(pdu)
        except IscsifuseError:
            self.state = LoginState.FAILED
            raise

    def _receive(self, pdu: Pdu) -> list[LoginRequest]:
        if not isinstance(pdu, LoginResponse):
            raise ProtocolError(f"the target sent a {type(pdu).__name__} in the login phase")
        if pdu.status_class != 0:
            self._refused(pdu)
            return []
        self._check(pdu)
        if self._last.cont:
            return self._continue(pdu)
        pairs = self._assembler.add(pdu.data, cont=pdu.cont)
        if pairs is None:
            return self._say([], ask=False)
        answers, ask = self._take(pairs)
        if not pdu.transit:
            return self._say(answers, ask=ask)
        if self._stage == Stage.SECURITY_NEGOTIATION:
            self._stage = Stage.LOGIN_OPERATIONAL_NEGOTIATION
            self.state = LoginState.OPERATIONAL
            return self._say([*answers, *self._negotiation.offers()], ask=True)
        # Answers that are due now can't be given any more: the target went on without them, so nothing changes.
        self._finish(pdu)
        return []

    # -- requests

    def _say(self, pairs: list[text.Pair], *, ask: bool) -> list[LoginRequest]:
        """Begin a text; ``ask`` for the next stage at its end."""
        self._pieces.extend(text.split(text.encode(pairs), self._negotiation.send_limit))
        self._ask = ask
        return [self._request()]

    def _request(self) -> LoginRequest:
        """The next piece of our text. Source: RFC 7143 §11.12."""
        data = self._pieces.popleft()
        cont = bool(self._pieces)
        transit = self._ask and not cont
        security = self._stage == Stage.SECURITY_NEGOTIATION
        asked = Stage.LOGIN_OPERATIONAL_NEGOTIATION if security else Stage.FULL_FEATURE_PHASE
        self._last = LoginRequest(
            transit=transit,
            cont=cont,
            csg=self._stage,
            nsg=asked if transit else Stage.SECURITY_NEGOTIATION,
            version_max=_VERSION,
            version_min=_VERSION,
            isid=self._isid,
            tsih=self._tsih,
            itt=self._itt,
            cid=self._cid,
            cmd_sn=self._cmd_sn,
            exp_stat_sn=self._exp_stat_sn or 0,
            data=data,
        )
        return self._last

    def _continue(self, pdu: LoginResponse) -> list[LoginRequest]:
        """The target's empty response in the middle of a text of ours. Source: RFC 7143 §6.2."""
        if pdu.data or pdu.cont:
            raise ProtocolError("the target answered before our text was complete")
        return [self._request()]

    # -- responses

    def _check(self, pdu: LoginResponse) -> None:
        """Everything that a response has to have, whatever its text is. Source: RFC 7143 §11.13."""
        self._exchanges += 1
        if self._exchanges > MAX_EXCHANGES:
            raise ProtocolError(f"the target lets the login go on for more than {MAX_EXCHANGES} exchanges")
        if pdu.itt != self._itt:
            raise ProtocolError(f"a Login Response with ITT {pdu.itt:#x} instead of {self._itt:#x}")
        if pdu.isid != self._isid:
            raise ProtocolError(f"a Login Response with ISID {pdu.isid.hex()} instead of {self._isid.hex()}")
        if pdu.version_active != _VERSION:
            raise ProtocolError(
                f"the target chose version {pdu.version_active:#04x} of the protocol, which was not offered"
            )
        if pdu.csg != self._stage:
            raise ProtocolError(f"a Login Response of stage {pdu.csg} in stage {int(self._stage)}")
        if pdu.transit:
            if pdu.cont:
                raise ProtocolError("a Login Response that changes the stage and says that its text goes on")
            if not self._last.transit:
                raise ProtocolError("the target changes the stage, which was not asked for")
            if pdu.nsg != self._last.nsg:
                raise ProtocolError(f"the target changes to stage {pdu.nsg}, but {int(self._last.nsg)} was asked for")
        if self._exp_stat_sn is not None and pdu.stat_sn != self._exp_stat_sn:
            raise ProtocolError(f"a Login Response with StatSN {pdu.stat_sn} instead of {self._exp_stat_sn}")
        self._exp_stat_sn = serial.add(pdu.stat_sn, 1)

    def _refused(self, pdu: LoginResponse) -> None:
        """A status class that isn't success. Source: RFC 7143 §11.13.5."""
        status = pdu.status_class << 8 | pdu.status_detail
        if status in (_MOVED_TEMPORARILY, _MOVED_PERMANENTLY):
            address = _redirection(pdu, status)
            self.redirect = Redirect(
                host=address.host, port=address.port, tag=address.tag, permanent=status == _MOVED_PERMANENTLY
            )
            self.state = LoginState.REDIRECTED
            return
        words = STATUS_WORDS.get(status) or _CLASS_WORDS.get(
            pdu.status_class, "the target refused in a way of its own"
        )
        kind: type[LoginError] = LoginError
        if status == _AUTHENTICATION_FAILURE or (status == _INITIATOR_ERROR and self._proof_refused):
            kind = AuthenticationError
            words = self._authentication_words()
        elif status == _AUTHORIZATION_FAILURE:
            words += f" with the name {printable(self._config.initiator_name, limit=223)}"
            if self._chap is None:
                words += "; either allow that name at the target, or, if the target asks for CHAP, give --chap-user"
        elif status == _NOT_FOUND:
            kind = NothingFoundError
            words = f"target {self._whom()} not found at this portal"
        raise kind(f"{words} (status {status:04x})", status=status)

    @property
    def _proof_refused(self) -> bool:
        """Whether this is the answer to our CHAP_R: some targets call a wrong secret an initiator error (0200)."""
        return self._chap is not None and self._chap.answered and self._stage == Stage.SECURITY_NEGOTIATION

    def _authentication_words(self) -> str:
        if self._chap is None:
            return "the target asks for CHAP; give --chap-user and a secret"
        if not self._chap.answered:
            return "the target refused CHAP before it asked for our secret; it may have no CHAP account for us"
        words = "authentication failed: the target refused our CHAP user or secret"
        if self._chap.algorithm is ChapAlgorithm.SHA256:
            # The drafts of RFC 3720 gave that number to SHA-1, and some targets kept it.
            words += " (or, as tgt does, it takes the number of SHA-256 for SHA-1: try auth=md5)"
        return words

    def _whom(self) -> str:
        name = self._config.target_name
        return "for discovery" if name is None else printable(name, limit=223)

    def _take(self, pairs: list[text.Pair]) -> tuple[list[text.Pair], bool]:
        """What to say to a text of the target, and whether the next stage may be asked for with it."""
        keys = self._auth_once([pair for pair in pairs if pair[0] in _AUTH_KEYS])
        answers = self._negotiation.receive((pair for pair in pairs if pair[0] not in _AUTH_KEYS), stage=self._stage)
        if self.state is LoginState.SECURITY_METHOD:
            return [*answers, *self._method(keys)], self._chap is None
        if self.state is LoginState.CHAP:
            # Anything but the keys of this step raises; with our answer we ask for the next stage.
            assert self._chap is not None  # noqa: S101  (that state is entered only with CHAP)
            answers += self._chap.receive(keys)
            if self._chap.done:
                self.state = LoginState.SECURITY_DONE
            return answers, True
        if keys:
            raise ProtocolError(f"the target sent {', '.join(sorted(keys))} after authentication was over")
        return answers, True

    def _auth_once(self, pairs: list[text.Pair]) -> dict[str, str]:
        """The keys of authentication in one text, none of them twice in it; AuthMethod not twice at all."""
        keys = dict(pairs)
        if len(keys) != len(pairs) or (_AUTH_METHOD in keys and self._method_answered):
            raise NegotiationError("the target sent a key of authentication twice")
        self._method_answered |= _AUTH_METHOD in keys
        return keys

    def _method(self, keys: dict[str, str]) -> list[text.Pair]:
        """The target's answer to AuthMethod, which need not be in its first response. Source: RFC 7143 §12."""
        method = keys.get(_AUTH_METHOD)
        if early := keys.keys() - {_AUTH_METHOD}:
            raise AuthenticationError(f"CHAP failed: the target sent {', '.join(sorted(early))} before its turn")
        if method == "NotUnderstood":
            raise NegotiationError("the target doesn't understand AuthMethod, which every target must")
        if self._chap is None:
            if method not in (None, "None"):
                raise AuthenticationError("the target asks for CHAP; give --chap-user and a secret")
            return []
        if method is None:
            return []
        if method != "CHAP":
            raise NoChapError(
                f"the target doesn't do CHAP, which --chap-user asks for: it answered '{printable(method, limit=60)}'"
            )
        self.state = LoginState.CHAP
        return self._chap.start()

    def _finish(self, pdu: LoginResponse) -> None:
        """Full feature phase. Source: RFC 7143 §6.3.3, §11.13."""
        parameters = self._negotiation.result(auth_method="None" if self._chap is None else "CHAP")
        self._result = LoginResult(
            parameters=parameters,
            tsih=pdu.tsih,
            next_cmd_sn=self._cmd_sn,
            exp_stat_sn=serial.add(pdu.stat_sn, 1),
            exp_cmd_sn=pdu.exp_cmd_sn,
            max_cmd_sn=pdu.max_cmd_sn,
        )
        self.state = LoginState.FULL_FEATURE


def _redirection(pdu: LoginResponse, status: int) -> TargetAddress:
    try:
        for key, value in text.decode(pdu.data):
            if key == "TargetAddress":
                return parse_address(value)
    except FormatError as error:
        raise LoginError(
            f"the target sends us to another portal, but not to one that can be read: {error}", status=status
        ) from error
    raise LoginError("the target sends us to another portal, but doesn't say which", status=status)
