"""Proof that a guest went on after a move: two witnesses, neither of which asks migrd.

    heartbeat   what the guest printed on all its hosts reads as one log: no gap, no repeat,
                one change of owner per migration; the longest silence is the blackout
    memory      every byte of its RAM is what the guest's own rules predict

The guest is itself the third: it checks each page it comes back to, and says in its heartbeat
how many it did not find as it had left them.
"""

from migrd.demo.errors import ProofFailed
from migrd.demo.heartbeat import Continuity, Heartbeat, SerialTap, heartbeats, prove_continuity
from migrd.demo.memory import MemoryMatch, SaveMemory, verify_memory

__all__ = [
    "Continuity",
    "Heartbeat",
    "MemoryMatch",
    "ProofFailed",
    "SaveMemory",
    "SerialTap",
    "heartbeats",
    "prove_continuity",
    "verify_memory",
]
