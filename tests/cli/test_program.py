"""The program as a whole: help, completion, commands from above this layer, configuration."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from migrd.cli import exits
from migrd.cli.checkup import print_checkup
from migrd.cli.exits import Exit
from migrd.cli.main import build
from migrd.cli.printing import Format, Printer
from migrd.errors import ConfigError
from tests.cli.conftest import Run, parsed, run_alone
from tests.cli.scripted_daemon import Daemon


def test_help_documents_every_exit_code_and_each_command_has_its_own(run: Run) -> None:
    result = run_alone("--help")
    assert result.exit_code == 0
    for code, meaning in exits.MEANING.items():
        assert f"{code.value}  {meaning}" in result.stdout
        assert f"| {code.value} | {meaning} |" in exits.as_markdown()
    for name, command in build().commands.items():
        shown = run_alone(name, "--help")
        assert shown.exit_code == 0
        assert f"  {name} " in result.stdout
        assert command.short_help
        assert max(len(line) for line in shown.stdout.splitlines()) <= 100


def test_completion_knows_vms_hosts_and_migrations(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complete(words: str) -> str:
        monkeypatch.setenv("_MIGRD_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        return run_alone().stdout

    monkeypatch.setenv("MIGRD_SOCKET", str(daemon.socket))
    assert complete("migrd migr").split() == ["plain,migrate", "plain,migrations"]
    assert complete("migrd migrate w").split() == ["plain,web1"]
    assert "plain,host-b" in complete("migrd migrate web1 ")
    monkeypatch.setenv("MIGRD_SOCKET", "/nonexistent")
    assert complete("migrd migrate w") == "\n" or complete("migrd migrate w") == ""


def test_commands_from_above_this_layer_share_messages_and_codes() -> None:
    @click.command("serve")
    def serve() -> None:
        """Run the daemon."""
        raise ConfigError("api.socket is wrong")

    result = CliRunner().invoke(build([serve]), ["serve"], prog_name="migrd")
    assert result.exit_code == Exit.USAGE
    assert "error: api.socket is wrong [bad_configuration]" in result.stderr
    assert "serve" in CliRunner().invoke(build([serve]), ["--help"]).stdout


def test_a_configuration_is_checked_without_a_daemon(tmp_path: Path) -> None:
    good = tmp_path / "good.toml"
    good.write_text('[host]\nname = "host-a"\n')
    result = run_alone("config", "check", "--config", str(good), "--show")
    assert result.exit_code == 0, result.output
    assert "1 settings set" in result.stdout
    assert f"{good}:2" in result.stdout
    assert parsed(run_alone("config", "check", "--config", str(good), "-o", "json"))["ok"] is True
    bad = tmp_path / "bad.toml"
    bad.write_text('[host]\nnmae = "x"\n[api]\nbody_limit_bytes = "many"\n')
    result = run_alone("config", "check", "--config", str(bad))
    assert result.exit_code == Exit.USAGE
    assert "nmae" in result.stderr
    assert "body_limit_bytes" in result.stderr


class Finding:
    def __init__(self, name: str, status: str, message: str, cure: str = "") -> None:
        self.name, self.status, self.message, self.cure = name, status, message, cure


def test_a_checkup_shows_the_cure_of_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        Finding("python", "ok", "3.11.2", "not needed"),
        Finding("kvm", "warn", "no /dev/kvm", "load the kvm module"),
        Finding("qemu", "fail", "not found", "apt install qemu-system-x86"),
    ]
    assert print_checkup(Printer(), findings) is Exit.UNEXPECTED
    out = capsys.readouterr().out
    assert "do: apt install qemu-system-x86" in out
    assert "not needed" not in out
    assert "1 of these must be mended" in out
    assert print_checkup(Printer(), findings[:2]) is Exit.OK
    capsys.readouterr()
    assert print_checkup(Printer(Format.JSON), findings) is Exit.UNEXPECTED
    assert [item["status"] for item in json.loads(capsys.readouterr().out)["items"]] == [
        "ok",
        "warn",
        "fail",
    ]
