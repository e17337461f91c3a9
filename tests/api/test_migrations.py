"""Migrations over HTTP: begin, look, wish, and what is refused."""

import pytest

from migrd.api.models import Migration, MigrationList
from migrd.core.migration import Policy, WhenNotConverging
from migrd.core.phases import Phase, Trigger
from tests.api.running import Api

BODY = {"vm": "web-1", "destination": "host-b"}


async def test_a_migration_is_begun_with_202_and_followed_at_its_location(api: Api) -> None:
    got = await api("POST", "/v1/migrations", BODY)
    assert got.status == 202
    assert got.headers["Retry-After"] == "1"
    migration = Migration.model_validate_json(got.body)
    assert got.headers["Location"] == f"/v1/migrations/{migration.id}"
    assert got.headers["ETag"] == f'"{migration.generation}"'
    seen = await api("GET", got.headers["Location"])
    assert seen.status == 200
    assert Migration.model_validate_json(seen.body).phase == Phase.PENDING


async def test_units_are_converted_once_and_what_is_left_out_is_the_daemons(api: Api) -> None:
    policy = {"downtime_limit_ms": 250, "when_not_converging": "throttle", "deadline_s": 90.5}
    got = await api("POST", "/v1/migrations", {**BODY, "policy": policy})
    kept = api.service.known[got.json["id"]].state.policy
    assert kept == Policy(WhenNotConverging.THROTTLE, 0.25, 90.5, 0, 80)
    assert got.json["policy"]["downtime_limit_ms"] == 250
    assert got.json["policy"]["deadline_s"] == 90.5


async def test_the_same_key_and_body_finds_the_same_migration_and_begins_no_second(
    api: Api,
) -> None:
    first = await api("POST", "/v1/migrations", BODY, Idempotency_Key="job-1")
    spelt_out: dict[str, object] = {
        **BODY,
        "policy": {},
        "allow_postcopy": False,
        "multifd_channels": None,
    }
    again = await api("POST", "/v1/migrations", spelt_out, Idempotency_Key="job-1")
    assert (first.status, again.status) == (202, 200)
    assert again.json["id"] == first.json["id"]
    assert again.headers["Location"] == first.headers["Location"]
    assert len(api.service.known) == 1


async def test_the_same_key_with_another_body_is_refused(api: Api) -> None:
    await api("POST", "/v1/migrations", BODY, Idempotency_Key="job-1")
    other = {**BODY, "destination": "host-c"}
    got = await api("POST", "/v1/migrations", other, Idempotency_Key="job-1")
    got.problem(422, "idempotency_key_reused")


@pytest.mark.parametrize("key", ["", "x" * 256, "two words", "caf\u00e9"])
async def test_an_idempotency_key_is_short_and_printable(api: Api, key: str) -> None:
    got = await api("POST", "/v1/migrations", BODY, Idempotency_Key=key)
    assert [v.field for v in got.problem(422, "invalid").violations] == ["Idempotency-Key"]
    assert not api.service.known


async def test_a_second_migration_of_a_vm_is_a_conflict_with_a_named_reason(api: Api) -> None:
    await api.begun()
    got = await api("POST", "/v1/migrations", BODY)
    problem = got.problem(409, "already_migrating")
    assert problem.type == "urn:migrd:problem:already_migrating"
    assert problem.retryable is False
    assert problem.instance == "/v1/migrations"
    assert problem.request_id == got.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({**BODY, "vm": "nobody"}, 404, "unknown_vm"),
        ({**BODY, "destination": "host-z"}, 404, "unknown_destination"),
        ({**BODY, "destination": "host-a"}, 422, "invalid"),
        ({**BODY, "vm": "idle-1"}, 409, "vm_stopped"),
    ],
)
async def test_what_cannot_be_migrated_is_said_by_name(
    api: Api, body: dict[str, object], status: int, code: str
) -> None:
    (await api("POST", "/v1/migrations", body)).problem(status, code)


@pytest.mark.parametrize("query", ["?dry_run", "?dry_run=1", "?dry_run=true"])
async def test_a_dry_run_answers_with_the_plan_and_begins_nothing(api: Api, query: str) -> None:
    got = await api("POST", f"/v1/migrations{query}", BODY)
    assert got.status == 200
    assert got.json["possible"] is True
    assert got.json["predicted_total_ms"] == 2500.0
    assert got.json["predicted_blackout_ms"] == 100.0
    assert got.json["predicted_converges"] is True
    assert got.json["dirty_rate_age_ms"] == 3000.0
    assert got.json["features_missing"]["destination"] == ["switchover_ack"]
    assert not api.service.known


