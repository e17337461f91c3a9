"""The scripted engine behind the real HTTP interface, in a thread or a process of its own.

`python -m tests.cli.scripted_daemon SOCKET [SPEED]` serves one, for looking at the command line by
hand; SIGUSR1 takes the listener away for a second.
"""

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from migrd.api.app import build_app
from tests.cli.scripted import Scripted


class Daemon:
    """The scripted engine behind the real interface, in a thread of its own."""

    def __init__(self, socket: Path, *, speed: float = 20.0) -> None:
        self.socket = socket
        self._speed = speed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted daemon")
        self._runner: web.AppRunner | None = None
        self.service: Scripted | None = None
        self.middlewares: list[Any] = []
        """Put before the interface's own when it next listens."""

    def __enter__(self) -> "Daemon":
        self._thread.start()
        self.do(self._begin())
        return self

    def __exit__(self, *error: object) -> None:
        self.do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def do(self, work: Any) -> Any:
        """Run a coroutine on the daemon's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def call(self, work: Callable[[Scripted], Any]) -> Any:
        """Look at the engine, or change it, on its own loop."""

        async def on_loop() -> Any:
            assert self.service is not None
            return work(self.service)

        return self.do(on_loop())

    def stop_listening(self) -> None:
        self.do(self._stop_listening())

    def listen(self) -> None:
        self.do(self._listen())

    async def _begin(self) -> None:
        self.service = Scripted(speed=self._speed)
        await self._listen()

    async def _listen(self) -> None:
        assert self.service is not None
        app = build_app(self.service, metrics=lambda: (b"", "text/plain", "0"))
        for middleware in self.middlewares:
            app.middlewares.insert(0, middleware)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.socket)).start()

    async def _stop_listening(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.socket.unlink(missing_ok=True)

    async def _end(self) -> None:
        assert self.service is not None
        tasks = [r.task for r in self.service.migrations_by_id.values() if r.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stop_listening()


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT; SIGUSR1 takes the listener away for a second."""
    socket, speed = Path(arguments[0]), float(arguments[1]) if len(arguments) > 1 else 1.0
    with Daemon(socket, speed=speed) as daemon:
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
        while signal.sigwait(signals) == signal.SIGUSR1:
            daemon.stop_listening()
            signal.sigtimedwait(signals - {signal.SIGUSR1}, 1.0)
            daemon.listen()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    main(sys.argv[1:])
