"""From a command's coroutine to an exit code: options, the connection, errors, Ctrl-C.

The options that say *where* and *how to print* are accepted before and after the command's name
(`migrd -o json vms`, `migrd vms -o json`); the one nearer to the command wins. An option beats the
environment, the environment beats the default.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import click

from migrd.cli.address import Address, locate
from migrd.cli.client import DEADLINE_S, Client
from migrd.cli.exits import CommandError, Exit, Usage
from migrd.cli.printing import Format, Printer
from migrd.errors import ConfigError, Invalid, MigrdError

P = ParamSpec("P")
Command = TypeVar("Command", bound=Callable[..., Any])

CACERT_VARIABLE: Final = "MIGRD_CLI_CACERT"


@dataclass
class Options:
    """What was said on the command line about where and how; None: not said."""

    socket: str | None = None
    url: str | None = None
    token_file: str | None = None
    cacert: str | None = None
    output: str | None = None
    call_timeout_s: float | None = None
    verbose: bool | None = None

    def address(self) -> Address:
        """Options first, then the environment. Raises Usage."""
        socket, url = self.socket, self.url
        if socket is None and url is None:
            socket, url = os.environ.get("MIGRD_SOCKET"), os.environ.get("MIGRD_URL")
            if socket and url:
                raise Usage(
                    "MIGRD_SOCKET and MIGRD_URL are both set",
                    cure="unset one of them, or say --url",
                )
        return locate(
            socket,
            url,
            self.token_file or os.environ.get("MIGRD_TOKEN_FILE"),
            self.cacert or os.environ.get(CACERT_VARIABLE),
        )

    def printer(self) -> Printer:
        """Raises Usage when MIGRD_OUTPUT is no format."""
        wanted = self.output or os.environ.get("MIGRD_OUTPUT") or Format.TABLE.value
        try:
            return Printer(Format(wanted), verbose=bool(self.verbose))
        except ValueError:
            names = ", ".join(Format)
            raise Usage(f"MIGRD_OUTPUT is {wanted!r}; it may be {names}") from None


@dataclass(frozen=True)
class Session:
    """What a command works with."""

    client: Client
    printer: Printer


def options_of(context: click.Context) -> Options:
    return context.find_root().ensure_object(Options)


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Store what was said; the command's own options are read after the group's, and win."""
    if value is not None and value is not False and parameter.name is not None:
        setattr(options_of(context), parameter.name, value)


_EVERYWHERE: Final[Mapping[tuple[str, ...], Mapping[str, Any]]] = {
    ("-o", "--output"): {
        "type": click.Choice([format_.value for format_ in Format]),
        "help": "How to print: a table for people, or JSON for scripts.  [env: MIGRD_OUTPUT]",
    },
    ("--socket",): {
        "metavar": "PATH",
        "help": "The daemon's unix socket.  [env: MIGRD_SOCKET; default: /run/migrd/api.sock]",
    },
    ("--url",): {
        "metavar": "URL",
        "help": "The daemon's TCP address instead, https://HOST:PORT.  [env: MIGRD_URL]",
    },
    ("--token-file",): {
        "metavar": "FILE",
        "help": "With --url: the file that holds the token.  [env: MIGRD_TOKEN_FILE]",
    },
    ("--cacert",): {
        "metavar": "FILE",
        "help": f"With --url: the certificate authority to trust.  [env: {CACERT_VARIABLE}]",
    },
    ("--call-timeout", "call_timeout_s"): {
        "type": click.FloatRange(min=0.1, max=3600),
        "metavar": "S",
        "help": f"How long one call to the daemon may take.  [default: {DEADLINE_S:g}]",
    },
    ("-v", "--verbose"): {
        "is_flag": True,
        "default": None,
        "help": "With an error: print the daemon's whole answer as well.",
    },
}


def common_options(*, hidden: bool) -> Callable[[Command], Command]:
    """The options of every command; on a command itself only -o is shown in the help."""

    def decorate(command: Command) -> Command:
        for names, more in reversed([*_EVERYWHERE.items()]):
            option = click.option(
                *names,
                expose_value=False,
                callback=_keep,
                is_eager=True,
                hidden=hidden and "-o" not in names,
                **more,
            )
            command = option(command)
        return command

    return decorate


def remote(
    function: Callable[Concatenate[Session, P], Awaitable[int | None]],
) -> Callable[P, None]:
    """Make a click callback of a coroutine that speaks with the daemon.

    The coroutine's result is the exit code (None: 0); its errors are printed by `guarded`.
    """

    @wraps(function)
    def callback(*args: P.args, **kwargs: P.kwargs) -> None:
        options = options_of(click.get_current_context())
        printer, address = options.printer(), options.address()

        async def connected() -> int | None:
            limit_s = options.call_timeout_s or DEADLINE_S
            async with Client(address, deadline_s=limit_s) as client:
                return await function(Session(client, printer), *args, **kwargs)

        code = asyncio.run(_until_terminated(connected()))
        if code:
            click.get_current_context().exit(int(code))

    return common_options(hidden=True)(callback)


async def _until_terminated(work: Coroutine[Any, Any, int | None]) -> int | None:
    """SIGTERM and SIGHUP end the command as Ctrl-C does: the terminal is put in order first."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        task.cancel()

    numbers = (signal.SIGTERM, signal.SIGHUP) if _is_main_thread() else ()
    for number in numbers:
        loop.add_signal_handler(number, end, number)
    try:
        return await work
    except asyncio.CancelledError:
        if not received:
            raise  # Ctrl-C: asyncio.run() makes it a KeyboardInterrupt
        return 128 + received[0]
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Guarded(click.Group):
    """The outermost group: errors become messages and exit codes, whichever command raised them."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MigrdError as raised:
            error = _as_command_error(raised)
            _printer_of(ctx).problem(error)
            ctx.exit(int(error.exit_code))
        except KeyboardInterrupt:
            ctx.exit(int(Exit.INTERRUPTED))
        except BrokenPipeError:  # `migrd migrations | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(int(Exit.UNEXPECTED))  # not 0: a watch that was cut off saw no success


def _printer_of(context: click.Context) -> Printer:
    try:
        return options_of(context).printer()
    except Usage:
        return Printer()


def _as_command_error(error: MigrdError) -> CommandError:
    if isinstance(error, CommandError):
        return error
    usage = isinstance(error, ConfigError | Invalid)
    return CommandError(
        error.message, code=error.code, exit_code=Exit.USAGE if usage else Exit.UNEXPECTED
    )
