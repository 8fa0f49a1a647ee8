"""The command window: which CmdSN comes next, and whether the target wants it yet.

The target says with every PDU what it expects (ExpCmdSN) and how far it lets us go (MaxCmdSN). We may send a
non-immediate command while ``cmd_sn <= max_cmd_sn``. Both numbers only ever move forward: PDUs of one connection
arrive in order, so a smaller value is a target's mistake and is ignored, and so are both when MaxCmdSN is less than
ExpCmdSN - 1. A window that is closed (MaxCmdSN = ExpCmdSN - 1) opens by a later PDU, never by waiting.

The numbers of the login are judged like all others. If they make no sense the window starts closed, just behind
CmdSN, where any later PDU can open it.

Source: RFC 7143 §4.2.2.1.
"""

from iscsifuse.iscsi.serial import HALF, MASK
from iscsifuse.quick import known

__all__ = ["CommandWindow"]


@known
class CommandWindow:
    """CmdSN, ExpCmdSN and MaxCmdSN of one session.

    Args:
        cmd_sn: the number that the first command will carry.
        exp_cmd_sn: from the last Login Response, unchecked.
        max_cmd_sn: likewise.

    Attributes:
        cmd_sn: the number that the next command will carry.
        exp_cmd_sn: the target has received everything before it.
        max_cmd_sn: the last number that it takes.
    """

    __slots__ = ("cmd_sn", "exp_cmd_sn", "max_cmd_sn")

    def __init__(self, *, cmd_sn: int, exp_cmd_sn: int, max_cmd_sn: int) -> None:
        self.cmd_sn = self.exp_cmd_sn = cmd_sn
        self.max_cmd_sn = (cmd_sn - 1) & MASK
        self.update(exp_cmd_sn=exp_cmd_sn, max_cmd_sn=max_cmd_sn)

    @property
    def is_open(self) -> bool:
        """Whether one more non-immediate command may be sent now."""
        return ((self.max_cmd_sn - self.cmd_sn) & MASK) < HALF

    @property
    def room(self) -> int:
        """How many non-immediate commands may be sent now."""
        return ((self.max_cmd_sn - self.cmd_sn + 1) & MASK) if self.is_open else 0

    def take(self) -> int:
        """The CmdSN of a non-immediate command that is sent now. The caller has seen that the window is open."""
        number = self.cmd_sn
        self.cmd_sn = (number + 1) & MASK
        return number

    def update(self, *, exp_cmd_sn: int, max_cmd_sn: int) -> None:
        """Take in the two numbers of a received PDU."""
        if exp_cmd_sn == self.exp_cmd_sn and max_cmd_sn == self.max_cmd_sn:
            return
        # Written out (see ``serial.less``), since every received PDU comes by here.
        if 0 < ((exp_cmd_sn - 1 - max_cmd_sn) & MASK) < HALF:
            return
        if 0 < ((exp_cmd_sn - self.exp_cmd_sn) & MASK) < HALF and ((self.cmd_sn - exp_cmd_sn) & MASK) < HALF:
            self.exp_cmd_sn = exp_cmd_sn
        if 0 < ((max_cmd_sn - self.max_cmd_sn) & MASK) < HALF:
            self.max_cmd_sn = max_cmd_sn
