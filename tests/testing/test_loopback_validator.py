"""Each rule of the validator trips here, one by one; that it stays silent otherwise is proved by all other tests."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from iscsifuse.iscsi.pdu import NO_LUN, RESERVED_TAG, Pdu
from iscsifuse.iscsi.request import (
    DataOut,
    LoginRequest,
    LogoutRequest,
    NopOut,
    ScsiCommand,
    SnackRequest,
    TaskFunction,
    TaskManagementRequest,
    TextRequest,
)
from iscsifuse.iscsi.response import (
    R2T,
    DataIn,
    LoginResponse,
    LogoutResponse,
    NopIn,
    Reject,
    ScsiResponse,
    TaskManagementResponse,
    TextResponse,
)
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.keys import Agreed
from iscsifuse.testing.scsi_engine import ScsiEngine
from iscsifuse.testing.validator import Validator

LUN = NO_LUN
READ = ScsiCommand(
    itt=2,
    read=True,
    expected_data_transfer_length=512,
    cmd_sn=10,
    exp_stat_sn=5,
    cdb=cdbs.read_10(lba=0, blocks=1).ljust(16, b"\0"),
)
WRITE = ScsiCommand(
    itt=2,
    write=True,
    expected_data_transfer_length=8192,
    cmd_sn=10,
    exp_stat_sn=5,
    cdb=cdbs.write_10(lba=0, blocks=16).ljust(16, b"\0"),
)
LOGIN = LoginRequest(itt=1, transit=True, csg=1, nsg=3, isid=b"ISID  ", cmd_sn=10)
GOOD = ScsiResponse(itt=2, stat_sn=5, exp_cmd_sn=11, max_cmd_sn=20)
R2T_1 = R2T(
    itt=2, ttt=77, stat_sn=5, exp_cmd_sn=11, max_cmd_sn=20, buffer_offset=4096, desired_data_transfer_length=4096
)
DATA = DataOut(itt=2, ttt=77, exp_stat_sn=5, buffer_offset=4096, data=bytes(4096))


class Scene:
    """A validator in the full feature phase, and what it said."""

    def __init__(self, agreed: Agreed | None = None, *, window: int = 11) -> None:
        self.said: list[str] = []
        self.validator = Validator(self.said)
        engine = ScsiEngine.of([Disk(blocks=100)])
        self.validator.know(lengths=lambda lun, cdb: engine.lengths(lun=lun, cdb=cdb))
        self.got(LOGIN)
        self.validator.full_feature(
            agreed or Agreed(initial_r2t=False, first_burst_length=4096, target_max_recv=4096)
        )
        self.put(LoginResponse(itt=1, transit=True, csg=1, nsg=3, stat_sn=4, exp_cmd_sn=10, max_cmd_sn=9 + window))

    def got(self, *pdus: Pdu) -> "Scene":
        for pdu in pdus:
            self.validator.received(pdu, header=pdu.header())
        return self

    def put(self, *pdus: Pdu) -> "Scene":
        for pdu in pdus:
            self.validator.sent(pdu)
        return self


def one(scene: Scene, sentence: str) -> None:
    assert len(scene.said) == 1, scene.said
    assert sentence in scene.said[0]


# --- format ---


@pytest.mark.parametrize("byte", [2, 3])
def test_reserved_bytes(byte: int) -> None:
    scene = Scene()
    header = bytearray(READ.header())
    header[byte] = 1
    scene.validator.received(READ, header=bytes(header))
    one(scene, f"reserved bits are set, or fixed ones aren't, at byte {byte}")


def test_reserved_flags() -> None:
    scene = Scene()
    header = bytearray(READ.header())
    header[1] |= 0x18
    scene.validator.received(READ, header=bytes(header))
    one(scene, "at byte 1")


def test_padding_and_additional_headers() -> None:
    scene = Scene()
    scene.validator.received(replace(WRITE, data=b"x"), pad=b"\0\0\1")
    one(scene, "padding that isn't zero")
    scene = Scene().got(replace(READ, ahs=bytes(8)))
    one(scene, "8 bytes of additional headers")


def test_long_segments() -> None:
    scene = Scene(Agreed(target_max_recv=1024, first_burst_length=4096)).got(replace(WRITE, data=bytes(1025)))
    one(scene, "a data segment of 1025 bytes, but 1024 is the limit")
    said: list[str] = []
    Validator(said).received(replace(LOGIN, data=bytes(8193)))
    assert said == ["LOGIN_REQUEST (itt 0x1): a data segment of 8193 bytes, but 8192 is the limit"]


# --- login ---


def login_case(*requests: LoginRequest, response: LoginResponse | None = None) -> list[str]:
    said: list[str] = []
    validator = Validator(said, label="one: ")
    for request in requests:
        validator.received(request)
        validator.sent(response or LoginResponse(itt=1, csg=request.csg, stat_sn=4))
    return [sentence.removeprefix("one: LOGIN_REQUEST (itt 0x1): ") for sentence in said]


FIRST = replace(LOGIN, transit=False, nsg=0, csg=0)
SECOND = replace(FIRST, exp_stat_sn=5)


def test_a_good_login_is_silent() -> None:
    assert login_case(FIRST, SECOND, replace(SECOND, cont=True)) == []
    advance = LoginResponse(itt=1, transit=True, csg=0, nsg=1, stat_sn=4)
    assert login_case(replace(FIRST, transit=True, nsg=1), replace(SECOND, csg=1), response=advance) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"isid": b"OTHER "}, "isid changed from b'ISID  ' to b'OTHER ' during the login"),
        ({"tsih": 4}, "tsih changed from 0 to 4 during the login"),
        ({"cid": 4}, "cid changed from 0 to 4 during the login"),
        ({"cmd_sn": 11}, "cmd_sn changed from 10 to 11 during the login"),
        ({"version_max": 1}, "version_max changed from 0 to 1 during the login"),
        ({"exp_stat_sn": 6}, "ExpStatSN 6 where 5 was due"),
        ({"cont": True, "transit": True, "nsg": 1}, "C=1 with T=1"),
        ({"transit": True, "nsg": 0}, "NSG 0 isn't after CSG 0"),
        ({"nsg": 1}, "NSG 1 without T"),
        ({"csg": 2}, "CSG 2"),
        ({"csg": 1}, "CSG 1 where 0 was due"),
    ],
)
def test_login_rules(change: dict[str, object], sentence: str) -> None:
    assert login_case(FIRST, replace(SECOND, **change)) == [sentence]  # type: ignore[arg-type]


def test_login_tags() -> None:
    said: list[str] = []
    validator = Validator(said)
    validator.received(replace(FIRST, itt=RESERVED_TAG))
    validator.received(replace(SECOND, itt=3))
    validator.received(NopOut(itt=5))
    assert [sentence.partition(": ")[2] for sentence in said] == [
        "the reserved Initiator Task Tag",
        "itt changed from 4294967295 to 3 during the login",
        "came during the login",
    ]
    one(Scene().got(LOGIN), "came in the full feature phase")


# --- numbers ---


@pytest.mark.parametrize(
    ("pdus", "sentence"),
    [
        ([replace(READ, cmd_sn=11)], "CmdSN 11 where 10 was due"),
        ([replace(READ, cmd_sn=9)], "CmdSN 9 where 10 was due"),
        ([READ, replace(READ, itt=3)], "CmdSN 10 where 11 was due"),
        ([NopOut(itt=3, immediate=True, cmd_sn=11, exp_stat_sn=5)], "CmdSN 11 where 10 was due"),
        ([replace(READ, exp_stat_sn=6)], "ExpStatSN 6, but only 4 was sent"),
        ([replace(READ, exp_stat_sn=4), replace(READ, itt=3, cmd_sn=11, exp_stat_sn=3)], "ExpStatSN 3 after 4"),
        ([replace(READ, itt=RESERVED_TAG)], "the reserved Initiator Task Tag"),
        ([READ, replace(READ, cmd_sn=11)], "the tag of a task that isn't over (SCSI_COMMAND)"),
    ],
)
def test_number_rules(pdus: list[Pdu], sentence: str) -> None:
    one(Scene().got(*pdus), sentence)


def test_the_window() -> None:
    scene = Scene(window=1).got(READ)
    assert scene.said == []
    scene.got(NopOut(itt=9, immediate=True, cmd_sn=11, exp_stat_sn=5))
    assert scene.said == []
    scene.got(replace(READ, itt=3, cmd_sn=11))
    one(scene, "CmdSN 11 beyond MaxCmdSN 10")


def test_a_window_that_makes_no_sense_is_not_one() -> None:
    nonsense = NopIn(stat_sn=5, exp_cmd_sn=100, max_cmd_sn=98)
    backwards = NopIn(stat_sn=5, exp_cmd_sn=10, max_cmd_sn=9)
    scene = Scene(window=2).put(nonsense, backwards).got(READ, replace(READ, itt=3, cmd_sn=11))
    assert scene.said == []
    one(scene.got(replace(READ, itt=4, cmd_sn=12)), "beyond MaxCmdSN 11")


def test_a_tag_may_be_used_again() -> None:
    again = replace(READ, cmd_sn=11)
    assert Scene().got(READ).put(GOOD).got(again).said == []
    assert Scene().got(READ).put(DataIn(itt=2, has_status=True, stat_sn=5)).got(again).said == []
    one(Scene().got(READ).put(DataIn(itt=2)).got(again), "isn't over")
    reject = Reject(stat_sn=5, data=READ.header())
    assert Scene().got(READ).put(reject).got(again).said == []


@pytest.mark.parametrize(
    ("request_", "over"),
    [
        (TaskManagementRequest(itt=9, referenced_task_tag=2, ref_cmd_sn=10), True),
        (TaskManagementRequest(itt=9, function=TaskFunction.ABORT_TASK_SET), True),
        (TaskManagementRequest(itt=9, function=TaskFunction.LOGICAL_UNIT_RESET, lun=b"\0\1" + bytes(6)), False),
        (TaskManagementRequest(itt=9, function=TaskFunction.TARGET_WARM_RESET), True),
    ],
)
def test_task_management_ends_tasks(request_: TaskManagementRequest, over: bool) -> None:
    scene = Scene().got(READ, replace(request_, cmd_sn=11, exp_stat_sn=5))
    scene.put(TaskManagementResponse(itt=9, stat_sn=5)).got(replace(READ, cmd_sn=11))
    assert (scene.said == []) == over


def test_r2ts_and_pings_use_no_number() -> None:
    ping = NopIn(ttt=5, stat_sn=5, exp_cmd_sn=11, max_cmd_sn=20)
    scene = Scene().got(WRITE).put(R2T_1, ping, DataIn(itt=2, stat_sn=99))
    one(scene.got(replace(READ, itt=3, cmd_sn=11, exp_stat_sn=6)), "ExpStatSN 6, but only 4 was sent")


# --- commands ---


@pytest.mark.parametrize(
    ("command", "sentences"),
    [
        (replace(READ, attribute=5), ["ATTR 5"]),
        (replace(READ, cdb=READ.cdb[:10] + b"\0\0\0\0\0\1"), ["bytes after the 10 of the CDB aren't zero"]),
        (replace(READ, write=True), ["R and W in one command", "W=1 in READ(10) that moves 0 bytes out"]),
        (
            replace(READ, read=False),
            ["expects 512 bytes with neither R nor W", "R=0 in READ(10) that moves 512 bytes in"],
        ),
        (replace(READ, expected_data_transfer_length=1024), ["expects 1024 bytes, but READ(10) moves 512"]),
        (
            replace(READ, read=True, cdb=bytes(16)),
            ["R=1 in TEST UNIT READY that moves 0 bytes in", "expects 512 bytes, but TEST UNIT READY moves 0"],
        ),
        (replace(READ, data=b"x"), ["1 bytes of immediate data in a command that isn't a write"]),
        (replace(READ, final=False), ["F=0 in a command that isn't a write"]),
        (replace(WRITE, data=bytes(4096), final=False), ["F=0 in a command, but nothing is left of the first burst"]),
    ],
)
def test_command_rules(command: ScsiCommand, sentences: list[str]) -> None:
    scene = Scene().got(command)
    assert [sentence.partition(": ")[2] for sentence in scene.said] == sentences


@pytest.mark.parametrize(
    ("agreed", "command", "sentence"),
    [
        (
            Agreed(immediate_data=False),
            replace(WRITE, data=b"x"),
            "1 bytes of immediate data, but ImmediateData is No",
        ),
        (
            Agreed(first_burst_length=512),
            replace(WRITE, data=bytes(513)),
            "513 bytes of immediate data, but the first burst has 512",
        ),
        (
            Agreed(),
            replace(
                READ, read=False, write=True, cdb=cdbs.write_10(lba=0, blocks=1).ljust(16, b"\0"), data=bytes(516)
            ),
            "516 bytes of immediate data, but the first burst has 512",
        ),
        (Agreed(), replace(WRITE, final=False), "F=0 in a command, but InitialR2T is Yes"),
    ],
)
def test_negotiated_command_rules(agreed: Agreed, command: ScsiCommand, sentence: str) -> None:
    one(Scene(agreed).got(command), sentence)


# --- data ---


def unsolicited(*pieces: tuple[int, int, bool]) -> Iterator[DataOut]:
    """Data-Out with these offsets, lengths and F bits."""
    for data_sn, (offset, length, final) in enumerate(pieces):
        yield DataOut(itt=2, exp_stat_sn=5, data_sn=data_sn, buffer_offset=offset, data=bytes(length), final=final)


OPEN = replace(WRITE, final=False, data=bytes(512))


@pytest.mark.parametrize(
    ("pieces", "sentences"),
    [
        ([(512, 2048, False), (2560, 1536, True)], []),
        ([(512, 3584, False)], ["no F after the last of 3584 bytes"]),
        ([(512, 3000, True)], ["F after 3000 bytes where 3584 were due"]),
        ([(512, 3588, True)], ["3588 bytes where 3584 were due"]),
        ([(0, 3584, True)], ["offset 0 where 512 was due"]),
        ([(512, 0, False)], ["a PDU without data"]),
        ([(512, 512, False), (1536, 2560, False)], ["offset 1536 where 1024 was due"]),
    ],
)
def test_unsolicited_data(pieces: list[tuple[int, int, bool]], sentences: list[str]) -> None:
    scene = Scene().got(OPEN, *unsolicited(*pieces))
    assert [sentence.partition(": unsolicited data: ")[2] for sentence in scene.said] == sentences


def test_unsolicited_data_that_has_no_place() -> None:
    one(Scene().got(WRITE, *unsolicited((0, 512, True))), "unsolicited data that wasn't announced, or after its end")
    late = [*unsolicited((512, 3584, True), (4096, 512, True))][1]
    one(Scene().got(OPEN, *unsolicited((512, 3584, True)), late), "after its end")
    one(Scene().got(*unsolicited((0, 512, True))), "data for a tag that no command has")
    odd = replace(next(unsolicited((512, 3584, True))), lun=b"\0\7" + bytes(6))
    one(Scene().got(OPEN, odd), "unsolicited data with LUN 0007000000000000")


def test_unsolicited_data_comes_in_the_order_of_the_commands() -> None:
    other = replace(OPEN, itt=3, cmd_sn=11)
    data = next(unsolicited((512, 3584, True)))
    assert Scene().got(OPEN, other, data, replace(data, itt=3)).said == []
    scene = Scene().got(OPEN, other, replace(data, itt=3), data)
    one(scene, "unsolicited data before that of itt 0x2 has ended")


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        ({}, []),
        ({"ttt": 78}, ["data for TTT 0x4e, which no R2T has, or after its end"]),
        ({"lun": b"\0\1" + bytes(6)}, ["data for TTT 0x4d with LUN 0001000000000000, not the R2T's"]),
        ({"data_sn": 1}, ["data for TTT 0x4d: DataSN 1 where 0 was due"]),
        ({"buffer_offset": 0}, ["data for TTT 0x4d: offset 0 where 4096 was due"]),
        ({"data": bytes(2048)}, ["data for TTT 0x4d: F after 2048 bytes where 4096 were due"]),
        ({"final": False}, ["data for TTT 0x4d: no F after the last of 4096 bytes"]),
        ({"exp_stat_sn": 9}, ["ExpStatSN 9, but only 4 was sent"]),
    ],
)
def test_solicited_data(change: dict[str, object], sentences: list[str]) -> None:
    scene = Scene().got(WRITE).put(R2T_1).got(replace(DATA, **change))  # type: ignore[arg-type]
    assert [sentence.partition(": ")[2] for sentence in scene.said] == sentences


def test_an_r2t_is_answered_once() -> None:
    one(Scene().got(WRITE).put(R2T_1).got(DATA, DATA), "which no R2T has, or after its end")


def test_data_that_was_in_flight_when_its_task_ended_is_welcome() -> None:
    scene = Scene().got(WRITE).put(R2T_1, replace(GOOD, status=2)).got(DATA)
    assert scene.said == []
    one(scene.got(DATA), "data for a tag that no command has")


# --- the rest ---


@pytest.mark.parametrize(
    ("pdu", "sentence"),
    [
        (NopOut(itt=3, ttt=5, cmd_sn=10, exp_stat_sn=5), "a ping with TTT 0x5"),
        (
            NopOut(ttt=6, immediate=True, cmd_sn=10, exp_stat_sn=5),
            "an answer to a ping with TTT 0x6, which wasn't sent",
        ),
        (NopOut(ttt=5, cmd_sn=10, exp_stat_sn=5), "an answer to a ping that isn't immediate"),
        (
            NopOut(ttt=5, immediate=True, lun=b"\0\1" + bytes(6), cmd_sn=10, exp_stat_sn=5),
            "an answer to a ping with LUN 0001000000000000, not the ping's",
        ),
        (TextRequest(itt=3, cont=True, cmd_sn=10, exp_stat_sn=5), "C=1 with F=1"),
        (TextRequest(itt=3, ttt=8, cmd_sn=10, exp_stat_sn=5), "TTT 0x8 in a request that answers no response"),
        (TaskManagementRequest(itt=3, data=b"x", function=2, cmd_sn=10, exp_stat_sn=5), "a data segment"),
        (
            TaskManagementRequest(itt=3, function=5, referenced_task_tag=1, cmd_sn=10, exp_stat_sn=5),
            "Referenced Task Tag 0x1 in function 5",
        ),
        (
            TaskManagementRequest(itt=3, referenced_task_tag=2, cmd_sn=10, exp_stat_sn=5),
            "ABORT TASK of tag 0x2, which no command has",
        ),
        (LogoutRequest(itt=3, data=b"x", cmd_sn=10, exp_stat_sn=5), "a data segment"),
        (SnackRequest(itt=3, exp_stat_sn=6), "ExpStatSN 6, but only 4 was sent"),
    ],
)
def test_other_rules(pdu: Pdu, sentence: str) -> None:
    ping = NopIn(ttt=5, stat_sn=5, exp_cmd_sn=10, max_cmd_sn=20)
    one(Scene().put(ping).got(pdu), sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lun": b"\0\1" + bytes(6)}, "ABORT TASK with LUN 0001000000000000, not the task's"),
        ({"ref_cmd_sn": 11}, "RefCmdSN 11, but the task's is 10"),
    ],
)
@pytest.mark.parametrize("answered", [False, True])
def test_abort_task_rules(change: dict[str, object], sentence: str, answered: bool) -> None:
    abort = TaskManagementRequest(itt=3, referenced_task_tag=2, ref_cmd_sn=10, cmd_sn=11, exp_stat_sn=5)
    scene = Scene().got(READ)
    if answered:
        scene.put(GOOD)
    one(scene.got(replace(abort, **change)), sentence)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"ttt": 9}, {"lun": b"\0\1" + bytes(6)}])
def test_text_requests_go_on_as_they_were_answered(change: dict[str, object]) -> None:
    request = TextRequest(itt=3, cmd_sn=10, exp_stat_sn=5)
    response = TextResponse(itt=3, final=False, ttt=8, stat_sn=5, exp_cmd_sn=11, max_cmd_sn=20)
    scene = Scene().got(request).put(response)
    one(scene.got(replace(request, **{"ttt": 8, "cmd_sn": 11, **change})), "but the response had 0x8 and 0000")  # type: ignore[arg-type]


def test_what_is_allowed() -> None:
    ping = NopIn(ttt=5, stat_sn=5, exp_cmd_sn=10, max_cmd_sn=20)
    text = TextRequest(itt=3, cmd_sn=10, exp_stat_sn=5)
    scene = Scene().put(ping).got(NopOut(ttt=5, immediate=True, cmd_sn=10, exp_stat_sn=5))
    scene.got(NopOut(immediate=True, cmd_sn=10, exp_stat_sn=5))
    scene.got(text).put(TextResponse(itt=3, final=False, ttt=8, stat_sn=5, exp_cmd_sn=11, max_cmd_sn=20))
    scene.got(replace(text, ttt=8, cmd_sn=11)).put(TextResponse(itt=3, stat_sn=6, exp_cmd_sn=12, max_cmd_sn=20))
    scene.got(replace(READ, itt=3, cmd_sn=12))
    assert scene.said == []


def test_nothing_after_a_logout() -> None:
    logout = LogoutRequest(itt=3, cmd_sn=10, exp_stat_sn=5)
    scene = Scene().got(logout)
    one(scene.got(READ), "came after a logout")
    assert Scene().got(logout).put(LogoutResponse(itt=3, stat_sn=5)).said == []


def test_old_tasks_are_forgotten_in_the_end() -> None:
    scene = Scene()
    number: Callable[[int], ScsiCommand] = lambda n: replace(READ, itt=100 + n, cmd_sn=10 + n)  # noqa: E731
    scene.validator.sent(NopIn(stat_sn=5, exp_cmd_sn=10, max_cmd_sn=10000))
    for index in range(300):
        scene.got(number(index)).put(replace(GOOD, itt=100 + index, exp_cmd_sn=11 + index, max_cmd_sn=10000))
    assert scene.said == []
    abort = TaskManagementRequest(itt=3, referenced_task_tag=100, ref_cmd_sn=10, cmd_sn=310, exp_stat_sn=5)
    one(scene.got(abort), "which no command has")
