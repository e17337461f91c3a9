"""A road of some length: TCP connections whose every byte arrives a set time later.

    python -m tests.bench.delaying DELAY_S LISTEN:TARGET ...      ports on the loopback

Prints "ready" when all ports listen; its stdin ends it. What is read is handed on DELAY_S after it
was read, in order, by a thread of its own for each direction, since an event loop's timers are good
to a millisecond only.
"""

import contextlib
import os
import queue
import socket
import sys
import threading
import time

_PIECE_BYTES = 1 << 16


def main(words: list[str]) -> None:
    delay_s = float(words[0])
    for pair in words[1:]:
        listen, target = (int(port) for port in pair.split(":"))
        server = socket.create_server(("127.0.0.1", listen))
        _start(_accept, server, target, delay_s)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)


def _start(work: object, *words: object) -> None:
    threading.Thread(target=work, args=words, daemon=True).start()  # type: ignore[arg-type]  # a callable


def _accept(server: socket.socket, target: int, delay_s: float) -> None:
    while True:
        near, _ = server.accept()
        try:
            far = socket.create_connection(("127.0.0.1", target))
        except OSError:
            near.close()
            continue
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pieces: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
            _start(_read, one, pieces, delay_s)
            _start(_hand_on, other, pieces)


def _read(
    one: socket.socket, pieces: "queue.SimpleQueue[tuple[float, bytes]]", delay_s: float
) -> None:
    piece = b"begun"
    while piece:
        try:
            piece = one.recv(_PIECE_BYTES)
        except OSError:
            piece = b""
        pieces.put((time.monotonic() + delay_s, piece))


def _hand_on(other: socket.socket, pieces: "queue.SimpleQueue[tuple[float, bytes]]") -> None:
    while True:
        due_s, piece = pieces.get()
        time.sleep(max(0.0, due_s - time.monotonic()))
        try:
            if not piece:
                other.shutdown(socket.SHUT_WR)
                return
            other.sendall(piece)
        except OSError:
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)
            return


if __name__ == "__main__":
    main(sys.argv[1:])
