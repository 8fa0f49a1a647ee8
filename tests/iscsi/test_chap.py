import hashlib
import secrets
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.errors import AuthenticationError, UsageError
from iscsifuse.iscsi import text
from iscsifuse.iscsi.chap import (
    ChallengeMemory,
    ChapAlgorithm,
    ChapCredentials,
    ChapInitiator,
    response,
    weak_secret,
)

OURS = b"our secret of enough bits"
THEIRS = b"their secret, also enough"
CHALLENGE = bytes(range(16))
ONE_WAY = ChapCredentials(user="joe", secret=OURS)
MUTUAL = ChapCredentials(user="joe", secret=OURS, target_user="disk", target_secret=THEIRS)

HASHES: dict[ChapAlgorithm, Callable[[bytes], bytes]] = {
    ChapAlgorithm.MD5: lambda data: hashlib.md5(data).digest(),  # noqa: S324  (the standard's)
    ChapAlgorithm.SHA1: lambda data: hashlib.sha1(data).digest(),  # noqa: S324  (the standard's)
    ChapAlgorithm.SHA256: lambda data: hashlib.sha256(data).digest(),
    ChapAlgorithm.SHA3_256: lambda data: hashlib.sha3_256(data).digest(),
}


def fixed_random(length: int) -> bytes:
    return (b"\xa5\x5a" * 512)[:length]


def challenged(
    credentials: ChapCredentials = MUTUAL,
    *,
    algorithm: int = 5,
    challenge: bytes = CHALLENGE,
    identifier: int = 7,
    challenges: ChallengeMemory | None = None,
) -> tuple[ChapInitiator, dict[str, str]]:
    """An exchange up to our answer."""
    memory = ChallengeMemory() if challenges is None else challenges
    chap = ChapInitiator(credentials, random=fixed_random, challenges=memory)
    chap.start()
    keys = {"CHAP_A": str(algorithm), "CHAP_I": str(identifier), "CHAP_C": text.hex_encode(challenge)}
    return chap, dict(chap.receive(keys))


def proof(answer: dict[str, str], *, algorithm: ChapAlgorithm = ChapAlgorithm.MD5, secret: bytes = THEIRS) -> str:
    """What a target with this secret answers to our challenge."""
    asked = bytes.fromhex(answer["CHAP_C"].removeprefix("0x"))
    return "0x" + HASHES[algorithm](bytes([int(answer["CHAP_I"])]) + secret + asked).hex()


# -- pieces


@pytest.mark.parametrize(
    ("algorithm", "identifier", "secret", "challenge", "expected"),
    [
        # The example that hashcat documents for its mode 4800, "iSCSI CHAP authentication"
        (5, 1, b"hashcat", bytes.fromhex("01020304050607080910111213141516"), "afd09efdd6f8ca9f18ec77c5869788c3"),
        # printf '\x01secret\x02\x03' | md5sum (sha1sum, sha256sum, openssl dgst -sha3-256)
        (5, 1, b"secret", b"\x02\x03", "f506c24f35d1c70e450edb8fdf933478"),
        (6, 1, b"secret", b"\x02\x03", "c89c16e4dae017f9f96fb7e0b771ae92805b9b3f"),
        (7, 1, b"secret", b"\x02\x03", "0139bffdf152606a2cbffc12059829afee1ca9ddf6a682afd2c3d9c5572c387b"),
        (8, 1, b"secret", b"\x02\x03", "f8d632f4120d63e6e132e32a335afbe79b4e84798b132a7a241688ff14c6fd5f"),
    ],
)
def test_response_vectors(algorithm: int, identifier: int, secret: bytes, challenge: bytes, expected: str) -> None:
    result = response(ChapAlgorithm(algorithm), identifier=identifier, secret=secret, challenge=challenge)
    assert result.hex() == expected


@given(st.sampled_from(ChapAlgorithm), st.integers(0, 255), st.binary(min_size=1), st.binary(min_size=1))
def test_response_is_the_hash_of_all_three(
    algorithm: ChapAlgorithm, identifier: int, secret: bytes, challenge: bytes
) -> None:
    result = response(algorithm, identifier=identifier, secret=secret, challenge=challenge)
    assert result == HASHES[algorithm](bytes([identifier]) + secret + challenge)


@pytest.mark.conformance(35)
def test_weak_secret() -> None:
    assert weak_secret(b"")
    assert weak_secret(b"x" * 11)
    assert not weak_secret(b"x" * 12)


@pytest.mark.conformance("B11")
def test_secrets_are_never_shown() -> None:
    chap, _ = challenged()
    for thing in (MUTUAL, chap, chap._question, ChallengeMemory()):
        for secret in (OURS, THEIRS):
            assert secret.decode() not in repr(thing)
            assert secret.hex() not in repr(thing)
    assert repr(chap) == "<ChapInitiator PROOF>"


@pytest.mark.parametrize(
    "fields",
    [
        {"user": ""},
        {"user": "a\0b"},
        {"user": "x" * 5000},
        {"secret": b""},
        {"secret": b"x" * 1025},
        {"target_user": "", "target_secret": b"y"},
        {"target_secret": b""},
        {"target_secret": OURS},
    ],
)
def test_credentials_that_can_t_be_used(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="CHAP"):
        ChapCredentials(**({"user": "joe", "secret": OURS} | fields))  # type: ignore[arg-type]


