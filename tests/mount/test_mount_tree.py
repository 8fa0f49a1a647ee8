"""Names, numbers and modes of a mount."""

import stat

import pytest
from mount_fakes import MemoryFile

from iscsifuse.errors import FormatError, UsageError
from iscsifuse.mount.tree import ROOT_INODE, Disk, Node, NodeKind, Permissions, Tree

ONE = "iqn.2004-04.com.example:one"
TWO = "eui.0123456789abcdef"
OURS = Permissions(uid=7, gid=8)


def disk(target: str = ONE, lun: int = 1, *, writable: bool = False, size: int = 4096) -> Disk:
    return Disk(target, lun, MemoryFile(size), writable=writable)


def names(node: Node) -> list[str]:
    return [child.name for child in node.listing()]


def test_a_portal_has_a_directory_for_each_target() -> None:
    disks = [disk(ONE, 1), disk(ONE, 300), disk(TWO, 1)]
    tree = Tree.of_directory(disks, OURS, by_target=True)
    assert names(tree.root) == [ONE, TWO]
    first = tree.lookup(ROOT_INODE, ONE.encode())
    assert first is not None
    assert names(first) == ["lun-1", "lun-300"]
    assert list(tree.paths.values()) == [f"{ONE}/lun-1", f"{ONE}/lun-300", f"{TWO}/lun-1"]
    found = tree.lookup(first.inode, b"lun-300")
    assert found is not None
    assert found.disk is disks[1]
    assert tree.node(found.inode) is found
    assert (tree.root.links, first.links, found.links) == (4, 2, 1)
    assert tree.size == 3 * 4096


def test_a_target_has_its_luns_in_the_root() -> None:
    tree = Tree.of_directory([disk(lun=4), disk(lun=2)], OURS, by_target=False)
    assert names(tree.root) == ["lun-4", "lun-2"]
    assert tree.lookup(ROOT_INODE, b"lun-3") is None
    assert tree.lookup(12345, b"lun-4") is None
    assert tree.node(12345) is None


def test_a_file_is_the_disk() -> None:
    only = disk(writable=True)
    tree = Tree.of_file(only, OURS)
    assert (tree.root.kind, tree.root.disk, tree.root.size) == (NodeKind.DISK, only, 4096)
    assert tree.root.mode == stat.S_IFREG | 0o600
    assert tree.paths == {only: ""}
    assert list(tree.disk_nodes()) == list(tree.nodes()) == [tree.root]


def test_the_status_file_is_there_and_not_listed() -> None:
    tree = Tree.of_directory([disk()], OURS, by_target=False)
    hidden = tree.lookup(ROOT_INODE, b".iscsifuse")
    assert hidden is not None
    assert hidden.hidden
    status = tree.lookup(hidden.inode, b"status.json")
    assert status is not None
    assert (status.kind, status.size, status.mode) == (NodeKind.STATUS, 0, stat.S_IFREG | 0o400)
    assert names(tree.root) == ["lun-1"]
    assert tree.root.links == 2  # what a listing shows, or find(1) would look for directories


def test_the_size_is_the_present_one() -> None:
    one = disk()
    tree = Tree.of_file(one, OURS)
    assert isinstance(one.file, MemoryFile)
    one.file.device.data.extend(bytes(512))
    assert tree.root.size == 4608


def test_inode_numbers_come_from_names() -> None:
    forward = Tree.of_directory([disk(ONE, 1), disk(ONE, 2), disk(TWO, 1)], OURS, by_target=True)
    backward = Tree.of_directory([disk(TWO, 1), disk(ONE, 2), disk(ONE, 1)], OURS, by_target=True)

    def numbers(tree: Tree) -> set[tuple[str, int]]:
        return {(path, node.inode) for node in tree.disk_nodes() if node.disk for path in [tree.paths[node.disk]]}

    assert numbers(forward) == numbers(backward)
    everything = [node.inode for node in forward.nodes()]
    assert len(set(everything)) == len(everything) == 8
    assert all(1 <= number < 1 << 48 for number in everything)


def test_colliding_names_get_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def digest(self) -> bytes:
            return bytes(6)

    monkeypatch.setattr("hashlib.blake2b", lambda *_, **__: Constant())
    tree = Tree.of_directory([disk(lun=1), disk(lun=2)], OURS, by_target=False)
    assert sorted(node.inode for node in tree.nodes()) == [1, 2, 3, 4, 5]


@pytest.mark.conformance("B6")
@pytest.mark.parametrize(
    "name", ["../etc", "iqn.2004-04.com.example/x", "iqn.2004-04.com.example:\x1b[2J", "", "lun-1"]
)
def test_names_that_must_not_become_directories(name: str) -> None:
    with pytest.raises(FormatError):
        Tree.of_directory([disk(name)], OURS, by_target=True)


@pytest.mark.conformance(107)
@pytest.mark.parametrize("by_target", [True, False])
def test_a_disk_that_is_new_changes_nothing_else(by_target: bool) -> None:
    first, second, new = disk(ONE, 1), disk(ONE, 2), disk(ONE, 7, writable=True)
    tree = Tree.of_directory([first, second], OURS, by_target=by_target)
    before = {node.inode: (node.name, node.mode) for node in tree.nodes()}
    place, node = tree.add(new)
    assert {number: (node.name, node.mode) for number, node in ((n, tree.node(n)) for n in before) if node} == before
    assert names(place) == ["lun-1", "lun-2", "lun-7"]
    assert (place is tree.root) == (not by_target)
    assert tree.lookup(place.inode, b"lun-7") is tree.node(node.inode) is node
    assert node.mode == stat.S_IFREG | 0o600
    assert tree.paths[new] == (f"{ONE}/lun-7" if by_target else "lun-7")
    # The number that it would have had from the beginning.
    whole = Tree.of_directory([first, second, new], OURS, by_target=by_target)
    assert {node.inode for node in whole.nodes()} == {node.inode for node in tree.nodes()}
    with pytest.raises(UsageError, match=r"LUN 7 of .* is there twice"):
        tree.add(disk(ONE, 7))
    with pytest.raises(UsageError):
        tree.add(disk(ONE, 1))


def test_a_lun_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"LUN 1 of .* is there twice"):
        Tree.of_directory([disk(), disk()], OURS, by_target=False)


@pytest.mark.parametrize(
    ("permissions", "directory", "status", "read_only", "writable"),
    [
        (Permissions(uid=0, gid=0), 0o500, 0o400, 0o400, 0o600),
        (Permissions(uid=0, gid=0, shared=True), 0o555, 0o444, 0o400, 0o600),
        (Permissions(uid=0, gid=0, mode=0o640), 0o550, 0o440, 0o440, 0o640),
        (Permissions(uid=0, gid=0, mode=0o666), 0o555, 0o444, 0o444, 0o666),
        (Permissions(uid=0, gid=0, mode=0o200), 0o500, 0o400, 0o000, 0o200),
    ],
)
def test_modes(permissions: Permissions, directory: int, status: int, read_only: int, writable: int) -> None:
    assert permissions.directory == directory
    assert permissions.status == status
    assert permissions.disk(writable=False) == read_only
    assert permissions.disk(writable=True) == writable
