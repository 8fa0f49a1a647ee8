"""CmdSN, MaxCmdSN and StatSN of a session, as the target counts them.

MaxCmdSN leaves room for as many commands as ``window`` says, less those that aren't done. It never goes back, so a
window that is made smaller closes as commands come in. Source: RFC 7143 §4.2.2.
"""

from iscsifuse.iscsi import serial

__all__ = ["Numbers"]


class Numbers:
    """The numbers of one session with one connection.

    Args:
        cmd_sn: CmdSN of the first command.
        stat_sn: StatSN of the next response.
        window: commands that may be outstanding.

    Attributes:
        exp_cmd_sn: CmdSN that is due.
        stat_sn: StatSN of the next response.
        window: change it at any time.
        outstanding: commands that aren't done; kept up to date by ``tasks``.
    """

    def __init__(self, *, cmd_sn: int, stat_sn: int, window: int) -> None:
        self.exp_cmd_sn = cmd_sn
        self.stat_sn = stat_sn
        self.window = window
        self.outstanding = 0
        self._max_cmd_sn = serial.add(cmd_sn, window - 1)

    @property
    def max_cmd_sn(self) -> int:
        """MaxCmdSN as it has to be told now."""
        limit = serial.add(self.exp_cmd_sn, self.window - self.outstanding - 1)
        if serial.less(self._max_cmd_sn, limit):
            self._max_cmd_sn = limit
        return self._max_cmd_sn

    def next_stat_sn(self) -> int:
        """StatSN for a response that uses it up."""
        number = self.stat_sn
        self.stat_sn = serial.add(number, 1)
        return number

    def within(self, cmd_sn: int) -> bool:
        """Whether a numbered PDU may be acted on, now or when its turn comes."""
        return serial.less_or_equal(self.exp_cmd_sn, cmd_sn) and serial.less_or_equal(cmd_sn, self._max_cmd_sn)

    def advance(self) -> None:
        """The command that was due has come."""
        self.exp_cmd_sn = serial.add(self.exp_cmd_sn, 1)
