"""The options of a mount, from one table: each is ``name=value`` in ``-o LIST``, and ``--name value`` as a flag.

Both ways append to one list of :class:`Setting` in the order in which they were typed; :func:`resolve` folds it, so
that the last one wins whichever way it was written (``--rw -o ro`` is read-only). Options that belong to a session
(:attr:`Option.session`) are flags of ``discover``, ``ls`` and ``info`` as well.

What mount(8) and systemd add for their own purposes (``dev``, ``_netdev``, ``x-systemd.…``) is accepted and means
nothing here.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from iscsifuse.cli import values
from iscsifuse.cli.values import LUN_RANGE, MIB
from iscsifuse.errors import UsageError

__all__ = ["IGNORED", "OPTIONS", "Option", "Options", "Setting", "add_flags", "parse_list", "resolve"]

_DEST = "settings"

#: Accepted and without meaning here: the kernel, mount(8) and systemd have dealt with them.
IGNORED = frozenset(
    {
        "defaults",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "nousers",
        "owner",
        "noowner",
        "group",
        "nogroup",
        "_netdev",
        "nofail",
        "dev",
        "nodev",
        "suid",
        "nosuid",
        "exec",
        "noexec",
        "async",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "lazytime",
        "nolazytime",
        "iversion",
        "noiversion",
        "mand",
        "nomand",
        "silent",
        "loud",
    }
)
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was set; None (or empty) where nothing was said.

    Attributes:
        header_digest: ask for CRC32C on headers.
        data_digest: ask for CRC32C on data segments.
        timeout: seconds for one SCSI command.
        login_timeout: seconds for one attempt to connect and log in.
        reconnect_timeout: seconds that I/O waits for a lost session.
        initiator_name: an iSCSI name.
        chap_user: the name that we log in with.
        chap_secret_file: path of the file with its secret.
        target_user: the name that the target has to prove.
        target_secret_file: path of the file with the target's secret.
        read_write: ``rw`` or ``ro``.
        allow_other: let other users use the mount.
        uid: owner of the files.
        gid: group of the files.
        mode: permission bits of the files.
        cache_size: bytes for all block caches together.
        read_ahead: bytes of the largest read-ahead window.
        write_behind: ``write=behind`` or ``write=through``.
        direct_io: no caching at all.
        luns: the ``lun=`` list, ascending.
    """

    header_digest: bool | None = None
    data_digest: bool | None = None
    timeout: float | None = None
    login_timeout: float | None = None
    reconnect_timeout: float | None = None
    initiator_name: str | None = None
    chap_user: str | None = None
    chap_secret_file: str | None = None
    target_user: str | None = None
    target_secret_file: str | None = None
    read_write: bool = False
    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    cache_size: int | None = None
    read_ahead: int | None = None
    write_behind: bool | None = None
    direct_io: bool = False
    luns: tuple[int, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Option:
    """A row of the table.

    Attributes:
        name: as in ``-o``; the flag has ``-`` for ``_``.
        parse: makes the value, or raises a ValueError that says what is wanted.
        metavar: stands for the value in the help; None for a switch.
        words: the line of the help.
        attribute: of :class:`Options`, where it isn't called like the option.
        session: whether it is about sessions, so that every command that logs in has it.
        list_only: whether it has no flag, and stands in ``-o`` only because mount(8) puts it there.
    """

    name: str
    parse: Callable[[str], object]
    metavar: str | None
    words: str
    _: KW_ONLY
    attribute: str = ""
    session: bool = False
    list_only: bool = False

    @property
    def sets(self) -> str:
        """The attribute of :class:`Options` that it sets."""
        return self.attribute or self.name

    @property
    def flag(self) -> str:
        """``--cache-size``."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Setting:
    """One option as it was typed: a row of the table, and a value that passed its parser."""

    option: Option
    value: object = field(repr=False)


#: Every option there is, in the order of the help.
OPTIONS: tuple[Option, ...] = (
    Option("ro", values.always(False), None, "read only (the default)", attribute="read_write"),
    Option("rw", values.always(True), None, "allow writing to the disks", attribute="read_write"),
    Option("lun", values.luns, "LIST", "show these LUNs only: 0,3 or 1-4", attribute="luns"),
    Option("allow_other", values.always(True), None, "let other users in"),
    Option("uid", values.identity, "N", "owner of the files"),
    Option("gid", values.identity, "N", "group of the files"),
    Option("mode", values.mode, "OCTAL", "their permissions (400, or 600 with rw)"),
    Option("cache_size", values.size(minimum=MIB, words="1M or more"), "SIZE", "memory of all block caches (64M)"),
    Option(
        "read_ahead", values.size(minimum=0, words="0 for none"), "SIZE", "largest read-ahead window (8M; 0 = none)"
    ),
    Option(
        "write",
        values.one_of(behind=True, through=False),
        "behind|through",
        "acknowledge writes from memory (behind, the default) or after the target's status",
        attribute="write_behind",
    ),
    Option("direct_io", values.always(True), None, "no caching at all; implies write=through"),
    Option("sync", values.always(False), None, "write=through", attribute="write_behind", list_only=True),
    Option("timeout", values.seconds(zero=False), "SECONDS", "for one SCSI command (60)", session=True),
    Option(
        "reconnect_timeout", values.seconds(zero=True), "SECONDS", "to wait for a lost session (120)", session=True
    ),
    Option("login_timeout", values.seconds(zero=False), "SECONDS", "to connect and log in (15)", session=True),
    Option("header_digest", values.digest, "none|crc32c", "checksum of headers (none)", session=True),
    Option("data_digest", values.digest, "none|crc32c", "checksum of data (none)", session=True),
    Option(
        "initiator_name",
        values.iscsi_name,
        "NAME",
        "who we say we are (as in /etc/iscsi/initiatorname.iscsi)",
        session=True,
    ),
    Option("chap_user", values.text, "USER", "log in as USER, with CHAP", session=True),
    Option("chap_secret_file", values.text, "FILE", "its first line is the secret of USER", session=True),
    Option("target_user", values.text, "USER", "the target has to prove that it is USER", session=True),
    Option("target_secret_file", values.text, "FILE", "its first line is the target's secret", session=True),
)
_BY_NAME = {option.name: option for option in OPTIONS}


def parse_list(text: str) -> list[Setting]:
    r"""Reads ``-o LIST``: ``name``, ``name=value``, between commas. A comma that belongs to a value is ``\,``.

    A number after ``lun=…`` continues its list: ``lun=1,3`` is what people write.

    Raises:
        UsageError: an option that doesn't exist, that lacks its value, or whose value can't be meant.
    """
    settings: list[Setting] = []
    for item in _joined(_split(text)):
        if not item or item in IGNORED or item.startswith(_IGNORED_PREFIXES):
            continue
        name, equals, value = item.partition("=")
        option = _BY_NAME.get(name)
        if option is None:
            raise UsageError(_unknown(name))
        if option.metavar is None and equals:
            raise UsageError(f"the option {name} takes no value")
        if option.metavar is not None and not equals:
            raise UsageError(f"the option {name} needs a value: {name}={option.metavar}")
        settings.append(_setting(option, value, spelled=item))
    return settings


def resolve(settings: Iterable[Setting]) -> Options:
    """Folds settings: the last one wins, ``lun=`` lists add up, ``direct_io`` means ``write=through``."""
    options = Options()
    for setting in settings:
        value: Any = setting.value
        if setting.option.sets == "luns":
            value = tuple(sorted({*options.luns, *value}))
        options = replace(options, **{setting.option.sets: value})
    if options.direct_io:
        options = replace(options, write_behind=False)
    return options


def add_flags(parser: argparse.ArgumentParser, *, mount: bool) -> None:
    """Gives a parser the long flags; with ``mount`` all of them, and ``-o``. ``namespace.settings`` collects them."""
    parser.set_defaults(**{_DEST: ()})
    of_mount = parser.add_argument_group("the mount")
    of_session = parser.add_argument_group("the session")
    if mount:
        of_mount.add_argument("-o", dest=_DEST, action=_AddList, metavar="LIST", help="any of these, as name=value,…")
    for option in OPTIONS:
        if option.list_only or not (mount or option.session):
            continue
        (of_session if option.session else of_mount).add_argument(
            option.flag,
            dest=_DEST,
            action=_AddFlag,
            nargs=0 if option.metavar is None else None,
            metavar=option.metavar,
            const=option,
            help=option.words,
        )


class _AddList(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - the interface of argparse
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002 - likewise
    ) -> None:
        setattr(namespace, _DEST, (*getattr(namespace, _DEST), *parse_list(str(values))))


class _AddFlag(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - the interface of argparse
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        option: Option = self.const
        text = values if isinstance(values, str) else ""
        setting = _setting(option, text, spelled=f"{option_string or option.flag} {text}".rstrip())
        setattr(namespace, _DEST, (*getattr(namespace, _DEST), setting))


def _setting(option: Option, value: str, *, spelled: str) -> Setting:
    try:
        return Setting(option, option.parse(value))
    except ValueError as error:
        raise UsageError(f"{spelled!r}: what {option.name} takes is {error}") from None


def _split(text: str) -> list[str]:
    r"""At every comma that no backslash stands before; ``\,`` and ``\\`` lose theirs."""
    items = [""]
    escaped = False
    for char in text:
        if escaped:
            items[-1] += char if char in ",\\" else "\\" + char
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == ",":
            items.append("")
        else:
            items[-1] += char
    if escaped:
        items[-1] += "\\"
    return items


def _joined(items: Iterable[str]) -> list[str]:
    joined: list[str] = []
    for item in items:
        if joined and joined[-1].startswith("lun=") and LUN_RANGE.fullmatch(item):
            joined[-1] += "," + item
        else:
            joined.append(item)
    return joined


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    if name == "remount":
        return "remount is not supported: umount it, and mount it again with the other options"
    near = get_close_matches(name.replace("-", "_"), _BY_NAME, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(_BY_NAME))}"
    return f"there is no option {name!r}: {hint}"
