"""SAM, SPC and SBC without any I/O: commands, statuses, sense data and parameter data as values.

Both ends use these modules. The initiator encodes CDBs and decodes what comes back; the loopback target
decodes CDBs and encodes its answers. Two rules hold everywhere:

- what comes *from the other side* may be any bytes at all, and a decoder that can't use them raises
  :class:`~iscsifuse.errors.ParameterDataError` and nothing else;
- what comes *from a caller* is checked, never masked: an LBA or a LUN that doesn't fit its field is a
  ``ValueError``, because a number that silently lost its high bits names another block of another disk.

Nothing is re-exported here; import the module that holds what is needed.
"""
