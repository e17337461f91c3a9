"""What QEMU is told before a migration."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from migrd.core.facts import TransferAddress, TransferSettings
from migrd.errors import VmmRefused
from migrd.qemu import migration
from migrd.qemu.schema import QmpSchema, read_schema

PLAIN = TransferSettings(downtime_limit_s=0.3, max_bandwidth_bytes_per_s=0, tls=False)
ENCRYPTED = replace(PLAIN, tls=True, peer_name="host-b.example")


def schema(version: str) -> QmpSchema:
    path = Path(__file__).parent / "schemas" / f"{version}.json"
    return read_schema(json.loads(path.read_text()))


@pytest.fixture(params=["7.2", "10.0"])
def each_schema(request: pytest.FixtureRequest) -> QmpSchema:
    return schema(request.param)


def test_both_sides_have_return_path_events_and_the_pause(each_schema: QmpSchema) -> None:
    states = migration.capabilities(each_schema, PLAIN)
    for name in ("events", "return-path", "pause-before-switchover"):
        assert states[name] is True


def test_every_capability_of_ours_is_named_so_that_nothing_old_stays(
    each_schema: QmpSchema,
) -> None:
    states = migration.capabilities(each_schema, PLAIN)
    assert set(states) == migration.OUR_CAPABILITIES & each_schema.capabilities
    assert not any(states[name] for name in ("multifd", "auto-converge", "postcopy-ram", "xbzrle"))


def test_settings_turn_into_capabilities(each_schema: QmpSchema) -> None:
    postcopy = replace(PLAIN, postcopy=True, postcopy_preempt=True)
    states = migration.capabilities(each_schema, postcopy)
    assert states["postcopy-ram"]
    assert states["postcopy-preempt"]
    alone = migration.capabilities(each_schema, replace(PLAIN, postcopy_preempt=True))
    assert not alone["postcopy-preempt"]  # QEMU refuses it without postcopy-ram
    assert migration.capabilities(each_schema, replace(PLAIN, multifd_channels=4))["multifd"]


def test_a_missing_feature_is_refused_by_name() -> None:
    text = (Path(__file__).parent / "schemas" / "7.2.json").read_text()
    old = read_schema(json.loads(text.replace('"multifd"', '"gone"')))
    migration.refuse_missing(old, PLAIN)
    with pytest.raises(VmmRefused, match="does not offer: multifd") as caught:
        migration.refuse_missing(old, replace(PLAIN, multifd_channels=2))
    assert caught.value.code == "feature_missing"


def test_only_the_source_has_limits_and_only_what_this_qemu_knows_is_set() -> None:
    outgoing = migration.parameters(schema("10.0"), PLAIN, is_outgoing=True)
    assert (outgoing["max-bandwidth"], outgoing["downtime-limit"]) == (0, 300)
    assert outgoing["avail-switchover-bandwidth"] == 0
    assert "avail-switchover-bandwidth" not in migration.parameters(
        schema("7.2"), PLAIN, is_outgoing=True
    )
    incoming = migration.parameters(schema("10.0"), PLAIN, is_outgoing=False)
    assert "max-bandwidth" not in incoming


def test_a_plain_stream_takes_old_credentials_away(each_schema: QmpSchema) -> None:
    for is_outgoing in (True, False):
        chosen = migration.parameters(each_schema, PLAIN, is_outgoing=is_outgoing)
        assert (chosen["tls-creds"], chosen["tls-hostname"], chosen["tls-authz"]) == ("", "", "")


def test_an_encrypted_stream_names_the_other_side_on_both(each_schema: QmpSchema) -> None:
    outgoing = migration.parameters(each_schema, ENCRYPTED, is_outgoing=True)
    assert (outgoing["tls-creds"], outgoing["tls-hostname"]) == (migration.TLS_ID, "host-b.example")
    incoming = migration.parameters(each_schema, ENCRYPTED, is_outgoing=False)
    assert (incoming["tls-creds"], incoming["tls-authz"]) == (
        migration.TLS_ID,
        migration.AUTHZ_ID,
    )
    credentials, authz = migration.tls_objects(each_schema, ENCRYPTED, "/tls", is_outgoing=False)
    assert (credentials["endpoint"], credentials["verify-peer"]) == ("server", True)
    assert authz["policy"] == "deny"
    assert {rule["match"] for rule in authz["rules"]} >= {"CN=host-b.example"}
    [credentials] = migration.tls_objects(each_schema, ENCRYPTED, "/tls", is_outgoing=True)
    assert (credentials["endpoint"], credentials["dir"]) == ("client", "/tls")


@pytest.mark.parametrize("name", ["*", "a*", "a,b", "", "-", "a b", "a\n", "[::1]", "x" * 300])
def test_a_name_that_is_no_host_name_reaches_neither_a_glob_nor_a_uri(name: str) -> None:
    if name:
        with pytest.raises(VmmRefused, match="not a host name"):
            migration.tls_objects(
                schema("10.0"), replace(ENCRYPTED, peer_name=name), "/tls", is_outgoing=False
            )
    with pytest.raises(VmmRefused, match="not a host name"):
        migration.tcp_uri(TransferAddress(name, 1))


def test_addresses_become_uris() -> None:
    assert migration.tcp_uri(TransferAddress("10.0.0.1", 49152)) == "tcp:10.0.0.1:49152"
    assert migration.tcp_uri(TransferAddress("fe80::1", 0)) == "tcp:[fe80::1]:0"
    assert migration.tcp_uri(TransferAddress("::", 5)) == "tcp:[::]:5"
    assert migration.tcp_uri(TransferAddress("host-b.example", 5)) == "tcp:host-b.example:5"
    with pytest.raises(VmmRefused, match="no TCP port"):
        migration.tcp_uri(TransferAddress("10.0.0.1", 70000))


@pytest.mark.parametrize(("asked", "bound"), [(0, 1), (1, 1), (70, 70), (99, 99), (100, 99)])
def test_throttling_goes_to_its_bound_in_one_step(asked: int, bound: int) -> None:
    chosen = migration.throttle_parameters(asked)
    assert chosen["max-cpu-throttle"] == chosen["cpu-throttle-initial"] == bound
    assert chosen["cpu-throttle-increment"] == bound


def test_auto_converge_is_held_down_until_it_is_wanted(each_schema: QmpSchema) -> None:
    chosen = migration.parameters(each_schema, replace(PLAIN, auto_converge=True), is_outgoing=True)
    assert chosen["max-cpu-throttle"] == 1


def test_a_downtime_limit_is_whole_milliseconds_within_qemus_bounds() -> None:
    assert migration.milliseconds(0.3) == 300
    assert migration.milliseconds(0.0001) == 1
    assert migration.milliseconds(1e9) == 2_000_000
