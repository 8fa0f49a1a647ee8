"""What a mount of many LUNs costs, against a tgtd on this machine: ``scripts/bench [--rounds N]``.

Prints the seconds from ``iscsifuse mount`` to its return (the mount is usable then), and the most memory that the
daemon ever had, after mounting and after each kind of load on top of it.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from support.cli import Mounted
from support.disks import random_file, sparse
from support.tgt import TgtServer

MIB = 1 << 20
CACHE_SIZE = 64 * MIB
BOUND = CACHE_SIZE + 80 * MIB


def peak(mounted: Mounted) -> int:
    """The most memory that the daemon had so far, in bytes."""
    assert mounted.pid is not None
    line = next(
        line for line in Path(f"/proc/{mounted.pid}/status").read_text().splitlines() if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


def shell(command: str) -> None:
    subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=600)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what a mount of many LUNs costs.")
    parser.add_argument("--rounds", type=int, default=5, help="how often to mount (default: 5)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="iscsifuse-bench-") as name, TgtServer(Path(name)) as server:
        folder = Path(name)
        for target in range(8):
            server.add_target(f"iqn.2026-11.example:many{target}")
            for lun in range(1, 9):
                backing = folder / f"{target}-{lun}.img"
                random_file(backing, 1024 * MIB) if (target, lun) == (0, 1) else sparse(backing, 512 * MIB)
                server.add_lun(f"iqn.2026-11.example:many{target}", lun, backing)
        times = []
        for _ in range(rounds):
            began = time.monotonic()
            with Mounted(server.url(), folder / "mount"):
                times.append(time.monotonic() - began)
        print(
            f"64 LUNs on 8 targets, mount to usable: median {statistics.median(times):.2f} s, "
            f"{min(times):.2f} to {max(times):.2f} s in {rounds} rounds (goal: 3 s)"
        )
        print(f"most resident memory of the daemon (goal: at most {BOUND // MIB} MiB = cache_size + 80 MiB):")
        with Mounted(server.url(), folder / "mount", "--rw") as mounted:
            here = mounted.point / "iqn.2026-11.example:many0"
            print(f"  mounted                              {peak(mounted) / MIB:6.1f} MiB")
            shell(f"dd if='{here}/lun-1' of=/dev/null bs=1M")
            print(f"  1 GiB read                           {peak(mounted) / MIB:6.1f} MiB")
            shell(f"dd if='{here}/lun-1' of='{here}/lun-2' bs=1M count=512 conv=notrunc,fsync")
            print(f"  512 MiB written                      {peak(mounted) / MIB:6.1f} MiB")
            files = "".join(f"--name=j{n} --filename='{here}/lun-{n}' " for n in range(3, 9)).replace(":", "\\:")
            shell(
                "cd / && fio --rw=randrw --bsrange=512-1M --bs_unaligned --size=64m --verify=crc32c "
                f"--verify_state_save=0 --end_fsync=1 {files}"
            )
            print(f"  6 jobs of verified random I/O        {peak(mounted) / MIB:6.1f} MiB")
            shell(f"cd '{mounted.point}' && for f in */lun-*; do dd if=$f of=/dev/null bs=1M count=8 & done; wait")
            print(f"  64 readers at once                   {peak(mounted) / MIB:6.1f} MiB")


if __name__ == "__main__":
    main()
