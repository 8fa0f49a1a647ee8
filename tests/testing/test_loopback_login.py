import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from loopback_client import INITIATOR, Client

from iscsifuse.iscsi import text
from iscsifuse.iscsi.request import NopOut, Stage, TextRequest
from iscsifuse.iscsi.response import LoginResponse, TextResponse
from iscsifuse.testing.config import (
    DEFAULT_TARGET_NAME,
    ChapPolicy,
    Redirect,
    TargetConfig,
    TargetKeys,
    TargetNode,
)
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.keys import Agreed, OperationalKeys
from iscsifuse.testing.target import LoopbackTarget

SECURITY, OPERATIONAL, FULL = (
    Stage.SECURITY_NEGOTIATION,
    Stage.LOGIN_OPERATIONAL_NEGOTIATION,
    Stage.FULL_FEATURE_PHASE,
)
NAMES = [("InitiatorName", INITIATOR), ("TargetName", DEFAULT_TARGET_NAME)]
SECRET = b"correct horse battery"
HASHES = {5: hashlib.md5, 6: hashlib.sha1, 7: hashlib.sha256, 8: hashlib.sha3_256}


@asynccontextmanager
async def serving(config: TargetConfig | None = None, *, clean: bool = True) -> AsyncIterator[LoopbackTarget]:
    async with LoopbackTarget(config or TargetConfig.of(Disk(blocks=64))).serve() as target:
        yield target
    if clean:
        assert target.violations == []


async def first(client: Client, pairs: Sequence[tuple[str, str]], **options: Any) -> LoginResponse:
    request = client.login_request(pairs, csg=OPERATIONAL, nsg=FULL)
    return await client.exchange(replace(request, **options))


def status_of(response: LoginResponse) -> int:
    return response.status_class << 8 | response.status_detail


async def test_a_login_with_one_request() -> None:
    keys = TargetKeys(alias="a disk", first_burst_length=8192, max_recv_data_segment_length=16384)
    async with serving(TargetConfig.of(Disk(blocks=1), keys=keys)) as target:
        client = Client(target.connect())
        response = await client.login()
        assert (response.transit, response.nsg, status_of(response)) == (True, FULL, 0)
        assert response.tsih != 0
        assert client.keys == {
            "TargetPortalGroupTag": "1",
            "HeaderDigest": "None",
            "DataDigest": "None",
            "InitialR2T": "No",
            "ImmediateData": "Yes",
            "MaxBurstLength": "1048576",
            "FirstBurstLength": "8192",
            "MaxOutstandingR2T": "4",
            "DefaultTime2Wait": "2",
            "DefaultTime2Retain": "0",
            "MaxConnections": "1",
            "ErrorRecoveryLevel": "0",
            "MaxRecvDataSegmentLength": "16384",
            "TargetAlias": "a disk",
        }
        await client.logout()
        assert await client.expect_end() == b""


async def test_a_login_in_small_steps() -> None:
    async with serving() as target:
        client = Client(target.connect())
        whole = text.encode([*NAMES, ("AuthMethod", "None")])
        request = client.login_request([], csg=SECURITY, transit=False, cont=True)
        response = await client.exchange(replace(request, data=whole[:20]))
        assert (response.data, response.transit) == (b"", False)
        request = client.login_request([], csg=SECURITY, transit=False)
        response = await client.exchange(replace(request, data=whole[20:]))
        assert (client.keys["AuthMethod"], response.transit) == ("None", False)
        response = await client.exchange(client.login_request([], csg=SECURITY, nsg=OPERATIONAL))
        assert (response.transit, response.nsg) == (True, OPERATIONAL)
        await client.exchange(client.login_request([("InitialR2T", "Yes")], csg=OPERATIONAL, transit=False))
        assert client.keys["InitialR2T"] == "Yes"
        response = await client.exchange(client.login_request([], csg=OPERATIONAL, nsg=FULL))
        assert (response.transit, response.nsg) == (True, FULL)
        assert target.sessions[0].agreed.initial_r2t


async def test_security_may_lead_to_the_full_feature_phase_at_once() -> None:
    async with serving() as target:
        client = Client(target.connect())
        response = await client.exchange(
            client.login_request([*NAMES, ("AuthMethod", "None")], csg=SECURITY, nsg=FULL)
        )
        assert (response.transit, response.nsg) == (True, FULL)
        assert target.sessions[0].agreed == Agreed()


async def test_a_proposal_of_the_target_keeps_the_stage_open() -> None:
    keys = TargetKeys(extra=(("X-org.example.odd", "1"),))
    async with serving(TargetConfig.of(Disk(blocks=1), keys=keys)) as target:
        client = Client(target.connect())
        response = await client.login()
        assert (client.keys["X-org.example.odd"], response.transit) == ("1", False)
        answer = [("X-org.example.odd", "NotUnderstood")]
        response = await client.exchange(client.login_request(answer, csg=OPERATIONAL, nsg=FULL))
        assert (response.transit, response.data) == (True, b"")


