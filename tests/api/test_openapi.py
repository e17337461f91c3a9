"""The document says what the API does, and is committed as it is generated."""

import re
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from migrd.api import openapi
from migrd.api.auth import Scope
from migrd.api.table import ROUTES
from tests.api.running import Api

COMMITTED = Path(openapi.__file__).with_name("openapi.json")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi.document()


def test_the_committed_document_is_the_generated_one() -> None:
    assert COMMITTED.read_bytes() == openapi.render(), (
        "run: python -m migrd.api.openapi > migrd/api/openapi.json"
    )


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(document).validate()


def test_every_route_is_in_the_document_and_nothing_else(document: dict[str, Any]) -> None:
    told = {(m.upper(), path) for path, item in document["paths"].items() for m in item}
    assert told == {(route.method, route.path) for route in ROUTES}
    assert len(ROUTES) == len(told)


def test_the_routes_are_those_of_the_design(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == {
        "/",
        "/healthz",
        "/metrics",
        "/openapi.json",
        "/readyz",
        "/v1/devices",
        "/v1/devices/{address}",
        "/v1/devices/{address}:probe",
        "/v1/events",
        "/v1/host",
        "/v1/migrations",
        "/v1/migrations/{migration_id}",
        "/v1/migrations/{migration_id}/decisions",
        "/v1/migrations/{migration_id}/policy",
        "/v1/migrations/{migration_id}/rounds",
        "/v1/migrations/{migration_id}:cancel",
        "/v1/migrations/{migration_id}:resolve",
        "/v1/migrations/{migration_id}:switchover",
        "/v1/vms",
        "/v1/vms/{vm}",
        "/v1/vms/{vm}/devices",
        "/v1/vms/{vm}/devices/{device}",
        "/v1/vms/{vm}/dirty-rate",
        "/v1/vms/{vm}/dirty-rate/history",
        "/v1/vms/{vm}/dirty-rate:measure",
        "/v1/vms/{vm}:plan",
        "/v1/vms/{vm}:start",
        "/v1/vms/{vm}:stop",
    }


def operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for item in document["paths"].values() for operation in item.values()]


def test_every_operation_tells_its_problems_and_who_may_call_it(document: dict[str, Any]) -> None:
    for operation in operations(document):
        name = operation["operationId"]
        assert operation["summary"], name
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                schema = response["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, name
        assert {"400", "422", "500", "503"} <= set(operation["responses"]), name
        if operation["security"]:
            assert {"401", "403"} <= set(operation["responses"]), name
        if "requestBody" in operation:
            assert {"408", "413", "415"} <= set(operation["responses"]), name
    open_to_all = [o["operationId"] for o in operations(document) if not o["security"]]
    assert open_to_all == ["healthz"]


def test_only_reads_are_open_to_readers() -> None:
    for route in ROUTES:
        if route.scope is not Scope.WRITE:
            assert route.method == "GET" or route.name == "plan_vm", route.name


def test_every_quantity_carries_its_unit(document: dict[str, Any]) -> None:
    """A number is a count, an id, a version, a percentage, or it says its unit."""
    unitless = {"generation", "resource_version", "epoch", "id", "pid", "status", "number"}
    unitless |= {"hardware_type", "iommu_group", "numa_node", "first_rung", "next_rung"}
    unitless |= {"iommufd", "hwpt_id", "amplification", "misfit"}
    counted = {"rounds", "vms", "queue_position", "round_number", "postcopy_requests", "devices"}
    counted |= {"measurements", "failures"}
    slots = {f"{way}_{what}" for way in ("outgoing", "incoming") for what in ("slots", "active")}
    unit = re.compile(r"(_ms|_s|_bytes|_pages|_bytes_per_s|_pages_per_s|_percent|_channels)$")
    for name, schema in document["components"]["schemas"].items():
        for field, of in schema.get("properties", {}).items():
            kinds = {of.get("type"), *(choice.get("type") for choice in of.get("anyOf", ()))}
            if kinds & {"integer", "number"}:
                assert unit.search(field) or field in unitless | counted | slots, (name, field)


def test_a_client_supplies_no_address_of_another_host(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request") or name in ("PolicyChange", "VmDefinition"):
            for field in schema["properties"]:
                assert not re.search(r"ur[il]|path|port|address|socket", field), (name, field)


def test_what_is_documented_as_a_range_is_what_is_enforced(document: dict[str, Any]) -> None:
    policy = document["components"]["schemas"]["PolicyRequest"]["properties"]
    limit = policy["downtime_limit_ms"]["anyOf"][0]
    assert (limit["minimum"], limit["maximum"]) == (1, 2_000_000)
    assert "milliseconds" in policy["downtime_limit_ms"]["description"]


async def test_the_document_is_served_as_it_is_committed(api: Api) -> None:
    got = await api("GET", "/openapi.json")
    assert got.headers["Content-Type"] == "application/json"
    assert got.body == openapi.render()
