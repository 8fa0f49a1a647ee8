"""Fuzzing: whatever bytes a target, a network or a user may send, only errors of ours come out, and soon.

Each module here holds the checks of a few decoders; a check is a plain function of some bytes that fails where the
decoder broke a promise. ``targets`` lists them. Three run them: the usual tests, over the corpus and over bytes that
hypothesis makes up; ``python -m fuzz`` under atheris, which is guided by coverage; and ``scripts/fuzz``, which does
that for all of them. See docs/fuzzing.md.
"""
