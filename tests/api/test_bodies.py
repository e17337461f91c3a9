"""What a request may hold, and what is said of one that holds anything else."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrd.api.bodies import Violations, parse
from migrd.api.models import MigrationRequest, VmDefinition
from migrd.api.problems import Malformed
from migrd.api.table import Limits
from migrd.errors import TooLarge
from tests.api.running import Api, parse_http, running

GOOD = {"vm": "web-1", "destination": "host-b"}
WHERE = "/v1/migrations"
DOWNTIME = "policy.downtime_limit_ms"
BANDWIDTH = "policy.max_bandwidth_bytes_per_s"
THROTTLE = "policy.max_throttle_percent"
WHEN = "policy.when_not_converging"


def with_policy(**policy: object) -> dict[str, object]:
    return {**GOOD, "policy": policy}


@pytest.mark.parametrize(
    ("body", "field", "code", "words"),
    [
        (with_policy(downtime_limit_ms=0), DOWNTIME, "out_of_range", "2000000 ms"),
        (with_policy(downtime_limit_ms=-1), DOWNTIME, "out_of_range", "found -1"),
        (with_policy(downtime_limit_ms=2_000_001), DOWNTIME, "out_of_range", "ms"),
        (with_policy(downtime_limit_ms=True), DOWNTIME, "wrong_type", "true"),
        (with_policy(downtime_limit_ms="300"), DOWNTIME, "wrong_type", '"300"'),
        (with_policy(downtime_limit_ms=1.5), DOWNTIME, "wrong_type", "1.5"),
        (with_policy(downtime_limit_ms=[1]), DOWNTIME, "wrong_type", "[1]"),
        (with_policy(deadline_s=0), "policy.deadline_s", "out_of_range", "0.1 to 31536000 s"),
        (with_policy(deadline_s=True), "policy.deadline_s", "wrong_type", "number"),
        (with_policy(max_throttle_percent=100), THROTTLE, "out_of_range", "99 p"),
        (
            with_policy(max_bandwidth_bytes_per_s=-5),
            "policy.max_bandwidth_bytes_per_s",
            "out_of_range",
            "bytes per second",
        ),
        (with_policy(max_bandwidth_bytes_per_s=2**53), BANDWIDTH, "out_of_range", ""),
        (with_policy(when_not_converging="pray"), WHEN, "unknown_word", "throttle"),
        (with_policy(downtime=1), "policy.downtime", "unknown_field", "not known"),
        ({**GOOD, "multifd_channels": 256}, "multifd_channels", "out_of_range", "0 to 255"),
        ({**GOOD, "allow_postcopy": 1}, "allow_postcopy", "wrong_type", "boolean"),
        ({**GOOD, "uri": "tcp:evil:4444"}, "uri", "unknown_field", "not known"),
        ({"vm": "web-1"}, "destination", "missing", "needed"),
        ({**GOOD, "vm": "../../etc/passwd"}, "vm", "bad_format", "what matches"),
        ({**GOOD, "vm": "web-1\n"}, "vm", "bad_format", ""),
        ({**GOOD, "vm": "web\u0000"}, "vm", "bad_format", "\\u0000"),
        ({**GOOD, "vm": "\u2603"}, "vm", "bad_format", "\\u2603"),
        ({**GOOD, "vm": "x" * 100}, "vm", "bad_format", "..."),
        ({**GOOD, "vm": None}, "vm", "wrong_type", "null"),
        ({**GOOD, "destination": "tcp://10.0.0.1:4444"}, "destination", "bad_format", ""),
        ({**GOOD, "policy": "wait"}, "policy", "wrong_type", "object"),
        ([], "", "wrong_type", "object"),
        ("text", "", "wrong_type", "object"),
    ],
)  # fmt: skip
async def test_a_wrong_field_is_named_with_its_value_unit_and_range(
    api: Api, body: object, field: str, code: str, words: str
) -> None:
    problem = (await api("POST", WHERE, body)).problem(422, "invalid")
    assert [(v.field, v.code) for v in problem.violations] == [(field, code)]
    assert words in problem.violations[0].message
    assert not api.service.known


async def test_everything_that_is_wrong_is_said_at_once(api: Api) -> None:
    body = {"vm": "/", "policy": {"downtime_limit_ms": 0, "x": 1}, "y": 2}
    got = await api("POST", f"{WHERE}?dry_run=perhaps&z=1", body, Idempotency_Key="a b")
    problem = got.problem(422, "invalid")
    assert {v.field for v in problem.violations} == {
        "vm",
        "destination",
        "policy.downtime_limit_ms",
        "policy.x",
        "y",
        "dry_run",
        "z",
        "Idempotency-Key",
    }


async def test_a_flood_of_fields_is_refused_before_it_holds_everybody_up(tmp_path: Path) -> None:
    body = json.dumps({f"k{number}": number for number in range(60_000)}).encode()
    nested = b"[" + b",".join([b'{"a":1}'] * 100_000) + b"]"
    items = b"[" + b"1," * 400_000 + b"1]"
    async with running(tmp_path, limits=Limits(body_limit_bytes=1 << 20)) as api:
        for flood in (body, nested, items):
            (await api("POST", WHERE, content=flood)).problem(413, "too_many_fields")


async def test_commas_in_a_text_are_no_fields(api: Api) -> None:
    body = {"resolution": "destination_fenced", "evidence": "," * 1999}
    got = await api("POST", "/v1/migrations/none:resolve", body)
    got.problem(404, "unknown_migration")


async def test_of_many_mistakes_a_hundred_are_told(api: Api) -> None:
    body = {f"k{number}": number for number in range(400)}
    problem = (await api("POST", WHERE, body)).problem(422, "invalid")
    assert len(problem.violations) == 100


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "bad_json"),
        (b"{", "bad_json"),
        (b"{} x", "bad_json"),
        (b"\xff\xfe{}", "bad_json"),
        (b"\xef\xbb\xbf{}", "bad_json"),
        ('{"vm": "caf\u00e9"}'.encode("latin-1"), "bad_json"),
        (b'{"vm": "\\ud800"}', "bad_json"),
        (b'{"multifd_channels": ' + b"9" * 10_000 + b"}", "bad_json"),
        (b'{"vm": "a", "vm": "b", "destination": "c"}', "repeated_key"),
        (b'{"vm":"a","destination":"c","policy":{"deadline_s":1,"deadline_s":2}}', "repeated_key"),
    ],
)
async def test_what_is_not_json_is_a_400(api: Api, content: bytes, code: str) -> None:
    (await api("POST", WHERE, content=content)).problem(400, code)


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_a_figure_that_is_none_is_refused(api: Api, figure: str) -> None:
    content = f'{{"vm":"web-1","destination":"host-b","policy":{{"deadline_s":{figure}}}}}'
    got = await api("POST", WHERE, content=content.encode())
    assert got.status in (400, 422), got
    assert not api.service.known


@pytest.mark.parametrize("opening", [b"[", b'{"vm":', b'{"policy":['])
async def test_deep_nesting_is_refused_before_it_is_a_recursion(api: Api, opening: bytes) -> None:
    limits = Limits(body_limit_bytes=2 << 20)
    async with running(api.path.parent / "..", limits=limits) as deep:
        (await deep("POST", WHERE, content=(opening * 100_000)[: 1 << 20])).problem(413, "too_deep")


async def test_a_body_that_is_announced_too_large_is_refused_unread(api: Api) -> None:
    head = b"POST /v1/migrations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    got = await api.raw(head + b"Content-Length: 999999999\r\n\r\n")
    assert got is not None
    assert "65536 bytes" in got.problem(413, "too_large").detail


async def test_a_chunked_body_is_cut_at_the_limit(api: Api) -> None:
    head = b"POST /v1/migrations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    got = await api.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3)
    assert got is not None
    got.problem(413, "too_large")


@pytest.mark.parametrize(
    ("media_type", "words"),
    [
        ("text/plain", "text/plain"),
        ("application/x-www-form-urlencoded", "form"),
        ("application/json; charset=utf-16", "utf-16"),
        ("application/jsonp", "jsonp"),
    ],
)
async def test_a_body_of_another_media_type_is_a_415(api: Api, media_type: str, words: str) -> None:
    got = await api("POST", WHERE, GOOD, Content_Type=media_type)
    assert words in got.problem(415, "wrong_media_type").detail


async def test_a_body_without_a_media_type_is_a_415(api: Api) -> None:
    content = json.dumps(GOOD).encode()
    head = f"POST {WHERE} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    got = await api.raw(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    assert got is not None
    got.problem(415, "wrong_media_type")


async def test_a_compressed_body_is_refused_so_that_it_cannot_be_a_bomb(api: Api) -> None:
    got = await api("POST", WHERE, GOOD, Content_Encoding="gzip")
    got.problem(415, "wrong_media_type")


async def test_a_body_that_trickles_is_given_up(tmp_path: Path) -> None:
    async with running(tmp_path, limits=Limits(body_within_s=0.2)) as api:
        head = (
            b"POST /v1/migrations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n"
        )
        async with api.wire() as wire:
            got = parse_http(await wire.trickled(head, b" "))
        assert got is not None
        got.problem(408, "too_slow")


async def test_parameters_of_a_profile_keep_their_types(api: Api) -> None:
    parameters = {"memory_mib": 512, "vcpus": 2, "label": "7", "kvm": False}
    body = {"profile": "small", "parameters": parameters}
    got = await api("PUT", "/v1/vms/new-1", body)
    assert got.status == 201, got
    kept = dict(api.service.known_vms["new-1"].spec.parameters)
    assert kept == parameters
    assert [type(value) for value in kept.values()] == [int, int, str, bool]


@pytest.mark.parametrize("value", [1.5, None, [], {}, 2**63, "x" * 1025, "a\u0000b"])
async def test_a_parameter_is_text_a_whole_number_or_a_truth_value(api: Api, value: object) -> None:
    body = {"profile": "small", "parameters": {"memory_mib": value}}
    problem = (await api("PUT", "/v1/vms/new-1", body)).problem(422, "invalid")
    assert [v.field for v in problem.violations] == ["parameters.memory_mib"]


async def test_the_engines_violations_reach_the_client(api: Api) -> None:
    body = {"profile": "small", "parameters": {"memory_mib": "much", "colour": 1}}
    problem = (await api("PUT", "/v1/vms/new-1", body)).problem(422, "invalid")
    assert {v.field for v in problem.violations} == {"parameters.memory_mib", "parameters.colour"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.binary() | _JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_get_past_the_parser_as_anything_but_a_model_or_a_refusal(body: bytes) -> None:
    for model in (MigrationRequest, VmDefinition):
        try:
            parsed = parse(model, body)
        except (Violations, Malformed, TooLarge):
            continue
        assert isinstance(parsed, model)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_no_float_becomes_a_deadline_that_never_ends(deadline_s: float) -> None:
    body = json.dumps(with_policy(deadline_s=deadline_s)).encode()
    try:
        said = parse(MigrationRequest, body).policy.deadline_s
    except (Violations, Malformed):
        return
    assert said is not None
    assert math.isfinite(said)
    assert 0.1 <= said <= 31_536_000
