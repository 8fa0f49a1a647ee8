"""One mount, from the first login to the last word: the life of a daemon.

::

    assembling ──> mounted ──(unmounted by somebody)──────────────────> writing back ──> logging out
        │             │                                                  ^
        │             └──(signal)──> unmounting politely ──(done)────────┤
        │                                │                               │
        │                                └──(busy)──> closing ───────────┘  no new opens; then cut off
        └──(signal, error)──> nothing was mounted; log out

Rules:

* Nothing stays mounted, whatever happens: from the moment that ``attach`` has returned, ``_detach`` is in a finally.
* An unmount by anybody (umount, fusermount3) ends ``pyfuse3.main``, which is the normal end.
* Write-back comes before logout, and has a deadline. A second signal makes the deadline now, if it is one that
  somebody means (``_Stop``). Nothing may skip it: a task of ours that breaks down is like a signal (``breakdown``).
* Programs that keep a mount busy may write until they are cut off, also while their disks are written back. So those
  that were written to meanwhile are written back once more after that, when nobody can.
* Never a FUSE request of our own from the thread that serves them. Invalidations go through a worker thread: the
  kernel lets them wait for pages that a pending read holds. What that means for the end: see ``invalidation``.
"""

import dataclasses
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Set
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from iscsifuse.cache import Handle
from iscsifuse.errors import IscsifuseError, MountError, UsageError, WriteBackError
from iscsifuse.initiator.groups import plain_errors
from iscsifuse.mount.assembly import Assembly
from iscsifuse.mount.attach import attach, unmount
from iscsifuse.mount.channel import Channel
from iscsifuse.mount.crew import workers_are_fibres
from iscsifuse.mount.invalidation import Invalidations
from iscsifuse.mount.kernel import abort_connection, keep_awake, prepare_process, tune_mount
from iscsifuse.mount.mountinfo import MountEntry, find_mount, is_dead, read_mounts
from iscsifuse.mount.operations import DiskOperations
from iscsifuse.mount.plan import MountPlan
from iscsifuse.mount.report import StatusReport
from iscsifuse.mount.tree import Disk, Permissions, Tree

__all__ = ["EXIT_FAILURE", "EXIT_INTERRUPTED", "EXIT_SOME", "Assemble", "build_tree", "serve"]

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 8
EXIT_FAILURE = 32
EXIT_SOME = 64

WORKERS = 128
"""pyfuse3's tasks, all of which stay once they are there: requests that can be under way at once."""
_SAME_MOMENT = 1.0
"""Seconds within which several signals are one request to end."""
_CONNECT_LIMIT = 30.0
_POLITE_LIMIT = 10.0
_STOP_LIMIT = 60.0
"""Seconds for the last write-back after a signal. systemd's patience is 90 s."""
_LAST_LIMIT = 5.0
"""Seconds, at least, for what was written to a busy mount meanwhile."""
_RELEASE_LIMIT = 5.0
"""Seconds for the kernel to leave off waiting in our name."""
_ENDLESS = 600.0
"""Stands for a reconnect_timeout that has no end, once somebody wants to go."""
_SLACK = 10.0

Assemble = Callable[[MountPlan], AbstractAsyncContextManager[Assembly]]


def build_tree(plan: MountPlan, assembly: Assembly, *, on_file: bool) -> Tree:
    """The tree that a URL stands for.

    Args:
        plan: says whether the URL names a portal or a target.
        assembly: the disks.
        on_file: the mount point is a regular file.

    Raises:
        UsageError: several disks for one file.
        FormatError: a target's name that can't be shown.
    """
    permissions = Permissions(
        uid=os.getuid() if plan.uid is None else plan.uid,
        gid=os.getgid() if plan.gid is None else plan.gid,
        mode=plan.mode,
        shared=plan.allow_other,
    )
    if not on_file:
        return Tree.of_directory(assembly.disks, permissions, by_target=plan.target_name is None)
    if len(assembly.disks) != 1:
        raise UsageError(f"{plan.mountpoint} is a file, so the URL has to name one LUN")
    return Tree.of_file(assembly.disks[0], permissions)


