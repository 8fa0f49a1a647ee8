"""Having the kernel forget: pages and attributes of a disk that has changed, names that are there now.

An invalidation is a system call of a worker thread, for it waits for every page that a read holds, until the daemon
has answered that read. At the end of a mount this is a trap: reads aren't answered any more, nothing can kill a
thread that waits so, and as long as it is there the kernel takes the daemon to be alive. All who wait for an answer,
and the thread, would wait for ever, even for a daemon that was killed. So an end that finds one under way ends the
connection first, or answers reads until it is over (see ``filesystem``).
"""

import logging

import pyfuse3
import trio

__all__ = ["Invalidations"]

log = logging.getLogger(__name__)

_PAUSE = 1.0
"""Seconds until the next attempt where this user may have no more threads."""


class Invalidations:
    """What the kernel has to forget, of one mount.

    Invariant: ``under_way`` is true from before a thread enters the kernel until after it has left it; after ``end``
    it doesn't become true again.

    Attributes:
        under_way: whether a thread may wait in the kernel.
    """

    def __init__(self) -> None:
        self.under_way = False
        self._over = False
        # Pages and attributes of an inode; with a name, that there is no such entry.
        self._wanted: set[tuple[int, bytes]] = set()
        self._news = trio.Event()
        self._done = trio.Event()  # replaced when one begins

    def forget(self, inode: int, name: bytes = b"") -> None:
        """Have the kernel forget an inode's pages and attributes, or an entry of a directory, soon.

        After ``end`` this does nothing: the mount goes, and all of that with it.
        """
        if not self._over:
            self._wanted.add((inode, name))
            self._news.set()

    def end(self) -> None:
        """No thread is to enter the kernel any more: nobody serves what it might wait for."""
        self._over = True
        self._wanted.clear()
        self._news.set()

    async def run(self) -> None:
        """Carry out what is wanted, until ``end``.

        Cancellation: at once; the thread is left alone, and ``under_way`` stays true.
        """
        while not self._over:
            await self._news.wait()
            self._news = trio.Event()
            while self._wanted:
                wanted = self._wanted.pop()
                if not await self._carry_out(*wanted):
                    self.forget(*wanted)
                    await trio.sleep(_PAUSE)

    async def _carry_out(self, number: int, name: bytes) -> bool:
        """Have the kernel forget one thing; whether there was a thread for that."""
        inode = pyfuse3.InodeT(number)
        started = False

        def job() -> None:
            nonlocal started
            started = True
            if name:
                pyfuse3.invalidate_entry(inode, pyfuse3.FileNameT(name))
            else:
                pyfuse3.invalidate_inode(inode)

        self.under_way = True
        self._done = trio.Event()
        try:
            await trio.to_thread.run_sync(job, abandon_on_cancel=True)
        except OSError as error:
            # ENOENT: the kernel doesn't know the file, so there is nothing to drop.
            log.debug("invalidate %s of inode %d: %s", name, inode, error)
        except RuntimeError as error:
            self._left()
            if started:
                raise
            log.warning("the kernel still remembers inode %d as it was: %s", inode, error)
            return False
        except Exception:
            self._left()
            raise
        self._left()
        return True

    def _left(self) -> None:
        self.under_way = False
        self._done.set()

    async def wait_done(self) -> None:
        """Wait until the one that is under way has ended."""
        await self._done.wait()
