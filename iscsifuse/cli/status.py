"""``iscsifuse status``: what a mount is doing: its sessions, its cache, and how fast the target answers.

The daemon tells it as a document (see :mod:`iscsifuse.mount.report`); here it becomes words. A daemon of another
version may tell less or more: what is missing is shown as ``-``.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["DESCRIPTION", "HELP", "as_text", "configure", "run"]

HELP = "tell how a mount is doing"
DESCRIPTION = "Shows a mount's sessions, negotiated keys, cache, and a table of service response times."

_COMMAND_HEADER = ("COMMAND", "CALLS", "ERRORS", "LOST", "BYTES", "MIN", "AVG", "MAX")
_LUN_HEADER = ("FILE", "SIZE", "ACCESS", "READ HITS", "READ MISSES", "CACHED", "DIRTY", "WRITE ERRORS")

Document = Mapping[str, object]


def configure(parser: argparse.ArgumentParser) -> None:
    """Gives the parser its arguments."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="where it is mounted")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(namespace: argparse.Namespace) -> int:
    """Carries it out; returns the exit status."""
    from iscsifuse.cli.words import say
    from iscsifuse.mount import client

    document = client.status(namespace.mountpoint)
    if namespace.json:
        import json

        # It has its schema already: the document's own.
        say(json.dumps(document, indent=2))
    else:
        say(as_text(document, now=time.time()))
    return 0


def as_text(document: Document, *, now: float) -> str:
    """The document in words.

    Args:
        document: as the daemon tells it.
        now: seconds since 1970.
    """
    from iscsifuse.cli.words import pairs

    access = f"read-write, write={_word(document, 'write')}" if document.get("read_write") else "read-only"
    if document.get("direct_io"):
        access += ", direct_io"
    sections = [
        pairs(
            f"{_word(document, 'mountpoint')}: {_word(document, 'source')}",
            {
                "access": access,
                "daemon": f"process {_word(document, 'pid')}, iscsifuse {_word(document, 'version')}",
                "mounted": _moment(document.get("started"), now=now),
            },
        )
    ]
    sections += [_session(session, now=now) for session in _objects(document, "sessions")]
    sections += [_luns(_objects(document, "luns")), _cache(_object(document, "cache")), _commands(document)]
    return "\n\n".join(sections)


def _session(session: Document, *, now: float) -> str:
    from iscsifuse.cli.words import pairs

    values = {
        "portal": _word(session, "portal"),
        "state": f"{_word(session, 'state')}, since {_moment(session.get('since'), now=now)}",
        "reconnects": _word(session, "reconnects"),
        "replays": _replays(session),
        "last error": _word(session, "last_error"),
        "commands": f"{_word(session, 'in_flight')} in flight, {_word(session, 'queued')} waiting",
        "ISID, TSIH": f"{_word(session, 'isid')}, {_word(session, 'tsih')}",
        "window": _window(session),
    }
    keys = {name: _word(_object(session, "keys"), name) for name in _object(session, "keys")}
    title = f"Session with {_word(session, 'target')}"
    return "\n".join(
        (pairs(title, values), pairs("  negotiated", {f"  {key}": value for key, value in keys.items()}))
    )


def _replays(session: Document) -> str:
    from iscsifuse.cli.words import count

    replays = _integer(session, "replays")
    return "-" if replays is None else f"{count(replays, 'command')} sent again"


def _window(session: Document) -> str:
    from iscsifuse.cli.words import count

    room = _integer(session, "window")
    return "-" if room is None else f"room for {count(room, 'more command')}"


def _luns(luns: Sequence[Document]) -> str:
    from iscsifuse.cli.words import table

    rows = []
    for lun in luns:
        cache = _object(lun, "cache")
        rows.append(
            (
                _word(lun, "path"),
                _size(lun, "size"),
                "read-write" if lun.get("writable") else "read-only",
                _word(cache, "hits"),
                _word(cache, "misses"),
                _size(cache, "cached_bytes"),
                _size(cache, "dirty_bytes"),
                _word(cache, "write_back_errors"),
            )
        )
    return table(_LUN_HEADER, rows, right=_LUN_HEADER[1:2] + _LUN_HEADER[3:])


def _cache(cache: Document) -> str:
    from iscsifuse.cli.words import pairs

    return pairs(
        "Cache",
        {
            "size": _size(cache, "size"),
            "used": _size(cache, "used"),
            "not yet written": _size(cache, "dirty"),
            "not yet flushed": _size(cache, "unsynced"),
            "read hits, misses": f"{_word(cache, 'hits')}, {_word(cache, 'misses')}",
            "read ahead": f"{_size(cache, 'read_ahead_bytes')}, commands: {_word(cache, 'read_ahead_commands')}",
            "written back": f"{_size(cache, 'write_back_bytes')}, commands: {_word(cache, 'write_back_commands')}",
            "flushes": _word(cache, "flushes"),
            "evictions": _word(cache, "evictions"),
        },
    )


def _commands(document: Document) -> str:
    from iscsifuse.cli.words import table

    rows = [
        (
            *(_word(row, name) for name in ("name", "calls", "errors", "lost")),
            _size(row, "bytes"),
            *(_time(row, name) for name in ("min", "avg", "max")),
        )
        for row in _objects(document, "commands")
    ]
    return "Service response times\n" + table(_COMMAND_HEADER, rows, right=_COMMAND_HEADER[1:])


# --- one value of a document each; whatever it is, this doesn't fail ---


def _object(document: Document, name: str) -> Document:
    value = document.get(name)
    return value if isinstance(value, Mapping) else {}


def _objects(document: Document, name: str) -> list[Document]:
    def found() -> Iterator[Document]:
        value = document.get(name)
        for one in value if isinstance(value, list) else ():
            if isinstance(one, Mapping):
                yield one

    return list(found())


def _number(document: Document, name: str) -> float | None:
    value = document.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(document: Document, name: str) -> int | None:
    value = _number(document, name)
    return None if value is None else int(value)


def _word(document: Document, name: str) -> str:
    from iscsifuse.iscsi.names import printable

    value = document.get(name)
    return "-" if value is None or value == "" else printable(str(value))


def _size(document: Document, name: str) -> str:
    from iscsifuse.cli.words import size

    value = _integer(document, name)
    return "-" if value is None else size(value)


def _time(document: Document, name: str) -> str:
    from iscsifuse.cli.words import duration

    value = _number(document, name)
    return "-" if value is None else duration(value)


def _moment(value: object, *, now: float) -> str:
    """``2026-01-31 12:00:00, 3 h 20 min ago``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    from datetime import datetime

    try:
        stamp = datetime.fromtimestamp(value).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "-"
    return f"{stamp}, {_span(max(0.0, now - value))} ago"


def _span(seconds: float) -> str:
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if minutes == 0:
        return f"{int(seconds)} s"
    if hours == 0:
        return f"{minutes} min"
    if days == 0:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"
