"""The hand-over protocol on the wire: what is encoded is decoded, and nothing else gets through."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.direct import messages
from migrd.direct.messages import (
    HEADER,
    KIND_OF,
    MAGIC,
    MOST_RANGES,
    NAME,
    VERSION,
    Answer,
    BadMessage,
    BadVersion,
    ClientState,
    ErrorMessage,
    Hello,
    Message,
    MessageType,
    Pause,
    RangeMessage,
    SourceKind,
    SourceMessage,
    Status,
    decode,
    encode,
)
from tests.direct.vmms import HEADER_DIRECTORY

_FORMS: dict[str, st.SearchStrategy[Any]] = {
    "u32": st.integers(0, 2**32 - 1),
    "u64": st.integers(0, 2**64 - 1),
    "name": st.just("") | st.from_regex(NAME, fullmatch=True),
    "text": st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60),
    "long_text": st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=120),
}
_RANGE = st.builds(RangeMessage, _FORMS["u32"], *[_FORMS["u64"]] * 3)


def of_kind(kind: type[Message]) -> st.SearchStrategy[Message]:
    fields = dict(field.split(":") for field in kind.LAYOUT.split() if field[0] != "_")
    values = {name: _FORMS[form] for name, form in fields.items()}
    values |= {name: st.sampled_from(list(enum)) for name, enum in kind.ENUMS.items()}
    if kind is SourceMessage:
        del values["count"]
        values["ranges"] = st.lists(_RANGE, min_size=1, max_size=5).map(tuple)
    return st.builds(kind, **values)


ANY_MESSAGE = st.one_of([of_kind(kind) for kind in KIND_OF.values()])


@given(ANY_MESSAGE, st.integers(0, 2**32 - 1))
def test_what_is_encoded_is_decoded(message: Message, serial: int) -> None:
    found = decode(encode(message, serial))
    assert (found.serial, found.message) == (serial, message)


@given(ANY_MESSAGE, st.data())
def test_a_packet_with_one_byte_more_or_less_is_refused(
    message: Message, data: st.DataObject
) -> None:
    packet = encode(message)
    short = data.draw(st.integers(0, len(packet) - 1))
    for wrong in (packet[:short], packet + b"\0"):
        with pytest.raises(BadMessage):
            decode(wrong)


@given(st.sampled_from(sorted(KIND_OF)), st.binary(max_size=400))
def test_any_bytes_are_a_message_or_a_clear_error(number: int, body: bytes) -> None:
    body = body[: KIND_OF[number].BODY.size].ljust(KIND_OF[number].BODY.size, b"\0")
    error = ""
    try:
        found = decode(HEADER.pack(MAGIC, number, VERSION, len(body), 1) + body)
        assert isinstance(found.message, KIND_OF[number])
    except BadMessage as failure:
        error = str(failure)
    assert not error or MessageType(number).name in error


@given(st.binary(max_size=64))
def test_bytes_of_another_protocol_are_refused(packet: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(packet)


@pytest.mark.parametrize("version", [0, 2, 9])
def test_another_version_is_refused_with_both_versions_named(version: int) -> None:
    with pytest.raises(BadVersion, match=rf"version {version} .*version {VERSION};"):
        decode(encode(Pause(), 1, version=version))


def test_an_error_is_understood_whatever_the_version() -> None:
    error = ErrorMessage(99, "upgrade")
    assert decode(encode(error, version=7)).message == error


@pytest.mark.parametrize(
    ("field", "raw"), [("vm", b"caf\xe9"), ("vm", b"a\0b"), ("vm", b"-a"), ("vm", b"x" * 72)]
)
def test_a_bad_name_is_refused_by_its_field(field: str, raw: bytes) -> None:
    body = Hello.BODY.pack(1, 0, raw, b"", b"")
    with pytest.raises(BadMessage, match=f"HELLO: {field} "):
        decode(HEADER.pack(MAGIC, Hello.TYPE, VERSION, len(body), 0) + body)


def test_a_text_that_is_too_long_is_cut_between_characters() -> None:
    answer = Answer(Status.REFUSED, ClientState.RUNNING, text="é" * 300)
    found = decode(encode(answer)).message
    assert isinstance(found, Answer)
    assert found.text == "é" * 127


def test_more_ranges_than_a_message_holds_are_refused() -> None:
    ranges = (RangeMessage(0, 0, 0, 4096),) * (MOST_RANGES + 1)
    with pytest.raises(BadMessage, match="ranges is 1025"):
        decode(encode(SourceMessage(SourceKind.PROCESS, 0, 4096, ranges)))


def test_a_value_that_does_not_fit_its_field_is_an_error_where_it_is_sent() -> None:
    with pytest.raises(BadMessage, match="THROTTLE"):
        encode(messages.Throttle(-1))


def test_the_page_of_the_protocol_lists_each_message_with_its_number() -> None:
    listed = re.findall(r"^ +(\d+) ([A-Z_]+) +(?:VMM|migrd)", messages.__doc__ or "", re.MULTILINE)
    assert {(int(number), name) for number, name in listed} == {
        (kind.TYPE.value, kind.TYPE.name) for kind in KIND_OF.values()
    }


def test_each_message_is_a_frozen_dataclass_whose_fields_are_its_layout() -> None:
    for kind in KIND_OF.values():
        fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]  # Message itself is none
        layout = [field.split(":")[0] for field in kind.LAYOUT.split()]
        assert [name for name in layout if name not in ("_", "count")] == [
            name for name in fields if name != "ranges"
        ]


def test_the_c_header_has_the_numbers_and_sizes_of_the_wire(tmp_path: Path) -> None:
    """The C compiler compares the header's with ours."""
    spelled = {"DEPARTED": "DEPART"}  # MIGRD_DEPARTED is the state
    enums: list[tuple[str, type[IntEnum]]] = [("MIGRD__", MessageType), ("MIGRD_", ClientState)]
    lines = ["#define MIGRD_DIRECT_IMPLEMENTATION", '#include "migrd_direct.h"']
    for prefix, enum in enums:
        for member in enum:
            name = member.name
            if enum is MessageType:
                name = spelled.get(name, name)
            lines.append(f'_Static_assert({prefix}{name} == {member.value}, "{name}");')
    for name, kind in (("hello", "HELLO"), ("region", "REGION"), ("answer", "ANSWER")):
        size = KIND_OF[MessageType[kind]].BODY.size
        lines.append(f'_Static_assert(sizeof(migrd__{name}) == {size}, "{name}");')
    lines.append(f'_Static_assert(MIGRD__MAGIC == {MAGIC}, "magic");')
    lines.append(f'_Static_assert(MIGRD__VERSION == {VERSION}, "version");')
    source = tmp_path / "wire.c"
    source.write_text("\n".join(lines) + "\n")
    command = ["gcc", "-std=c11", "-fsyntax-only", f"-I{HEADER_DIRECTORY}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
