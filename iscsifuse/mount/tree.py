"""The inode tree of a mount: which names there are, and what stat(2) says of them. No FUSE in here.

How it thinks. The mount point is what the URL names, so there are four layouts, and one rule makes all of them::

    a portal         <target>/lun-<n> ...      (two levels, even where there is just one target)
    a target         lun-<n> ...
    one LUN          lun-<n>                   (on a directory)
    one LUN          the root itself           (on a regular file)

A directory also has a hidden ``.iscsifuse/status.json`` in its root: a lookup finds it, a listing doesn't.

The tree only grows, where a target has a new LUN (`Tree.add`); what is in it stays, with its number: a disk that is
gone has a file whose every read fails. Inode numbers are made from names, so they stay the same from mount to mount
and whatever the order in which a target lists its LUNs. Times are constant, for a changing mtime makes the kernel
drop its page cache.
"""

import hashlib
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from iscsifuse.cache import BlockFile
from iscsifuse.errors import UsageError
from iscsifuse.iscsi.names import validate_iscsi_name

__all__ = ["HIDDEN_DIRECTORY", "ROOT_INODE", "STATUS_FILE", "Disk", "Node", "NodeKind", "Permissions", "Tree"]

ROOT_INODE: Final = 1
HIDDEN_DIRECTORY: Final = ".iscsifuse"
STATUS_FILE: Final = "status.json"

_INODE_BYTES = 6
"""Inode numbers below 2^48 survive every program that keeps them in a double."""
_READ_BITS = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
_WRITE_BITS = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class NodeKind(Enum):
    """What an inode is."""

    DIRECTORY = "directory"
    DISK = "disk"
    STATUS = "status"


@dataclass(frozen=True, slots=True, eq=False)
class Disk:
    """A LUN that becomes a file.

    Attributes:
        target: iSCSI name of its target.
        lun: its number.
        file: its bytes.
        writable: whether it may be written to.
    """

    target: str
    lun: int
    file: BlockFile
    writable: bool = False

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"lun-{self.lun}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """Who may do what with the files.

    Attributes:
        uid: owner of everything.
        gid: group of everything.
        mode: permission bits of the files, or None for 0400, and 0600 where a disk is writable.
        shared: whether other users may use the mount at all (``allow_other``).
    """

    uid: int
    gid: int
    mode: int | None = None
    shared: bool = False

    def disk(self, *, writable: bool) -> int:
        """Mode of a disk. One that can't be written to has no write bit, whatever was asked for."""
        if self.mode is None:
            return 0o600 if writable else 0o400
        return self.mode if writable else self.mode & ~_WRITE_BITS

    @property
    def directory(self) -> int:
        """Mode of a directory: whoever may read a file may find it, and in a shared mount everybody may look."""
        if self.shared:
            return 0o555
        readers = stat.S_IRUSR | (_READ_BITS & (self.mode or 0))
        return readers | readers >> 2

    @property
    def status(self) -> int:
        """Mode of the status file."""
        return self.directory & _READ_BITS


@dataclass(slots=True, eq=False)
class Node:
    """One inode.

    Attributes:
        inode: its number.
        kind: what it is.
        name: its name in its parent, "" for the root.
        mode: type and permission bits.
        disk: of a DISK.
        children: of a DIRECTORY, by name as the kernel gives it, in the order of a listing.
        hidden: left out of listings.
    """

    inode: int
    kind: NodeKind
    name: str
    mode: int
    disk: Disk | None = None
    children: "dict[bytes, Node]" = field(default_factory=dict)
    hidden: bool = False

    @property
    def size(self) -> int:
        """Bytes, as stat(2) tells them. The status file is 0 bytes long, as the files of /proc are."""
        return self.disk.file.size if self.disk is not None else 0

    @property
    def links(self) -> int:
        """Number of links; for a directory 2 and one for each directory in it that is listed."""
        if self.kind is not NodeKind.DIRECTORY:
            return 1
        return 2 + sum(child.kind is NodeKind.DIRECTORY for child in self.listing())

    def listing(self) -> "Iterator[Node]":
        """The children that a listing shows."""
        return (child for child in self.children.values() if not child.hidden)


