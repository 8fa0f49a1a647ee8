"""Against a target that plays by the rules, whatever it chooses where they leave it a choice."""

import pytest
from connection_driver import LUN, Driver, pattern, read, write
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.iscsi.parameters import NegotiatedParameters
from iscsifuse.iscsi.pdu import RESERVED_TAG, Pdu
from iscsifuse.iscsi.request import DataOut, ScsiCommand
from iscsifuse.iscsi.response import R2T, DataIn, ScsiResponse
from iscsifuse.iscsi.serial import add
from iscsifuse.iscsi.tasks import Task

pytestmark = pytest.mark.usefixtures("both_ways")

FIRST = 0xFFFFFFFE


class HonestTarget:
    """Puts Data-Out together as RFC 7143 §11.7 says, and is offended by everything else."""

    def __init__(self, p: NegotiatedParameters) -> None:
        self._parameters = p
        self.disks: dict[int, bytearray] = {}
        self.have: dict[int, set[int]] = {}
        self._open: dict[tuple[int, int], tuple[int, int, int | None]] = {}  # DataSN, offset, end (None: free)

    def take(self, pdu: Pdu) -> None:
        p = self._parameters
        assert len(pdu.data) <= p.target_max_recv_data_segment_length
        if isinstance(pdu, ScsiCommand):
            length = pdu.expected_data_transfer_length
            self.disks[pdu.itt] = bytearray(length)
            self.have[pdu.itt] = set()
            assert p.immediate_data or not pdu.data
            assert not p.initial_r2t or pdu.final
            self._keep(pdu, 0)
            if not pdu.final:
                unsolicited = min(p.first_burst_length, length)
                self._open[pdu.itt, RESERVED_TAG] = (0, len(pdu.data), unsolicited)
            elif not p.initial_r2t:
                assert len(pdu.data) == min(p.first_burst_length, length)
            return
        assert isinstance(pdu, DataOut)
        data_sn, offset, end = self._open.pop((pdu.itt, pdu.ttt))
        assert (pdu.data_sn, pdu.buffer_offset, pdu.lun) == (data_sn, offset, LUN)
        self._keep(pdu, offset)
        offset += len(pdu.data)
        assert end is not None
        assert offset <= end
        assert pdu.final == (offset == end)
        if not pdu.final:
            self._open[pdu.itt, pdu.ttt] = (data_sn + 1, offset, end)

    def expect(self, r2t: R2T) -> None:
        end = r2t.buffer_offset + r2t.desired_data_transfer_length
        self._open[r2t.itt, r2t.ttt] = (0, r2t.buffer_offset, end)

    def _keep(self, pdu: Pdu, offset: int) -> None:
        end = offset + len(pdu.data)
        self.disks[pdu.itt][offset:end] = pdu.data
        self.have[pdu.itt].update(range(offset, end))

    @property
    def waits(self) -> bool:
        return bool(self._open)


@pytest.mark.conformance(54)
@pytest.mark.conformance(58)
@pytest.mark.conformance(59)
@given(
    data=st.data(),
    p=st.builds(
        NegotiatedParameters,
        initial_r2t=st.booleans(),
        immediate_data=st.booleans(),
        header_digest=st.booleans(),
        data_digest=st.booleans(),
        first_burst_length=st.integers(1, 300),
        max_burst_length=st.integers(300, 500),
        target_max_recv_data_segment_length=st.integers(1, 400),
    ),
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=3),
    room=st.integers(1, 4),
)
def test_writes_to_an_honest_target(
    data: st.DataObject, p: NegotiatedParameters, lengths: list[int], room: int
) -> None:
    d = Driver(p, room=room, cmd_sn=FIRST, stat_sn=0xFFFFFFFF)
    target = HonestTarget(p)
    tasks = [write(length) for length in lengths]
    for task in tasks:
        d.connection.submit(task)
    running: list[Task] = []
    asked: dict[int, int] = {}
    done = 0
    while done < len(tasks):
        for pdu in d.sent():
            if isinstance(pdu, ScsiCommand):
                task = d.connection.tasks[pdu.itt]
                assert task is tasks[done + len(running)]  # in the order of submission
                assert task.cmd_sn == pdu.cmd_sn == add(FIRST, done + len(running))
                running.append(task)
            target.take(pdu)
        assert not target.waits
        assert 0 < len(running) <= room
        task = data.draw(st.sampled_from(running))
        have = target.have[task.itt]
        missing = [offset for offset in range(task.expected) if offset not in have]
        if missing:
            offset = data.draw(st.sampled_from([missing[0], missing[len(missing) // 2]]))
            length = data.draw(st.integers(1, min(p.max_burst_length, task.expected - offset)))
            r2t_sn = asked.get(task.itt, 0)
            asked[task.itt] = r2t_sn + 1
            r2t = R2T(
                itt=task.itt,
                lun=LUN,
                ttt=r2t_sn,
                r2t_sn=r2t_sn,
                buffer_offset=offset,
                desired_data_transfer_length=length,
            )
            target.expect(r2t)
            assert d.give(r2t, max_cmd_sn=add(FIRST, done + room - 1)) == []
        else:
            running.remove(task)
            done += 1
            response = ScsiResponse(itt=task.itt)
            assert d.give(response, max_cmd_sn=add(FIRST, done + room - 1)) == [task]
            assert task.error is None
            assert target.disks[task.itt] == pattern(task.expected)
    assert d.connection.idle


@given(data=st.data(), header_digest=st.booleans(), data_digest=st.booleans())
def test_reads_of_an_honest_target(data: st.DataObject, header_digest: bool, data_digest: bool) -> None:
    """Any number of reads, answered in pieces and interleaved, in any chunks."""
    d = Driver(NegotiatedParameters(header_digest=header_digest, data_digest=data_digest))
    lengths = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=5))
    pairs = [read(length) for length in lengths]
    d.submit(*(task for task, _ in pairs))
    left = dict.fromkeys(range(len(pairs)), 0)
    stream = b""
    order: list[int] = []
    while left:
        index = data.draw(st.sampled_from(sorted(left)))
        task = pairs[index][0]
        whole = pattern(lengths[index])
        start = left[index]
        rest = lengths[index] - start
        size = data.draw(st.integers(min(1, rest), rest))
        end = start + size
        collapsed = end == len(whole) and data.draw(st.booleans())
        sequence = order.count(index)
        stream += d.encoded(
            DataIn(
                itt=task.itt,
                data_sn=sequence,
                buffer_offset=start,
                data=whole[start:end],
                final=collapsed or data.draw(st.booleans()),
                has_status=collapsed,
            )
        )
        order.append(index)
        left[index] = end
        if end == len(whole):
            if not collapsed:
                stream += d.encoded(ScsiResponse(itt=task.itt, exp_data_sn=sequence + 1))
            del left[index]
    cut = data.draw(st.integers(20, 400))
    events = []
    for at in range(0, len(stream), cut):
        events += d.receive(stream[at : at + cut])
    assert len(events) == len(pairs)
    assert {id(event) for event in events} == {id(task) for task, _ in pairs}
    for (task, memory), length in zip(pairs, lengths, strict=True):
        assert task.error is None
        assert memory == pattern(length)
    assert d.connection.idle