@pytest.mark.parametrize(
    ("pairs", "options", "status"),
    [
        (NAMES[:1], {}, 0x0207),
        (NAMES[1:], {}, 0x0207),
        ([NAMES[0], ("TargetName", "iqn.2000-01.org.example:none")], {}, 0x0203),
        ([*NAMES, ("SessionType", "Odd")], {}, 0x0209),
        (NAMES, {"version_min": 1, "version_max": 1}, 0x0205),
        (NAMES, {"tsih": 7}, 0x0206),
        ([*NAMES, ("InitialR2T", "yes")], {}, 0x0200),
        ([*NAMES, ("MaxBurstLength", "1_000")], {}, 0x0200),
        ([*NAMES, ("InitialR2T", "Yes"), ("InitialR2T", "Yes")], {}, 0x0200),
    ],
)
async def test_what_is_refused(pairs: list[tuple[str, str]], options: dict[str, int], status: int) -> None:
    async with serving(clean=False) as target:
        client = Client(target.connect())
        response = await first(client, pairs, **options)
        assert status_of(response) == status
        assert await client.expect_end() == b""
        assert target.sessions == []


async def test_nothing_but_logins_during_a_login() -> None:
    async with serving(clean=False) as target:
        client = Client(target.connect())
        await client.send(NopOut(itt=1))
        assert await client.expect_end() == b""
        assert target.violations == ["NOP_OUT (itt 0x1): came during the login"]


@pytest.mark.parametrize(
    ("permanent", "after_chap", "status"), [(False, False, 0x0101), (True, False, 0x0102), (False, True, 0x0101)]
)
async def test_redirection(permanent: bool, after_chap: bool, status: int) -> None:
    redirect = Redirect("192.0.2.1:3261", permanent=permanent, times=1, after_chap=after_chap)
    config = TargetConfig(nodes=[TargetNode(disks=[Disk(blocks=1)], redirect=redirect)])
    async with serving(config) as target:
        client = Client(target.connect())
        response = await client.login()
        assert (status_of(response), client.keys["TargetAddress"]) == (status, "192.0.2.1:3261")
        client = Client(target.connect())
        assert status_of(await client.login()) == 0


# --- CHAP ---


def chap_config(**changes: object) -> TargetConfig:
    policy = ChapPolicy(users={"user": SECRET}, target_secret=b"the target's secret")
    return TargetConfig(nodes=[TargetNode(disks=[Disk(blocks=1)])], chap=replace(policy, **changes))  # type: ignore[arg-type]


async def chap(
    client: Client, algorithms: str, *, secret: bytes = SECRET, mutual: bytes = b"", reflect: bool = False
) -> LoginResponse:
    """The exchange as far as the target lets it go; the last response."""
    offer = [*NAMES, ("AuthMethod", "CHAP,None")]
    await client.exchange(client.login_request(offer, csg=SECURITY, transit=False))
    assert client.keys["AuthMethod"] == "CHAP"
    response = await client.exchange(client.login_request([("CHAP_A", algorithms)], csg=SECURITY, transit=False))
    if "CHAP_C" not in client.keys:
        return response
    identifier, challenge = int(client.keys["CHAP_I"]), text.binary(client.keys["CHAP_C"], 1024)
    function = HASHES[int(client.keys["CHAP_A"])]
    answer = [
        ("CHAP_N", "user"),
        ("CHAP_R", text.hex_encode(function(bytes([identifier]) + secret + challenge).digest())),
    ]
    if mutual:
        sent = challenge if reflect else mutual
        answer += [("CHAP_I", "9"), ("CHAP_C", text.hex_encode(sent))]
    response = await client.exchange(client.login_request(answer, csg=SECURITY, nsg=OPERATIONAL))
    if mutual and response.status_class == 0:
        expected = function(b"\x09" + b"the target's secret" + mutual).digest()
        assert (client.keys["CHAP_N"], text.binary(client.keys["CHAP_R"], 64)) == ("target", expected)
    return response


@pytest.mark.parametrize("algorithm", [5, 6, 7, 8])
@pytest.mark.parametrize("mutual", [b"", b"a challenge of ours"])
async def test_chap(algorithm: int, mutual: bytes) -> None:
    async with serving(chap_config()) as target:
        client = Client(target.connect())
        response = await chap(client, f"99,{algorithm},5", mutual=mutual)
        assert (client.keys["CHAP_A"], response.transit, response.nsg) == (str(algorithm), True, OPERATIONAL)
        response = await client.exchange(client.login_request([], csg=OPERATIONAL, nsg=FULL))
        assert (response.transit, target.logins) == (True, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"algorithms": "99,nine,5²,²"},
        {"algorithms": "5", "secret": b"wrong"},
        {"algorithms": "5", "mutual": b"x" * 16, "reflect": True},
        {"algorithms": "5", "mutual": b"x" * 1025},
    ],
)
async def test_chap_that_fails(options: dict[str, object]) -> None:
    async with serving(chap_config()) as target:
        client = Client(target.connect())
        assert status_of(await chap(client, **options)) == 0x0201  # type: ignore[arg-type]
        assert await client.expect_end() == b""


