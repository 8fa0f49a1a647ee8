from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iscsifuse.scsi.lba_status import Extent, Provisioning
from iscsifuse.testing.disk import BadBlockError, Disk, FileBacking, MemoryBacking

BLOCKS = 12


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    lba = draw(st.integers(0, BLOCKS - 1))
    return lba, draw(st.integers(1, BLOCKS - lba))


steps = st.lists(
    st.tuples(st.sampled_from(["write", "stable", "unmap", "sync", "sync all", "cut"]), ranges()), max_size=25
)


@given(steps=steps, thin=st.booleans(), cache=st.booleans())
@settings(max_examples=150)
def test_a_power_cut_leaves_exactly_what_was_made_stable(
    steps: list[tuple[str, tuple[int, int]]], thin: bool, cache: bool
) -> None:
    disk = Disk(blocks=BLOCKS, block_length=512, thin=thin, volatile_cache=cache)
    now: list[tuple[bytes, bool]] = [(bytes(512), False)] * BLOCKS
    stable = list(now)
    for number, (step, (lba, blocks)) in enumerate(steps, 1):
        where = slice(lba, lba + blocks)
        if step in ("write", "stable"):
            data = bytes([number]) * 512
            disk.write(data * blocks, lba=lba, stable=step == "stable")
            now[where] = [(data, thin)] * blocks
        elif step == "unmap":
            disk.unmap(lba=lba, blocks=blocks)
            now[where] = [(bytes(512), False)] * blocks
        elif step == "sync":
            disk.synchronize(lba=lba, blocks=blocks)
        elif step == "sync all":
            disk.synchronize()
            stable = list(now)
        else:
            disk.power_cut()
            now = list(stable)
        if step in ("stable", "sync") or not cache:
            stable[where] = now[where]
        assert disk.contents() == b"".join(data for data, _ in now)
        if thin:
            mapped = [extent.mapped for extent in disk.extents(lba=0, limit=99) for _ in range(extent.blocks)]
            assert mapped == [is_mapped for _, is_mapped in now]


@given(writes=st.lists(st.tuples(st.integers(0, 3 << 20), st.binary(max_size=3000)), max_size=8))
@settings(max_examples=40)
def test_memory_holds_what_was_written(writes: list[tuple[int, bytes]]) -> None:
    backing, model = MemoryBacking(), bytearray(4 << 20)
    for offset, data in writes:
        backing.write(data, offset=offset)
        model[offset : offset + len(data)] = data
    assert backing.read(offset=0, length=len(model)) == bytes(model)


def test_memory_of_a_petabyte_costs_nothing() -> None:
    disk = Disk(blocks=1 << 41)
    disk.write(b"x" * 512, lba=(1 << 41) - 1)
    assert disk.read(lba=(1 << 41) - 2, blocks=2) == bytes(512) + b"x" * 512


def test_a_file_is_read_and_written(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"a" * 1000)
    disk = Disk.from_file(image, lun=3)
    assert (disk.blocks, disk.lun, disk.unstable_blocks) == (2, 3, 0)
    assert disk.read(lba=1, blocks=1) == b"a" * 488 + bytes(24)
    disk.write(b"b" * 512, lba=1)
    disk.synchronize()
    disk.close()
    assert image.read_bytes() == b"a" * 512 + b"b" * 512


def test_a_read_only_file_is_write_protected(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    image.chmod(0o400)
    disk = Disk.from_file(image, read_only=True)
    assert disk.write_protected
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk.backing.write(b"x", offset=0)
    disk.close()
    with pytest.raises(FileNotFoundError):
        FileBacking(tmp_path / "none")


def test_bad_blocks_are_reported_and_cured() -> None:
    disk = Disk(blocks=10, bad_blocks={4, 6}, bad_writes={9})
    with pytest.raises(BadBlockError) as caught:
        disk.read(lba=0, blocks=10)
    assert caught.value.lba == 4
    assert disk.read(lba=0, blocks=4) == bytes(2048)
    disk.write(b"x" * 512, lba=4)
    assert disk.bad_blocks == {6}
    with pytest.raises(BadBlockError) as caught:
        disk.write(bytes(1024), lba=8)
    assert caught.value.lba == 9
    assert disk.contents(lba=8) == bytes(1024)


def test_extents_of_a_disk_that_is_not_thin() -> None:
    assert Disk(blocks=10).extents(lba=3, limit=1) == [Extent(lba=3, blocks=7, provisioning=Provisioning.MAPPED)]


def test_extents_are_limited() -> None:
    disk = Disk(blocks=10, thin=True)
    disk.write(bytes(512), lba=1)
    disk.write(bytes(1024), lba=5)
    assert [(e.lba, e.blocks, e.mapped) for e in disk.extents(lba=0, limit=4)] == [
        (0, 1, False),
        (1, 1, True),
        (2, 3, False),
        (5, 2, True),
    ]
    assert [(e.lba, e.blocks) for e in disk.extents(lba=6, limit=9)] == [(6, 1), (7, 3)]


def test_a_new_capacity_is_an_attention() -> None:
    disk = Disk.from_bytes(b"x" * 1025)
    assert (disk.blocks, disk.size) == (3, 1536)
    disk.resize(1)
    assert disk.attentions == [(0x2A, 0x09)]
