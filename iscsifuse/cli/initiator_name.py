"""Who we say we are, where nobody said it: the name that this machine's administrator chose, or else one of our own.

A target lets initiators in by name, so the name has to be the same every time.

Source: open-iscsi's ``/etc/iscsi/initiatorname.iscsi``: a line ``InitiatorName=iqn…``.
"""

import platform
import re
from pathlib import Path

from iscsifuse.errors import FormatError
from iscsifuse.iscsi.names import make_initiator_name, validate_iscsi_name

__all__ = ["NAME_FILE", "default_initiator_name"]

NAME_FILE = Path("/etc/iscsi/initiatorname.iscsi")
MACHINE_ID = Path("/etc/machine-id")

_LINE = re.compile(r"^[ \t]*InitiatorName[ \t]*=[ \t]*(\S+)[ \t]*$", re.MULTILINE)


def default_initiator_name(*, name_file: Path = NAME_FILE, machine_id: Path = MACHINE_ID) -> str:
    """An iSCSI name: the file's where it can be read and is one, else made from the machine-id or the host's name."""
    match = _LINE.search(_text(name_file))
    if match:
        try:
            return validate_iscsi_name(match[1])
        except FormatError:
            # A broken file of another program's is no reason not to work; the name that we make is as good.
            pass
    identity = _text(machine_id).strip()
    return make_initiator_name(identity if identity not in ("", "uninitialized") else platform.node())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
