"""Exclusive ranges, first come first served; pure bookkeeping.

A range that overlaps one in front of it (held, or waiting itself) waits. So nobody overtakes somebody he would get
in the way of, no range starves, and ranges with nothing in common never wait for each other. The lists are short (a
file system has a few dozen requests in flight), so they are simply walked through.
"""

__all__ = ["RangeLock", "Ticket"]


class Ticket:
    """A range that somebody holds or waits for.

    Attributes:
        start: first unit.
        stop: unit after the last one.
        blockers: how many tickets in front overlap; 0 means that the range is held.
    """

    __slots__ = ("blockers", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.blockers = 0

    @property
    def held(self) -> bool:
        """Whether the range is the ticket holder's now."""
        return self.blockers == 0


class RangeLock:
    """All ranges that are held or waited for, oldest first."""

    __slots__ = ("_tickets",)

    def __init__(self) -> None:
        self._tickets: dict[Ticket, None] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def request(self, start: int, stop: int) -> Ticket:
        """Queue up for the units ``start`` to ``stop - 1``; the ticket may be held at once."""
        ticket = Ticket(start, stop)
        for other in self._tickets:
            if other.start < stop and start < other.stop:
                ticket.blockers += 1
        self._tickets[ticket] = None
        return ticket

    def release(self, ticket: Ticket) -> list[Ticket]:
        """Give a range back, or give up waiting for it.

        Returns:
            The tickets that are held from now on.
        """
        granted = []
        behind = False
        for other in self._tickets:
            if other is ticket:
                behind = True
            elif behind and other.start < ticket.stop and ticket.start < other.stop:
                other.blockers -= 1
                if not other.blockers:
                    granted.append(other)
        del self._tickets[ticket]
        return granted
