"""Read-ahead at work: ranges that the policy asked for become device reads in the background.

Ranges wait in a queue, not commands: a command is made when a worker is free to send it, from what is then still
missing. So a demand never waits for a read-ahead that hasn't been sent, what the reader has passed by itself isn't
read again, and slots are taken no sooner than needed. Once sent, a read-ahead is a fill like any other: whoever
needs one of its blocks waits for it.

A read-ahead that fails leaves its blocks as they were, and nobody hears of it: the reader who needs one of them asks
for exactly what he needs, and gets exactly his own error.
"""

from collections import deque
from collections.abc import Callable

import trio

from iscsifuse.cache.extent import Transfer, next_run, span
from iscsifuse.cache.filling import Filler
from iscsifuse.cache.pacing import Pacer
from iscsifuse.cache.readahead import ReadAhead, Stream
from iscsifuse.cache.workers import Workers
from iscsifuse.cache.writeback import LARGEST_TRANSFER

__all__ = ["Prefetcher"]


class _Range:
    __slots__ = ("position", "stop", "stream")

    def __init__(self, stream: Stream, position: int, stop: int) -> None:
        self.stream = stream
        self.position = position
        self.stop = stop


class Prefetcher:
    """The read-ahead of one LUN.

    Args:
        policy: is told of failures.
        filler: of the LUN.
        depth: commands in flight at once.
        block_count: how many blocks the device has now.
        pacer: says how much may be under way, and learns from it.

    Attributes:
        commands: device reads that were started.
        arrived: bytes that they brought.
        failures: how many of them failed.
    """

    def __init__(
        self,
        policy: ReadAhead,
        *,
        filler: Filler,
        depth: int,
        block_count: Callable[[], int],
        pacer: Pacer,
    ) -> None:
        self.commands = self.arrived = self.failures = 0
        self._policy = policy
        self._geometry = filler.geometry
        self._filler = filler
        self._block_count = block_count
        self._ranges: deque[_Range] = deque()
        self._pacer = pacer
        self._workers = Workers(depth, take=self._take, work=self._read)

    def start(self, nursery: trio.Nursery) -> None:
        """Read ahead in this nursery from now on; see `Workers.start`."""
        self._workers.start(nursery)

    def stop(self) -> None:
        """No more read-ahead."""
        self._ranges.clear()

    def submit(self, stream: Stream, start: int, stop: int) -> None:
        """Read the bytes ``start`` to ``stop - 1`` ahead, as far as there is room."""
        self._ranges.append(_Range(stream, start, stop))
        if len(self._ranges) == 1:
            self._workers.kick()

    def _take(self) -> tuple[Stream, Transfer] | None:
        """The next command; its blocks are ``filling`` from now on.

        None also where enough is under way: each worker that ends a command comes back for the next one.
        """
        block = self._geometry.block_length
        while self._ranges and self._pacer.has_room:
            work = self._ranges[0]
            # In blocks: from the first that no demand has begun with; the policy's end may lie inside a block.
            position = -(-max(work.position, work.stream.end) // block)
            stop = min(-(-work.stop // block), self._block_count())
            transfer = None
            if not work.stream.dead:
                transfer, position = self._next(work.stream, position, stop)
            work.position = position * block
            if work.stream.dead or position >= stop:
                self._ranges.popleft()
            if transfer is not None:
                if self._ranges:
                    self._workers.kick()
                return work.stream, transfer
        return None

    def _next(self, stream: Stream, position: int, stop: int) -> tuple[Transfer | None, int]:
        """One command from the blocks ``position`` to ``stop - 1``, and where to go on."""
        geometry = self._geometry
        transfer: Transfer | None = None
        while position < stop:
            index, first = divmod(position, geometry.blocks)
            extent = self._filler.extents.get(index) or self._filler.allocate(index, ahead=True)
            if extent is None:
                self._policy.refused(stream, position * geometry.block_length)
                return transfer, stop
            last = min(geometry.blocks, stop - index * geometry.blocks)
            missing = span(first, last) & ~(extent.valid | extent.filling)
            if not missing:
                if transfer is not None:
                    break
                position += last - first
                continue
            begin, end = next_run(missing, 0)
            if transfer is None:
                end = min(end, begin + max(1, LARGEST_TRANSFER // geometry.block_length))
                transfer = Transfer.of(geometry, extent, begin, end)
            else:
                room = LARGEST_TRANSFER - (transfer.end - transfer.begin)
                end = min(end, begin + room // geometry.block_length)
                if end <= begin or not transfer.add(geometry, extent, begin, end):
                    break
            extent.filling |= transfer.parts[-1][1]
            position = index * geometry.blocks + end
            if end < last:
                break
        return transfer, position

    async def _read(self, job: tuple[Stream, Transfer]) -> None:
        stream, transfer = job
        size = transfer.end - transfer.begin
        self.commands += 1
        well = False
        begun = self._pacer.begin(size)
        try:
            await self._filler.fill(transfer)
            well = True
            self.arrived += size
        except Exception:
            self.failures += 1
            self._policy.failed(stream)
        finally:
            self._pacer.end(size, begun, well=well)
