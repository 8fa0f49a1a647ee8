"""What a person types, and what they read: argument parsing and words, a file per command, no logic.

Nothing heavy is imported at module level in here (no trio, no pyfuse3, no session code), so that ``iscsifuse --help``
answers in a blink. What a command needs it imports when it runs.
"""
