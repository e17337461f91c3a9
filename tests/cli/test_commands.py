"""Each command against the real interface: what it prints, its JSON, its exit code."""

import json
from dataclasses import replace

import pytest

from migrd.api import models
from migrd.cli.exits import Exit
from tests.cli.conftest import Run, ended, migration_to, parsed, until
from tests.cli.scripted import Scripted
from tests.cli.scripted_daemon import Daemon


def test_vms_lists_them_as_aligned_lines(run: Run) -> None:
    result = run("vms")
    assert result.exit_code == 0
    header, first, second = result.stdout.splitlines()
    assert header.split() == ["VM", "STATE", "MEMORY", "QEMU", "PROFILE", "MIGRATION"]
    assert first.split()[:2] == ["db1", "running"]
    assert first.index("running") == second.index("running") == header.index("STATE")


def test_json_is_the_apis_own_answer(run: Run) -> None:
    id_ = ended(run, "host-b")
    answers: list[tuple[type[models.WireModel], tuple[str, ...]]] = [
        (models.VmList, ("vms",)),
        (models.Vm, ("vms", "show", "web1")),
        (models.Host, ("host",)),
        (models.DeviceList, ("devices",)),
        (models.Device, ("devices", "0000:41:00.1")),
        (models.Plan, ("plan", "web1", "host-b")),
        (models.Migration, ("migrations", "show", id_)),
        (models.MigrationList, ("migrations",)),
        (models.RoundList, ("rounds", id_)),
        (models.DecisionList, ("decisions", id_)),
    ]
    for model, arguments in answers:
        model.model_validate_json(run(*arguments, "-o", "json").stdout)


def test_jsonl_is_one_item_a_line(run: Run) -> None:
    lines = run("vms", "-o", "jsonl").stdout.splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["db1", "web1"]
    (line,) = run("host", "-o", "jsonl").stdout.splitlines()
    assert json.loads(line)["name"] == "host-a"
    (line,) = run("vms", "show", "web1", "-o", "jsonl").stdout.splitlines()
    assert json.loads(line)["name"] == "web1"