@pytest.mark.parametrize(
    "steps",
    [
        [("AuthMethod", "None")],
        [("AuthMethod", "CHAP"), ("CHAP_N", "user")],
        [("AuthMethod", "CHAP"), ("CHAP_A", "5"), ("CHAP_A", "5")],
        [("AuthMethod", "CHAP"), ("CHAP_A", "5"), ("CHAP_N", "user")],
    ],
)
async def test_chap_out_of_order(steps: list[tuple[str, str]]) -> None:
    async with serving(chap_config()) as target:
        client = Client(target.connect())
        pairs = list(NAMES)
        for step in steps:
            response = await client.exchange(client.login_request([*pairs, step], csg=SECURITY, transit=False))
            pairs = []
        assert status_of(response) == 0x0201


async def test_no_way_around_chap() -> None:
    async with serving(chap_config()) as target:
        client = Client(target.connect())
        assert status_of(await client.login()) == 0x0201
        client = Client(target.connect())
        response = await client.exchange(client.login_request(NAMES, csg=SECURITY, nsg=OPERATIONAL))
        assert (status_of(response), response.transit) == (0, False)


async def test_chap_may_be_optional() -> None:
    async with serving(chap_config(required=False)) as target:
        client = Client(target.connect())
        assert status_of(await client.login()) == 0


async def test_chap_offered_alone_to_a_target_without_it() -> None:
    async with serving() as target:
        client = Client(target.connect())
        pairs = [*NAMES, ("AuthMethod", "CHAP")]
        assert status_of(await client.exchange(client.login_request(pairs, csg=SECURITY, nsg=OPERATIONAL))) == 0x0201


# --- keys ---


@pytest.mark.parametrize(
    ("ours", "key", "value", "answer", "agreed"),
    [
        (TargetKeys(), "HeaderDigest", "CRC32C,None", "CRC32C", {"header_digest": True}),
        (TargetKeys(header_digests=("None",)), "HeaderDigest", "CRC32C,None", "None", {"header_digest": False}),
        (TargetKeys(data_digests=("None",)), "DataDigest", "CRC32C", "Reject", {"data_digest": False}),
        (TargetKeys(), "DataDigest", "X-odd,CRC32C", "CRC32C", {"data_digest": True}),
        (TargetKeys(initial_r2t=True), "InitialR2T", "No", "Yes", {"initial_r2t": True}),
        (TargetKeys(), "InitialR2T", "No", "No", {"initial_r2t": False}),
        (TargetKeys(immediate_data=False), "ImmediateData", "Yes", "No", {"immediate_data": False}),
        (TargetKeys(), "ImmediateData", "No", "No", {"immediate_data": False}),
        (TargetKeys(max_burst_length=4096), "MaxBurstLength", "0x2000", "4096", {"max_burst_length": 4096}),
        (TargetKeys(max_burst_length=4096), "FirstBurstLength", "8192", "4096", {"first_burst_length": 4096}),
        (TargetKeys(), "MaxOutstandingR2T", "1", "1", {"max_outstanding_r2t": 1}),
        (TargetKeys(), "MaxConnections", "8", "1", {}),
        (TargetKeys(), "ErrorRecoveryLevel", "2", "0", {}),
        (TargetKeys(default_time2wait=7), "DefaultTime2Wait", "3", "7", {}),
        (TargetKeys(default_time2retain=7), "DefaultTime2Retain", "3", "3", {}),
        (TargetKeys(), "DataPDUInOrder", "No", "Yes", {}),
        (TargetKeys(), "IFMarker", "Yes", "No", {}),
        (TargetKeys(), "OFMarkInt", "1~2", "Reject", {}),
        (TargetKeys(), "X-org.example.odd", "1", "NotUnderstood", {}),
    ],
)
def test_operational_keys(ours: TargetKeys, key: str, value: str, answer: str, agreed: dict[str, object]) -> None:
    keys = OperationalKeys(ours, discovery=False)
    answers = dict(keys.answer([(key, value)]))
    assert answers.pop("MaxRecvDataSegmentLength") == "262144"
    assert answers == {key: answer}
    result = keys.finish()
    assert {name: getattr(result, name) for name in agreed} == agreed


