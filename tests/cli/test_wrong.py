"""What is wrong with a command or with what a daemon sends: the code, and what to do."""

from dataclasses import replace

import pytest

from migrd.cli.exits import Exit
from tests.cli.conftest import Run, ended, migration_to, parsed
from tests.cli.scripted import Scripted
from tests.cli.scripted_daemon import Daemon
from tests.cli.scripted_view import ODD


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("vms", "show", "nobody"), Exit.NOT_FOUND, "[unknown_vm]"),
        (("migrate", "nobody", "host-b"), Exit.NOT_FOUND, "`migrd vms` lists"),
        (("migrate", "web1", "mars"), Exit.NOT_FOUND, "`migrd host` lists"),
        (("watch", "0000"), Exit.NOT_FOUND, "[unknown_migration]"),
        (("cancel", "5a3cbb2c-6a8f-4b0c-9d1f-0c5d5c2f6f10"), Exit.NOT_FOUND, "unknown_migration"),
        (("start", "new", "--profile", "none"), Exit.NOT_FOUND, "[unknown_profile]"),
        (("migrate", "web1", "host-b", "--downtime-limit-ms", "0"), Exit.USAGE, "downtime_limit"),
        (("migrate", "web1", "host-b", "--deadline-s", "soon"), Exit.USAGE, "90s or 10min"),
        (("migrate", "web1"), Exit.USAGE, "Missing argument"),
        (("vms", "define", "new"), Exit.USAGE, "--profile"),
        (("start", "new", "--set", "a=1"), Exit.USAGE, "--profile"),
        (("vms", "show", ".."), Exit.USAGE, "no name"),
        (("vms", "show", "a/../../b?x=1#"), Exit.USAGE, "pattern"),
    ],
)
def test_what_is_wrong_has_its_code_and_says_what_to_do(
    run: Run, arguments: tuple[str, ...], code: Exit, said: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert result.stdout == ""


def test_all_violations_are_listed_at_once_and_verbose_shows_the_whole_answer(run: Run) -> None:
    wrong = ("--downtime-limit-ms", "0", "--multifd", "999", "--max-throttle-percent", "100")
    result = run("migrate", "web1", "host-b", *wrong)
    assert result.exit_code == Exit.USAGE
    for field in ("downtime_limit_ms", "multifd_channels", "max_throttle_percent"):
        assert f"{field}: " in result.stderr
    assert '"request_id"' not in result.stderr
    assert '"request_id"' in run("migrate", "web1", "host-b", *wrong, "--verbose").stderr


def test_an_ambiguous_beginning_of_an_id_is_refused(run: Run, daemon: Daemon) -> None:
    id_ = ended(run, "host-b")
    twin = id_[:9] + "0" * 27

    def add_twin(engine: Scripted) -> None:
        first = engine.migrations_by_id[id_]
        engine.migrations_by_id[twin] = replace(first, state=replace(first.state, id=twin))

    daemon.call(add_twin)
    result = run("watch", id_[:8])
    assert result.exit_code == Exit.USAGE
    assert id_ in result.stderr.replace("\n", " ")
    assert run("watch", id_[:12]).exit_code == 0


def test_a_second_migration_of_the_vm_is_a_conflict(run: Run) -> None:
    id_ = migration_to(run, "host-never")
    result = run("migrate", "web1", "host-b")
    assert result.exit_code == Exit.REFUSED
    assert "[already_migrating]" in result.stderr
    assert run("cancel", id_).exit_code == 0


def test_text_that_would_steer_the_terminal_is_shown_written_out(run: Run) -> None:
    id_ = parsed(run("migrate", "web1", "host-odd", "--watch", "-o", "json"))["id"]
    outputs = [
        run("host"),
        run("watch", id_),
        run("migrations"),
        run("migrations", "show", id_),
        run("decisions", id_),
        run("events"),
    ]
    for result in outputs:
        assert "\x1b" not in result.output
        assert "\x9b" not in result.output
        assert "\u202e" not in result.output
    assert "\\x1b[2J" in outputs[1].stdout
    assert "[bold red]markup[/]" in outputs[1].stdout
    raw = run("decisions", id_, "-o", "json")
    assert parsed(raw)["items"][0]["message"] == ODD
    assert raw.stdout.isascii()
