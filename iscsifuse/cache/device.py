"""What the cache stands on: a device of blocks, and what a device promises about buffers.

The cache knows no SCSI. It needs three calls, and two promises about memory that make it possible to hand out
slices of the cache's own arena instead of copies:

* when ``read_into`` returns or raises, ``trio.Cancelled`` included, nothing writes into the buffer any more;
* when ``write`` returns or raises, nothing reads from the buffer any more.

A device retries on its own and has a deadline for everything, so that whoever waits for a device call waits for a
bounded time. It may be called by any number of tasks at once; calls for overlapping blocks may be executed in any
order, which is why the cache never has a write in flight together with another transfer of the same block.

Fibres call it, too: so ``read_into`` and ``write`` keep the rule of `iscsifuse.fibres`.
"""

import errno as _errno
from typing import Protocol

from iscsifuse.errors import IscsifuseError

__all__ = ["BlockDevice", "EndOfDeviceError"]


class EndOfDeviceError(IscsifuseError):
    """A write that begins at or beyond the end of the device."""

    errno = _errno.ENOSPC


class BlockDevice(Protocol):
    """A disk, as the cache sees it."""

    @property
    def block_length(self) -> int:
        """Bytes in one logical block (512, 520, 4096 ...); never changes."""
        ...

    @property
    def block_count(self) -> int:
        """Number of logical blocks; may change while mounted (then ``invalidate`` is called)."""
        ...

    @property
    def write_burst(self) -> int:
        """Bytes that the disk takes in one write before more round trips are needed; at least one block."""
        ...

    @property
    def latency(self) -> float:
        """Seconds that its quickest command took, so what each of them takes at least; 0 if that isn't known."""
        ...

    @property
    def volatile(self) -> bool:
        """Whether what was written may be lost with the disk's power until it is flushed."""
        ...

    async def read_into(self, buffer: memoryview, *, lba: int) -> None:
        """Fill the whole buffer from the blocks that begin at ``lba``.

        Args:
            buffer: writable, contiguous, a multiple of ``block_length`` bytes.
            lba: address of the first block.

        Raises:
            IscsifuseError: the read failed; the content of ``buffer`` is undefined.

        Cancellation: nothing writes into ``buffer`` once this has raised.
        """
        ...

    async def write(self, buffer: memoryview, *, lba: int, fua: bool = False) -> None:
        """Write the whole buffer to the blocks that begin at ``lba``; returns with the disk's status.

        Args:
            buffer: contiguous, a multiple of ``block_length`` bytes; must not change until this returns.
            lba: address of the first block.
            fua: past the disk's volatile cache (force unit access).

        Raises:
            IscsifuseError: the write failed; each block holds its old or its new content.

        Cancellation: nothing reads from ``buffer`` once this has raised; each block is old or new.
        """
        ...

    async def flush(self) -> None:
        """Make every completed write durable (SYNCHRONIZE CACHE, where the disk has a volatile cache).

        Raises:
            IscsifuseError: some of the completed writes may not be durable.
        """
        ...
