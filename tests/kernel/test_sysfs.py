"""Reading one file, link or directory, whatever stands in its place."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrd.kernel import sysfs
from migrd.kernel.sysfs import Directory, bounded, shown


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Path, Directory]]:
    opened = Directory.open(str(tmp_path))
    assert opened is not None
    with opened:
        yield tmp_path, opened


Place = tuple[Path, Directory]


def test_a_line_comes_without_its_end(place: Place) -> None:
    path, directory = place
    (path / "driver_override").write_text("vfio-pci\n")
    assert directory.text("driver_override") == "vfio-pci"
    assert directory.trouble == []


def test_what_is_missing_is_none_and_no_trouble(place: Place) -> None:
    _, directory = place
    assert directory.text("nothing") is None
    assert directory.number("nothing", 10) is None
    assert directory.link("nothing") is None
    assert directory.names_in("nothing") == []
    assert directory.child("nothing", "/", directory.trouble) is None
    assert not directory.has("nothing")
    assert directory.trouble == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe\n", "is not text"),
        (b"a\nb\n", "is not one line of text"),
        (b"a\x1b[31m\n", "is not one line of text"),
        (b"a\x00b", "is not one line of text"),
        (b"x" * 5000, "is longer than 4096 bytes"),
    ],
)
def test_what_is_not_a_line_is_trouble_and_names_the_file(
    place: Place, content: bytes, told: str
) -> None:
    path, directory = place
    (path / "it").write_bytes(content)
    assert directory.text("it") is None
    assert len(directory.trouble) == 1
    assert directory.trouble[0].startswith(f"it: {told}")
    assert directory.trouble[0].isprintable()


def test_a_page_full_is_read_whole(place: Place) -> None:
    path, directory = place
    (path / "it").write_bytes(b"x" * 4096)
    assert directory.text("it") == "x" * 4096


@pytest.mark.parametrize(
    ("text", "base", "number"),
    [("0x8086\n", 16, 0x8086), ("f00f4a\n", 16, 0xF00F4A), ("0\n", 10, 0), ("17", 10, 17)],
)
def test_numbers_are_read_in_their_base(place: Place, text: str, base: int, number: int) -> None:
    path, directory = place
    (path / "it").write_text(text)
    assert directory.number("it", base) == number


@pytest.mark.parametrize("text", ["", "x", "-1", "1_0", "٣", "1 2", "1" * 30, "9" * 4090, "0x"])
def test_what_is_no_number_is_none_and_trouble(place: Place, text: str) -> None:
    path, directory = place
    (path / "it").write_text(text)
    assert directory.number("it", 10) is None
    assert len(directory.trouble) == 1
    assert len(directory.trouble[0]) < 200


def test_minus_one_is_a_number_only_where_the_kernel_says_none_so(place: Place) -> None:
    path, directory = place
    (path / "numa_node").write_text("-1\n")
    assert directory.number("numa_node", 10, lowest=-1) == -1


def test_a_directory_a_fifo_and_a_link_in_place_of_a_file_are_trouble_and_stop_nobody(
    place: Place,
) -> None:
    path, directory = place
    (path / "directory").mkdir()
    os.mkfifo(path / "fifo")
    (path / "line").write_text("one line of text")
    (path / "link").symlink_to("line")
    assert directory.text("directory") is None
    assert directory.number("fifo", 10) is None
    assert directory.text("link") is None
    assert [line.split(":")[0] for line in directory.trouble] == ["directory", "fifo", "link"]


def test_a_link_is_its_last_component_and_is_not_followed(place: Place) -> None:
    path, directory = place
    (path / "driver").symlink_to("../nowhere/at/all/vfio-pci")
    (path / "circle").symlink_to("circle")
    assert directory.link("driver") == "vfio-pci"
    assert directory.link("circle") == "circle"
    assert directory.trouble == []


@pytest.mark.parametrize("target", ["/", "..", "a/..", "a\nb", "x" * 200, b"\xff"])
def test_a_link_to_what_cannot_be_a_name_is_trouble(place: Place, target: str | bytes) -> None:
    path, directory = place
    os.symlink(os.fsencode(target), os.fsencode(path / "driver"))
    assert directory.link("driver") is None
    assert len(directory.trouble) == 1
    assert directory.trouble[0].isprintable()


def test_a_file_in_place_of_a_link_is_trouble(place: Place) -> None:
    path, directory = place
    (path / "driver").write_text("vfio-pci")
    assert directory.link("driver") is None
    assert directory.trouble == ["driver: is not a link"]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("/etc", "leads out of"),
        ("..", "leads out of"),
        ("nowhere", "a link that leads nowhere"),
        ("it", "Too many levels of symbolic links"),
        ("file", "Not a directory"),
    ],
)
def test_a_directory_is_entered_only_below_the_root(place: Place, target: str, told: str) -> None:
    path, directory = place
    (path / "file").touch()
    (path / "it").symlink_to(target)
    assert directory.child("it", str(path), directory.trouble) is None
    assert len(directory.trouble) == 1
    assert told in directory.trouble[0]


def test_entries_are_sorted_and_those_past_the_bound_are_told(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, directory = place
    for name in "dacb":
        (path / name).touch()
    assert directory.names() == ["a", "b", "c", "d"]
    monkeypatch.setattr(sysfs, "MAX_ENTRIES", 3)
    assert len(directory.names()) == 3
    assert "only the first 3 entries" in directory.trouble[0]


def test_no_descriptor_is_left_open(place: Place) -> None:
    path, directory = place
    (path / "file").write_bytes(b"\xff" * 5000)
    (path / "sub").mkdir()
    (path / "out").symlink_to("/etc")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("file", "sub", "out", "nothing"):
        directory.text(name)
        directory.link(name)
        directory.names_in(name)
        opened = directory.child(name, str(path), [])
        if opened is not None:
            with opened:
                pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shortage_of_our_own_is_raised_and_not_taken_for_what_is_there(place: Place) -> None:
    path, directory = place
    (path / "file").write_text("1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(directory.fd)
    os.close(lowest_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        with pytest.raises(OSError, match="Too many open files") as raised:
            directory.text("file")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised.value.errno == errno.EMFILE
    assert directory.trouble == []


def test_names_from_outside_are_made_fit_for_a_log_line() -> None:
    assert shown("vfio-pci") == "vfio-pci"
    assert shown("a\nb") == r"'a\nb'"
    assert shown("\udcff").isprintable()
    assert len(shown("x" * 10_000)) <= 80


def test_trouble_is_bounded_and_says_so() -> None:
    assert bounded(["b", "a"]) == ("a", "b")
    many = bounded([f"{number:05}" for number in range(1000)])
    assert len(many) == sysfs.MAX_TROUBLE + 1
    assert many[-1] == "... and 900 more of the kind"
