"""What a LUN looks like to a file system, cached or not: the part that is common to both.

That is: handles and the errors they are told of, and flushing. A flush is shared: a caller needs one that *started*
after his own data had reached the device, so he joins the next one, never one that is already running.
"""

import abc
from collections.abc import Callable

import trio

from iscsifuse.cache.device import BlockDevice
from iscsifuse.cache.errseq import ErrorSequence, Handle, write_back_error
from iscsifuse.cache.settings import CacheStats
from iscsifuse.errors import WriteBackError

__all__ = ["BlockFile", "Buffer"]

Buffer = memoryview | bytes | bytearray

_MOST_LOSSES = 8


class BlockFile(abc.ABC):
    """One LUN as a file of bytes. All methods belong to one trio thread.

    Errors that nobody waited for (of write-back, of a flush) are told to each handle that is open at the time, by its
    next ``drain`` and by its next ``sync``: a drain hides nothing from a sync (see `errseq`).
    """

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._block_length = device.block_length
        self._errors = ErrorSequence()
        self._flushes = 0  # started
        self._flushed = 0  # the latest that has ended, well or not
        self._flushing: trio.Event | None = None
        self._losses = 0

    @property
    def size(self) -> int:
        """Bytes in the device, now."""
        return self._device.block_count * self._block_length

    def open(self) -> Handle:
        """A new handle, for ``drain`` and ``sync``; it needn't be closed."""
        return self._errors.open()

    def report(self, error: Exception) -> None:
        """Record an error of earlier writes that the device learnt of later.

        A deferred error, or volatile data lost with the power: every handle's next ``drain`` and ``sync`` fail.
        """
        self._errors.record(error if isinstance(error, WriteBackError) else write_back_error(error))

    def check(self, handle: Handle | None = None) -> None:
        """Tell what is known by now; waits for nothing.

        Args:
            handle: as for ``drain``.

        Raises:
            WriteBackError: the device failed something that was acknowledged.
        """
        self._errors.check(handle or self._errors.open())

    def on_error(self, callback: Callable[[], None]) -> None:
        """Have a function called whenever something that was acknowledged turns out not to be on the disk.

        For whoever keeps copies of what was written: the disk has something else.
        """
        self._errors.on_record = callback

    @abc.abstractmethod
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do the background work until cancelled.

        It is the owner's duty to ``drain`` or ``sync`` first: what is still dirty when this is cancelled is lost,
        and recorded as an error. Without a running ``run`` there is no read-ahead, and writes go through.
        """

    def peek(self, offset: int, length: int) -> Buffer | None:  # noqa: ARG002 - for who can
        """What ``read`` would return, where all of it is in memory; None where one would have to wait, or might.

        A plain call: for whoever wants to be spared the cost of an await. Counts as a read if it isn't None.
        """
        return None

    @abc.abstractmethod
    async def read(self, offset: int, length: int) -> Buffer:
        """Read ``length`` bytes from ``offset``, fewer only at the end of the device (none beyond it).

        Args:
            offset: of the first byte, not negative.
            length: bytes.

        Returns:
            The bytes. **A memoryview is a slice of the cache itself: it is valid until the caller's next
            checkpoint**, must not be written to, and is to be copied by whoever needs it longer.

        Raises:
            IscsifuseError: a block of this very range can't be read.

        Cancellation: leaves nothing behind; others who wait for the same blocks read them themselves. Not a
        checkpoint where the bytes are in memory.
        """

    @abc.abstractmethod
    async def write(self, offset: int, data: Buffer) -> int:
        """Write bytes at ``offset``; cut at the end of the device.

        Args:
            offset: of the first byte, not negative.
            data: bytes (format ``B``); must not change until this returns.

        Returns:
            How many bytes were written.

        Raises:
            EndOfDeviceError: ``offset`` is at or beyond the end.
            IscsifuseError: the write failed (write-through), or a block that it covers in part can't be read.

        Cancellation: any part of the data may have been written. Not a checkpoint where the data were just buffered.
        """

    @abc.abstractmethod
    def invalidate(self) -> None:
        """The medium or its capacity changed: forget everything that was read. Dirty data stays.

        What was written, but not flushed, where a disk was that has shrunk is gone: an error of the next ``sync``.
        """

    def lose(self) -> None:
        """The device may have lost what was written to it and not flushed (power lost, reset).

        What is still in memory is written again; what isn't is an error of the next ``sync``. A plain call, so that
        it can be made before anything else reaches the device.
        """
        self._losses += 1
        self._lose()

    def _lose(self) -> None:  # noqa: B027 - for who has something to lose
        """See ``lose``."""

    @abc.abstractmethod
    def stats(self) -> CacheStats:
        """Counters, and the present state."""

    async def drain(self, handle: Handle | None = None) -> None:
        """Wait until everything that was written before this call is on the device (has its status).

        Args:
            handle: who asks. None: somebody with no handle, who is told of what nobody has been told of yet.

        Raises:
            WriteBackError: a write failed that this handle hasn't been told of. Its next ``sync`` tells that, too.

        Cancellation: the write-back goes on.
        """
        handle = handle or self._errors.open()
        since = self._errors.count
        await self._drain()
        self._errors.check(handle, since=since, drain=True)

    async def sync(self, handle: Handle | None = None) -> None:
        """Wait until everything that was written before this call is on stable storage.

        Args:
            handle: as for ``drain``.

        Raises:
            WriteBackError: a write failed that no ``sync`` of this handle has told of, or the flush did.

        Cancellation: the write-back goes on; a flush may have happened or not.
        """
        handle = handle or self._errors.open()
        since = self._errors.count
        for _ in range(_MOST_LOSSES):
            losses = self._losses
            await self._drain()
            self._errors.check(handle, since=since)
            await self._flush()
            self._errors.check(handle, since=since)
            if losses == self._losses:
                return
            # The device lost something meanwhile, perhaps before the flush: that is dirty again.
        raise WriteBackError("the disk was reset again and again before what it was given could be made durable")

    @abc.abstractmethod
    async def _drain(self) -> None:
        """Wait until everything that is dirty now is on the device, or has failed and is recorded."""

    async def _flush(self) -> None:
        """Wait until a flush that starts from now on has ended; its failure is recorded.

        No await lies between looking at ``_flushing`` and setting it or waiting for it: one flush runs at a time.
        """
        wanted = self._flushes + 1
        while self._flushed < wanted:
            if self._flushing is not None:
                await self._flushing.wait()
                continue
            done = self._flushing = trio.Event()
            number = self._flushes = self._flushes + 1
            well = False
            self._flush_begins()
            try:
                await self._device.flush()
                self._flushed = number
                well = True
            except Exception as error:
                self._flushed = number
                self._errors.record(write_back_error(error, what="the disk's write cache could not be flushed"))
            finally:  # Cancelled: not ended; the next in line flushes himself.
                self._flush_ends(well=well)
                self._flushing = None
                done.set()

    def _flush_begins(self) -> None:  # noqa: B027
        """The device is flushed: what has reached it by now will be covered."""

    def _flush_ends(self, *, well: bool) -> None:  # noqa: B027
        """That flush has ended, and covers what it should, or not."""
