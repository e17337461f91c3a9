"""A pseudo-terminal with the program in it, and what a person would see there."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from types import TracebackType

_ESCAPE = re.compile(rb"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[()][A-Z0-9])")


class Terminal:
    """Runs a program on a terminal of the given size and keeps everything it wrote."""

    def __init__(
        self, command: list[str], environment: dict[str, str], *, columns: int, lines: int
    ) -> None:
        self._main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environment = {**environment, "TERM": "xterm-256color"}
        command = ["setsid", "--ctty", *command]  # a controlling terminal: ^C becomes SIGINT
        self._program = subprocess.Popen(
            command, env=environment, stdin=other, stdout=other, stderr=other
        )
        os.close(other)
        self.raw = b""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._program.poll() is None:
            self._program.kill()
            self._program.wait(10)
        os.close(self._main)

    @property
    def text(self) -> str:
        """Everything written so far, without the terminal's control sequences."""
        return _ESCAPE.sub(b"", self.raw).decode("utf-8", "replace").replace("\r\n", "\n")

    def wait_for(self, wanted: str | Callable[[str], bool], within_s: float = 20.0) -> None:
        """Until `wanted` was written; fails with what was written instead."""
        deadline_s = time.monotonic() + within_s
        while not (wanted in self.text if isinstance(wanted, str) else wanted(self.text)):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"waited for {wanted!r}, saw:\n{self.text}"
            self._read(min(left_s, 0.2))

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.write(self._main, b"\x03")

    def signal(self, number: signal.Signals) -> None:
        self._program.send_signal(number)

    def ended(self, within_s: float = 20.0) -> int:
        """The exit code, once the program has ended."""
        deadline_s = time.monotonic() + within_s
        while self._program.poll() is None:
            assert time.monotonic() < deadline_s, f"it does not end:\n{self.text}"
            self._read(0.1)
        while self._read(0.0):
            pass
        return self._program.returncode

    def _read(self, within_s: float) -> bool:
        readable, _, _ = select.select([self._main], [], [], within_s)
        if not readable:
            return False
        try:
            content = os.read(self._main, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self.raw += content
        return bool(content)
