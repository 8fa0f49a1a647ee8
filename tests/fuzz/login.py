"""The login phase, and CHAP in it: a target that says anything."""

import hashlib
from collections.abc import Iterator

from fuzz.pdu import decoded
from fuzz.text import INITIATOR, TARGET, check_parameters
from fuzz.words import check_message
from iscsifuse.errors import (
    AuthenticationError,
    FormatError,
    LoginError,
    ProtocolError,
)
from iscsifuse.iscsi import text
from iscsifuse.iscsi.chap import ChallengeMemory, ChapAlgorithm, ChapCredentials, ChapInitiator
from iscsifuse.iscsi.login import MAX_EXCHANGES, LoginMachine, LoginState
from iscsifuse.iscsi.parameters import LoginConfig
from iscsifuse.iscsi.pdu import Pdu, decode_stream
from iscsifuse.iscsi.request import LoginRequest
from iscsifuse.iscsi.response import LoginResponse

__all__ = [
    "ALGORITHMS",
    "INITIATOR",
    "ISID",
    "RECORDS",
    "SECRET",
    "TARGET",
    "TARGET_SECRET",
    "TARGET_USER",
    "USER",
    "check_chap",
    "check_login",
    "config_of",
    "record_of",
    "steady",
]

ISID = bytes.fromhex("80f022000000")
USER = "fuzz-initiator"
SECRET = b"secret of the initiator"
TARGET_USER = "fuzz-target"
TARGET_SECRET = b"secret of the target"
RECORDS = 0x80
"""Option of a login: records of `record_of` follow, not PDUs."""
ALGORITHMS = (ChapAlgorithm.SHA3_256, ChapAlgorithm.SHA256, ChapAlgorithm.SHA1, ChapAlgorithm.MD5)
_HASHES = {"5": "md5", "6": "sha1", "7": "sha256", "8": "sha3_256"}


def steady(count: int) -> bytes:
    """In place of random bytes: the same ones each time, so that a seed may hold the answer to our challenge."""
    return hashlib.shake_128(b"steady").digest(count)


def config_of(options: int) -> LoginConfig:
    """What a login asks for: bit 0 CHAP, 1 mutual, 2 discovery, 3 header digest, 4 data digest, 5 MD5 only."""
    chap = None
    if options & 1:
        chap = ChapCredentials(
            user=USER,
            secret=SECRET,
            target_user=TARGET_USER if options & 2 else None,
            target_secret=TARGET_SECRET if options & 2 else None,
            algorithms=(ChapAlgorithm.MD5,) if options & 32 else ALGORITHMS,
        )
    return LoginConfig(
        initiator_name=INITIATOR,
        target_name=None if options & 4 else TARGET,
        header_digest=bool(options & 8),
        data_digest=bool(options & 16),
        chap=chap,
    )


def check_login(data: bytes) -> None:
    """The first byte chooses what we ask for (`config_of`) and the form of the rest (`RECORDS`)."""
    if not data:
        return
    config = config_of(data[0])
    machine = LoginMachine(config, isid=ISID, itt=0, cmd_sn=1, random=steady, challenges=ChallengeMemory())
    requests = machine.start()
    responses = _from_records(data[1:]) if data[0] & RECORDS else _from_stream(data[1:])
    count = 0
    failed = False
    try:
        for pdu in responses:
            requests = machine.receive(pdu)
            count += 1
            assert count <= MAX_EXCHANGES
            for request in requests:
                _check_request(request)
            if machine.redirect is not None or machine.done:
                assert not requests
                break
            assert len(requests) == 1
    except (LoginError, ProtocolError) as error:
        check_message(error)
        failed = True
    if failed:
        assert machine.state is LoginState.FAILED
        assert machine.redirect is None
    if machine.redirect is not None:
        assert 1 <= machine.redirect.port <= 65535
        assert machine.redirect.host.isprintable()
    if machine.done:
        result = machine.result
        check_parameters(result.parameters, config)
        assert result.parameters.auth_method == ("None" if config.chap is None else "CHAP")
        assert 0 <= result.exp_stat_sn <= 0xFFFFFFFF
    if machine.done or machine.redirect is not None or failed:
        _check_over(machine)


