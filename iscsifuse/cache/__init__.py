"""Between the bytes of a file and the blocks of a disk.

``block_file`` makes what a file system reads and writes; ``BlockFile`` is what it looks like, ``BufferPool`` the
memory that all files of a mount share. How it works, from the bottom up: ``extent`` (what is known about a block),
``pool`` (memory and eviction), ``filling``, ``distance``, ``readahead`` and ``prefetch``, ``writeback`` and
``errseq``, ``through``, ``cache`` (which ties them together); ``rangelock`` and ``direct`` (no cache at all).
"""

from iscsifuse.cache.cache import BlockCache
from iscsifuse.cache.device import BlockDevice, EndOfDeviceError
from iscsifuse.cache.direct import DirectFile
from iscsifuse.cache.errseq import Handle
from iscsifuse.cache.file import BlockFile, Buffer
from iscsifuse.cache.pool import BufferPool
from iscsifuse.cache.settings import CacheSettings, CacheStats

__all__ = [
    "BlockCache",
    "BlockDevice",
    "BlockFile",
    "Buffer",
    "BufferPool",
    "CacheSettings",
    "CacheStats",
    "DirectFile",
    "EndOfDeviceError",
    "Handle",
    "block_file",
]


def block_file(device: BlockDevice, *, pool: BufferPool, settings: CacheSettings) -> BlockFile:
    """The file that a device is to be shown as.

    Args:
        device: the disk.
        pool: memory of the mount; unused in direct mode.
        settings: how to cache, and whether at all.

    Raises:
        ParameterDataError: the device's blocks are larger than a slot of the pool (and ``direct`` isn't set).
    """
    if settings.direct:
        return DirectFile(device)
    return BlockCache(device, pool=pool, settings=settings)
