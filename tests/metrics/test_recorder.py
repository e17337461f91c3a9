"""What the engine reports shows under exactly the names of the interface."""

import ast
import asyncio
import subprocess
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

import migrd
from migrd.core.facts import Round
from migrd.core.phases import Phase
from migrd.core.rate_reading import Tracker
from migrd.core.standing import StandingDecision
from migrd.core.tracking import Migratability, Plan, TrackingPolicy
from migrd.engine.rate_views import RateSeen
from migrd.engine.service import Check, Role, VmView
from migrd.engine.world import Observer
from migrd.metrics import Exposition, Metrics
from migrd.metrics.daemon import QMP_COMMANDS
from migrd.metrics.migrations import CONDITIONS
from tests.fakes.inventory import mixed_host
from tests.metrics.views import Host, migration_view, vm_facts, vm_view

NAMES = {
    "migrd_build_info",
    "migrd_device_estimates_wrong",
    "migrd_dirty_rate_samples",
    "migrd_dirty_rate_sampling_cpu_seconds",
    "migrd_devices",
    "migrd_event_loop_lag_seconds",
    "migrd_harvest_duration_seconds",
    "migrd_harvest_rounds",
    "migrd_host_all_iommus_track_dirty",
    "migrd_iommu_dirty_tracking",
    "migrd_journal_commit_seconds",
    "migrd_migration_blackout_seconds",
    "migrd_migration_condition",
    "migrd_migration_phase_duration_seconds",
    "migrd_migration_predicted_blackout_seconds",
    "migrd_migration_remaining_bytes",
    "migrd_migration_transferred_bytes",
    "migrd_migrations",
    "migrd_migrations_active",
    "migrd_ownership_violations",
    "migrd_peer_up",
    "migrd_qmp_call_seconds",
    "migrd_ready",
    "migrd_tracking_decisions",
    "migrd_vm_dirty_bytes_per_second",
    "migrd_vm_dirty_pages",
    "migrd_vm_dirty_rate_sampled_timestamp_seconds",
    "migrd_vm_migratable",
}
"""The interface's metrics that can be filled (the parser takes `_total` off)."""

ROUND = Round(
    number=1,
    at_s=10.0,
    duration_s=2.0,
    transferred_bytes=1 << 20,
    remaining_bytes=1 << 19,
    dirty_pages_per_s=100.0,
    page_size_bytes=4096,
    bandwidth_bytes_per_s=5e5,
    throttle_percent=0,
)


def busy() -> tuple[Metrics, Host]:
    """Everything reported once."""
    metrics = Metrics(peers=["b"])
    metrics.phase_changed("source", Phase.PRECOPY, Phase.SWITCHOVER, 1.5)
    metrics.migration_ended("source", Phase.SUCCEEDED, "none")
    metrics.migration_ended("source", Phase.ROLLED_BACK, "link_stalled")
    metrics.blackout(0.042)
    metrics.round_recorded("web", ROUND)
    metrics.transferred("web", "ram", 1 << 20)
    metrics.journal_committed(0.003)
    metrics.qmp_called("query-migrate", "ok", 0.0004)
    metrics.peer_checked("b", True)
    metrics.loop_lag(0.0001)
    metrics.ownership_violation()
    metrics.inventory_seen(mixed_host())
    metrics.estimate_was_wrong()
    metrics.decided("auto", "live", "none")
    metrics.rate_sampled(RateSeen("web", Tracker.QEMU, "ok", 4096.0, 0.0, 0.002, 1_795_000_000.0))
    host = Host(known=[vm_view("web", vm_facts())], moving=[migration_view("web")])
    return metrics, host


async def exposed(
    metrics: Metrics, host: Host
) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    body = (await Exposition(metrics, host).refresh()).body.decode()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            series = found.setdefault(sample.name, {})
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in series, f"{sample.name}{labels} is there twice"
            series[labels] = sample.value
    return found


def test_the_hooks_are_what_the_engine_calls() -> None:
    observer: Observer = Metrics()
    observer.ownership_violation()


async def test_the_names_are_exactly_those_of_the_interface() -> None:
    body = (await Exposition(*busy()).refresh()).body.decode()
    names = {family.name for family in text_string_to_metric_families(body)}
    assert {name for name in names if not name.startswith("process_")} == NAMES
    assert "process_cpu_seconds" in names
    assert "_created" not in body


async def test_promtool_has_nothing_to_say_against_them(promtool: Path) -> None:
    body = (await Exposition(*busy()).refresh()).body

    def check() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [promtool, "check", "metrics"], input=body, capture_output=True, timeout=60
        )

    told = await asyncio.to_thread(check)
    assert (told.returncode, told.stdout, told.stderr) == (0, b"", b"")


