"""CHAP: proving a shared secret without sending it, in one direction or in both.

::

    initiator                                   target
    AuthMethod=CHAP                 →
                                    ←           AuthMethod=CHAP
    CHAP_A=8,6,5                    →                                   start()
                                    ←           CHAP_A CHAP_I CHAP_C    receive(), state CHALLENGE
    CHAP_N CHAP_R [CHAP_I CHAP_C]   →
                                    ←           [CHAP_N CHAP_R]         receive(), state PROOF, mutual only

How it thinks:

- Each step must bring exactly its own keys. A key that is missing, early, late, or of another range ends the login:
  nobody who means well gets these wrong.
- The target proves itself *before* full feature phase, or there is none: `ChapInitiator.done` stays False.
- An attacker without the secret may want us to compute the answer to our own question. So every challenge that we
  send is remembered in a set that all logins of the process share, and a challenge from a target that is in there is
  refused, on whichever connection it comes back. And a proof that equals what *our* secret would have given is
  refused too: it means that one secret serves both directions.
- Comparisons of secrets' products take constant time. Secrets never appear in a repr or a message.

Random bytes are an argument; they must be an operating system's.

Source: RFC 7143 §9.2.1, §12.1.3; RFC 1994.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterator, Mapping, MutableSet
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Final

from iscsifuse.errors import AuthenticationError, FormatError, UsageError
from iscsifuse.iscsi import text
from iscsifuse.iscsi.names import printable

__all__ = [
    "CHAP_KEYS",
    "MAX_CHALLENGE_LENGTH",
    "ChallengeMemory",
    "ChapAlgorithm",
    "ChapCredentials",
    "ChapInitiator",
    "response",
    "weak_secret",
]

CHAP_KEYS: Final = frozenset({"CHAP_A", "CHAP_I", "CHAP_C", "CHAP_N", "CHAP_R"})
MAX_CHALLENGE_LENGTH: Final = 1024
"""Bytes. Source: RFC 7143 §12.1.3."""
_MIN_SECRET_BITS: Final = 96
_MAX_SECRET_LENGTH: Final = 1024


class ChapAlgorithm(IntEnum):
    """CHAP_A. Source: RFC 7143 §12.1.3; the IANA registry of PPP authentication algorithms."""

    MD5 = 5
    SHA1 = 6
    SHA256 = 7
    SHA3_256 = 8


_HASHES: Final = {
    ChapAlgorithm.MD5: "md5",
    ChapAlgorithm.SHA1: "sha1",
    ChapAlgorithm.SHA256: "sha256",
    ChapAlgorithm.SHA3_256: "sha3_256",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChapCredentials:
    """What CHAP needs to know.

    Attributes:
        user: our name, CHAP_N.
        secret: ours; it proves us to the target.
        target_user: the name that the target has to give, or None to take any.
        target_secret: the target's; when given, the target has to prove itself (mutual CHAP).
        algorithms: in the order of preference. MD5 is always offered, last if it isn't named: the standard demands
            it, so this is a preference and no guarantee. SHA-256 is left out unless it is asked for: tgt and its
            relatives know its number from a draft in which it meant SHA-1, choose it, and then fail.

    Raises:
        UsageError: a name or a secret that CHAP can't carry.
    """

    user: str
    secret: bytes = field(repr=False)
    target_user: str | None = None
    target_secret: bytes | None = field(default=None, repr=False)
    algorithms: tuple[ChapAlgorithm, ...] = (
        ChapAlgorithm.SHA3_256,
        ChapAlgorithm.SHA1,
        ChapAlgorithm.MD5,
    )

    def __post_init__(self) -> None:
        for name in (self.user, self.target_user):
            if name is not None and (not name or "\0" in name or len(name) > text.MAX_VALUE_LENGTH // 4):
                raise UsageError("a CHAP user name must have at least one character, no NUL, and a sane length")
        for secret in (self.secret, self.target_secret):
            if secret is not None and not 0 < len(secret) <= _MAX_SECRET_LENGTH:
                raise UsageError(f"a CHAP secret must have 1 to {_MAX_SECRET_LENGTH} bytes")
        if self.target_secret is not None and hmac.compare_digest(self.secret, self.target_secret):
            raise UsageError("the CHAP secrets of the two directions must differ")

    @property
    def mutual(self) -> bool:
        """Whether the target has to prove itself too."""
        return self.target_secret is not None

    @property
    def offered(self) -> tuple[ChapAlgorithm, ...]:
        """The algorithms in the order in which they are offered, MD5 among them, none twice."""
        return tuple(dict.fromkeys((*self.algorithms, ChapAlgorithm.MD5)))


def weak_secret(secret: bytes) -> bool:
    """Whether a secret has fewer than 96 bits, which only IPsec would make good enough.

    Source: RFC 7143 §9.2.1.
    """
    return len(secret) * 8 < _MIN_SECRET_BITS


def response(algorithm: ChapAlgorithm, *, identifier: int, secret: bytes, challenge: bytes) -> bytes:
    """CHAP_R: the hash of identifier, secret and challenge.

    Args:
        algorithm: the one agreed on.
        identifier: CHAP_I, 0..255.
        secret: of the side that answers.
        challenge: CHAP_C, decoded.

    Source: RFC 1994 §4.1; RFC 7143 §12.1.3.
    """
    # usedforsecurity=False: MD5 and SHA1 are what the standard has, and a FIPS build would refuse them.
    return hashlib.new(_HASHES[algorithm], bytes((identifier,)) + secret + challenge, usedforsecurity=False).digest()


class ChallengeMemory(MutableSet[bytes]):
    """The challenges that this process has sent, for as long as a reflection of one could be worth trying.

    Args:
        capacity: how many to keep; the oldest goes first. Each is a few dozen bytes.

    Source: RFC 7143 §9.2.1.
    """

    __slots__ = ("_capacity", "_challenges")

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._challenges: dict[bytes, None] = {}

    def __contains__(self, challenge: object) -> bool:
        return challenge in self._challenges

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._challenges)

    def __len__(self) -> int:
        return len(self._challenges)

    def __repr__(self) -> str:
        return f"<ChallengeMemory of {len(self)}>"

    def add(self, value: bytes) -> None:
        """Remember a challenge."""
        self._challenges[value] = None
        while len(self._challenges) > self._capacity:
            del self._challenges[next(iter(self._challenges))]

    def discard(self, value: bytes) -> None:
        """Forget a challenge, if it is known."""
        self._challenges.pop(value, None)


class _State(Enum):
    START = "the list of algorithms has not been sent"
    CHALLENGE = "the target's challenge is awaited"
    PROOF = "the target's answer to our challenge is awaited"
    DONE = "nothing is left to say"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """What we asked the target, and the secret that proves it."""

    algorithm: ChapAlgorithm
    identifier: int
    challenge: bytes
    target_secret: bytes = field(repr=False)

    def answer(self, secret: bytes) -> bytes:
        return response(self.algorithm, identifier=self.identifier, secret=secret, challenge=self.challenge)


class ChapInitiator:
    """The initiator's half of one CHAP exchange.

    Args:
        credentials: names and secrets.
        random: gives that many unpredictable bytes, such as ``secrets.token_bytes``.
        challenges: all challenges sent by this process, shared between all logins; ours are added to it.

    Source: RFC 7143 §12.1.3.
    """

    def __init__(
        self,
        credentials: ChapCredentials,
        *,
        random: Callable[[int], bytes],
        challenges: MutableSet[bytes],
    ) -> None:
        self._credentials = credentials
        self._random = random
        self._challenges = challenges
        self._state = _State.START
        self._algorithm: ChapAlgorithm | None = None
        self._question: _Question | None = None

    def __repr__(self) -> str:
        return f"<ChapInitiator {self._state.name}>"

    @property
    def answered(self) -> bool:
        """Whether our own proof has been given, so that nothing but the target's may follow."""
        return self._state in (_State.PROOF, _State.DONE)

    @property
    def done(self) -> bool:
        """Whether nothing is left to say: our proof is given, and the target's, if asked for, was right."""
        return self._state is _State.DONE

    @property
    def algorithm(self) -> ChapAlgorithm | None:
        """What the target chose, None before it did."""
        return self._algorithm

    def start(self) -> list[text.Pair]:
        """The first keys to send, once the target agreed to CHAP."""
        self._state = _State.CHALLENGE
        return [("CHAP_A", ",".join(str(int(algorithm)) for algorithm in self._credentials.offered))]

    def receive(self, keys: Mapping[str, str]) -> list[text.Pair]:
        """Take the CHAP keys of one response.

        Args:
            keys: those of `CHAP_KEYS` that it held, none of them twice.

        Returns:
            The keys to send next; none when the target's proof has been checked.

        Raises:
            AuthenticationError: keys missing, unexpected or out of range; a challenge of ours came back; or the
                target could not prove itself.
        """
        if self._state is _State.CHALLENGE:
            _expect(keys, {"CHAP_A", "CHAP_I", "CHAP_C"})
            return self._answer(keys)
        if self._question is not None and not self.done:
            _expect(keys, {"CHAP_N", "CHAP_R"})
            self._verify(self._question, keys)
            self._state = _State.DONE
            return []
        raise AuthenticationError(f"CHAP failed: the target sent {', '.join(sorted(keys))} out of turn")

    def _answer(self, keys: Mapping[str, str]) -> list[text.Pair]:
        credentials = self._credentials
        try:
            chosen = text.number(keys["CHAP_A"], key="CHAP_A")
            identifier = text.number(keys["CHAP_I"], high=255, key="CHAP_I")
            challenge = text.binary(keys["CHAP_C"], MAX_CHALLENGE_LENGTH, key="CHAP_C")
        except FormatError as error:
            raise AuthenticationError(f"CHAP failed: {error}") from error
        if chosen not in credentials.offered:
            raise AuthenticationError(f"CHAP failed: the target chose algorithm {chosen}, which was not offered")
        if challenge in self._challenges:
            raise AuthenticationError(
                "CHAP failed: the target sent back a challenge of our own, as an impostor would"
            )
        self._algorithm = ChapAlgorithm(chosen)
        proof = response(self._algorithm, identifier=identifier, secret=credentials.secret, challenge=challenge)
        answer = [("CHAP_N", credentials.user), ("CHAP_R", text.hex_encode(proof))]
        if credentials.target_secret is None:
            self._state = _State.DONE
            return answer
        self._question = _Question(
            algorithm=self._algorithm,
            identifier=self._random(1)[0],
            challenge=self._random(len(proof)),
            target_secret=credentials.target_secret,
        )
        if self._question.challenge in self._challenges or self._question.challenge == challenge:
            raise AuthenticationError("CHAP failed: the random numbers of this machine repeat themselves")
        self._challenges.add(self._question.challenge)
        self._state = _State.PROOF
        return [
            *answer,
            ("CHAP_I", str(self._question.identifier)),
            ("CHAP_C", text.hex_encode(self._question.challenge)),
        ]

    def _verify(self, question: _Question, keys: Mapping[str, str]) -> None:
        credentials = self._credentials
        try:
            received = text.binary(keys["CHAP_R"], len(question.challenge), key="CHAP_R")
        except FormatError as error:
            raise AuthenticationError(f"CHAP failed: {error}") from error
        if hmac.compare_digest(received, question.answer(credentials.secret)):
            raise AuthenticationError("CHAP failed: the target answered with our own secret; the two must differ")
        if not hmac.compare_digest(received, question.answer(question.target_secret)):
            raise AuthenticationError(
                "CHAP failed: the target could not prove that it knows its secret; check the target's user and secret"
            )
        name = keys["CHAP_N"]
        if credentials.target_user is not None and not hmac.compare_digest(
            name.encode("utf-8", "replace"), credentials.target_user.encode("utf-8", "replace")
        ):
            raise AuthenticationError(
                f"CHAP failed: the target calls itself '{printable(name, limit=80)}', not what it should"
            )


def _expect(keys: Mapping[str, str], wanted: set[str]) -> None:
    """Exactly these keys, or the exchange is over."""
    if missing := wanted - keys.keys():
        raise AuthenticationError(f"CHAP failed: the target left out {', '.join(sorted(missing))}")
    if extra := keys.keys() - wanted:
        raise AuthenticationError(f"CHAP failed: the target sent {', '.join(sorted(extra))} out of turn")