def _check_over(machine: LoginMachine) -> None:
    try:
        machine.receive(LoginResponse())
    except ProtocolError:
        return
    raise AssertionError("a login that is over took one more response")


def _check_request(request: LoginRequest) -> None:
    raw = request.encode()
    assert decode_stream(raw) == (request, len(raw))
    assert len(request.data) <= 8192
    assert not (request.transit and request.cont)
    assert (request.isid, request.itt, request.cmd_sn, request.tsih) == (ISID, 0, 1, 0)


def _from_stream(stream: bytes) -> Iterator[Pdu]:
    """PDUs as they come."""
    return iter(decoded(stream, limit=65536)[0])


def record_of(pdu: LoginResponse) -> bytes:
    """A response without what has to be right anyway: stages, status, length and text are left."""
    flags = pdu.transit << 7 | pdu.cont << 6 | pdu.csg << 2 | pdu.nsg
    return bytes((flags, pdu.status_class, pdu.status_detail)) + len(pdu.data).to_bytes(2, "big") + pdu.data


def _from_records(data: bytes) -> Iterator[Pdu]:
    """The responses of `record_of`, with tag, ISID and StatSN as they have to be."""
    stat_sn = 0xFFFFFFFE
    while len(data) >= 5:
        flags, status_class, status_detail = data[:3]
        length = int.from_bytes(data[3:5], "big")
        segment, data = data[5 : 5 + length], data[5 + length :]
        pdu = LoginResponse(
            transit=bool(flags & 0x80),
            cont=bool(flags & 0x40),
            csg=flags >> 2 & 3,
            nsg=flags & 3,
            isid=ISID,
            tsih=1,
            stat_sn=stat_sn,
            exp_cmd_sn=1,
            max_cmd_sn=8,
            itt=0,
            status_class=status_class,
            status_detail=status_detail,
            data=segment,
        )
        stat_sn = (stat_sn + 1) & 0xFFFFFFFF
        yield pdu


def check_chap(data: bytes) -> None:
    """The first byte chooses the credentials; then texts of the target, parted by two NULs."""
    if not data:
        return
    config = config_of(data[0] | 1)
    credentials = config.chap
    assert credentials is not None
    challenges = ChallengeMemory()
    if data[0] & 4:  # somebody else of this process has sent this challenge
        challenges.add(b"0123456789abcdef")
    chap = ChapInitiator(credentials, random=steady, challenges=challenges)
    chap.start()
    said: dict[str, str] = {}
    heard: dict[str, str] = {}
    try:
        for piece in data[1:].split(b"\0\0"):
            heard = dict(text.decode(piece))
            was_done = chap.done
            answer = chap.receive(heard)
            assert not was_done, "CHAP went on when it was over"
            text.encode(answer)
            said |= answer
            if (chap.answered and not chap.done) or (chap.done and not credentials.mutual):
                _check_proof(said["CHAP_R"], heard, SECRET)
            if chap.done and credentials.mutual:
                _check_proof(heard["CHAP_R"], {**said, "CHAP_A": str(int(chap.algorithm or 0))}, TARGET_SECRET)
                assert heard["CHAP_N"] == TARGET_USER
    except (AuthenticationError, FormatError) as error:
        check_message(error, secrets=(SECRET.decode(), TARGET_SECRET.decode()))


def _check_proof(proof: str, question: dict[str, str], secret: bytes) -> None:
    """By hand: the hash of identifier, secret and challenge. Source: RFC 1994 §4.1."""
    algorithm = _HASHES[str(int(question["CHAP_A"], 0))]
    identifier = int(question["CHAP_I"], 0)
    challenge = text.binary(question["CHAP_C"], 1024)
    expected = hashlib.new(algorithm, bytes((identifier,)) + secret + challenge).digest()
    assert text.binary(proof, 64) == expected, "a proof that proves nothing"
