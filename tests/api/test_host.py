"""This host and its VMs over HTTP."""

from migrd.api.models import Host, Vm
from migrd.engine.service import Check
from tests.api.running import Api


async def test_the_host_says_what_it_has(api: Api) -> None:
    host = Host.model_validate_json((await api("GET", "/v1/host")).body)
    assert (host.name, host.profiles, host.all_iommus_track_dirty) == ("host-a", ("small",), False)
    assert [peer.name for peer in host.peers] == ["host-b", "host-c"]


async def test_a_vm_is_defined_once_started_stopped_and_forgotten(api: Api) -> None:
    body = {"profile": "small", "parameters": {"vcpus": 2}}
    dry = await api("PUT", "/v1/vms/new-1?dry_run", body)
    assert (dry.status, "new-1" in api.service.known_vms) == (200, False)
    first = await api("PUT", "/v1/vms/new-1", body)
    assert (first.status, first.headers["Location"]) == (201, "/v1/vms/new-1")
    assert (await api("PUT", "/v1/vms/new-1", body)).status == 200
    started = Vm.model_validate_json((await api("POST", "/v1/vms/new-1:start")).body)
    assert started.state == "running"
    assert started.facts is not None
    assert started.facts.features == ("multifd", "yank")
    assert started.facts_age_ms == 500.0
    (await api("DELETE", "/v1/vms/new-1")).problem(409, "vm_running")
    assert (await api("POST", "/v1/vms/new-1:stop")).json["state"] == "stopped"
    gone = await api("DELETE", "/v1/vms/new-1")
    assert (gone.status, gone.body) == (204, b"")
    (await api("GET", "/v1/vms/new-1")).problem(404, "unknown_vm")


async def test_a_profile_that_does_not_exist_is_named(api: Api) -> None:
    (await api("PUT", "/v1/vms/new-1", {"profile": "huge"})).problem(404, "unknown_profile")


async def test_a_vm_that_is_migrating_is_not_stopped(api: Api) -> None:
    id_ = await api.begun()
    (await api("POST", "/v1/vms/web-1:stop")).problem(409, "already_migrating")
    assert (await api("GET", "/v1/vms/web-1")).json["migration_id"] == id_


async def test_vms_come_by_name_in_pages(api: Api) -> None:
    first = (await api("GET", "/v1/vms?limit=1")).json
    assert [vm["name"] for vm in first["items"]] == ["idle-1"]
    rest = (await api("GET", f"/v1/vms?limit=1&page_token={first['next_page_token']}")).json
    assert [vm["name"] for vm in rest["items"]] == ["web-1"]
    assert rest["next_page_token"] is None


async def test_a_plan_shows_every_refusal_and_changes_nothing(api: Api) -> None:
    await api.begun()
    got = await api("POST", "/v1/vms/web-1:plan", {"destination": "host-c"})
    assert got.json["possible"] is False
    assert [r["code"] for r in got.json["refusals"]] == ["already_migrating"]
    assert len(api.service.known) == 1


async def test_readiness_names_what_is_missing(api: Api) -> None:
    assert (await api("GET", "/readyz")).json["ready"] is True
    api.service.checks = [Check("journal", False, "disk full"), Check("qemu", True, "fine")]
    problem = (await api("GET", "/readyz")).problem(503, "not_ready")
    assert [(v.field, v.message) for v in problem.violations] == [("journal", "disk full")]
    assert problem.retryable
    assert (await api("GET", "/healthz")).json == {"status": "ok"}


async def test_the_first_page_says_where_things_are(api: Api) -> None:
    got = await api("GET", "/")
    assert got.headers["Content-Type"].startswith("text/plain")
    for where in ("/v1/host", "/v1/vms", "/v1/migrations", "/metrics", "/openapi.json"):
        assert where in got.body.decode()
        assert (await api("GET", where)).status == 200
