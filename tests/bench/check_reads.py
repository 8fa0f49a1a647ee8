"""``check_reads.py FILE BACKING THREADS READS``: whether 4 KiB reads with O_DIRECT give the right bytes.

A program of its own, so that nobody else hangs when the file does. It runs with any Python: another user may not be
able to see ours.
"""

import mmap
import os
import random
import sys
import threading

BLOCK = 4096


def check(path: str, backing: str, threads: int, reads: int) -> list[str]:
    """What was wrong."""
    wrong: list[str] = []
    size = os.stat(backing).st_size  # noqa: PTH116 - nothing but the size
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    truth = os.open(backing, os.O_RDONLY)

    def read_some(seed: int) -> None:
        chosen = random.Random(seed)
        with mmap.mmap(-1, BLOCK) as buffer:  # aligned to a page, as O_DIRECT wants it
            for _ in range(reads // threads):
                offset = chosen.randrange(size // BLOCK) * BLOCK
                try:
                    got = os.preadv(file, [buffer], offset)
                except OSError as error:
                    wrong.append(f"at {offset}: {error.strerror}")
                    return
                if got != BLOCK or buffer[:] != os.pread(truth, BLOCK, offset):
                    wrong.append(f"at {offset}: wrong bytes ({got} were read)")
                    return

    workers = [threading.Thread(target=read_some, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


if __name__ == "__main__":
    errors = check(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    print("\n".join(errors), file=sys.stderr)
    sys.exit(bool(errors))
