"""A socket that systemd made is served as it is."""

import asyncio
import os
import socket
import sys
from pathlib import Path

from migrd.cli.address import Address
from migrd.cli.client import Client

START_S = 20.0
PASS_ON = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
    "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='api');"
    "os.execv(sys.executable, [sys.executable, '-m', 'migrd', 'serve', '--config', sys.argv[2]])"
)


async def test_the_daemon_serves_the_socket_that_systemd_hands_over(short_tmp_path: Path) -> None:
    path = short_tmp_path / "by-systemd.sock"
    config = short_tmp_path / "migrd.toml"
    text = (
        f'[host]\nname = "alpha"\nstate_dir = "{short_tmp_path}/state"\n'
        f'runtime_dir = "{short_tmp_path}/run"\nprofiles_dir = "{short_tmp_path}/profiles"\n'
    )
    await asyncio.to_thread(config.write_text, text)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        os.chmod(path, 0o600)
        listening.listen()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PASS_ON, str(listening.fileno()), str(config)),
            pass_fds=[listening.fileno()],
        )
    try:
        async with asyncio.timeout(START_S), Client(Address(socket=path)) as client:
            reply = await client.call("GET", "/healthz", deadline_s=START_S)
        assert reply.status == 200
        assert not (short_tmp_path / "run" / "api.sock").exists()
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        process.terminate()
        assert await process.wait() == 0
    path.unlink()
