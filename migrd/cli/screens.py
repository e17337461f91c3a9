"""The faces of a watch: a live region on a terminal, one line per change in a pipe, JSON lines.

On a terminal what has happened scrolls by above (phases, decisions, the connection) and stays in
the scroll-back; below it a few lines show how things stand now. The region never gets higher than
the terminal, and each line is cut to its width: a wrapped line would leave rubbish behind when the
region is drawn again.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from migrd.cli import story
from migrd.cli.exits import CommandError
from migrd.cli.printing import Printer
from migrd.cli.seen import Seen
from migrd.cli.text import clock, percent, rate, size, span, word
from migrd.cli.watching import Look, Screen

_QUIET_S: Final = 10.0
"""In a pipe, say how the transfer stands at least so often."""
_LEAST_ROUNDS: Final = 3
_MOST_ROUNDS: Final = 12
_OTHER_LINES: Final = 19
"""Lines of the live region other than rounds, and some for what has happened above it."""


def screen_for(printer: Printer) -> Screen:
    """The face that fits where the output goes."""
    if printer.is_for_scripts:
        return JsonScreen(printer)
    if printer.out.is_terminal and not printer.out.is_dumb_terminal:
        return LiveScreen(printer)
    return PlainScreen(printer)


class JsonScreen:
    """`-o jsonl`: each new state of the migration, one a line. `-o json` shows only the end."""

    refresh_s = 1.0

    def __init__(self, printer: Printer) -> None:
        self._printer = printer
        self._shown: object = None

    def show(self, look: Look) -> None:
        version = look.migration.body.get("resource_version"), look.migration.body.get("progress")
        if self._printer.format.value == "jsonl" and version != self._shown:
            self._shown = version
            self._printer.json_line(look.migration.body)

    def lost(self, error: CommandError) -> None:
        """Scripts learn it from the exit code, if the daemon stays away."""

    def back(self) -> None: ...


Say = Callable[[Text, float], None]
"""Takes a line and the moment it speaks of."""


class Teller:
    """What has happened since the last look, as lines, in the order it happened."""

    def __init__(self, say: Say, *, with_rounds: bool) -> None:
        self._say = say
        self._with_rounds = with_rounds
        self._phases_told = 0
        self._decision: Seen | None = None

    def tell(self, look: Look) -> None:
        """Say what is new."""
        news = [*self._phases(look.migration), *self._rounds(look), *self._decisions(look)]
        for moment_s, line in sorted(news, key=lambda pair: pair[0]):
            self._say(line, moment_s)

    def _phases(self, migration: Seen) -> Iterator[tuple[float, Text]]:
        timeline = migration.parts("timeline")
        new, self._phases_told = timeline[self._phases_told :], len(timeline)
        for entry in new:
            yield entry.moment("entered_at") or time.time(), _phase_news(entry, migration)

    def _rounds(self, look: Look) -> Iterator[tuple[float, Text]]:
        for round_ in look.new_rounds if self._with_rounds else ():
            yield _moment_of(round_, look.migration), Text(story.round_line(round_))

    def _decisions(self, look: Look) -> Iterator[tuple[float, Text]]:
        for decision in look.new_decisions:
            if story.is_news(decision, self._decision):
                yield _moment_of(decision, look.migration), _decision_news(decision)
            self._decision = decision


def _moment_of(seen: Seen, migration: Seen) -> float:
    """Wall-clock time of a round or decision, which carry the age of the migration."""
    begun_s, age_s = migration.moment("created_at"), seen.seconds("elapsed")
    return time.time() if begun_s is None or age_s is None else begun_s + age_s


def _phase_news(entry: Seen, migration: Seen) -> Text:
    name = entry.text("phase")
    style = "bold cyan"
    if migration.flag("is_terminal") and name == migration.text("phase"):
        style = story.STYLE_OF_END.get(story.exit_of(migration), style)
    line = Text(word(name), style)
    meaning = story.MEANING_OF_PHASE.get(name)
    return line.append(f": {meaning}", "default not bold") if meaning else line


def _decision_news(decision: Seen) -> Text:
    verdict = decision.raw("verdict") or ""
    style = {"give_up": "bold red", "throttle": "yellow", "start_postcopy": "yellow"}.get(verdict)
    return Text(f"decision: {story.decision_line(decision)}", style or "")


class PlainScreen:
    """One line per change: for pipes, logs and terminals without cursor control."""

    refresh_s = 2.0

    def __init__(self, printer: Printer) -> None:
        self._printer = printer
        self._teller = Teller(self._say, with_rounds=True)
        self._spoke_at_s = time.monotonic()
        self._began = False

    def _say(self, line: str | Text, moment_s: float) -> None:
        self._spoke_at_s = time.monotonic()
        self._printer.line(Text.assemble(f"{clock(moment_s)}  ", line))

    def show(self, look: Look) -> None:
        if not self._began:
            self._began = True
            head = f"{look.migration.text('vm')}: {story.route(look.migration)}"
            self._say(f"{head}, migration {look.migration.text('id')}", time.time())
        self._teller.tell(look)
        standing = story.progress_line(look.migration)
        if standing and time.monotonic() - self._spoke_at_s >= _QUIET_S:
            self._say(standing, time.time())

    def lost(self, error: CommandError) -> None:
        self._say(f"connection to the daemon lost ({error.message}); trying again", time.time())

    def back(self) -> None:
        self._say("connected to the daemon again", time.time())


class LiveScreen:
    """The live region. Use as a context manager: it must be taken down before the summary."""

    refresh_s = 0.25

    def __init__(self, printer: Printer) -> None:
        self._printer = printer
        self._teller = Teller(self._say, with_rounds=False)
        self._rounds: deque[Seen] = deque(maxlen=50)
        self._migration = Seen(None)
        self._lost: str | None = None
        self._live = Live(
            console=printer.out, auto_refresh=False, transient=True, redirect_stderr=False
        )

    def _say(self, line: Text, moment_s: float) -> None:
        """Above the region; what does not fit on the line goes on below itself."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(clock(moment_s), line)
        self._printer.out.print(grid)

    def __enter__(self) -> "LiveScreen":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()
        self._printer.line()

    def show(self, look: Look) -> None:
        self._teller.tell(look)
        self._rounds.extend(look.new_rounds)
        self._migration = look.migration
        self._draw()

    def lost(self, error: CommandError) -> None:
        self._lost = error.message
        self._say(Text("connection to the daemon lost; trying again", "yellow"), time.time())
        self._draw()

    def back(self) -> None:
        self._lost = None
        self._say(Text("connected to the daemon again", "green"), time.time())
        self._draw()

    def _draw(self) -> None:
        rows = max(_LEAST_ROUNDS, min(_MOST_ROUNDS, self._printer.out.height - _OTHER_LINES))
        view = region(self._migration, list(self._rounds)[-rows:], self._lost)
        self._live.update(view, refresh=True)


