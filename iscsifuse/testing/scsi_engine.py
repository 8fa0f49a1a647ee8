"""A SCSI device server: CDBs against the disks of one target.

A command goes through two doors. :meth:`ScsiEngine.check` is asked when it has arrived: is there such a LUN, does a
unit attention have to be told first, is the operation code known, is the unit ready, may the medium be changed, are
the blocks there? A command that fails here needs no data. :meth:`ScsiEngine.perform` executes it, with all of its
data. What can change in between (the capacity, say) is looked at again.

**Unit attentions.** Each nexus has a queue for each logical unit: what the login put there (power on, nexus loss),
and what the disk's log gained since the nexus last looked. INQUIRY, REPORT LUNS and REQUEST SENSE pass them by; the
last one reads them instead.

**The ledger** says what was executed, in order, and nothing about what was refused at the first door.

Source: SAM-5 §5.14 (unit attention), §5.3 (status); SPC-4 §6; SBC-3 §5.
"""

import hashlib
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from iscsifuse.errors import ParameterDataError
from iscsifuse.scsi import cdb as cdbs
from iscsifuse.scsi import lun as luns
from iscsifuse.scsi.cdb import Opcode, ParsedCdb, ServiceActionIn16
from iscsifuse.scsi.sense import SenseKey
from iscsifuse.scsi.status import Status
from iscsifuse.testing import media, parameter_data
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.lengths import Lengths, lengths
from iscsifuse.testing.outcome import Outcome, SenseError, illegal_request

__all__ = ["LedgerEntry", "ScsiEngine"]

_PASS_ATTENTIONS = frozenset({Opcode.INQUIRY, Opcode.REPORT_LUNS, Opcode.REQUEST_SENSE})
_NO_MEDIUM_NEEDED = _PASS_ATTENTIONS | {
    Opcode.MODE_SENSE_6,
    Opcode.MODE_SENSE_10,
    Opcode.START_STOP_UNIT,
    Opcode.PREVENT_ALLOW_MEDIUM_REMOVAL,
}
_FOR_EVERY_DEVICE = _NO_MEDIUM_NEEDED | {Opcode.TEST_UNIT_READY}
_KNOWN = _FOR_EVERY_DEVICE | {Opcode.READ_CAPACITY_10, Opcode.SERVICE_ACTION_IN_16} | media.HANDLERS.keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """A command that was executed.

    Attributes:
        number: from 0, in the order of execution.
        name: "WRITE(10)".
        lun: number of the logical unit.
        lba: first block, 0 where there is none.
        blocks: how many.
        status: how it ended.
        sha256: of the data that it moved, hexadecimal; empty where the engine doesn't hash.
    """

    number: int
    name: str
    lun: int
    lba: int
    blocks: int
    status: int
    sha256: str = ""


@dataclass(slots=True)
class _Attentions:
    """What a nexus still has to be told of one logical unit."""

    queue: deque[tuple[int, int]]
    read: int


