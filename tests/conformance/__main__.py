"""``scripts/conformance``: run the tests that prove numbered cases, and print the table that comes of it."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from conformance.cases import load_cases
from conformance.report import read_run, render_document, render_terminal, rows_of

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "conformance.md"


def main() -> int:
    """The exit status: 0 when every case passes, or says why it can't."""
    parser = argparse.ArgumentParser(prog="scripts/conformance", description=__doc__)
    parser.add_argument("--write", action="store_true", help="bring docs/conformance.md up to date")
    parser.add_argument("--slow", action="store_true", help="run the tests that take long, too")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        command = ["-m", "pytest", "-q", "-m", "conformance", f"--conformance={results}"]
        command += ["--slow"] if arguments.slow else []
        # The table has standard output for itself.
        status = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=sys.stderr, check=False).returncode
        if not results.exists():
            sys.stderr.write("conformance: pytest did not get as far as running tests\n")
            return 1
        run = read_run(results)

    cases = load_cases()
    rows = rows_of(cases, run)
    sys.stdout.write(render_terminal(rows) + "\n")
    if arguments.write:
        DOCUMENT.write_text(render_document(rows))
    unknown = run.keys() - {case.number for case in cases}
    problems = [f"tests/conformance/cases.toml has no case {number}" for number in sorted(unknown)]
    if status and not any(row.result.is_bad for row in rows):
        problems.append(f"pytest failed with status {status}")
    for problem in problems:
        sys.stderr.write(f"conformance: {problem}\n")
    return int(bool(problems) or any(row.result.is_bad for row in rows))


if __name__ == "__main__":
    sys.exit(main())
