"""``python -m iscsifuse.cli``: the same as the script ``iscsifuse``."""

from iscsifuse.cli.main import main

main()