class _Stop:
    """What signals ask for: the first one, an end; another one, that it be now, whatever is lost by that.

    That is for people to say, who are impatient. A session or a machine that ends sends several signals at once, and
    hangs up besides (SIGTERM and SIGHUP of systemd; SIGHUP of the shell, and of the kernel). So a SIGHUP never
    hurries, nor does what comes in the same moment as the first SIGINT or SIGTERM.
    """

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.hurry = trio.Event()
        self.mounted = False

    async def watch(self, signals: AsyncIterator[int], whole: trio.CancelScope) -> None:
        """Before anything is mounted a signal ends it all; then the first one unmounts, the second one hurries."""
        patient_until: float | None = None
        async for number in signals:
            if not self.asked.is_set():
                log.info("%s: ending", signal.Signals(number).name)
                self.asked.set()
            if number != signal.SIGHUP:
                now = trio.current_time()
                if patient_until is None:
                    patient_until = now + _SAME_MOMENT
                elif now >= patient_until and not self.hurry.is_set():
                    log.warning("%s again: what isn't written back is given up", signal.Signals(number).name)
                    self.hurry.set()
            if not self.mounted:
                whole.cancel()


async def serve(plan: MountPlan, *, ready: Callable[[bool], None], assemble: Assemble) -> int:
    """Mount, serve until the end, write back, log out.

    Args:
        plan: what to mount.
        ready: called once the mount is usable, with whether it is partial. What it raises ends the mount.
        assemble: makes the disks.

    Returns:
        Bits of mount(8): 0; EXIT_INTERRUPTED, where a signal came before there was a mount; EXIT_FAILURE, where
        something could not be written back.

    Raises:
        IscsifuseError: nothing was mounted, or the mount broke down. Nothing is mounted any more.
    """
    # Resolved now: once it is mounted, looking at it would be a request to ourselves.
    plan = dataclasses.replace(plan, mountpoint=Path(os.path.realpath(plan.mountpoint)))  # noqa: ASYNC240
    prepare_process()
    stop = _Stop()
    code = EXIT_INTERRUPTED
    with (
        plain_errors(),
        keep_awake(),
        trio.open_signal_receiver(*_signals()) as signals,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop.watch, signals, nursery.cancel_scope)
            async with assemble(plan) as assembly:
                code = await _Mount(plan, assembly, stop).run(ready)
            nursery.cancel_scope.cancel()
    return code


def _signals() -> list[signal.Signals]:
    """The signals that end a mount; not those that whoever started us had us ignore (nohup), but always SIGTERM."""
    asked = (number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN)
    return [signal.SIGTERM, *asked]


