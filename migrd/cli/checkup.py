"""Printing the result of `migrd doctor`; the checks themselves live above this layer."""

from collections.abc import Sequence
from typing import Final, Protocol

from rich.text import Text

from migrd.cli.exits import Exit
from migrd.cli.printing import Printer
from migrd.cli.text import printable

_MARK: Final = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


class Finding(Protocol):
    """One line of a checkup."""

    @property
    def name(self) -> str: ...

    @property
    def status(self) -> str:
        """ok, warn or fail."""

    @property
    def message(self) -> str: ...

    @property
    def cure(self) -> str:
        """What to do; "" when there is nothing to do."""


def print_checkup(printer: Printer, findings: Sequence[Finding]) -> Exit:
    """Print the findings, the bad ones with their cures; the exit code is 1 when one failed."""
    failed = sum(finding.status == "fail" for finding in findings)
    warned = sum(finding.status == "warn" for finding in findings)
    if printer.is_for_scripts:
        items = [
            {"name": f.name, "status": f.status, "message": f.message, "cure": f.cure}
            for f in findings
        ]
        printer.json({"ok": not failed, "items": items})
    else:
        for finding in findings:
            _print(printer, finding)
        printer.line(_verdict(failed, warned))
    return Exit.UNEXPECTED if failed else Exit.OK


def _print(printer: Printer, finding: Finding) -> None:
    mark, style = _MARK.get(finding.status, (printable(finding.status), "bold"))
    line = Text.assemble((mark, style), "  ", (printable(finding.name), "bold"), "  ")
    printer.line(line.append(printable(finding.message)))
    if finding.cure and finding.status != "ok":
        for step in finding.cure.splitlines():
            printer.line(Text.assemble("      ", ("do: ", "dim"), printable(step)))


def _verdict(failed: int, warned: int) -> Text:
    if failed:
        text = Text(f"{failed} of these must be mended before migrd can do its work", "bold red")
        return text.append(f", {warned} should be looked at" if warned else "")
    if warned:
        return Text(f"migrd can work here; {warned} should be looked at", "yellow")
    return Text("everything migrd needs is here", "green")