@dataclass(slots=True, kw_only=True)
class ScsiEngine:
    """The disks of a target, and what each nexus knows of them.

    Attributes:
        disks: by LUN.
        ledger: what was executed.
        record: keep a ledger (it grows without end).
        hash_data: put a hash of the data into the ledger.
    """

    disks: dict[int, Disk]
    ledger: list[LedgerEntry] = field(default_factory=list)
    record: bool = True
    hash_data: bool = False
    _attentions: dict[tuple[Hashable, int], _Attentions] = field(default_factory=dict, repr=False)
    _nexuses: set[Hashable] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, disks: Iterable[Disk], *, record: bool = True, hash_data: bool = False) -> "ScsiEngine":
        """An engine for these disks, each under its own ``lun``.

        Raises:
            ValueError: two disks have the same LUN.
        """
        found: dict[int, Disk] = {}
        for disk in disks:
            if found.setdefault(disk.lun, disk) is not disk:
                raise ValueError(f"two disks are LUN {disk.lun}")
        return cls(disks=found, record=record, hash_data=hash_data)

    def login(self, nexus: Hashable, *, attention: tuple[int, int] | None) -> None:
        """A nexus begins: every logical unit has this to tell it first."""
        self._nexuses.add(nexus)
        for number, disk in self.disks.items():
            queue = deque([attention] if attention else [])
            self._attentions[nexus, number] = _Attentions(queue, len(disk.attentions))

    def logout(self, nexus: Hashable) -> None:
        """A nexus ends."""
        self._nexuses.discard(nexus)
        for key in [key for key in self._attentions if key[0] == nexus]:
            del self._attentions[key]

    def reset(self, lun: int) -> None:
        """LOGICAL UNIT RESET: every nexus is told (29/03)."""
        self.disks[lun].attentions.append((0x29, 0x03))

    def replace(self, disk: Disk) -> None:
        """Put a disk under its LUN, new or instead of another: every nexus is told that the list changed (3F/0E)."""
        for other in self.disks.values():
            other.attentions.append((0x3F, 0x0E))
        self.disks[disk.lun] = disk
        for nexus in self._nexuses:
            self._attentions[nexus, disk.lun] = _Attentions(deque([(0x3F, 0x0E)]), len(disk.attentions))

    def remove(self, lun: int) -> None:
        """Take a disk away: every nexus is told that the list changed (3F/0E)."""
        del self.disks[lun]
        for other in self.disks.values():
            other.attentions.append((0x3F, 0x0E))

    def find(self, lun: bytes) -> Disk | None:
        """The disk behind eight bytes of LUN, or None."""
        try:
            number = luns.decode(lun).number
        except ParameterDataError:
            return None
        return None if number is None else self.disks.get(number)

    def lengths(self, *, lun: bytes, cdb: bytes) -> Lengths | None:
        """What a command moves, or None where that isn't known, for want of a logical unit too."""
        disk = self.find(lun)
        if disk is None:
            return None
        try:
            return lengths(cdbs.decode(cdb), block_length=disk.block_length)
        except ParameterDataError:
            return None

    def check(self, *, nexus: Hashable, lun: bytes, cdb: bytes) -> Outcome | None:
        """The first door.

        Args:
            nexus: who asks, as given to :meth:`login`.
            lun: eight bytes.
            cdb: as received.

        Returns:
            How the command ended already, or None where it can be performed.
        """
        disk = self.find(lun)
        try:
            parsed = cdbs.decode(cdb)
            if disk is None:
                if parsed.opcode not in _PASS_ATTENTIONS:
                    raise illegal_request(0x25)
                return None
            if parsed.opcode not in _PASS_ATTENTIONS:
                attention = self._next_attention(nexus, disk)
                if attention is not None:
                    raise SenseError(SenseKey.UNIT_ATTENTION, *attention)
            self._check_command(disk, parsed)
        except ParameterDataError:
            return illegal_request(0x20).outcome()
        except SenseError as error:
            return error.outcome(descriptor=disk is not None and disk.descriptor_sense)
        return None

    def _check_command(self, disk: Disk, cdb: ParsedCdb) -> None:
        if cdb.opcode not in (_KNOWN if disk.is_disk else _FOR_EVERY_DEVICE):
            raise illegal_request(0x20)
        if cdb.opcode not in _NO_MEDIUM_NEEDED:
            _check_ready(disk)
        if cdb.opcode in media.CHANGES_MEDIUM and disk.write_protected:
            raise SenseError(SenseKey.DATA_PROTECT, 0x27)
        if cdb.opcode in media.HANDLERS:
            media.check_range(disk, cdb)

    def perform(self, *, nexus: Hashable, lun: bytes, cdb: bytes, data: media.Data = b"") -> Outcome:
        """The second door: execute a command that :meth:`check` let pass.

        Args:
            nexus: who asks.
            lun: eight bytes.
            cdb: as received.
            data: what the initiator sent for it; fewer bytes than the CDB names where it declared fewer.
        """
        disk = self.find(lun)
        parsed = cdbs.decode(cdb)
        try:
            if disk is None:
                outcome = Outcome(data_in=self._for_nobody(parsed)[: parsed.allocation_length])
            else:
                outcome = Outcome(data_in=self._execute(nexus, disk, parsed, data))
        except SenseError as error:
            outcome = error.outcome(descriptor=disk is not None and disk.descriptor_sense)
        if self.record:
            self._write_down(disk, cdb, parsed, data, outcome)
        return outcome

    def _write_down(
        self, disk: Disk | None, cdb: bytes, parsed: ParsedCdb, data: media.Data, outcome: Outcome
    ) -> None:
        moved = data or outcome.data_in
        self.ledger.append(
            LedgerEntry(
                number=len(self.ledger),
                name=cdbs.name(cdb),
                lun=-1 if disk is None else disk.lun,
                lba=parsed.lba,
                blocks=parsed.blocks,
                status=outcome.status,
                sha256=hashlib.sha256(moved).hexdigest() if self.hash_data else "",
            )
        )

    def executed(self, *names: str) -> list[LedgerEntry]:
        """The part of the ledger that is about commands with these names and ended GOOD."""
        return [entry for entry in self.ledger if entry.name in names and entry.status == Status.GOOD]

    def _for_nobody(self, cdb: ParsedCdb) -> bytes:
        """What a LUN answers behind which there is nothing. Source: SPC-4 §6.6.1, SAM-5 §4.7.4."""
        if cdb.opcode == Opcode.INQUIRY:
            return parameter_data.no_unit()
        if cdb.opcode == Opcode.REPORT_LUNS:
            return parameter_data.report_luns(sorted(self.disks), cdb)
        return illegal_request(0x25).outcome(descriptor=cdb.descriptor).sense

    def _execute(self, nexus: Hashable, disk: Disk, cdb: ParsedCdb, data: media.Data) -> bytes:
        handler = media.HANDLERS.get(cdb.opcode)
        if handler is not None:
            media.check_range(disk, cdb)
            return handler(disk, cdb, data)
        match cdb.opcode:
            case Opcode.INQUIRY:
                answer = parameter_data.inquiry(disk, cdb)
            case Opcode.REQUEST_SENSE:
                answer = self._request_sense(nexus, disk, cdb)
            case Opcode.REPORT_LUNS:
                answer = parameter_data.report_luns(sorted(self.disks), cdb)
            case Opcode.MODE_SENSE_6 | Opcode.MODE_SENSE_10:
                answer = parameter_data.mode_sense(disk, cdb)
            case Opcode.READ_CAPACITY_10:
                return parameter_data.capacity(disk).encode_10()
            case Opcode.SERVICE_ACTION_IN_16 if cdb.service_action == ServiceActionIn16.READ_CAPACITY_16:
                answer = parameter_data.capacity(disk).encode_16()
            case Opcode.SERVICE_ACTION_IN_16 if cdb.service_action == ServiceActionIn16.GET_LBA_STATUS:
                answer = media.get_lba_status(disk, cdb)
            case Opcode.SERVICE_ACTION_IN_16:
                raise illegal_request(0x20)
            case Opcode.START_STOP_UNIT:
                if not cdb.power_condition and not cdb.load_eject:
                    disk.stopped = not cdb.start
                return b""
            case _:  # TEST UNIT READY, PREVENT ALLOW MEDIUM REMOVAL: said all by their status
                return b""
        return answer[: cdb.allocation_length]

    def _request_sense(self, nexus: Hashable, disk: Disk, cdb: ParsedCdb) -> bytes:
        attention = self._next_attention(nexus, disk)
        if attention is not None:
            return SenseError(SenseKey.UNIT_ATTENTION, *attention).outcome(descriptor=cdb.descriptor).sense
        return SenseError(SenseKey.NO_SENSE, 0).outcome(descriptor=cdb.descriptor).sense

    def _next_attention(self, nexus: Hashable, disk: Disk) -> tuple[int, int] | None:
        found = self._attentions.get((nexus, disk.lun))
        if found is None:
            return None
        if found.read < len(disk.attentions):
            found.queue.extend(disk.attentions[found.read :])
            found.read = len(disk.attentions)
        return found.queue.popleft() if found.queue else None


def _check_ready(disk: Disk) -> None:
    if not disk.medium_present:
        raise SenseError(SenseKey.NOT_READY, 0x3A)
    if disk.becoming_ready > 0:
        disk.becoming_ready -= 1
        raise SenseError(SenseKey.NOT_READY, 0x04, 0x01)
    if disk.stopped:
        raise SenseError(SenseKey.NOT_READY, 0x04, 0x02)