class Tree:
    """All inodes of a mount.

    Attributes:
        root: inode 1.
        permissions: of its files.
        paths: where each disk is, relative to the mount point; "" where the mount point itself is the disk.
    """

    def __init__(self, root: Node, permissions: Permissions, *, by_target: bool = False) -> None:
        self.root = root
        self.permissions = permissions
        self._by_target = by_target
        self.paths: dict[Disk, str] = {}
        self._nodes: dict[int, Node] = {ROOT_INODE: root}
        if root.disk is not None:
            self.paths[root.disk] = ""

    @classmethod
    def of_file(cls, disk: Disk, permissions: Permissions) -> "Tree":
        """The tree of a mount on a regular file: the root is the disk."""
        mode = stat.S_IFREG | permissions.disk(writable=disk.writable)
        return cls(Node(ROOT_INODE, NodeKind.DISK, "", mode, disk=disk), permissions)

    @classmethod
    def of_directory(cls, disks: Sequence[Disk], permissions: Permissions, *, by_target: bool) -> "Tree":
        """The tree of a mount on a directory.

        Args:
            disks: in the order in which they are to be listed.
            permissions: of its files.
            by_target: whether each target has a directory of its own.

        Raises:
            FormatError: a target's name that must not become a directory.
            UsageError: two disks would have the same path.
        """
        root = Node(ROOT_INODE, NodeKind.DIRECTORY, "", stat.S_IFDIR | permissions.directory)
        tree = cls(root, permissions, by_target=by_target)
        for disk in disks:
            tree.add(disk)
        hidden = tree._directory(HIDDEN_DIRECTORY)
        hidden.hidden = True
        tree._add(hidden, STATUS_FILE, NodeKind.STATUS, stat.S_IFREG | permissions.status)
        return tree

    def add(self, disk: Disk) -> tuple[Node, Node]:
        """One more disk in the tree of a directory, at the end of its listing.

        Returns:
            The directory that it is in, and itself.

        Raises:
            FormatError: its target's name must not become a directory.
            UsageError: there is a disk with the same path.
        """
        place = self._directory(validate_iscsi_name(disk.target)) if self._by_target else self.root
        if disk.name.encode() in place.children:
            raise UsageError(f"LUN {disk.lun} of {disk.target} is there twice")
        mode = stat.S_IFREG | self.permissions.disk(writable=disk.writable)
        node = self._add(place, disk.name, NodeKind.DISK, mode, salt=disk.target, disk=disk)
        self.paths[disk] = f"{place.name}/{node.name}" if self._by_target else node.name
        return place, node

    def node(self, inode: int) -> Node | None:
        """The inode with that number."""
        return self._nodes.get(inode)

    def lookup(self, parent: int, name: bytes) -> Node | None:
        """The child of a directory with that name, hidden ones included."""
        node = self._nodes.get(parent)
        return node.children.get(name) if node is not None else None

    def nodes(self) -> Iterator[Node]:
        """All inodes."""
        return iter(self._nodes.values())

    def disk_nodes(self) -> Iterator[Node]:
        """The inodes of disks."""
        return (node for node in self._nodes.values() if node.kind is NodeKind.DISK)

    @property
    def size(self) -> int:
        """Bytes of all disks together."""
        return sum(node.size for node in self.disk_nodes())

    def _directory(self, name: str) -> Node:
        found = self.root.children.get(name.encode())
        if found is not None:
            return found
        return self._add(self.root, name, NodeKind.DIRECTORY, stat.S_IFDIR | self.permissions.directory)

    def _add(
        self, parent: Node, name: str, kind: NodeKind, mode: int, *, salt: str = "", disk: Disk | None = None
    ) -> Node:
        node = Node(self._number(f"{kind.value}\0{salt}\0{name}"), kind, name, mode, disk=disk)
        parent.children[name.encode()] = node
        self._nodes[node.inode] = node
        return node

    def _number(self, key: str) -> int:
        """An inode number for a name: the same in every mount, unless two names collide."""
        digest = hashlib.blake2b(key.encode(), digest_size=_INODE_BYTES).digest()
        number = int.from_bytes(digest, "big")
        while number <= ROOT_INODE or number in self._nodes:
            number += 1
        return number
