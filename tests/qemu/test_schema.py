"""What a QEMU offers is read from its schema; whatever the schema looks like."""

import json
from pathlib import Path
from typing import Any

import pytest

from migrd.core.facts import REQUIRED_FEATURES, Feature
from migrd.qemu.schema import FEATURE_TESTS, read_schema
from tests.qemu.real import running_qemu

SCHEMAS = Path(__file__).parent / "schemas"
LATER_ONLY = {
    Feature.SWITCHOVER_ACK,
    Feature.AVAIL_SWITCHOVER_BANDWIDTH,
    Feature.INCOMING_EXIT_ON_ERROR,
    Feature.TCG_KEEPS_DIRTY_PAGES,
}


def stored(version: str) -> Any:
    return json.loads((SCHEMAS / f"{version}.json").read_text())


def test_each_feature_has_its_test() -> None:
    assert set(FEATURE_TESTS) == set(Feature)


def test_the_features_that_7_2_lacks_are_named() -> None:
    assert set(read_schema(stored("7.2")).missing(Feature)) == LATER_ONLY
    assert read_schema(stored("10.0")).missing(Feature) == ()
    assert read_schema(stored("7.2")).missing(REQUIRED_FEATURES) == ()


def test_commands_that_go_out_of_band_are_known() -> None:
    assert {"yank", "migrate-pause", "migrate-recover"} <= read_schema(stored("7.2")).oob_commands
    assert "migrate_cancel" not in read_schema(stored("10.0")).oob_commands


def test_statuses_and_values_are_found_behind_made_up_type_names() -> None:
    schema = read_schema(stored("10.0"))
    assert {"pre-switchover", "device", "postcopy-recover-setup"} <= schema.statuses
    assert {"none", "zlib", "zstd"} <= schema.multifd_compressions
    assert {"tls-creds-x509", "authz-list"} <= schema.object_types
    assert "channels" in schema.migrate_arguments


@pytest.mark.parametrize(
    "odd",
    [
        None,
        {},
        [1, None, {"meta-type": "command"}],
        [{"name": "migrate", "meta-type": "command", "arg-type": ["?"]}],
        [{"name": "query-migrate", "meta-type": "sorcery", "ret-type": "1"}, {"name": "1"}],
        [{"name": "migrate", "arg-type": "1"}, {"name": "1", "members": {"not": "a list"}}],
    ],
)
def test_a_schema_we_cannot_read_offers_nothing_and_raises_nothing(odd: object) -> None:
    assert read_schema(odd).features == frozenset()


def test_a_capability_taken_out_is_reported_missing() -> None:
    text = json.dumps(stored("10.0")).replace('"postcopy-preempt"', '"something-else"')
    assert read_schema(json.loads(text)).missing(Feature) == (Feature.POSTCOPY_PREEMPT,)


@pytest.mark.real
@pytest.mark.parametrize(("version", "key"), [("7.2", "7.2"), ("10.0", "10")])
async def test_the_stored_schemas_are_those_of_the_real_qemus(
    version: str, key: str, qemu_binaries: dict[str, Path], short_tmp_path: Path
) -> None:
    async with running_qemu(qemu_binaries[key], short_tmp_path) as qemu:
        real = await qemu.machine.schema()
    ours = read_schema(stored(version))
    assert real.features == ours.features
    assert (real.statuses, real.capabilities, real.parameters) == (
        ours.statuses,
        ours.capabilities,
        ours.parameters,
    )
