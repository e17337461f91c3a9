"""What the events of one QEMU have told so far, for whoever asks later: QEMU repeats none.

A daemon that has just come, or come back, has seen nothing: None says so.
"""

from migrd.qemu.passthrough import DEVICES_BOUND, States, with_device_state
from migrd.qemu.wire import QmpEvent


class Seen:
    """Of one QEMU, over all connections of this daemon. All stamps: time.monotonic()."""

    def __init__(self) -> None:
        self.moved_at_s = 0.0
        """When its migration last told of a new status or pass."""
        self.stopped_at_s: float | None = None
        self.resumed_at_s: float | None = None
        self.shut_itself_down = False
        self.device_states: States = ()
        self.reset_devices: tuple[str, ...] = ()

    def take(self, event: QmpEvent) -> None:
        if event.name in {"MIGRATION", "MIGRATION_PASS"}:
            self.moved_at_s = event.received_s
        elif event.name == "STOP":
            self.stopped_at_s = event.received_s
        elif event.name == "RESUME":
            self.resumed_at_s = event.received_s
        elif event.name == "VFIO_MIGRATION":
            self.device_states = with_device_state(self.device_states, event.data)
        elif event.name == "SHUTDOWN" and event.data.get("guest") is True:
            self.shut_itself_down = True

    def begin_migration(self) -> None:
        """From here on, stops and starts are those of this migration."""
        self.stopped_at_s = self.resumed_at_s = None

    def note_reset(self, devices: tuple[str, ...]) -> None:
        """QEMU has said that it reset them. It says so until the next migration; it stays true."""
        known = dict.fromkeys((*self.reset_devices, *devices))
        self.reset_devices = tuple(known)[:DEVICES_BOUND]

    def forget_device(self, id_: str) -> None:
        """It was unplugged: another one may come by that name."""
        self.device_states = tuple(pair for pair in self.device_states if pair[0] != id_)
        self.reset_devices = tuple(device for device in self.reset_devices if device != id_)