def region(migration: Seen, rounds: list[Seen], lost: str | None) -> RenderableType:
    """The lines that show how things stand."""
    parts: list[RenderableType] = [Text()]
    head = Text(no_wrap=True, overflow="ellipsis")
    head.append(migration.text("vm"), "bold")
    head.append(f"  {story.route(migration)}  ")
    head.append(word(migration.text("phase")), "bold cyan")
    head.append(f"  {span(story.total_s(migration))}", "dim")
    parts.append(head)
    parts.append(_one_line(story.phase_line(migration)))
    if not migration.flag("is_terminal"):
        parts += _transfer(migration)
    if rounds:
        parts += [Text(), _rounds(rounds), Text()]
    if lost is not None:
        parts.append(_one_line(Text(f"no answer from the daemon: {lost}", "yellow")))
    parts.append(_one_line(Text("Ctrl-C stops watching; the migration goes on", "dim")))
    return Group(*parts)


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _transfer(migration: Seen) -> list[RenderableType]:
    progress, guess = migration.part("progress"), migration.part("estimate")
    total, remaining = progress.number("total_bytes"), progress.number("remaining_bytes")
    if total is None or remaining is None:
        waiting = migration.whole("queue_position")
        text = "" if waiting is None else f"waiting for a free slot, {waiting} before it"
        return [_one_line(Text(text or "not transferring yet", "dim"))]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=9)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    done = max(0.0, total - remaining)
    grid.add_row("memory", _bar(total, done, remaining))
    grid.add_row("now", _now(progress, guess))
    fate, style = story.fate_of(guess, story.limit_of(migration))
    grid.add_row("blackout", Text(fate, style))
    grid.add_row("time left", story.time_left(migration))
    if guess.flag("converges") is False:
        for name, command in story.ways_out(migration):
            grid.add_row(name, Text(command, "yellow"))
    return [grid]


def _bar(total: float, done: float, remaining: float) -> RenderableType:
    line = Table.grid(padding=(0, 1))
    line.add_row(
        ProgressBar(total=max(total, 1.0), completed=done, width=24),
        Text(f"{percent(100 * done / total) if total else ''}"),
        Text(f"{size(remaining)} of {size(total)} left", no_wrap=True, overflow="ellipsis"),
    )
    return line


def _now(progress: Seen, guess: Seen) -> Text:
    bandwidth = progress.number("bandwidth_bytes_per_s")
    if bandwidth is None:
        bandwidth = guess.number("bandwidth_bytes_per_s")
    dirtying = story.dirty_rate(progress)
    text = Text(f"sending {rate(bandwidth)}, dirtying {rate(dirtying)}")
    throttled = progress.number("throttle_percent")
    if throttled:
        text.append(f", throttled {percent(throttled)}", "yellow")
    stalled_s = progress.seconds("stalled")
    if stalled_s:
        text.append(f", nothing moved for {span(stalled_s)}", "bold red")
    return text


def _rounds(rounds: list[Seen]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("round", "took", "sent", "at", "left", "dirtying", "throttle"):
        table.add_column(title, justify="right", no_wrap=True)
    for round_ in rounds:
        table.add_row(
            round_.text("number"),
            span(round_.seconds("duration")),
            size(round_.number("transferred_bytes")),
            rate(round_.number("bandwidth_bytes_per_s")),
            size(round_.number("remaining_bytes")),
            rate(story.dirty_rate(round_)),
            percent(round_.number("throttle_percent")),
        )
    return table
