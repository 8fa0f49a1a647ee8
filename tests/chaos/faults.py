"""What can go wrong: each kind of fault is a function that does it, waits, and undoes it.

Times are short on purpose, so that there are many; now and then one is long enough to be found out by a ping.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from chaos.world import RAW, TARGET, World, run
from support.tgt import TgtError

__all__ = ["KINDS", "Kind"]

_LOGIN_BYTES = 4096  # more than a login has, either way


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: for the report.
        weight: how often it comes, relative to the others.
        what: in words.
        do: does it; it is over when this returns.
    """

    name: str
    weight: float
    what: str
    do: Callable[[World, random.Random], None]


def _wait(chance: random.Random, least: float, most: float) -> None:
    time.sleep(chance.uniform(least, most))


def _kill_sockets(world: World) -> None:
    run("ss", "-K", "-n", "-t", "sport", "=", f":{world.relay.port}", check=False)


def _reset(world: World, _: random.Random) -> None:
    _kill_sockets(world)


def _cut(world: World, chance: random.Random) -> None:
    world.relay.cut_after(down=chance.randint(1, 300_000))
    _wait(chance, 0.1, 0.4)


def _finish(world: World, chance: random.Random) -> None:
    world.relay.finish(down=chance.random() < 0.5)


def _refuse(world: World, chance: random.Random) -> None:
    world.relay.cut(refuse=True)
    _wait(chance, 0.2, 2.5)
    world.relay.resume()


def _storm(world: World, chance: random.Random) -> None:
    for _ in range(chance.randint(5, 10)):
        _kill_sockets(world)
        _wait(chance, 0.0, 0.25)


def _stall(world: World, chance: random.Random) -> None:
    world.relay.stall()
    _wait(chance, 0.1, 2.0)
    world.relay.resume()


def _black_hole(world: World, chance: random.Random) -> None:
    world.relay.blackhole()
    _wait(chance, 0.1, 2.0)
    world.relay.resume()


def _long_black_hole(world: World, chance: random.Random) -> None:
    """Long enough for a ping to find it out; the sockets stay open."""
    world.relay.blackhole()
    _wait(chance, 11, 14)
    world.relay.resume()


def _delay(world: World, chance: random.Random) -> None:
    world.relay.delay = chance.uniform(0.005, 0.15)
    _wait(chance, 0.5, 1.5)
    world.relay.delay = 0


def _trickle(world: World, chance: random.Random) -> None:
    world.relay.rate = chance.uniform(5_000, 200_000)
    _wait(chance, 0.5, 1.5)
    world.relay.rate = None


def _damage(world: World, chance: random.Random) -> None:
    world.relay.damage_after(chance.randint(1, 100_000), down=chance.random() < 0.5, spare=_LOGIN_BYTES)
    _wait(chance, 0.1, 0.4)


def _stop(world: World, chance: random.Random) -> None:
    world.server.pause()
    _wait(chance, 0.1, 2.0)
    world.server.cont()


def _long_stop(world: World, chance: random.Random) -> None:
    world.server.pause()
    _wait(chance, 11, 14)
    world.server.cont()


def _kill(world: World, chance: random.Random) -> None:
    world.server.kill()
    _wait(chance, 0.0, 1.5)
    world.server.start()


def _offline(world: World, chance: random.Random) -> None:
    """tgtd refuses as long as commands run on it, so it takes a few attempts under load."""
    for _ in range(200):
        try:
            world.server.withdraw_lun(TARGET, RAW)
            break
        except TgtError:
            time.sleep(0.01)
    else:
        return
    _wait(chance, 0.05, 0.6)
    world.server.bring_back_lun(TARGET, RAW)


KINDS: tuple[Kind, ...] = (
    Kind("reset", 5, "RST on every connection (ss -K)", _reset),
    Kind("cut", 5, "RST after some byte on its way to us", _cut),
    Kind("finish", 3, "FIN in one direction (half-closed)", _finish),
    Kind("refuse", 2, "RST, then connections are refused for up to 2.5 s", _refuse),
    Kind("storm", 2, "5 to 10 times RST within about a second", _storm),
    Kind("stall", 3, "nothing is carried for up to 2 s, and nothing lost", _stall),
    Kind("black hole", 3, "everything is swallowed for up to 2 s, then RST", _black_hole),
    Kind("long black hole", 0.4, "... for 11 to 14 s: a ping finds it out", _long_black_hole),
    Kind("delay", 2, "10 to 300 ms more per round trip", _delay),
    Kind("trickle", 2, "5 to 200 kB/s", _trickle),
    Kind("damage", 5, "one bit is flipped, in either direction; digests are on", _damage),
    Kind("stop", 3, "tgtd stands still (SIGSTOP) for up to 2 s", _stop),
    Kind("long stop", 0.4, "... for 11 to 14 s: a ping finds it out", _long_stop),
    Kind("kill", 4, "tgtd is killed (SIGKILL) and started anew within about 2 s", _kill),
    Kind("offline", 2, "one LUN is taken away for up to 0.6 s (ILLEGAL REQUEST 25h)", _offline),
)
