"""Directories of processes, as a look finds them while others make and remove them."""

from pathlib import Path
from typing import ClassVar

from migrd.processes.instance import Instance


class Thing(Instance):
    below: ClassVar[str] = "things"


def test_what_is_being_launched_is_known_whenever_its_directory_is_seen(tmp_path: Path) -> None:
    """Its name is noted before its directory is made, and asked for after that was seen: a look
    that began before the launch takes its process for nobody's left-over."""
    Thing(tmp_path, "vm", "old").make()
    launching: set[tuple[str, str]] = set()
    looking = Thing.all_below(tmp_path, launching.__contains__)
    launching.add(("vm", "new"))
    Thing(tmp_path, "vm", "new").make()
    assert [at.name for at in looking] == ["old"]


def test_what_migrd_did_not_make_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "things" / "vm" / ".hidden").mkdir(parents=True)
    (tmp_path / "things" / "vm" / "file").write_text("")
    assert list(Thing.all_below(tmp_path, lambda _: False)) == []
