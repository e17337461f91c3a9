"""Where output goes and in what shape.

    -o table   for people: a table on a terminal, aligned plain lines in a pipe
    -o json    one document: the API's own answer, unchanged
    -o jsonl   one object a line: the items of a list, or each change while watching

Results go to stdout, everything else to stderr. JSON is written in ASCII, so no answer can steer a
terminal or break a line. Nothing here reads markup: rich is given Text, never strings to parse.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from migrd.cli.exits import CommandError
from migrd.cli.seen import Json, Seen

Cell = str | Text


class Format(StrEnum):
    """What `-o` takes."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    right: bool = False
    wraps: bool = False
    """Its text may take several lines on a terminal."""
    enough: int = 44
    """So much room is enough for one that wraps: no other column is dropped to give it more."""
    drop: int = 0
    """On a terminal that is too narrow, columns with the highest `drop` go first; 0 stays."""


@dataclass
class Printer:
    """The command's two outputs."""

    format: Format = Format.TABLE
    verbose: bool = False
    out: Console = field(default_factory=lambda: _console(stderr=False))
    err: Console = field(default_factory=lambda: _console(stderr=True))

    @property
    def is_for_scripts(self) -> bool:
        return self.format is not Format.TABLE

    def json(self, body: Json) -> None:
        """One document (`json`), or one line for each item of `items` (`jsonl`)."""
        if self.format is Format.JSONL:
            for item in _items(body):
                self.json_line(item)
        else:
            click.echo(json.dumps(body, indent=2))

    def json_line(self, body: Json) -> None:
        click.echo(json.dumps(body, separators=(",", ":")))

    def line(self, text: Cell = "", style: str = "") -> None:
        """One line of the result."""
        _print(self.out, text, style)

    def note(self, text: Cell, style: str = "") -> None:
        """Something to know that is not the result: on stderr, and not when a script reads."""
        if not self.is_for_scripts:
            _print(self.err, text, style)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], empty: str) -> None:
        """Rows for people; `empty` is said instead of a table without rows."""
        if not rows:
            self.note(empty)
        elif self.out.is_terminal:
            self.out.print(_rich_table(*_fitting(columns, rows, self.out.width)))
        else:
            for line in plain_table(columns, rows):
                click.echo(line)

    def facts(self, pairs: Iterable[tuple[str, Cell]]) -> None:
        """A block of `name  value` lines; long values wrap under themselves."""
        rows = [(name, value) for name, value in pairs if str(value)]
        if not self.out.is_terminal:
            width = max((cell_len(name) for name, _ in rows), default=0)
            for name, value in rows:
                click.echo(f"{name.ljust(width)}  {value}".rstrip())
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(name, as_text(value))
        self.out.print(grid)

    def item(self, mark: str, text: Cell) -> None:
        """An item of a list; a long one wraps under itself."""
        if not self.out.is_terminal:
            click.echo(f"{mark}{text}")
            return
        grid = Table.grid()
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(as_text(mark), as_text(text))
        self.out.print(grid)

    def heading(self, text: str) -> None:
        """Sets a following part apart."""
        self.line()
        self.line(text, style="bold")

    def problem(self, error: CommandError) -> None:
        """What went wrong: for people with every violation and the cure, for scripts as JSON."""
        details = Seen(getattr(error, "details", Seen(None)).body)
        if self.is_for_scripts:
            click.echo(json.dumps(_as_problem(error, details), separators=(",", ":")), err=True)
            return
        headline = Text.assemble(
            ("error: ", "bold red"), error.message, (f" [{error.code}]", "dim")
        )
        self.err.print(headline, soft_wrap=not self.err.is_terminal)
        for violation in violations(details):
            _print(self.err, Text(f"  - {violation}"))
        if error.cure:
            _print(self.err, Text.assemble(("  try: ", "bold"), error.cure))
        if self.verbose and details:
            click.echo(json.dumps(details.body, indent=2), err=True)


def violations(details: Seen) -> list[str]:
    """Every single thing that was wrong: of a request, or of preflight."""
    said = []
    for key in ("violations", "refusals"):
        for item in details.parts(key):
            where = item.text("field", "")
            line = f"{where}: " if where else ""
            line += f"{item.text('message')} [{item.text('code')}]"
            cure = item.text("cure", "")
            said.append(f"{line}; {cure}" if cure else line)
    return said


def _as_problem(error: CommandError, details: Seen) -> dict[str, Json]:
    own: dict[str, Json] = {
        "code": error.code,
        "detail": error.message,
        "retryable": error.retryable,
        "exit_code": int(error.exit_code),
    }
    if error.cure:
        own["cure"] = error.cure
    return {**own, **details.body}


def as_text(cell: Cell, style: str = "") -> Text:
    """Text without markup."""
    return cell if isinstance(cell, Text) else Text(cell, style=style)


def plain_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Aligned lines without colour or truncation: for pipes, `grep` and `awk`."""
    grid = [[column.title.upper() for column in columns]]
    grid += [[str(cell) for cell in row] for row in rows]
    widths = [max(cell_len(line[at]) for line in grid) for at in range(len(columns))]
    return ["  ".join(_padded(line, widths, columns)).rstrip() for line in grid]


def _padded(line: Sequence[str], widths: Sequence[int], columns: Sequence[Column]) -> list[str]:
    padded = []
    for cell, width, column in zip(line, widths, columns, strict=True):
        room = " " * (width - cell_len(cell))
        padded.append(room + cell if column.right else cell + room)
    return padded


def _fitting(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int
) -> tuple[Sequence[Column], Sequence[Sequence[Cell]]]:
    """The columns that fit side by side, and their cells."""
    kept = list(range(len(columns)))
    while True:
        needed = sum(_width(columns[at], [row[at] for row in rows]) + 2 for at in kept)
        spare = [at for at in kept if columns[at].drop]
        if needed <= width or not spare:
            break
        kept.remove(max(spare, key=lambda at: columns[at].drop))
    return [columns[at] for at in kept], [[row[at] for at in kept] for row in rows]


def _width(column: Column, cells: Sequence[Cell]) -> int:
    widest = max(cell_len(str(cell)) for cell in [column.title, *cells])
    return min(widest, column.enough) if column.wraps else widest


def _rich_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            Text(column.title),
            justify="right" if column.right else "left",
            no_wrap=not column.wraps,
            overflow="fold" if column.wraps else "ellipsis",
        )
    for row in rows:
        table.add_row(*(as_text(cell) for cell in row))
    return table


def _items(body: Json) -> Sequence[Json]:
    """The items of a page, or the thing itself."""
    if isinstance(body, dict):
        for value in body.values():
            if isinstance(value, list):
                lists = [key for key, held in body.items() if isinstance(held, list)]
                if len(lists) == 1 and "id" not in body and "name" not in body:
                    return value
        return [body]
    return body if isinstance(body, list) else [body]


def _print(console: Console, text: Cell, style: str = "") -> None:
    console.print(as_text(text, style), soft_wrap=not console.is_terminal, highlight=False)


class _Console(Console):
    """NO_COLOR, TERM and COLUMNS are read by rich; a reader that has gone is the caller's."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(*, stderr: bool) -> Console:
    return _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
