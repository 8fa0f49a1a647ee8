"""Short cuts in C (``_quick.c``) through what a small READ does most often.

A small read costs some microseconds of the kernel, and used to cost twice that in Python, spread over sixty functions
none of which was slow. What can't be had by fewer steps is had by compiled ones, in the four places that each such
read comes by:

=============  =====================================  =========================================================
short cut      through                                where nothing is unusual
=============  =====================================  =========================================================
`start_read`   `Connection.submit`                    a READ(10) is made, numbered and encoded
`take_reads`   `FrameReceiver`, `Incoming`            Data-In PDUs that each end their read are taken in
`end_reads`    `Session._end`, `CommandStatistics`    reads that ended well are counted, their callers told
`take_stray`   `BlockCache.read`, `ReadAhead`         a read that is near to nothing is remembered, and gets memory
=============  =====================================  =========================================================

**The Python is complete without them, and defines what they do.** Each looks first and changes nothing meanwhile;
where anything is unusual it says so, and the Python goes on from the very same state. They have no state of their own
but that of the Python objects, whose ``__slots__`` they read and write: hence `known`. The tests hold both ways
against each other, and run the C under a sanitizer.

Each name is None where there is no compiled module (it is built at installation, if there is a compiler), or where
ISCSIFUSE_PURE is set in the environment.
"""

import os
from typing import TypeVar

__all__ = ["end_reads", "known", "start_read", "take_reads", "take_stray"]

_Class = TypeVar("_Class", bound=type)

_compiled = not os.environ.get("ISCSIFUSE_PURE")
if _compiled:
    try:
        from iscsifuse import _quick
    except ImportError:
        _compiled = False

start_read = _quick.start_read if _compiled else None
take_reads = _quick.take_reads if _compiled else None
end_reads = _quick.end_reads if _compiled else None
take_stray = _quick.take_stray if _compiled else None


def known(cls: _Class) -> _Class:
    """A decorator: let the short cuts know where the slots of a class are.

    Raises:
        TypeError, AttributeError, ValueError: they need a slot that it doesn't have, or know no class of this name.
    """
    if _compiled:
        _quick.bind(cls)
    return cls
