"""Real daemons and real QEMUs under faults from a seed, for as long as one likes.

    python -m tests.long --migrations 300 --seed-from 1 [--seconds S] [--restarts N]
    python -m tests.long --seed-from 17 --migrations 1                 one of them again

    schedule.py   a number -> what goes wrong in one migration
    field.py      two hosts whose daemons are born quickly (nursery.py), with links that can fail
    blows.py      carries out what a schedule has in store
    ground.py     who runs, asked of QEMU itself, over a monitor that migrd does not know of
    judging.py    what must be true afterwards

A guest lives through as many migrations as it can: after each faulted one it is moved once more
without a fault. Every QEMU's serial line is recorded from its first byte.
"""
