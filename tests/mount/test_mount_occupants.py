"""Who keeps a mount busy."""

from pathlib import Path

from iscsifuse.mount.occupants import occupants

MOUNT = "/mnt/san"


def process(proc: Path, pid: int, name: str, *, files: dict[int, str], cwd: str = "/", maps: str = "") -> None:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "comm").write_text(name + "\n")
    (folder / "maps").write_text(maps)
    (folder / "cwd").symlink_to(cwd)
    for number, place in files.items():
        (folder / "fd" / str(number)).symlink_to(place)


def test_all_kinds_of_occupants(tmp_path: Path) -> None:
    proc, sysfs = tmp_path / "proc", tmp_path / "sys"
    process(proc, 200, "dd", files={3: f"{MOUNT}/lun-1", 4: f"{MOUNT}/lun-1", 5: "/mnt/sandals"})
    process(proc, 31, "bash", files={0: "/dev/null"}, cwd=MOUNT)
    line = "7f0000000000-7f0000001000 r--s 00000000 00:28 12345"
    process(proc, 32, "mapper", files={}, maps=f"{line:<73}{MOUNT}/lun-2\n{line}\n")
    (proc / "self").mkdir()
    (proc / "self/mountinfo").write_text(
        f"50 43 0:50 / {MOUNT}/x rw - tmpfs tmpfs rw\n43 1 0:40 / {MOUNT} rw - x x rw\n"
    )
    loop = sysfs / "block/loop3/loop"
    loop.mkdir(parents=True)
    (loop / "backing_file").write_text(f"{MOUNT}/lun-3\n")
    (sysfs / "block/loop4/loop").mkdir(parents=True)
    (sysfs / "block/loop4/loop/backing_file").write_text("/other\n")
    assert occupants(MOUNT, proc=proc, sysfs=sysfs) == [
        f"{MOUNT}/lun-3 is attached to /dev/loop3",
        f"something is mounted on {MOUNT}/x",
        "it is the working directory of bash (pid 31)",
        f"{MOUNT}/lun-2 is open by mapper (pid 32)",
        f"{MOUNT}/lun-1 is open by dd (pid 200)",
    ]


def test_a_handful_is_enough(tmp_path: Path) -> None:
    for pid in range(100, 120):
        process(tmp_path, pid, "dd", files={3: f"{MOUNT}/lun-1"})
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text("")
    assert len(occupants(MOUNT, proc=tmp_path, sysfs=tmp_path)) == 5


def test_what_may_not_be_seen_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text("")
    assert occupants(MOUNT, proc=tmp_path, sysfs=tmp_path) == []
