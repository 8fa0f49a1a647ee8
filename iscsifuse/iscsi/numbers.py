"""The numbers of a connection that both of its directions need. Source: RFC 7143 §4.2.2.2, §11.2.1.8."""

from iscsifuse.quick import known

__all__ = ["Numbers"]


@known
class Numbers:
    """What is sent acknowledges what has come.

    Attributes:
        exp_stat_sn: StatSN that is expected next; everything before it is acknowledged by whatever we send.
        next_itt: Initiator Task Tag to try next.
    """

    __slots__ = ("exp_stat_sn", "next_itt")

    def __init__(self, *, exp_stat_sn: int, next_itt: int) -> None:
        self.exp_stat_sn = exp_stat_sn
        self.next_itt = next_itt
