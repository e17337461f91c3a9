"""What one QEMU process offers, and which machine it is: asked once per connection.

Behind a new connection may be another QEMU, so nothing is kept over it. The schema is long: QEMU
needs some ten milliseconds to write it down and we to read it, on the way of each migration. A QEMU
that was launched from a binary which has been probed offers what that binary does. So the probe's
answer is taken, if the greeting names the very same version and package.

Trap: the binary may be exchanged between probe and launch, or stand behind a wrapper script. The
greeting comes from the process itself; two builds that call themselves by the same version and
package, one behind the other behind the same script, are told apart by a restart of the daemon.
"""

from migrd.qemu import samples
from migrd.qemu.monitor import Monitor
from migrd.qemu.preparation import Ask
from migrd.qemu.probe import Probed
from migrd.qemu.schema import QmpSchema, read_schema
from migrd.qemu.wire import CommandRefused


class Offer:
    """Of the QEMU behind one monitor."""

    def __init__(self, monitor: Monitor, expected: Probed | None) -> None:
        """`expected`: what its binary said when it was probed, where that is known."""
        self._monitor = monitor
        self._expected = expected
        self._schema: tuple[int, QmpSchema] | None = None
        self._machine_type: tuple[int, str | None] | None = None

    async def schema(self, ask: Ask, *, deadline_s: float) -> QmpSchema:
        """Raises as `ask` does."""
        connections = self._monitor.state.connections
        if self._schema is None or self._schema[0] != connections:
            known = self._as_expected()
            if known is None:
                known = read_schema(await ask("query-qmp-schema", deadline_s=deadline_s))
            self._schema = (connections, known)
        return self._schema[1]

    async def machine_type(self, ask: Ask) -> str | None:
        """None where QEMU does not say. Raises as `ask` does."""
        connections = self._monitor.state.connections
        if self._machine_type is None or self._machine_type[0] != connections:
            try:
                kind = await ask("qom-get", {"path": "/machine", "property": "type"})
            except CommandRefused:
                kind = None
            self._machine_type = (connections, samples.read_machine_type(kind))
        return self._machine_type[1]

    def _as_expected(self) -> QmpSchema | None:
        expected, greeting = self._expected, self._monitor.greeting
        if expected is None or not greeting or greeting.get("version") != expected.greeted:
            return None
        return expected.schema