async def test_cancel_is_queued_then_already_so(api: Api) -> None:
    id_ = await api.begun()
    api.service.drive_to(id_, Phase.PRECOPY)
    first = await api("POST", f"/v1/migrations/{id_}:cancel")
    again = await api("POST", f"/v1/migrations/{id_}:cancel")
    assert (first.status, first.json["admission"]) == (202, "queued")
    assert (again.status, again.json["admission"]) == (200, "already_so")
    assert again.json["migration"]["phase"] == "rolling_back"
    assert {by.partition("/")[0] for _, by in api.service.said} == {"uid:0"}


async def test_cancel_past_the_point_of_no_return_is_denied(api: Api) -> None:
    id_ = await api.begun()
    api.service.drive_to(id_, Phase.GRANTED)
    got = await api("POST", f"/v1/migrations/{id_}:cancel")
    assert "granted" in got.problem(409, "past_point_of_no_return").detail


async def test_every_phase_gives_an_answer_to_every_wish(api: Api) -> None:
    for number, phase in enumerate(p for p in Phase if p not in _OFF_THE_PATH):
        id_ = await api.begun(f"vm-{number}")
        api.service.drive_to(id_, phase)
        for wish in ("switchover", "cancel"):
            got = await api("POST", f"/v1/migrations/{id_}:{wish}")
            assert got.status in (200, 202, 409), (phase, wish, got)


_OFF_THE_PATH = {
    Phase.ROLLING_BACK,
    Phase.ROLLED_BACK,
    Phase.CANCELLED,
    Phase.REFUSED,
    Phase.GUEST_LOST,
    Phase.NEEDS_OPERATOR,
}


async def test_a_policy_change_keeps_what_it_does_not_say(api: Api) -> None:
    id_ = await api.begun()
    api.service.drive_to(id_, Phase.PRECOPY)
    where = f"/v1/migrations/{id_}/policy"
    assert (await api("PATCH", where, {"deadline_s": 7})).status == 202
    assert (await api("PATCH", where, {"downtime_limit_ms": 1000})).status == 202
    policy = (await api("GET", f"/v1/migrations/{id_}")).json["policy"]
    assert (policy["deadline_s"], policy["downtime_limit_ms"]) == (7.0, 1000.0)
    assert (await api("PATCH", where, {"downtime_limit_ms": 1000})).status == 200


@pytest.mark.parametrize("nothing", [{}, {"deadline_s": None}])
async def test_a_policy_change_must_say_something(api: Api, nothing: object) -> None:
    id_ = await api.begun()
    got = await api("PATCH", f"/v1/migrations/{id_}/policy", nothing)
    assert "says nothing" in got.problem(422, "invalid").detail


async def test_a_policy_change_against_an_older_state_is_refused(api: Api) -> None:
    id_ = await api.begun()
    where = f"/v1/migrations/{id_}/policy"
    seen = (await api("GET", f"/v1/migrations/{id_}")).headers["ETag"]
    api.service.drive_to(id_, Phase.PRECOPY)
    got = await api("PATCH", where, {"deadline_s": 7}, If_Match=seen)
    got.problem(412, "precondition_failed")
    now = (await api("GET", f"/v1/migrations/{id_}")).headers["ETag"]
    assert (await api("PATCH", where, {"deadline_s": 7}, If_Match=f"W/{now}")).status == 412
    assert (await api("PATCH", where, {"deadline_s": 7}, If_Match=now)).status == 202
    assert (await api("PATCH", where, {"deadline_s": 8}, If_Match="*")).status == 202


async def test_an_operator_settles_what_migrd_cannot_know(api: Api) -> None:
    id_ = await api.begun()
    said = {"resolution": "destination_fenced", "evidence": "host-b is off, seen at the PDU"}
    early = await api("POST", f"/v1/migrations/{id_}:resolve", said)
    early.problem(409, "not_needs_operator")
    api.service.drive_to(id_, Phase.GRANTED)
    api.service.step(id_, Trigger.OUTCOME_UNKNOWN)
    assert (await api("GET", f"/v1/migrations/{id_}")).json["guest_runs_on"] == "unknown"
    got = await api("POST", f"/v1/migrations/{id_}:resolve", said)
    assert (got.status, got.json["migration"]["phase"]) == (202, "rolling_back")


