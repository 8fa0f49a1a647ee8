"""CHAP as the side that asks: offers an algorithm and a challenge, checks the answer, proves itself where asked to.

It is written on its own, from the standard, and shares no code with the initiator's: an error in one is then found by
the other. Source: RFC 7143 §12.1.3; RFC 1994.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Mapping

from iscsifuse.errors import FormatError
from iscsifuse.iscsi import text
from iscsifuse.iscsi.text import Pair
from iscsifuse.testing.config import ChapPolicy

__all__ = ["ChapRefusedError", "ChapTarget"]

_HASHES = {5: "md5", 6: "sha1", 7: "sha256", 8: "sha3_256"}
_MAX_CHALLENGE = 1024


class ChapRefusedError(Exception):
    """The initiator didn't prove who it is."""


class ChapTarget:
    """One login's exchange.

    Attributes:
        done: the initiator has proved who it is, and so have we where it asked.
    """

    def __init__(self, policy: ChapPolicy) -> None:
        self.done = False
        self._policy = policy
        self._algorithm = 0
        self._identifier = 0
        self._challenge = b""

    def receive(self, pairs: Mapping[str, str]) -> list[Pair]:
        """The answer to the CHAP keys of a request.

        Raises:
            ChapRefusedError: no known algorithm, a wrong name or response, or keys in a wrong order.
        """
        if "CHAP_A" in pairs and not self._challenge:
            return self._challenge_with(pairs["CHAP_A"])
        if "CHAP_N" in pairs and "CHAP_R" in pairs and self._challenge and not self.done:
            return self._verify(pairs)
        raise ChapRefusedError("CHAP keys are missing or out of order")

    def _challenge_with(self, offered: str) -> list[Pair]:
        known = {str(number): number for number in self._policy.algorithms if number in _HASHES}
        for choice in offered.split(","):
            if choice in known:
                self._algorithm = known[choice]
                self._identifier = secrets.randbelow(256)
                self._challenge = secrets.token_bytes(self._policy.challenge_length)
                return [
                    ("CHAP_A", choice),
                    ("CHAP_I", str(self._identifier)),
                    ("CHAP_C", self._encoded(self._challenge)),
                ]
        raise ChapRefusedError(f"no known algorithm among {offered}")

    def _encoded(self, value: bytes) -> str:
        return "0b" + base64.b64encode(value).decode() if self._policy.base64 else text.hex_encode(value)

    def _hash(self, identifier: int, secret: bytes, challenge: bytes) -> bytes:
        function = hashlib.new(_HASHES[self._algorithm], usedforsecurity=False)
        function.update(bytes([identifier]) + secret + challenge)
        return function.digest()

    def _verify(self, pairs: Mapping[str, str]) -> list[Pair]:
        secret = self._policy.users.get(pairs["CHAP_N"])
        try:
            response = text.binary(pairs["CHAP_R"], 64, key="CHAP_R")
        except FormatError as error:
            raise ChapRefusedError(str(error)) from None
        if secret is None or not hmac.compare_digest(response, self._hash(self._identifier, secret, self._challenge)):
            raise ChapRefusedError("a wrong name or secret")
        self.done = True
        if "CHAP_I" not in pairs and "CHAP_C" not in pairs:
            return []
        try:
            identifier = text.number(pairs.get("CHAP_I", ""), high=255, key="CHAP_I")
            challenge = text.binary(pairs.get("CHAP_C", ""), _MAX_CHALLENGE, key="CHAP_C")
        except FormatError as error:
            raise ChapRefusedError(str(error)) from None
        if challenge == self._challenge or not self._policy.target_secret:
            raise ChapRefusedError("our own challenge came back, or we have no secret to prove")
        proof = self._hash(identifier, self._policy.target_secret, challenge)
        return [("CHAP_N", self._policy.target_name), ("CHAP_R", self._encoded(proof))]
