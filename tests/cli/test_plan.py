"""`migrd plan` and what else the command line says of passthrough devices."""

import pytest

from migrd.cli.decision import change_line
from migrd.cli.exits import Exit
from migrd.cli.seen import Seen
from tests.cli.conftest import PROGRAM, Run, parsed
from tests.cli.scripted_daemon import Daemon
from tests.cli.terminal import Terminal

NIC, NIC2, DISK, GPU = "0000:41:00.1", "0000:41:00.2", "0000:81:00.0", "0000:c1:00.0"


def test_the_verdict_comes_first_then_a_row_for_each_device(run: Run) -> None:
    result = run("plan", "web1", "--device", "41:00.1", "--device", "81:00.0")
    assert result.exit_code == Exit.OK, result.output
    verdict, header, first, second, *_ = result.stdout.splitlines()
    assert verdict == "web1 cannot be migrated with hostdev1"
    assert header.split() == ["DEVICE", "ADDRESS", "IOMMU", "TRACKED", "BY", "VERDICT", "REASON"]
    assert first.split()[:3] == ["hostdev0", NIC, "dmar0"]
    assert second.split()[:4] == ["hostdev1", DISK, "dmar1", "nobody"]
    assert "try: use a device behind an IOMMU that can" in result.stdout
    assert "at least" in result.stdout


def test_all_is_well_in_one_line(run: Run) -> None:
    result = run("plan", "web1", "--device", "41:00.1")
    assert result.stdout.startswith("web1 can be live-migrated\n")
    assert run("plan", "web1").stdout.startswith("web1 has no passthrough devices")


def test_a_start_that_would_be_refused_lists_everything_and_exits_4(run: Run) -> None:
    result = run(
        "plan", "web1", "--device", "c1:00.0", "--device", "99:00.0", "--tracking", "require"
    )
    assert result.exit_code == Exit.REFUSED
    assert result.stdout.startswith("web1 cannot be started like this")
    for code in ("unknown_device", "driver_not_bound", "in_group_with_others", "policy_not_met"):
        assert f"[{code}]" in result.stdout, code


def test_with_a_destination_both_hosts_are_shown(run: Run) -> None:
    run("start", "n1", "--profile", "small", "--device", "41:00.1")
    for named in (["host-b"], ["--to", "host-b"]):
        out = run("plan", "n1", *named).stdout
        assert out.startswith("n1 can be migrated to host-b")
        assert "Its passthrough devices, on this host" in out
        assert "Its passthrough devices, on host-b" in out
    result = run("plan", "n1", "host-b", "--to", "host-c")
    assert result.exit_code == Exit.USAGE


def test_what_qemu_would_be_told_is_printed_on_wish_and_not_wrapped(run: Run) -> None:
    asked = ("plan", "web1", "--device", "nic=41:00.1@rp0/00.0")
    assert "-device" not in run(*asked).stdout
    out = run(*asked, "--arguments").stdout
    (line,) = [one for one in out.splitlines() if "-device" in one]
    assert "id=nic,fd=<nic>" in line
    assert "bus=rp0,addr=00.0" in line


def test_json_is_the_plan_itself(run: Run) -> None:
    plan = parsed(run("plan", "web1", "--device", "41:00.1", "-o", "json"))
    assert plan["decision"]["migratability"] == "live"
    assert plan["destination"] is None


def test_start_defines_devices_and_policy_and_says_the_verdict(run: Run) -> None:
    result = run(
        *("start", "n1", "--profile", "small", "--device", "41:00.1", "--device", "disk=81:00.0"),
        *("--tracking", "always"),
    )
    assert result.exit_code == Exit.OK, result.output
    assert "n1 cannot be migrated with disk" in result.stdout
    assert "migrd plan n1" in result.stderr
    vm = parsed(run("vms", "show", "n1", "-o", "json"))
    assert [(d["id"], d["address"]) for d in vm["devices"]] == [("hostdev0", NIC), ("disk", DISK)]
    assert vm["tracking_policy"] == "always"
    shown = run("vms", "show", "n1").stdout
    assert "hostdev0 = 0000:41:00.1, disk = 0000:81:00.0" in shown
    assert "n1 cannot be migrated with disk" in shown