class _Mount:
    def __init__(self, plan: MountPlan, assembly: Assembly, stop: _Stop) -> None:
        self._plan = plan
        self._assembly = assembly
        self._stop = stop
        self._tree = build_tree(plan, assembly, on_file=plan.mountpoint.is_file())
        patience = plan.session.reconnect_timeout
        self._patience = (patience if patience >= 0 else _ENDLESS) + plan.session.timeout + _SLACK
        self._report = StatusReport(
            plan=plan,
            tree=self._tree,
            sessions=assembly.sessions,
            statistics=assembly.statistics,
            stop_timeout=self._patience + _SLACK,
            details=assembly.details,
        )
        self._operations = DiskOperations(
            self._tree,
            status=self._report.as_json,
            read_only=not plan.read_write,
            direct_io=plan.direct_io,
        )
        # Opened before anybody writes, so it is told of every error that happens from now on.
        self._keepers: dict[Disk, Handle] = {disk: disk.file.open() for disk in assembly.disks if disk.writable}
        self._inodes = {node.disk: node.inode for node in self._tree.disk_nodes() if node.disk is not None}
        self._main = trio.CancelScope()
        self._ended = trio.Event()
        self._breakdown = assembly.breakdown
        self._invalidations = Invalidations()
        self._device = ""
        self._lost: list[str] = []  # sentences
        self._reasons: set[tuple[Disk, str]] = set()  # of these
        for disk, inode in self._inodes.items():
            # The kernel has the pages of a write that failed afterwards, and would show them as the disk's.
            disk.file.on_error(partial(self._invalidations.forget, inode))

    async def run(self, ready: Callable[[bool], None]) -> int:
        plan = self._plan
        attach(self._operations, plan)
        self._stop.mounted = True
        try:
            with plain_errors():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._serve_requests)
                    entry = await self._connected()
                    self._device = entry.device
                    tune_mount(entry, read_ahead=0 if plan.direct_io else plan.read_ahead)
                    channel = Channel(entry.device, status=self._report.document, may_listen=self._may_listen)
                    nursery.start_soon(channel.serve)
                    nursery.start_soon(self._invalidate)
                    self._assembly.on_change = self._note_change
                    self._assembly.on_new = self._note_new
                    for disk in self._assembly.disks:
                        if disk not in self._inodes:  # It came while this was being mounted.
                            self._note_new(disk)
                    gc.freeze()  # What is there now stays: the collector needn't look at it again and again.
                    ready(self._assembly.partial)
                    errors = await self._until_the_end(channel)
                    nursery.cancel_scope.cancel()
        finally:
            self._detach()
        self._breakdown.check()
        return EXIT_FAILURE if errors else 0

    # -- serving ----------------------------------------------------------------------------------------------------

    async def _serve_requests(self) -> None:
        try:
            with self._breakdown.contained(), self._main:
                await _serve_kernel(self._operations)
        finally:
            self._ended.set()

    async def _invalidate(self) -> None:
        with self._breakdown.contained():
            await self._invalidations.run()

    async def _connected(self) -> MountEntry:
        """Wait until the kernel has shaken hands; the mount as the mount table has it."""
        with trio.move_on_after(_CONNECT_LIMIT):
            while not self._operations.connected.is_set():
                if self._ended.is_set():
                    break
                await _first_of(self._operations.connected, self._ended)
        entry = find_mount(self._plan.mountpoint)
        broken = self._breakdown.error
        if broken is not None or not self._operations.connected.is_set() or entry is None:
            raise MountError(f"{self._plan.mountpoint}: the kernel did not take up the mount") from broken
        return entry

    def _may_listen(self, uid: int) -> bool:
        return self._plan.allow_other or uid in (0, os.geteuid(), self._tree.permissions.uid)

    def _note_change(self, disk: Disk) -> None:
        log.warning("LUN %d of %s has changed; it has %d bytes now", disk.lun, disk.target, disk.file.size)
        inode = self._inodes.get(disk)
        if inode is not None:
            self._invalidations.forget(inode)

    def _note_new(self, disk: Disk) -> None:
        try:
            place, node = self._tree.add(disk)
        except IscsifuseError as error:
            log.warning("LUN %d of %s can't be shown: %s", disk.lun, disk.target, error)
            return
        self._inodes[disk] = node.inode
        disk.file.on_error(partial(self._invalidations.forget, node.inode))
        if disk.writable:
            self._keepers[disk] = disk.file.open()
        self._invalidations.forget(place.inode)
        self._invalidations.forget(place.inode, node.name.encode())

    # -- ending -----------------------------------------------------------------------------------------------------

    async def _until_the_end(self, channel: Channel) -> list[str]:
        await _first_of(self._ended, self._stop.asked, self._breakdown.happened)
        patience = self._patience
        if not self._ended.is_set():
            patience = min(patience, _STOP_LIMIT)
            await self._unmount_politely()
        if self._ended.is_set():
            channel.stop_listening()
        end = trio.current_time() + patience
        late = await self._write_back(patience)
        self._main.cancel()
        await self._ended.wait()
        self._invalidations.end()
        if self._invalidations.under_way:
            with self._breakdown.contained():
                await self._release()
        # Once more: now nobody can write any more. See the module.
        late |= await self._write_back(max(_LAST_LIMIT, end - trio.current_time()), without=late)
        self._tell_the_rest(late)
        await channel.say_farewell(self._lost)
        return self._lost

    def _tell(self, disk: Disk, error: Exception) -> None:
        """Something of a disk is lost: the log has it now, and the farewell later. Once for each reason."""
        reason = (disk, str(error.__cause__ or error))
        if reason not in self._reasons:
            self._reasons.add(reason)
            self._lost.append(f"LUN {disk.lun} of {disk.target}: {error}")
            log.error("%s", self._lost[-1])

    async def _release(self) -> None:
        """Nobody answers reads any more: let nobody wait for that, and for a page that such a read holds.

        See ``invalidation``. Whoever may not abort the connection (neither root, nor fusectl's to use) serves it a
        little longer: every read and write is an error.
        """
        if self._abort():
            return
        self._operations.refuse_all()
        with trio.move_on_after(_RELEASE_LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_serve_kernel, self._operations)
                await self._invalidations.wait_done()
                nursery.cancel_scope.cancel()

    async def _unmount_politely(self) -> None:
        """What umount(8) does: the kernel writes back what it has, and no more requests come. Or it is busy."""
        mountpoint = str(self._plan.mountpoint)
        problem: Exception | None = None

        def try_to() -> None:
            if self._mount_entry() is None:
                raise MountError(f"{mountpoint} isn't the mount it was")
            unmount(mountpoint)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_after, self._stop.hurry, nursery.cancel_scope)
            with trio.move_on_after(_POLITE_LIMIT) as limit:
                try:
                    await trio.to_thread.run_sync(try_to, abandon_on_cancel=True)
                    await self._ended.wait()
                except Exception as error:  # Also that there can't be one more thread. Write-back has to follow.
                    problem = error
            nursery.cancel_scope.cancel()
        if self._ended.is_set():
            return
        self._operations.closing = True
        reason = "does not come to rest" if limit.cancelled_caught else str(problem or "interrupted again")
        log.warning("%s; programs that still use it will get errors", reason)

    async def _write_back(self, patience: float, *, without: Set[Disk] = frozenset()) -> set[Disk]:
        """Bring everything to stable storage, and tell what couldn't be.

        Args:
            patience: seconds.
            without: disks of which it is known that they take too long.

        Returns:
            The disks that took too long.
        """
        waiting = set(self._operations.unsynced()) - without

        async def one(disk: Disk) -> None:
            # The first error may be an old one, or of one block: everything else is still to be flushed.
            for _ in range(2):
                try:
                    await self._operations.sync(disk, self._keepers[disk])
                except WriteBackError as error:
                    self._tell(disk, error)
                    continue
                except IscsifuseError as error:
                    self._tell(disk, error)
                except Exception as error:
                    log.exception("writing back LUN %d of %s failed unexpectedly", disk.lun, disk.target)
                    self._tell(disk, WriteBackError(repr(error)))
                break
            waiting.discard(disk)

        with trio.move_on_after(patience):
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as disks:
                    nursery.start_soon(_cancel_after, self._stop.hurry, nursery.cancel_scope)
                    for disk in list(waiting):
                        disks.start_soon(one, disk)
                nursery.cancel_scope.cancel()
        for disk in waiting:
            lost = disk.file.stats().dirty_bytes
            self._tell(disk, WriteBackError(f"not everything could be written back in time; {lost} bytes are lost"))
        return waiting

    def _tell_the_rest(self, late: Set[Disk]) -> None:
        """What the other disks failed before a later fsync that was fine: whoever unmounts is told of it, too."""
        for disk in self._keepers.keys() - late:
            try:
                disk.file.check(self._keepers[disk])
            except IscsifuseError as error:
                self._tell(disk, error)

    def _detach(self) -> None:
        """Whatever is still mounted goes; whoever still waits for an answer gets an error."""
        if self._invalidations.under_way:
            # A thread is inside libfuse, so its session must not be destroyed; the process ends soon anyway.
            self._abort()
        else:
            # libfuse unmounts whatever is there now. Programs that still have ours open are cut off in any case.
            try:
                is_there = not self._device or self._mount_entry() is not None
            except OSError as error:
                log.warning("can't look what is mounted: %s", error)
                is_there = True
            pyfuse3.close(unmount=is_there)
        # It may have been moved; and libfuse takes a connection that was aborted (/sys/fs/fuse/connections) for an
        # unmounted one.
        for entry in self._reachable():
            if self._invalidations.under_way or is_dead(entry.mountpoint):
                try:
                    unmount(entry.mountpoint, lazy=True)
                except (IscsifuseError, OSError) as error:
                    log.warning("%s", error)

    def _abort(self) -> bool:
        """Abort the connection, if we may; whether that was so."""
        return bool(self._device) and abort_connection(int(self._device.partition(":")[2]), self._mount_entry())

    def _mount_entry(self) -> MountEntry | None:
        """Our mount, if it is still there. It may be the next one already: that one lives."""
        entry = find_mount(self._plan.mountpoint)
        return entry if entry is not None and entry.device == self._device else None

    def _reachable(self) -> list[MountEntry]:
        """The same, wherever it is mounted; but not what another mount covers."""
        try:
            mounts = read_mounts()
        except OSError:
            return []
        ours = (entry for entry in mounts if entry.device == self._device)
        return [entry for entry in ours if find_mount(entry.mountpoint, mounts) is entry]


async def _serve_kernel(operations: DiskOperations) -> None:
    with workers_are_fibres(lambda: operations.moved):
        await pyfuse3.main(min_tasks=WORKERS, max_tasks=WORKERS)


async def _first_of(*events: trio.Event) -> None:
    """Wait until one of the events is set."""
    async with trio.open_nursery() as nursery:
        for event in events:
            nursery.start_soon(_cancel_after, event, nursery.cancel_scope)


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
