"""What ``_quick.c`` offers; `iscsifuse.quick` says what for. Arguments of another type than these raise TypeError."""

from typing import Any

def bind(cls: type, /) -> None: ...
def start_read(
    state: tuple[object, object, dict[int, Any], dict[int, Any]],
    lun: bytes,
    lba: int,
    blocks: int,
    buffer: memoryview,
    started: float,
    /,
) -> tuple[Any, bytes] | None: ...
def take_reads(
    state: tuple[object, object, dict[int, Any], dict[int, Any]],
    staging: memoryview,
    start: int,
    end: int,
    events: list[Any],
    max_data: int,
    /,
) -> int: ...
def end_reads(events: list[Any], rows: dict[int, Any], now: float, /) -> tuple[int, float, list[Any]]: ...
def take_stray(tables: tuple[object, ...], offset: int, length: int, size: int, /) -> memoryview | None: ...
