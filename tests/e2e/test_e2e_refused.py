"""A mounted target that will not have us any more: who reads is told at once, and the mount can be taken away."""

import time
from pathlib import Path

import pytest

from iscsifuse.iscsi.pdu import Opcode
from iscsifuse.iscsi.response import LoginResponse
from iscsifuse.testing.actions import Change
from iscsifuse.testing.config import LoginAttention, TargetConfig, TargetKeys, TargetNode
from iscsifuse.testing.disk import Disk
from iscsifuse.testing.script import OUT, Rule, is_a
from iscsifuse.testing.target import LoopbackTarget
from support.cli import Mounted, is_mounted, run_cli
from support.ports import wait_until

pytestmark = pytest.mark.fuse


@pytest.mark.conformance(23)
def test_a_mount_that_was_refused(tmp_path: Path) -> None:
    """23: status class 2 while mounted → EIO at once, whatever reconnect_timeout says; umount works."""
    config = TargetConfig(
        nodes=[TargetNode(disks=[Disk(blocks=4096)])],
        keys=TargetKeys(default_time2wait=0),
        login_attention=LoginAttention.NONE,
    )
    point = tmp_path / "m"
    refuse = Rule(OUT, Change(lambda _: LoginResponse(status_class=2, status_detail=2)), is_a(Opcode.LOGIN_RESPONSE))

    def disown() -> None:
        config.script.add(refuse)
        target.drop_connections()

    with (
        LoopbackTarget(config).in_thread() as target,
        Mounted(target.url(lun=0), point, "-o", "reconnect_timeout=600,direct_io") as mounted,
    ):
        assert mounted.lun(0).read_bytes() == bytes(4096 * 512)
        target.call(disown)
        began = time.monotonic()
        with pytest.raises(OSError, match="Input/output error"):
            mounted.lun(0).read_bytes()
        assert time.monotonic() - began < 60
        wait_until(lambda: mounted.status_file()["sessions"][0]["state"] == "refused", timeout=10, what="the refusal")
        assert "not allowed to use the target" in run_cli("status", point).stdout
        # One attempt, though the rule is used up: the next one would have worked.
        assert target.call(lambda: target.logins) == 1
        mounted.unmount()
        assert not is_mounted(point)