async def test_rounds_and_decisions_are_kept_with_their_figures(api: Api) -> None:
    id_ = await api.begun()
    api.service.drive_to(id_, Phase.PRECOPY)
    for remaining in (200 << 20, 90 << 20, 1 << 20):
        api.service.add_round(id_, remaining_bytes=remaining)
    rounds = (await api("GET", f"/v1/migrations/{id_}/rounds")).json["items"]
    assert [r["number"] for r in rounds] == [1, 2, 3]
    assert rounds[0]["duration_ms"] == 1500.0
    assert rounds[0]["dirty_bytes_per_s"] == 2560 * 4096
    assert rounds[1]["elapsed_ms"] - rounds[0]["elapsed_ms"] == 1500.0
    decisions = (await api("GET", f"/v1/migrations/{id_}/decisions")).json["items"]
    assert decisions[-1]["verdict"] == "switch_over"
    assert decisions[-1]["estimate"]["predicted_blackout_ms"] < 300
    migration = (await api("GET", f"/v1/migrations/{id_}")).json
    assert migration["last_decision"] == decisions[-1]


async def test_records_come_in_pages_that_fit_together(api: Api) -> None:
    id_ = await api.begun()
    api.service.drive_to(id_, Phase.PRECOPY)
    for _ in range(5):
        api.service.add_round(id_)
    numbers: list[int] = []
    token = ""
    while True:
        got = await api("GET", f"/v1/migrations/{id_}/rounds?limit=2{token}")
        numbers += [r["number"] for r in got.json["items"]]
        if got.json["next_page_token"] is None:
            break
        token = f"&page_token={got.json['next_page_token']}"
    assert numbers == [1, 2, 3, 4, 5]


async def test_the_phases_of_a_finished_migration_sum_to_its_total(api: Api) -> None:
    id_ = await api.begun()
    api.service.drive_to(id_, Phase.SUCCEEDED)
    migration = (await api("GET", f"/v1/migrations/{id_}")).json
    assert migration["is_terminal"] is True
    assert migration["guest_runs_on"] == "destination"
    lasted = [e["duration_ms"] for e in migration["timeline"] if e["duration_ms"] is not None]
    assert sum(lasted) == pytest.approx(migration["total_ms"])
    assert [e["phase"] for e in migration["timeline"]][-1] == "succeeded"


async def test_lists_are_newest_first_filtered_and_paged_while_new_ones_come(api: Api) -> None:
    ids = [await api.begun(f"vm-{n}") for n in range(5)]
    api.service.drive_to(ids[0], Phase.SUCCEEDED)
    first = await api("GET", "/v1/migrations?limit=2")
    assert [m["id"] for m in first.json["items"]] == [ids[4], ids[3]]
    await api.begun("vm-new")
    token = first.json["next_page_token"]
    second = await api("GET", f"/v1/migrations?limit=2&page_token={token}")
    assert [m["id"] for m in second.json["items"]] == [ids[2], ids[1]]
    third = MigrationList.model_validate_json(
        (
            await api("GET", f"/v1/migrations?limit=2&page_token={second.json['next_page_token']}")
        ).body
    )
    assert [m.id for m in third.items] == [ids[0]]
    assert third.next_page_token is None

    async def shown(query: str) -> list[str]:
        return [m["id"] for m in (await api("GET", f"/v1/migrations?{query}")).json["items"]]

    assert await shown("active=false") == [ids[0]]
    assert await shown("vm=vm-2") == [ids[2]]
    assert await shown("phase=succeeded") == [ids[0]]
    assert len(await shown("active=true&role=source")) == 5
    assert await shown("role=destination") == []


@pytest.mark.parametrize("token", ["!!", "AAAA", "eA", "MQ", "%00", "a" * 256])
async def test_a_page_token_that_was_not_given_here_is_refused(api: Api, token: str) -> None:
    got = await api("GET", f"/v1/migrations?page_token={token}")
    assert got.problem(422, "invalid").violations[0].field == "page_token"


async def test_an_unknown_migration_is_not_found_whatever_is_asked_of_it(api: Api) -> None:
    for method, rest in [("GET", ""), ("GET", "/rounds"), ("POST", ":cancel")]:
        got = await api(method, f"/v1/migrations/00000000-0000-0000-0000-0000000000ff{rest}")
        got.problem(404, "unknown_migration")
