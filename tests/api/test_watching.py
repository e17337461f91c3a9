"""ETags and long polls: how a client follows what changes without asking all the time."""

import asyncio

import pytest

from migrd.api.models import DecisionList, MigrationList, RoundList, VmList
from migrd.api.table import to_json
from migrd.core.phases import Phase, Trigger
from tests.api.running import METRICS, Api, until


async def test_what_the_client_has_already_is_a_304(api: Api) -> None:
    id_ = await api.begun()
    for where in (f"/v1/migrations/{id_}", "/v1/vms/web-1", "/metrics"):
        etag = (await api("GET", where)).headers["ETag"]
        for known in (etag, f'"other", {etag}', f"W/{etag}", "*"):
            got = await api("GET", where, If_None_Match=known)
            assert (got.status, got.body, got.headers["ETag"]) == (304, b"", etag), where
        assert (await api("GET", where, If_None_Match='"other"')).status == 200


async def test_the_etag_changes_with_every_change(api: Api) -> None:
    id_ = await api.begun()
    seen = set()
    for phase in (Phase.PREFLIGHT, Phase.PREPARING, Phase.PRECOPY, Phase.SWITCHOVER):
        api.service.drive_to(id_, phase)
        seen.add((await api("GET", f"/v1/migrations/{id_}")).headers["ETag"])
    assert len(seen) == 4


async def test_a_watch_answers_when_the_migration_changes(api: Api) -> None:
    id_ = await api.begun()
    version = (await api("GET", f"/v1/migrations/{id_}")).json["resource_version"]
    where = f"/v1/migrations/{id_}?watch=1&resource_version={version}&timeout_s=10"
    watch = asyncio.create_task(api("GET", where))
    await until(lambda: api.service.stream._newer._waiters)
    api.service.add_vm("other-1")  # another change on this host is no change of this migration
    api.service.step(id_, Trigger.STARTED)
    got = (await watch).json
    assert got["phase"] == "preflight"
    assert got["resource_version"] > version


@pytest.mark.parametrize("kind", ["vms", "migrations"])
async def test_a_watch_on_a_list_answers_with_anything_newer(api: Api, kind: str) -> None:
    version = (await api("GET", f"/v1/{kind}")).json["resource_version"]
    where = f"/v1/{kind}?watch&resource_version={version}&timeout_s=10"
    watch = asyncio.create_task(api("GET", where))
    await until(lambda: api.service.stream._newer._waiters)
    api.service.add_vm("other-1")
    assert (await watch).json["resource_version"] > version


async def test_a_watch_misses_no_change_that_came_between_two_polls(api: Api) -> None:
    id_ = await api.begun()
    seen, phases = 0, []
    for trigger in (Trigger.STARTED, Trigger.PREFLIGHT_PASSED, Trigger.DESTINATION_PREPARED):
        api.service.step(id_, trigger)
        where = f"/v1/migrations/{id_}?watch=1&resource_version={seen}&timeout_s=10"
        got = (await api("GET", where)).json
        seen = got["resource_version"]
        phases.append(got["phase"])
    assert phases == ["preflight", "preparing", "precopy"]


async def test_a_watch_whose_time_is_over_answers_with_what_is(api: Api) -> None:
    id_ = await api.begun()
    for where in (f"/v1/migrations/{id_}", "/v1/vms/web-1", "/v1/vms", "/v1/migrations"):
        version = (await api("GET", where)).json["resource_version"]
        got = await api("GET", f"{where}?watch=true&resource_version={version}&timeout_s=0.05")
        assert got.status == 200
        assert got.json["resource_version"] == version


async def test_a_version_from_before_a_restart_is_answered_at_once(api: Api) -> None:
    id_ = await api.begun()
    for where in (f"/v1/migrations/{id_}", "/v1/vms"):
        got = await api("GET", f"{where}?watch=1&resource_version=9007199254740991&timeout_s=60")
        assert got.status == 200


@pytest.mark.parametrize(
    "query",
    [
        "timeout_s=-1",
        "timeout_s=nan",
        "timeout_s=inf",
        "timeout_s=301",
        "resource_version=-1",
        "resource_version=1e3",
        "resource_version=99999999999999999999",
        "watch=perhaps",
        "watch=1&watch=1",
        "limit=0",
        "limit=10000",
        "since=yesterday",
    ],
)
async def test_a_parameter_that_cannot_be_right_is_refused(api: Api, query: str) -> None:
    (await api("GET", f"/v1/migrations?{query}")).problem(422, "invalid")


async def test_a_failure_while_waiting_keeps_its_meaning(api: Api) -> None:
    version = (await api("GET", "/v1/vms/web-1")).json["resource_version"]
    where = f"/v1/vms/web-1?watch=1&resource_version={version}&timeout_s=10"
    watch = asyncio.create_task(api("GET", where))
    await until(lambda: api.service.stream._newer._waiters)
    api.service.known_vms["web-1"].running = False
    await api("DELETE", "/v1/vms/web-1")
    (await watch).problem(404, "unknown_vm")


async def test_metrics_are_the_bytes_that_were_rendered(api: Api) -> None:
    got = await api("GET", "/metrics")
    assert (got.body, got.headers["Content-Type"]) == METRICS[:2]
    assert got.headers["ETag"] == '"m1"'


async def test_a_list_put_together_from_pieces_is_the_model_of_the_list(api: Api) -> None:
    ids = [await api.begun(f"vm-{number}") for number in range(60)]
    for id_ in ids[::2]:
        api.service.drive_to(id_, Phase.SUCCEEDED)
    for _ in range(3):
        api.service.add_round(ids[1])
    for _ in range(2):  # rendered, then remembered
        migrations = (await api("GET", "/v1/migrations?limit=57")).body
        whole = MigrationList.model_validate_json(migrations)
        assert to_json(whole) == migrations
        assert len(whole.items) == 57
    vms = (await api("GET", "/v1/vms")).body
    assert to_json(VmList.model_validate_json(vms)) == vms
    for kind, model in (("rounds", RoundList), ("decisions", DecisionList)):
        records = (await api("GET", f"/v1/migrations/{ids[1]}/{kind}")).body
        assert to_json(model.model_validate_json(records)) == records


async def test_a_long_list_leaves_others_their_turn(api: Api) -> None:
    for number in range(300):
        api.service.add_vm(f"vm-{number}")
    loop, longest_s = asyncio.get_running_loop(), 0.0

    async def beat() -> None:
        nonlocal longest_s
        while True:
            begun_s = loop.time()
            await asyncio.sleep(0)
            longest_s = max(longest_s, loop.time() - begun_s)

    async with asyncio.TaskGroup() as tasks:
        beating = tasks.create_task(beat())
        begun_s = loop.time()
        await api("GET", "/v1/vms")
        whole_s = loop.time() - begun_s
        beating.cancel()
    assert longest_s < 0.8 * whole_s


async def test_a_migration_that_ended_is_remembered_as_it_ended(api: Api) -> None:
    id_ = await api.begun()
    api.service.drive_to(id_, Phase.COMPLETING)
    assert (await api("GET", f"/v1/migrations/{id_}")).json["phase"] == "completing"
    api.service.drive_to(id_, Phase.SUCCEEDED)
    for _ in range(2):
        assert (await api("GET", f"/v1/migrations/{id_}")).json["phase"] == "succeeded"