def test_a_refused_start_names_device_reason_and_cure(run: Run) -> None:
    result = run("start", "n1", "--profile", "small", "--device", "c1:00.0")
    assert result.exit_code == Exit.REFUSED
    assert GPU in result.stderr
    assert "nouveau" in result.stderr
    assert "[driver_not_bound]" in result.stderr
    assert run("vms", "show", "n1").exit_code == Exit.NOT_FOUND


@pytest.mark.parametrize("text", ["", "=41:00.1", "a=b=c", "41:00.1@", "41:00.1@a/b/c"])
def test_a_device_that_is_written_wrongly_is_a_usage_error(run: Run, text: str) -> None:
    result = run("plan", "web1", "--device", text)
    assert result.exit_code == Exit.USAGE
    assert "ADDRESS" in result.stderr


def test_devices_and_policy_need_a_profile_to_start_with(run: Run) -> None:
    for words in (("--device", "41:00.1"), ("--tracking", "auto")):
        assert run("start", "web1", *words).exit_code == Exit.USAGE


def test_plug_and_unplug(run: Run) -> None:
    run("start", "n1", "--profile", "small", "--device", "41:00.1")
    out = run("vms", "plug", "n1", "41:00.2@rp0").stdout
    assert out.splitlines() == [f"{NIC2} is a device of n1 now", "n1 can be live-migrated"]
    refused = run("vms", "plug", "n1", "81:00.0")
    assert refused.exit_code == Exit.REFUSED
    assert "[lowers_migratability]" in refused.stderr
    assert run("vms", "plug", "n1", "81:00.0", "--accept-lower").exit_code == Exit.OK
    assert "hostdev2 is no device of n1" in run("vms", "unplug", "n1", "hostdev2").stdout
    assert run("vms", "unplug", "n1", "hostdev2").exit_code == Exit.NOT_FOUND


def test_a_migration_is_told_its_devices_there_and_what_was_agreed(
    run: Run, daemon: Daemon
) -> None:
    result = run(
        *("migrate", "web1", "host-b", "--device-there", "hostdev0=81:00.2"),
        "--accept-less-migratable",
    )
    id_ = result.stdout.strip()
    request = daemon.call(lambda engine: engine.migrations_by_id[id_].state.request)
    assert dict(request.destination_devices) == {"hostdev0": "0000:81:00.2"}
    assert request.accept_less_migratable


def test_on_a_terminal_of_80_columns_nothing_is_cut_off(daemon: Daemon) -> None:
    import os

    environment = {**os.environ, "MIGRD_SOCKET": str(daemon.socket)}
    asked = [*PROGRAM, "plan", "web1", "--device", "41:00.1", "--device", "81:00.0"]
    with Terminal(asked, environment, columns=80, lines=60) as terminal:
        assert terminal.ended() == Exit.OK
        lines = terminal.text.splitlines()
    assert lines[0] == "web1 cannot be migrated with hostdev1"
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in terminal.text
    assert any("iommu no dirty tracking" in line for line in lines)


def test_a_verdict_that_has_changed_is_told_in_a_sentence() -> None:
    reason = {"code": "iommu_no_dirty_tracking", "device": "nic0", "message": "nic0: cannot track"}
    lower = {"before": "live", "after": "stop_and_copy", "appeared": [reason], "disappeared": []}
    assert change_line(Seen(lower)) == "was live, is stop and copy: nic0: cannot track"
    higher = {"before": "stop_and_copy", "after": "live", "disappeared": [reason, 7]}
    assert change_line(Seen(higher)).endswith("is live: no more: nic0: cannot track")
