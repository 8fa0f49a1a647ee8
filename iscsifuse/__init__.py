"""A user-space iSCSI initiator that turns every LUN of a target into a plain file."""

__version__ = "0.1.0"