@pytest.mark.conformance("B9")
def test_challenge_memory() -> None:
    memory = ChallengeMemory(capacity=3)
    for number in range(4):
        memory.add(bytes([number]))
    assert list(memory) == [b"\1", b"\2", b"\3"]
    memory.add(b"\1")
    assert len(memory) == 3
    assert b"\0" not in memory
    memory.discard(b"\2")
    memory.discard(b"\2")
    assert b"\2" not in memory


# -- the offer


@pytest.mark.conformance(27)
@pytest.mark.parametrize(
    ("algorithms", "offer"),
    [
        (None, "8,6,5"),
        ((ChapAlgorithm.MD5,), "5"),
        ((ChapAlgorithm.SHA256,), "7,5"),
        ((ChapAlgorithm.SHA3_256, ChapAlgorithm.SHA256, ChapAlgorithm.SHA1, ChapAlgorithm.MD5), "8,7,6,5"),
        ((ChapAlgorithm.MD5, ChapAlgorithm.SHA1, ChapAlgorithm.MD5), "5,6"),
        ((), "5"),
    ],
)
def test_offer(algorithms: tuple[ChapAlgorithm, ...] | None, offer: str) -> None:
    credentials = ONE_WAY if algorithms is None else ChapCredentials(user="joe", secret=OURS, algorithms=algorithms)
    chap = ChapInitiator(credentials, random=fixed_random, challenges=set())
    assert chap.start() == [("CHAP_A", offer)]
    assert not chap.answered
    assert chap.algorithm is None


# -- one way


@pytest.mark.parametrize("algorithm", ChapAlgorithm)
def test_one_way(algorithm: ChapAlgorithm) -> None:
    credentials = ChapCredentials(user="joe", secret=OURS, algorithms=(algorithm,))
    memory = ChallengeMemory()
    chap, answer = challenged(credentials, algorithm=algorithm, identifier=255, challenges=memory)
    expected = HASHES[algorithm](b"\xff" + OURS + CHALLENGE)
    assert answer == {"CHAP_N": "joe", "CHAP_R": "0x" + expected.hex()}
    assert chap.done
    assert chap.answered
    assert chap.algorithm is algorithm
    assert len(memory) == 0


def test_a_proof_that_was_not_asked_for() -> None:
    chap, _ = challenged(ONE_WAY)
    with pytest.raises(AuthenticationError, match="CHAP_N, CHAP_R out of turn"):
        chap.receive({"CHAP_N": "disk", "CHAP_R": "0x00"})


def test_keys_before_the_start() -> None:
    chap = ChapInitiator(ONE_WAY, random=fixed_random, challenges=set())
    with pytest.raises(AuthenticationError, match="CHAP_A out of turn"):
        chap.receive({"CHAP_A": "5"})


GOOD = {"CHAP_A": "5", "CHAP_I": "0x7", "CHAP_C": "0bAAECAw=="}


def test_hex_identifier_and_base64_challenge() -> None:
    chap = ChapInitiator(ONE_WAY, random=fixed_random, challenges=set())
    chap.start()
    answer = dict(chap.receive(GOOD))
    assert answer["CHAP_R"] == "0x" + HASHES[ChapAlgorithm.MD5](b"\7" + OURS + b"\0\1\2\3").hex()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param({"CHAP_A": "9"}, "algorithm 9, which was not offered", marks=pytest.mark.conformance(28)),
        pytest.param({"CHAP_A": "7"}, "algorithm 7, which was not offered", marks=pytest.mark.conformance(28)),
        pytest.param({"CHAP_A": "MD5"}, "CHAP_A should be a number", marks=pytest.mark.conformance(28)),
        pytest.param({"CHAP_A": "8,5"}, "CHAP_A should be a number", marks=pytest.mark.conformance(28)),
        pytest.param({"CHAP_A": "0"}, "algorithm 0", marks=pytest.mark.conformance(28)),
        pytest.param({"CHAP_I": "256"}, r"CHAP_I should lie in 0\.\.255", marks=pytest.mark.conformance(29)),
        pytest.param({"CHAP_I": "-1"}, "CHAP_I should be a number", marks=pytest.mark.conformance(29)),
        pytest.param({"CHAP_I": None}, "left out CHAP_I", marks=pytest.mark.conformance(29)),
        pytest.param({"CHAP_C": None}, "left out CHAP_C", marks=pytest.mark.conformance(29)),
        pytest.param({"CHAP_A": None}, "left out CHAP_A", marks=pytest.mark.conformance(29)),
        pytest.param({"CHAP_R": "0x00"}, "CHAP_R out of turn", marks=pytest.mark.conformance(29)),
        pytest.param({"CHAP_C": "0x"}, "CHAP_C should be a binary", marks=pytest.mark.conformance(29)),
        pytest.param({"CHAP_C": "0bA"}, "base64", marks=pytest.mark.conformance(30)),
        pytest.param({"CHAP_C": "0x" + "11" * 1025}, "longer than 1024", marks=pytest.mark.conformance(30)),
    ],
)
def test_challenges_that_end_the_login(changes: dict[str, str | None], complaint: str) -> None:
    chap = ChapInitiator(MUTUAL, random=fixed_random, challenges=set())
    chap.start()
    keys = {key: value for key, value in (GOOD | changes).items() if value is not None}
    with pytest.raises(AuthenticationError, match=complaint):
        chap.receive(keys)
    assert not chap.answered


