"""An iSCSI disk target for demonstrations and tests: honest by default, faulty on request.

It shares the codecs of :mod:`iscsifuse.iscsi` and :mod:`iscsifuse.scsi` with the initiator and nothing else, so what
it proves is behaviour, not bytes; that the bytes are right is for targets and dissectors written by others to say.

=================  ===================================================================================================
``config``         what to serve: portals, targets, disks, CHAP, the values of the operational keys
``disk``           one logical unit: blocks, a volatile cache that a power cut empties, bad blocks, thin provisioning
``scsi_engine``    executes CDBs against disks (``media``: the block commands; ``parameter_data``: what a disk says of
                   itself), keeps unit attentions per nexus and a ledger of what was executed
``script``         faults: rules about the nth PDU that matches (``actions``: change, drop, delay, cut, replace it)
``validator``      what an initiator may send, checked strictly (``burst``: the data of one write)
``wire``           a byte stream as PDUs, through digests, script and validator
``login``          the login phase as a target sees it (``keys``, ``chap_target``)
``session``        the full feature phase: order, task management, pings, logout (``numbers``, ``discovery``)
``tasks``          SCSI commands from arrival to status (``transfer``: collecting Data-Out, splitting Data-In)
``target``         portals, sessions, and how to run it all
=================  ===================================================================================================
"""