async def test_each_report_shows_with_its_labels_and_value() -> None:
    seen = await exposed(*busy())
    outcome = (("outcome", "rolled_back"), ("reason", "link_stalled"), ("role", "source"))
    assert seen["migrd_migrations_total"][outcome] == 1
    in_phase = (("phase", "precopy"), ("role", "source"))
    assert seen["migrd_migration_phase_duration_seconds_sum"][in_phase] == 1.5
    assert seen["migrd_migrations_active"][in_phase] == 1
    assert seen["migrd_migration_blackout_seconds_sum"][()] == 0.042
    assert seen["migrd_migration_remaining_bytes"][(("vm", "web"),)] == 4096
    assert seen["migrd_migration_predicted_blackout_seconds"][(("vm", "web"),)] == 0.25
    sent = (("channel", "ram"), ("vm", "web"))
    assert seen["migrd_migration_transferred_bytes_total"][sent] == 1 << 20
    tracked = (("tracker", "qemu"), ("vm", "web"))
    assert seen["migrd_vm_dirty_pages_total"][tracked] == 200
    assert seen["migrd_vm_dirty_bytes_per_second"][tracked] == 8192
    assert seen["migrd_vm_migratable"][(("verdict", "live"), ("vm", "web"))] == 1
    assert seen["migrd_vm_migratable"][(("verdict", "blocked"), ("vm", "web"))] == 0
    assert seen["migrd_peer_up"][(("peer", "b"),)] == 1
    assert seen["migrd_ownership_violations_total"][()] == 1
    assert seen["migrd_build_info"][(("version", migrd.__version__),)] == 1


async def test_every_phase_a_migration_can_be_in_has_a_series_even_at_zero() -> None:
    seen = await exposed(Metrics(), Host())
    source = {dict(k)["phase"] for k in seen["migrd_migrations_active"] if ("role", "source") in k}
    assert {"pending", "granted", "needs_operator"} <= source
    assert "succeeded" not in source
    assert set(seen["migrd_migrations_active"].values()) == {0}


async def shown(host: Host) -> set[tuple[str, str, float]]:
    """(role, condition, count) of what is not at zero."""
    seen = (await exposed(Metrics(), host))["migrd_migration_condition"]
    labelled = [(dict(key), count) for key, count in seen.items()]
    return {(key["role"], key["condition"], count) for key, count in labelled if count}


async def test_a_condition_of_either_side_is_counted_while_it_stands_and_gone_when_it_is_over() -> (
    None
):
    there = Role.DESTINATION
    host = Host(moving=[migration_view("web"), migration_view("db", role=there, phase="loaded")])
    assert await shown(host) == set()
    host.moving = [
        migration_view("web", conditions=["LinkStalled", "CancelRequested"]),
        migration_view("mail", conditions=["LinkStalled"]),
        migration_view("db", role=there, phase="loaded", conditions=["NotGoingOn"]),
    ]
    assert await shown(host) == {
        ("source", "LinkStalled", 2),
        ("source", "CancelRequested", 1),
        ("destination", "NotGoingOn", 1),
    }
    host.moving = [migration_view("web"), migration_view("db", role=there, phase="owned")]
    assert await shown(host) == set()


async def test_the_conditions_of_a_migration_that_has_ended_are_not_counted() -> None:
    ended = migration_view(phase="succeeded", is_terminal=True, conditions=["SourceNotEnding"])
    assert await shown(Host(moving=[ended])) == set()


async def test_a_condition_that_is_said_not_to_hold_is_not_counted() -> None:
    view = migration_view(conditions=["LinkStalled"])
    over = replace(view, conditions=(replace(view.conditions[0], status="False"),))
    assert await shown(Host(moving=[over])) == set()


async def test_conditions_that_the_metrics_do_not_know_are_one_other_of_a_migration() -> None:
    odd = migration_view(conditions=[f"Odd{n}" for n in range(100)])
    assert await shown(Host(moving=[odd])) == {("source", "other", 1)}


async def test_every_condition_a_side_can_show_has_a_series_even_at_zero() -> None:
    seen = (await exposed(Metrics(), Host()))["migrd_migration_condition"]
    known = {(dict(key)["role"], dict(key)["condition"]) for key in seen}
    assert {("source", "PostcopyPaused"), ("destination", "NotGoingOn")} <= known
    assert ("destination", "PostcopyPaused") not in known
    assert {condition for _, condition in known} == set(CONDITIONS)
    assert set(seen.values()) == {0}


async def test_each_check_of_readyz_is_a_series_that_is_1_while_it_holds() -> None:
    host = Host(checks=[Check("recovered", True, ""), Check("journal", False, "disk full")])
    ready = (await exposed(Metrics(), host))["migrd_ready"]
    assert ready == {(("check", "recovered"),): 1, (("check", "journal"),): 0}
    host.checks[1] = Check("journal", True, "writable")
    assert set((await exposed(Metrics(), host))["migrd_ready"].values()) == {1}


async def test_a_vm_that_is_no_longer_tracked_takes_its_series_with_it() -> None:
    metrics, host = busy()
    exposition = Exposition(metrics, host)
    assert b'vm="web"' in (await exposition.refresh()).body
    host.known, host.moving = [], [migration_view("web", phase="succeeded", is_terminal=True)]
    assert b'vm="web"' not in (await exposition.refresh()).body
    host.known = [vm_view("web")]
    seen = await exposed(metrics, host)
    assert "migrd_migration_transferred_bytes_total" not in seen  # counts from nothing again