@pytest.mark.conformance(30)
def test_the_longest_challenge() -> None:
    long = secrets.token_bytes(1024)
    _, answer = challenged(ONE_WAY, challenge=long)
    assert answer["CHAP_R"] == "0x" + HASHES[ChapAlgorithm.MD5](b"\7" + OURS + long).hex()


# -- mutual


@pytest.mark.parametrize("algorithm", ChapAlgorithm)
def test_mutual(algorithm: ChapAlgorithm) -> None:
    credentials = ChapCredentials(
        user="joe", secret=OURS, target_user="disk", target_secret=THEIRS, algorithms=(algorithm,)
    )
    memory = ChallengeMemory()
    chap, answer = challenged(credentials, algorithm=algorithm, challenges=memory)
    length = len(HASHES[algorithm](b""))
    assert list(answer) == ["CHAP_N", "CHAP_R", "CHAP_I", "CHAP_C"]
    assert answer["CHAP_I"] == str(0xA5)
    assert answer["CHAP_C"] == "0x" + fixed_random(length).hex()
    assert list(memory) == [fixed_random(length)]
    assert chap.answered
    assert not chap.done
    assert chap.receive({"CHAP_N": "disk", "CHAP_R": proof(answer, algorithm=algorithm)}) == []
    assert chap.done


def test_mutual_with_any_name() -> None:
    chap, answer = challenged(ChapCredentials(user="joe", secret=OURS, target_secret=THEIRS))
    chap.receive({"CHAP_N": "whoever", "CHAP_R": proof(answer)})
    assert chap.done


def test_a_target_user_alone_asks_for_no_proof() -> None:
    credentials = ChapCredentials(user="joe", secret=OURS, target_user="disk")
    assert not credentials.mutual
    assert MUTUAL.mutual
    chap, _ = challenged(credentials)
    assert chap.done


@pytest.mark.conformance(31)
@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("disk", lambda _: "0x" + "00" * 16, "could not prove"),
        ("disk", lambda right: right[:-2], "could not prove"),
        ("disk", lambda right: right + "00", "longer than 16"),
        ("disk", lambda _: "nonsense", "should be a binary value"),
        ("disk", lambda _: None, "left out CHAP_R"),
        ("other\x1b", lambda right: right, r"calls itself 'other\\x1b'"),
        ("disk2", lambda right: right, "calls itself"),
        ("", lambda right: right, "calls itself"),
        (None, lambda right: right, "left out CHAP_N"),
    ],
)
def test_a_target_that_can_t_prove_itself(
    name: str | None, change: Callable[[str], str | None], complaint: str
) -> None:
    chap, answer = challenged()
    keys = {"CHAP_N": name, "CHAP_R": change(proof(answer))}
    with pytest.raises(AuthenticationError, match=complaint):
        chap.receive({key: value for key, value in keys.items() if value is not None})
    assert not chap.done


@pytest.mark.conformance(32)
def test_a_proof_by_our_own_secret() -> None:
    chap, answer = challenged()
    with pytest.raises(AuthenticationError, match="our own secret"):
        chap.receive({"CHAP_N": "disk", "CHAP_R": proof(answer, secret=OURS)})
    assert not chap.done


@pytest.mark.conformance(33)
@pytest.mark.conformance("B9")
def test_our_challenge_comes_back_on_another_connection() -> None:
    memory = ChallengeMemory()
    first, answer = challenged(challenges=memory)
    asked = bytes.fromhex(answer["CHAP_C"].removeprefix("0x"))
    with pytest.raises(AuthenticationError, match="a challenge of our own"):
        challenged(challenge=asked, challenges=memory)  # in parallel
    first.receive({"CHAP_N": "disk", "CHAP_R": proof(answer)})
    with pytest.raises(AuthenticationError, match="a challenge of our own"):
        challenged(ONE_WAY, challenge=asked, challenges=memory)  # later


@pytest.mark.conformance(33)
def test_our_challenge_comes_back_on_the_same_connection() -> None:
    chap, answer = challenged()
    with pytest.raises(AuthenticationError, match="left out CHAP_N, CHAP_R"):
        chap.receive({"CHAP_A": "5", "CHAP_I": answer["CHAP_I"], "CHAP_C": answer["CHAP_C"]})
    assert not chap.done


@pytest.mark.conformance("B9")
def test_random_numbers_that_repeat_themselves() -> None:
    memory = ChallengeMemory()
    challenged(challenges=memory)
    with pytest.raises(AuthenticationError, match="repeat themselves"):
        challenged(challenges=memory)
    with pytest.raises(AuthenticationError, match="repeat themselves"):
        challenged(challenge=fixed_random(16))
