import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iscsifuse.cli.main import run
from iscsifuse.cli.status import as_text
from iscsifuse.errors import MountError, UsageError

NOW = 1_800_000_000.0

DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "pid": 4711,
    "version": "9.9",
    "source": "iscsi://h/iqn.2004-04.com.example:x",
    "mountpoint": "/mnt/x",
    "read_write": True,
    "write": "through",
    "direct_io": False,
    "started": NOW - 3700,
    "sessions": [
        {
            "target": "iqn.2004-04.com.example:x",
            "portal": "10.0.0.1:3260",
            "state": "logged in",
            "since": NOW - 5,
            "reconnects": 2,
            "replays": 1,
            "last_error": "the connection was\nclosed",
            "isid": "80f3ad670000",
            "tsih": 4,
            "in_flight": 1,
            "queued": 3,
            "window": 1,
            "keys": {"HeaderDigest": "None", "DataDigest": "CRC32C"},
        }
    ],
    "luns": [
        {
            "path": "lun-1",
            "size": 67108864,
            "writable": True,
            "cache": {"hits": 10, "misses": 2, "cached_bytes": 1048576, "dirty_bytes": 0, "write_back_errors": 1},
        }
    ],
    "cache": {
        "size": 67108864,
        "used": 1048576,
        "dirty": 512,
        "unsynced": 4096,
        "hits": 10,
        "misses": 2,
        "evictions": 0,
    },
    "commands": [
        {
            "name": "READ(10)",
            "calls": 12345,
            "errors": 0,
            "lost": 1,
            "bytes": 1 << 30,
            "min": 0.00018,
            "avg": 0.0021,
            "max": 1.5,
        },
        {"name": "INQUIRY", "calls": 0, "errors": 0, "lost": 1, "bytes": 0, "min": None, "avg": None, "max": None},
    ],
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    document = dict(DOCUMENT)
    monkeypatch.setattr("iscsifuse.mount.client.status", lambda mountpoint: {**document, "mountpoint": mountpoint})
    return document


def test_words() -> None:
    text = as_text(DOCUMENT, now=NOW)
    for words in (
        "/mnt/x: iscsi://h/iqn.2004-04.com.example:x\n  access   read-write, write=through\n",
        "  daemon   process 4711, iscsifuse 9.9\n",
        ", 1 h 1 min ago\n",
        "Session with iqn.2004-04.com.example:x\n  portal      10.0.0.1:3260\n  state       logged in, since ",
        ", 5 s ago\n  reconnects  2\n  replays     1 command sent again\n  last error  the connection was\\nclosed\n",
        "  commands    1 in flight, 3 waiting\n",
        "  window      room for 1 more command\n",
        "    HeaderDigest  None\n    DataDigest    CRC32C\n",
        (
            "FILE       SIZE  ACCESS      READ HITS  READ MISSES   CACHED  DIRTY  WRITE ERRORS\n"
            "lun-1  64.0 MiB  read-write         10            2  1.0 MiB    0 B             1\n"
        ),
        "  not yet written    512 B\n  not yet flushed    4.0 KiB\n",
        (
            "COMMAND   CALLS  ERRORS  LOST    BYTES     MIN      AVG     MAX\n"
            "READ(10)  12345       0     1  1.0 GiB  180 µs  2.10 ms  1.50 s\n"
            "INQUIRY       0       0     1      0 B       -        -       -"
        ),
    ):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"read_write": False}, "access   read-only\n"),
        ({"direct_io": True}, "access   read-write, write=through, direct_io\n"),
        ({"started": NOW - 30}, ", 30 s ago"),
        ({"started": NOW - 600}, ", 10 min ago"),
        ({"started": NOW - 90000}, ", 1 d 1 h ago"),
        ({"started": NOW + 60}, ", 0 s ago"),
        ({"started": None}, "mounted  -"),
        ({"started": 1e300}, "mounted  -"),
        ({"sessions": []}, "FILE"),
        ({"source": "evil\x1b[31m"}, "evil\\x1b[31m"),
    ],
)
def test_variants(changes: dict[str, Any], words: str) -> None:
    assert words in as_text({**DOCUMENT, **changes}, now=NOW)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(DOCUMENT)), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(sorted(DOCUMENT)), _JSON))
def test_a_daemon_of_another_version_may_tell_anything(document: dict[str, Any]) -> None:
    as_text(document, now=NOW)


def test_command(told: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    told["started"] = time.time()
    assert run(["status", "/mnt/y"]) == 0
    assert capsys.readouterr().out.startswith("/mnt/y: iscsi://h/")


def test_json(told: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "/mnt/y", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {**told, "mountpoint": "/mnt/y"}


@pytest.mark.parametrize(("error", "code"), [(UsageError("nothing there"), 1), (MountError("it is dead"), 2)])
def test_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr("iscsifuse.mount.client.status", fail)
    assert run(["status", "/mnt/y"]) == code
    assert capsys.readouterr() == ("", f"iscsifuse: {error}\n")
