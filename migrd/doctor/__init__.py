"""`migrd doctor`: is everything here that migrd needs, and if not, what is to be done?

    command     the command line
    examination everything, in order
    finding     Finding, and running checks so that one that hangs is itself a finding
    software    Python, launch profiles, the QEMUs they name
    storage     directories, fsync, the journal
    network     addresses, certificates, tokens, the other hosts
    kernel      KVM, userfaultfd, memory, open files, clock
    passthrough IOMMUs, iommufd and VFIO, the devices that are meant for VMs
    sampling    dirty rates outside of migrations

Rules
1. Looking changes nothing: no directory is made, the journal is tried on a copy, no port is taken.
2. fail: migrd cannot do what the configuration asks of it. warn: it can, but somebody should look.
   What is merely not there and not asked for is ok, and said.
3. Every finding that is not ok says what to do, as a command where there is one.
4. Every check has a deadline, and a defect in one is a finding of its own.
"""
