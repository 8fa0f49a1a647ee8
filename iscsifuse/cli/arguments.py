"""Takes passwords out of this process's own command line, as ps(1) and /proc show it.

Whoever is quick can still see them: a URL is no place for a secret. But a daemon runs for weeks, with the command
line that it was started with. The memory in which the kernel looks is ours to write to; it is written through
/proc/self/mem, so that a wrong address is an error and not a crash, and only where it holds what /proc/self/cmdline
says.

Source: proc_pid_stat(5), ``arg_start``.
"""

import re
from pathlib import Path

__all__ = ["hide_passwords", "masked"]

_USERINFO = re.compile(rb"(?<=://)[^\0]*(?=@)")
_TARGET_PASSWORD = re.compile(rb"(?<=target_password=)[^&\0]*")
_ARG_START = 48
_AFTER_NAME = 3


def hide_passwords(proc: Path = Path("/proc/self")) -> bool:
    """Overwrites what may be a password; returns whether anything was changed. Never fails."""
    try:
        shown = (proc / "cmdline").read_bytes()
        hidden = masked(shown)
        if hidden == shown:
            return False
        # The name, in parentheses, may hold blanks; the fields after it are counted from 3.
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        with (proc / "mem").open("r+b", buffering=0) as memory:
            start = int(fields[_ARG_START - _AFTER_NAME])
            memory.seek(start)
            if memory.read(len(shown)) != shown:
                return False
            memory.seek(start)
            memory.write(hidden)
    except (OSError, ValueError, IndexError):
        return False
    return True


def masked(line: bytes) -> bytes:
    """A command line of the same length, with ``x`` in place of what may be a user and a password."""
    for pattern in (_USERINFO, _TARGET_PASSWORD):
        line = pattern.sub(lambda match: b"x" * len(match[0]), line)
    return line
