"""The compiled module again, with every access to memory and every overflow watched.

It is compiled here, without a warning, whether or not one was installed: one that doesn't compile is left out at
installation, and all other tests of it skip.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
TESTS = ["tests/iscsi/test_quick.py", "tests/cache/test_cache_quick.py"]
_BUG = "volatile int size = 8; volatile char *p = malloc(size); return p[size];"


def _compile(source: Path, target: Path, *options: str) -> bool:
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1", "-Wall", "-Wextra"]
    command = ["gcc", *sanitize, *options, "-o", str(target), str(source)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sanitizer's library, which has to be loaded before Python's memory is of any interest to it."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    folder = tmp_path_factory.mktemp("bug")
    (folder / "bug.c").write_text(f"#include <stdlib.h>\nint main(void) {{ {_BUG} }}\n")
    if not _compile(folder / "bug.c", folder / "bug"):
        pytest.skip("gcc has no sanitizers here")
    found = subprocess.run([folder / "bug"], capture_output=True, text=True)
    assert "heap-buffer-overflow" in found.stderr, "a sanitizer that finds nothing"
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return " ".join(libraries)


def test_no_byte_is_touched_that_is_not_ours(runtime: str, tmp_path: Path) -> None:
    headers = [f"-I{sysconfig.get_path(kind)}" for kind in ("include", "platinclude")]
    module = tmp_path / f"_quick{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert _compile(TOP / "iscsifuse" / "_quick.c", module, "-shared", "-fPIC", "-Werror", *headers)
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python itself leaves some at its end
        "PYTHONMALLOC": "malloc",  # or else it hands out pieces of what is one large piece to the sanitizer
        "QUICK_MODULE": str(module),
        "PYTHONPATH": str(TOP / "tests"),
    }
    # "-k": memory is counted by somebody else then
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.sanitized", "-p", "no:cacheprovider", *TESTS]
    result = subprocess.run(
        [*command, "-k", "not nothing_is_kept"], cwd=TOP, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "skipped" not in result.stdout