async def test_an_ended_migration_has_no_remaining_bytes_but_its_vm_keeps_its_counters() -> None:
    metrics, host = busy()
    host.moving = [migration_view("web", phase="succeeded", is_terminal=True)]
    seen = await exposed(metrics, host)
    assert "migrd_migration_remaining_bytes" not in seen
    assert seen["migrd_migration_transferred_bytes_total"]


async def test_what_is_not_known_has_no_series_rather_than_a_zero() -> None:
    view = migration_view(remaining_bytes=None, dirty_bytes_per_s=None, predicted_blackout_s=None)
    seen = await exposed(Metrics(), Host(moving=[view]))
    for name in ("remaining_bytes", "predicted_blackout_seconds"):
        assert f"migrd_migration_{name}" not in seen
    assert "migrd_vm_dirty_bytes_per_second" not in seen


async def test_how_a_vm_can_be_migrated_is_one_of_the_verdicts_or_unknown() -> None:
    blocked = vm_facts("blocked", blocked_reasons=("a device says no",))
    old = vm_facts("old", features=frozenset())
    host = Host(
        known=[
            vm_view("unseen"),
            vm_view("blocked", blocked),
            vm_view("old", old),
            vm_view("adopted", vm_facts("adopted"), profile=None),
            vm_view("fit", vm_facts("fit")),
            vm_view("undecided", vm_facts("undecided", passthrough_devices=("hostdev0",))),
            decided("copied", Migratability.STOP_AND_COPY),
            decided("stuck", Migratability.NEEDS_UNPLUG, blocked_reasons=("vfio says no",)),
            decided("surprising", Migratability.LIVE, blocked_reasons=("vfio says no",)),
        ]
    )
    seen = (await exposed(Metrics(), host))["migrd_vm_migratable"]
    verdicts = {dict(k)["vm"]: dict(k)["verdict"] for k, v in seen.items() if v == 1}
    assert verdicts == {
        "unseen": "unknown", "blocked": "blocked", "old": "blocked", "adopted": "blocked",
        "fit": "live", "undecided": "unknown", "copied": "stop_and_copy",
        "stuck": "needs_unplug", "surprising": "blocked",
    }  # fmt: skip


def decided(vm: str, migratability: Migratability, **facts: object) -> VmView:
    plan = Plan(TrackingPolicy.AUTO, migratability, migratability, ())
    known = vm_facts(vm, passthrough_devices=("hostdev0",), **facts)
    return replace(vm_view(vm, known), decision=StandingDecision(plan, (), 1000.0))


async def test_decisions_are_counted_by_words_from_closed_sets() -> None:
    metrics = Metrics()
    metrics.decided("auto", "live", "none")
    metrics.decided("require", "refused", "policy_not_met")
    for n in range(1000):
        metrics.decided(f"policy-{n}", f"decision-{n}", f"reason-{n}")
    seen = (await exposed(metrics, Host()))["migrd_tracking_decisions_total"]
    assert len(seen) == 3
    live = (("decision", "live"), ("policy", "auto"), ("reason", "none"))
    assert seen[live] == 1


async def test_words_from_outside_cannot_add_series_without_bound() -> None:
    metrics = Metrics(peers=["b"])
    for n in range(1000):
        metrics.qmp_called(f"x-command-{n}", f"outcome-{n}", 0.1)
        metrics.migration_ended("source", f"outcome_{n}", f"reason_{n}")
        metrics.phase_changed(f"role_{n}", f"phase_{n}", "x", 1.0)
        metrics.transferred("web", f"channel-{n}", 1)
        metrics.peer_checked(f"peer-{n}", False)
    seen = await exposed(metrics, Host(known=[vm_view("web")]))
    assert sum(len(series) for series in seen.values()) < 250
    unknown = (("command", "other"), ("outcome", "other"))
    assert seen["migrd_qmp_call_seconds_count"][unknown] == 1000
    assert seen["migrd_migration_transferred_bytes_total"][(("channel", "other"), ("vm", "web"))]


async def test_two_migrations_of_one_vm_make_no_series_twice() -> None:
    both = [migration_view("web"), migration_view("web", role=Role.DESTINATION, phase="receiving")]
    seen = await exposed(Metrics(), Host(moving=both))
    assert len(seen["migrd_migration_remaining_bytes"]) == 1


def test_odd_figures_never_raise() -> None:
    metrics = Metrics()
    metrics.phase_changed("source", "precopy", "switchover", -1.0)
    metrics.phase_changed("source", "precopy", "switchover", None)
    metrics.blackout(-0.1)
    metrics.transferred("web", "ram", -5)
    metrics.migration_ended("source", "cancelled", None)


def test_every_qmp_command_that_migrd_sends_has_a_series_of_its_own() -> None:
    sent = set()
    for path in Path(migrd.__file__).parent.joinpath("qemu").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute | ast.Name)
                and (getattr(node.func, "attr", None) or getattr(node.func, "id", ""))
                in ("execute", "execute_oob")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                sent.add(str(node.args[0].value))
    assert sent, "no call was found: has the verb been renamed?"
    assert sent <= QMP_COMMANDS, sent - QMP_COMMANDS
