"""Who goes through the kernel's page cache; what the kernel makes of it is in test_mount_page_cache.py."""

import os

import pytest
from mount_fakes import MemoryFile

from iscsifuse.cache.distance import NEAR
from iscsifuse.mount.handles import DiskUse

READER, WRITER, BOTH = os.O_RDONLY, os.O_WRONLY, os.O_RDWR


def use_of(file: MemoryFile | None = None, *, page_cache: bool = True, release: str = "6.18.44") -> DiskUse:
    return DiskUse(file or MemoryFile(), page_cache=page_cache, release=release)


@pytest.mark.parametrize(
    ("flags", "past"),
    [
        (READER, False),
        (BOTH, False),
        (WRITER, True),
        (WRITER | os.O_APPEND | os.O_SYNC, True),
        (WRITER | os.O_DIRECT, False),  # the kernel takes care of the page cache then
        (READER | os.O_DIRECT, False),
    ],
)
def test_who_only_writes_goes_past_it(flags: int, past: bool) -> None:
    opened = use_of().open(flags)
    assert (opened.past, opened.writable, opened.direct) == (
        past,
        flags & os.O_ACCMODE != READER,
        bool(flags & os.O_DIRECT),
    )
    assert opened.keep_cache


@pytest.mark.parametrize("before", [READER, BOTH, READER | os.O_DIRECT])
def test_nobody_writes_past_those_who_go_through(before: int) -> None:
    use = use_of()
    first = use.open(before)
    second = use.open(WRITER)
    assert (second.past, second.keep_cache) == (False, True)
    use.close(first)
    assert not use.open(WRITER).past  # the second is still there
    use = use_of()
    use.close(use.open(before))
    assert use.open(WRITER).past


@pytest.mark.parametrize("late", [READER, BOTH, WRITER | os.O_DIRECT])
def test_nobody_goes_through_beside_those_who_write_past(late: int) -> None:
    use = use_of()
    writer, another = use.open(WRITER), use.open(WRITER)
    assert another.past
    use.close(writer)
    beside = use.open(late)
    assert (beside.past, beside.keep_cache) == (True, False)
    use.close(another)
    after = use.open(READER)
    if late == READER:  # who can't write doesn't harm
        assert (after.past, after.keep_cache) == (False, False)  # what was mapped meanwhile may be old
        assert use.open(READER).keep_cache
    else:
        assert after.past
        use.close(beside)
        assert not use.open(READER).past


def test_a_writer_alone_leaves_nothing_old() -> None:
    use = use_of()
    use.close(use.open(WRITER))
    assert use.open(READER).keep_cache


@pytest.mark.parametrize(
    ("release", "keeps"),
    [("6.6.0", True), ("6.10-rc1", True), ("7.0.1-arch", True), ("6.5.13", False), ("5.15", False), ("odd", False)],
)
def test_older_kernels_drop_everything_first(release: str, keeps: bool) -> None:
    assert use_of(release=release).open(WRITER).keep_cache is keeps


def test_far_away_everybody_goes_through() -> None:
    file = MemoryFile()
    file.device.latency = NEAR
    assert not use_of(file).open(WRITER).past
    file.device.latency = NEAR * 0.99
    assert use_of(file).open(WRITER).past


def test_where_a_write_waits_for_the_disk_everybody_goes_through() -> None:
    file = MemoryFile()
    file.writes_behind = False
    assert not use_of(file).open(WRITER).past


@pytest.mark.parametrize("flags", [READER, WRITER, BOTH, BOTH | os.O_DIRECT])
def test_without_a_page_cache_everybody_goes_past_it(flags: int) -> None:
    use = use_of(page_cache=False)
    for _ in range(2):
        opened = use.open(flags)
        assert (opened.past, opened.keep_cache, opened.direct) == (True, False, False)
