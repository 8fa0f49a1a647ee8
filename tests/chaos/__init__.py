"""``scripts/chaos``: a mount under load while everything below it goes wrong; see `chaos.__main__`."""