def test_the_format_may_stand_before_or_after_the_command_or_in_the_environment(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parsed(run("-o", "json", "vms"))["items"]
    assert parsed(run("vms", "list", "-o", "json"))["items"]
    monkeypatch.setenv("MIGRD_OUTPUT", "json")
    assert parsed(run("vms"))["items"]
    assert run("vms", "-o", "table").stdout.startswith("VM")
    monkeypatch.setenv("MIGRD_OUTPUT", "xml")
    result = run("vms")
    assert result.exit_code == Exit.USAGE
    assert "'xml'" in result.stderr


def test_host_shows_slots_peers_and_what_is_not_known(run: Run) -> None:
    out = run("host").stdout
    assert "0 of 4 slots in use" in out
    assert "all IOMMUs track dirty pages  no: 1 of 2 cannot: dmar1" in out
    assert "small (QEMU unknown), standard (QEMU 10.0.2)" in out
    assert "not asked yet" in out


def test_host_says_what_the_daemon_lacks(run: Run, daemon: Daemon) -> None:
    assert "not ready" not in run("host").stdout
    daemon.call(lambda engine: setattr(engine, "ready", False))
    out = run("host").stdout
    assert "not ready to migrate:" in out
    assert "journal: the disk is full" in out


def test_migrations_are_chosen_by_vm_and_by_whether_they_go_on(run: Run) -> None:
    ended(run, "host-b", "db1")
    going_on = migration_to(run, "host-never")
    assert len(run("migrations").stdout.splitlines()) == 3
    active = run("migrations", "--active").stdout.splitlines()[1:]
    assert [line.split()[0] for line in active] == [going_on]
    of_db1 = run("migrations", "list", "--vm", "db1", "-o", "json")
    assert [item["vm"] for item in parsed(of_db1)["items"]] == ["db1"]
    assert run("cancel", going_on).exit_code == 0


def test_every_page_of_a_long_list_is_read(run: Run, daemon: Daemon) -> None:
    id_ = ended(run, "host-b")

    def add_more(engine: Scripted) -> None:
        first = engine.migrations_by_id[id_]
        for number in range(250):
            other = replace(first, state=replace(first.state, id=f"m-{number:04}"))
            engine.migrations_by_id[other.state.id] = other

    daemon.call(add_more)
    page = run("migrations")
    assert len(page.stdout.splitlines()) == 1 + 100
    assert "--all" in page.stderr
    assert len(parsed(run("migrations", "--all", "-o", "json"))["items"]) == 251
    assert run("watch", id_[:9]).exit_code == 0


def test_a_vm_is_defined_started_stopped_and_forgotten(run: Run) -> None:
    dry = run("vms", "define", "new1", "--profile", "standard", "--dry-run")
    assert "would be defined" in dry.stdout
    assert run("vms", "show", "new1").exit_code == Exit.NOT_FOUND
    defined = run("vms", "define", "new1", "--profile", "standard", "--set", "memory_mib=64")
    assert "new1 is defined" in defined.stdout
    assert parsed(run("vms", "show", "new1", "-o", "json"))["parameters"] == {"memory_mib": 64}
    assert "new1 is running" in run("start", "new1").stdout
    assert run("vms", "forget", "new1").exit_code == Exit.REFUSED
    assert "new1 is stopped" in run("vms", "stop", "new1").stdout
    assert run("vms", "forget", "new1").exit_code == 0
    assert run("vms", "show", "new1").exit_code == Exit.NOT_FOUND


def test_start_with_a_profile_defines_the_vm_first(run: Run) -> None:
    assert run("start", "new2", "--profile", "small", "--set", "debug=true").exit_code == 0
    vm = parsed(run("vms", "show", "new2", "-o", "json"))
    assert (vm["profile"], vm["parameters"], vm["state"]) == ("small", {"debug": True}, "running")


def test_plan_lists_every_refusal_with_its_cure_and_exits_4(run: Run) -> None:
    result = run("plan", "web1", "host-refuses")
    assert result.exit_code == Exit.REFUSED
    assert "cannot be migrated" in result.stdout
    assert "[no_memory]" in result.stdout
    assert "[no_profile]" in result.stdout
    assert "try: stop a VM" in result.stdout
    assert run("plan", "web1", "host-b").exit_code == 0


def test_migrate_prints_the_id_alone_on_stdout(run: Run, daemon: Daemon) -> None:
    id_ = migration_to(run, "host-b")
    assert daemon.call(lambda engine: id_ in engine.migrations_by_id)


def test_what_was_wished_reaches_the_daemon_and_nothing_else(run: Run, daemon: Daemon) -> None:
    id_ = migration_to(
        run,
        "host-b",
        *("--downtime-limit-ms", "1.5s", "--deadline-s", "10min"),
        *("--max-bandwidth", "100MiB/s", "--when-not-converging", "throttle"),
        *("--max-throttle-percent", "60", "--multifd", "4", "--allow-postcopy"),
    )
    request = daemon.call(lambda engine: engine.migrations_by_id[id_].state.request)
    policy = request.policy
    assert (policy.downtime_limit_s, policy.deadline_s) == (1.5, 600)
    assert policy.max_bandwidth_bytes_per_s == 100 * 2**20
    assert (policy.when_not_converging, policy.max_throttle_percent) == ("throttle", 60)
    assert (request.multifd_channels, request.allow_postcopy) == (4, True)


def test_the_same_idempotency_key_gives_the_same_migration(run: Run) -> None:
    first = migration_to(run, "host-b", "--idempotency-key", "K1")
    assert migration_to(run, "host-b", "--idempotency-key", "K1") == first
    other = run("migrate", "db1", "host-b", "--idempotency-key", "K1")
    assert other.exit_code == Exit.USAGE
    assert "[idempotency_key_reused]" in other.stderr


@pytest.mark.parametrize(
    ("destination", "code", "where"),
    [
        ("host-b", Exit.OK, "web1 runs on host-b (the destination)"),
        ("host-refuses", Exit.REFUSED, "web1 runs on host-a (the source); refused"),
        ("host-fails", Exit.ENDED_OTHERWISE, "web1 runs on host-a (the source); rolled back"),
        ("host-lost", Exit.GUEST_LOST, "web1 runs nowhere: the guest is lost"),
        ("host-unknown", Exit.NEEDS_OPERATOR, "It is not known where web1 runs"),
    ],
)
def test_watching_ends_with_where_the_guest_is_and_the_code_for_it(
    run: Run, destination: str, code: Exit, where: str
) -> None:
    result = run("migrate", "web1", destination, "--watch")
    assert result.exit_code == code, result.output
    assert where in result.stdout
    id_ = parsed(run("migrations", "-o", "json"))["items"][0]["id"]
    again = run("watch", id_[:8])
    assert again.exit_code == code
    assert where in again.stdout


def test_a_failure_names_its_cause_and_the_next_step(run: Run) -> None:
    out = run("migrate", "web1", "host-fails", "--watch").stdout
    assert "the destination's QEMU exited with status 1 [destination_died]" in out
    assert "look at the destination's log" in out


def test_needs_operator_says_which_command_settles_it(run: Run) -> None:
    id_ = parsed(run("migrate", "web1", "host-unknown", "-w", "-o", "json"))["id"]
    assert f"migrd resolve {id_} RESOLUTION --evidence TEXT" in run("watch", id_).stdout


def test_every_round_and_decision_is_listed(run: Run) -> None:
    id_ = ended(run, "host-b")
    rounds = run("rounds", id_).stdout.splitlines()
    assert rounds[0].split()[0] == "ROUND"
    assert [line.split()[0] for line in rounds[1:]] == ["1", "2", "3"]
    assert "4.0 GiB" in rounds[1]
    decisions = run("decisions", id_).stdout
    assert "switch over" in decisions
    assert "fits_downtime_limit" in decisions


def test_a_migration_is_described_while_it_goes_on(run: Run) -> None:
    id_ = migration_to(run, "host-never")
    until(lambda: parsed(run("rounds", id_, "-o", "json"))["items"])
    out = run("migrations", "show", id_).stdout
    assert "web1 runs on host-a (the source); in phase precopy" in out
    assert "limit 300 ms" in out
    assert "when not converging: wait" in out
    assert run("cancel", id_).exit_code == 0


def test_a_migration_is_cancelled_and_the_second_wish_is_already_so(run: Run) -> None:
    id_ = migration_to(run, "host-never")
    first = run("cancel", id_[:8])
    assert first.exit_code == 0
    assert parsed(run("cancel", id_, "-o", "json"))["admission"] == "already_so"
    assert run("watch", id_).exit_code == Exit.ENDED_OTHERWISE


def test_a_cancel_that_comes_too_late_is_denied(run: Run) -> None:
    result = run("cancel", ended(run, "host-b"))
    assert result.exit_code == Exit.REFUSED
    assert "[past_point_of_no_return]" in result.stderr


def test_a_switchover_can_be_forced(run: Run) -> None:
    id_ = migration_to(run, "host-never")
    until(lambda: "precopy" in run("migrations", "show", id_).stdout)
    assert run("switchover", id_).exit_code == 0
    assert run("watch", id_).exit_code == 0


def test_the_policy_is_changed_and_what_is_not_named_stays(run: Run) -> None:
    id_ = migration_to(run, "host-never", "--deadline-s", "777")
    result = run("policy", id_, "--downtime-limit-ms", "5s", "-o", "json")
    assert result.exit_code == 0, result.output
    assert parsed(result)["migration"]["policy"]["downtime_limit_ms"] == 5000
    assert parsed(result)["migration"]["policy"]["deadline_s"] == 777
    assert run("watch", id_).exit_code == 0
    assert run("policy", id_).exit_code == Exit.USAGE


def test_an_operator_settles_what_is_not_known(run: Run) -> None:
    id_ = ended(run, "host-unknown")
    assert run("resolve", id_, "destination_fenced").exit_code == Exit.USAGE
    result = run("resolve", id_, "destination_fenced", "--evidence", "seen dark")
    assert result.exit_code == 0
    assert run("watch", id_).exit_code == Exit.ENDED_OTHERWISE
    again = run("resolve", id_, "guest_lost", "--evidence", "x")
    assert again.exit_code == Exit.REFUSED


def test_events_shows_the_history_and_ends(run: Run) -> None:
    id_ = ended(run, "host-b")
    events = [json.loads(line) for line in run("events", "-o", "jsonl").stdout.splitlines()]
    assert events[0]["kind"] == "migration.phase"
    assert {event["migration_id"] for event in events} == {id_}
    assert parsed(run("events", "-o", "json"))["items"] == events
    after = run("events", "--after", str(events[-2]["id"]), "-o", "jsonl").stdout.splitlines()
    assert [json.loads(line)["id"] for line in after] == [events[-1]["id"]]
    assert "phase=succeeded" in run("events", "--kind", "migration.phase").stdout
    assert "migration.round" not in run("events", "--kind", "migration.phase").stdout
    assert run("events", "--vm", "db1").stdout == ""