def test_the_first_burst_never_exceeds_the_burst() -> None:
    keys = OperationalKeys(TargetKeys(max_recv_data_segment_length=None), discovery=False)
    assert keys.answer([("MaxBurstLength", "1024"), ("FirstBurstLength", "65536")])[1] == ("FirstBurstLength", "1024")
    assert keys.finish().first_burst_length == 1024
    keys = OperationalKeys(TargetKeys(), discovery=False)
    keys.answer([("MaxBurstLength", "1024"), ("MaxRecvDataSegmentLength", "512"), ("InitiatorAlias", "x")])
    assert (keys.finish().first_burst_length, keys.finish().initiator_max_recv) == (1024, 512)


# --- discovery ---


async def send_targets(client: Client, value: str = "All") -> tuple[list[tuple[str, str]], int]:
    """The answer to SendTargets, joined, and how many PDUs it had."""
    request = TextRequest(
        itt=client.next_itt(),
        cmd_sn=client.next_cmd_sn(),
        exp_stat_sn=client.exp_stat_sn,
        data=text.encode([("SendTargets", value)]),
    )
    data, count = b"", 0
    while True:
        await client.send(request)
        response = await client.receive()
        assert isinstance(response, TextResponse)
        client.exp_stat_sn = response.stat_sn + 1
        data, count = data + response.data, count + 1
        if response.final:
            assert response.ttt == 0xFFFFFFFF
            return text.decode(data), count
        assert response.cont
        request = replace(
            request,
            ttt=response.ttt,
            lun=response.lun,
            cmd_sn=client.next_cmd_sn(),
            exp_stat_sn=client.exp_stat_sn,
            data=b"",
        )


def many() -> TargetConfig:
    nodes = [TargetNode(name=f"iqn.2000-01.org.example:disk{number}") for number in range(20)]
    nodes[3].addresses = ("192.0.2.1:3260,7", "[2001:db8::1],8", "san.example")
    return TargetConfig(nodes=nodes)


@pytest.mark.parametrize("chunk", [0, 500, 7])
async def test_discovery(chunk: int) -> None:
    config = many()
    config.text_chunk = chunk
    async with serving(config) as target:
        client = Client(target.connect())
        await client.login(target=None)
        pairs, count = await send_targets(client)
        whole = text.encode(pairs)
        assert count == (-(-len(whole) // chunk) if chunk else 1)
        assert pairs[:2] == [
            ("TargetName", "iqn.2000-01.org.example:disk0"),
            ("TargetAddress", f"127.0.0.1:{target.port},1"),
        ]
        assert [value for key, value in pairs if key == "TargetAddress"][3:6] == list(config.nodes[3].addresses or ())
        assert len(pairs) == 42
        one, _ = await send_targets(client, "iqn.2000-01.org.example:disk5")
        assert one == pairs[12:14]
        await client.logout()


async def test_a_normal_session_may_ask_about_its_own_target() -> None:
    async with serving() as target:
        client = Client(target.connect())
        await client.login()
        pairs, _ = await send_targets(client, "")
        assert pairs == [("TargetName", DEFAULT_TARGET_NAME), ("TargetAddress", f"{target.portal},1")]
        assert await send_targets(client, "All") == ([("SendTargets", "Reject")], 1)


async def test_text_requests_in_pieces_and_unknown_keys() -> None:
    async with serving() as target:
        client = Client(target.connect())
        await client.login(target=None)
        request = TextRequest(
            itt=5,
            final=False,
            cont=True,
            cmd_sn=client.next_cmd_sn(),
            exp_stat_sn=client.exp_stat_sn,
            data=b"X-odd=1\0Send",
        )
        await client.send(request)
        response = await client.receive()
        assert isinstance(response, TextResponse)
        assert (response.final, response.data) == (False, b"")
        await client.send(
            replace(
                request,
                final=True,
                cont=False,
                ttt=response.ttt,
                cmd_sn=client.next_cmd_sn(),
                exp_stat_sn=response.stat_sn + 1,
                data=b"Targets=iqn.2000-01.org.example:none\0",
            )
        )
        response = await client.receive()
        assert isinstance(response, TextResponse)
        assert (response.final, response.data) == (True, b"X-odd=NotUnderstood\0")


async def test_ipv6_portals() -> None:
    config = TargetConfig.of(Disk(blocks=1))
    config.hosts = ("::1", "127.0.0.1")
    try:
        async with serving(config) as target:
            assert target.portal == f"[::1]:{target.port}"
            assert target.url(lun=3) == f"iscsi://[::1]:{target.port}/{DEFAULT_TARGET_NAME}/3"
            client = Client(await trio.open_tcp_stream("::1", target.port))
            await client.login(target=None)
            pairs, _ = await send_targets(client)
            assert [value for _, value in pairs[1:]] == [f"[::1]:{target.port},1", f"127.0.0.1:{target.port},1"]
            await client.stream.aclose()
    except* OSError:
        pytest.skip("no IPv6 on this machine")
