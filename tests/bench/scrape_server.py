"""The daemon's HTTP side alone, with many series: python -m tests.bench.scrape_server <socket> <n>

The real application, the real exposition with its renderer, over a Service that has as many VMs as
make the series; the exposition refreshes all the time, as it does while things change.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from migrd.api.app import build_app
from migrd.api.server import serving
from migrd.api.table import Scrape
from migrd.config import LogSettings
from migrd.core.facts import REQUIRED_FEATURES, QemuStatus, RunState, VmFacts, VmSpec
from migrd.engine.service import Check, MigrationView, VmView
from migrd.log import configure
from migrd.metrics.exposition import Exposition
from migrd.metrics.recorder import Metrics


class ManyVms:
    """What the exposition reads of the engine; something has changed whenever it looks."""

    def __init__(self, count: int) -> None:
        self._version = 0
        self._views = [_view(f"vm-{n:05}") for n in range(count)]

    def vms(self) -> tuple[int, Sequence[VmView]]:
        self._version += 1
        return self._version, self._views

    def migrations(self) -> tuple[int, Sequence[MigrationView]]:
        return self._version, ()

    def readiness(self) -> Sequence[Check]:
        return ()


def _view(name: str) -> VmView:
    facts = VmFacts(
        vm=name,
        run_state=RunState.RUNNING,
        qemu_status=QemuStatus.NONE,
        qemu_version="10.0.2",
        machine_type="q35",
        memory_bytes=1 << 30,
        features=REQUIRED_FEATURES,
    )
    return VmView(
        name=name,
        resource_version=1,
        spec=VmSpec(name, "linux"),
        managed=True,
        state="running",
        facts=facts,
        facts_age_s=0.1,
        epoch=1,
    )


async def main() -> None:
    configure(LogSettings(level="warning"))
    path, series = Path(sys.argv[1]), int(sys.argv[2])
    service: Any = ManyVms(series // 3)  # three verdicts for each VM
    exposition = Exposition(Metrics(), service)
    refreshed = await exposition.refresh()
    lines = refreshed.body.count(b"\n") - refreshed.body.count(b"\n#")
    assert lines >= series, f"only {lines} series"

    def metrics() -> Scrape:
        snapshot = exposition.serve()
        return Scrape(snapshot.body, snapshot.content_type, snapshot.etag, snapshot.gzipped)

    over = asyncio.Event()

    def answer() -> None:
        if sys.stdin.readline():
            sys.stdout.write(f"{exposition.renderings} {len(exposition.latest.body)}\n")
            sys.stdout.flush()
        else:
            over.set()

    asyncio.get_running_loop().add_reader(0, answer)
    async with serving(build_app(service, metrics=metrics)) as server:
        await server.serve_unix(path, mode=0o600, gid=-1)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await over.wait()


if __name__ == "__main__":
    asyncio.run(main())
