"""Daemons born quickly: migrd is imported once, and each daemon is a fork of that.

    orders (stdin)     {"config": ..., "holds": ..., "log": ..., "failpoints": ...}
    answers (stdout)   {"pid": ...}                             one JSON object a line

A daemon takes two seconds of processor time to import itself; a thousand restarts would be most of
an hour. What is forked here has imported, and nothing else: no loop, no thread, no file of migrd's
is open. From there on it is migrd's own `serve`. Children are nobody's to wait for (SIGCHLD is
ignored here): whoever ordered them holds a pidfd.
"""

import gc
import json
import os
import signal
import sys
import traceback
from typing import NoReturn

import migrd.__main__
import migrd.daemon  # noqa: F401 - what takes so long to import
from migrd import failpoints
from tests.integration import held


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            _become(order)
        sys.stdout.write(json.dumps({"pid": pid}) + "\n")
        sys.stdout.flush()


def _become(order: dict[str, str]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, wanted in enumerate((null, log, log)):
            os.dup2(wanted, number)
        os.closerange(3, 256)
        os.environ.update({failpoints.VARIABLE: order["failpoints"]})
        sys.argv = ["held.py", order["holds"], "serve", "--config", order["config"]]
        held.main()
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
