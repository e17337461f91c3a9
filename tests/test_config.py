"""Settings: right ones are read whole, wrong ones are refused whole, and the reference is true."""

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from migrd.config import Settings, explain, load
from migrd.config.checks import INSTANCE_ROOM_BYTES, SUN_PATH_BYTES, conflicts
from migrd.config.loading import known_keys
from migrd.config.reference import EXAMPLES, reference
from migrd.core.migration import Policy, WhenNotConverging
from migrd.engine.options import EngineOptions
from migrd.errors import ConfigError
from migrd.qemu.launch import QemuLauncher
from migrd.qemu.profile_files import Profiles

REFERENCE = Path(__file__).parents[1] / "config" / "migrd.toml"

PEER = """
[peer]
listen_host = "192.0.2.1"
cert = "/c"
key = "/k"
ca = "/a"
[migration]
tls_dir = "/t"
[peers.host-b]
url = "https://192.0.2.2:7443"
"""

Load = Callable[..., Settings]


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    def load_it(text: str, environ: Mapping[str, str] | None = None) -> Settings:
        path = tmp_path / "migrd.toml"
        path.write_text(text)
        return load(path, environ or {})

    return load_it


def complaints(load_text: Load, text: str, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load_text(text, environ)
    return refused.value.message.removeprefix("the configuration has a problem: ").splitlines()


# The reference file


def test_the_reference_file_is_what_the_settings_say() -> None:
    assert REFERENCE.read_text() == reference(), "python -m migrd.config > config/migrd.toml"


def test_the_reference_file_as_it_stands_gives_the_defaults() -> None:
    assert load(REFERENCE, {}) == Settings()


def uncommented(text: str) -> str:
    return re.sub(r"(?m)^#(?=[a-z_]+ = |\[)", "", text)


def test_every_setting_is_in_the_reference_with_its_default_or_an_example() -> None:
    table = tomllib.loads(uncommented(REFERENCE.read_text()))
    for key in known_keys():
        here: object = table
        for part in key.replace("<name>", "host-b").split("."):
            assert isinstance(here, dict), key
            assert part in here, key
            here = here[part]


def test_taking_the_comment_signs_away_changes_nothing_but_the_examples(load_text: Load) -> None:
    changed = load_text(uncommented(REFERENCE.read_text()))
    defaults = {line.key: line.value for line in explain(Settings())}
    for line in explain(changed):
        if line.key in EXAMPLES:
            assert line.value == EXAMPLES[line.key]
        elif line.key in defaults and line.key != "migration.listen_host":
            assert line.value == defaults[line.key], line.key


def test_every_number_with_a_unit_says_it_in_the_reference() -> None:
    words = {
        "_s": "in seconds", "_ms": "in milliseconds", "_bytes": "in bytes", "_days": "days",
        "_percent": "in percent", "_bytes_per_s": "in bytes per second",
    }  # fmt: skip
    for comment, key in re.findall(r"((?:^# .*\n)+)#([a-z_]+) = ", REFERENCE.read_text(), re.M):
        text = " ".join(line.removeprefix("# ") for line in comment.splitlines())
        suffix = next((s for s in sorted(words, key=len, reverse=True) if key.endswith(s)), None)
        assert suffix is None or words[suffix] in text, (key, text)


# Where values come from


def test_the_environment_wins_over_the_file_and_the_origin_says_so(load_text: Load) -> None:
    environ = {"MIGRD_MIGRATION__DOWNTIME_LIMIT_MS": "50", "MIGRD_API__ALLOW_UIDS": "[0, 107]"}
    settings = load_text("[migration]\ndowntime_limit_ms = 70\nstall_s = 3\n", environ)
    assert settings.migration.downtime_limit_ms == 50
    assert settings.api.allow_uids == (0, 107)
    lines = {line.key: line for line in explain(settings)}
    limit = lines["migration.downtime_limit_ms"]
    assert limit.origin == "environment variable MIGRD_MIGRATION__DOWNTIME_LIMIT_MS"
    assert lines["migration.stall_s"].origin.endswith("migrd.toml:3")
    assert lines["migration.stall_s"].value == "3.0"
    assert lines["log.level"].is_default
    assert lines["log.level"].origin == "default"


def test_a_peer_can_come_from_the_environment(load_text: Load) -> None:
    settings = load_text(PEER, {"MIGRD_PEERS__HOST_C__URL": "https://192.0.2.3:7443"})
    assert set(settings.peers) == {"host-b", "host_c"}


def test_credentials_stand_in_for_what_neither_file_nor_environment_names(
    load_text: Load, tmp_path: Path
) -> None:
    for name in ("api-token", "peer-key", "peer-cert"):
        (tmp_path / name).write_text("x")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    settings = load_text('[api.tcp]\n[peer]\ncert = "/c"\n', environ)
    assert settings.api.tcp is not None
    assert settings.api.tcp.token_file == tmp_path / "api-token"
    assert settings.peer.key == tmp_path / "peer-key"
    assert settings.peer.cert == Path("/c")
    assert settings.origins["peer.key"] == "systemd credential peer-key"


def test_a_credential_alone_opens_no_tcp_port(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "api-token").write_text("x")
    assert load_text("", {"CREDENTIALS_DIRECTORY": str(tmp_path)}).api.tcp is None


def test_variables_of_the_command_line_and_of_others_are_left_alone(load_text: Load) -> None:
    environ = {"MIGRD_SOCKET": "/x", "MIGRD_TEST_QEMU": "y", "PATH": "/bin", "migrd_api": "z"}
    assert load_text("", environ) == Settings()


def test_without_a_file_the_defaults_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("migrd.config.loading.DEFAULT_PATH", tmp_path / "none.toml")
    assert load(None, {}) == Settings()
    (tmp_path / "none.toml").write_text('[log]\nlevel = "debug"\n')
    assert load(None, {}).log.level == "debug"


def test_defaults_follow_the_settings_they_are_derived_from(load_text: Load) -> None:
    settings = load_text('[host]\nruntime_dir = "/tmp/r"\nstate_dir = "/tmp/s"\n' + PEER)
    assert settings.api.socket == Path("/tmp/r/api.sock")
    assert settings.journal.path == Path("/tmp/s/journal.db")
    assert settings.migration.listen_host == "192.0.2.1"
    explicit = load_text('[host]\nruntime_dir = "/tmp/r"\n[api]\nsocket = "/tmp/own.sock"\n')
    assert explicit.api.socket == Path("/tmp/own.sock")
    by_model = Settings.model_validate({"host": {"runtime_dir": "/tmp/r"}})
    assert by_model.api.socket == Path("/tmp/r/api.sock")


def test_settings_cannot_be_changed_once_read() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.log.level = "debug"  # type: ignore[misc,assignment]  # the fault, planted


# What the values mean


def test_the_default_policy_is_that_of_the_core() -> None:
    assert Settings().migration.default_policy() == Policy()


def test_the_default_tracking_policy_is_that_of_the_engine(load_text: Load) -> None:
    devices, engine = Settings().devices, EngineOptions(host="a")
    assert devices.tracking_policy is engine.tracking_policy
    assert set(devices.forbidden_tracking_policies) == engine.forbidden_tracking_policies
    told = load_text('[devices]\nexpected = ["0000:C1:00.0"]\n').devices
    assert told.expected == ("0000:c1:00.0",)


def test_the_default_deadlines_are_those_of_the_engine() -> None:
    migration, engine = Settings().migration, EngineOptions(host="a")
    for name in (
        "preflight_deadline_s", "prepare_deadline_s", "grant_deadline_s", "rollback_deadline_s",
        "release_deadline_s", "stall_s", "receive_idle_s", "loaded_idle_s", "outgoing_slots",
        "incoming_slots", "listen_host",
    ):  # fmt: skip
        assert getattr(migration, name) == getattr(engine, name), name
    assert migration.switchover_deadline_for(0.3) == engine.switchover_s(0.3) == 2.6


def test_a_policy_is_made_of_seconds_and_bytes(load_text: Load) -> None:
    text = (
        "[migration]\ndowntime_limit_ms = 80\ndeadline_s = 60\nmax_throttle_percent = 50\n"
        'max_bandwidth_bytes_per_s = 125000000\nwhen_not_converging = "throttle"\n'
    )
    assert load_text(text).migration.default_policy() == Policy(
        WhenNotConverging.THROTTLE, 0.08, 60.0, 125_000_000, 50
    )


@pytest.mark.parametrize("text", ['"0660"', '"660"', "0o660", '"0o660"'])
def test_the_socket_mode_can_be_written_in_every_usual_way(load_text: Load, text: str) -> None:
    assert load_text(f"[api]\nsocket_mode = {text}\n").api.socket_mode == 0o660


def test_the_longest_runtime_dir_allowed_is_one_that_the_launcher_can_use() -> None:
    longest = "/" + "r" * (SUN_PATH_BYTES - INSTANCE_ROOM_BYTES - 1)
    assert conflicts(Settings.model_validate({"host": {"runtime_dir": longest}})) == ()
    QemuLauncher(Profiles(), Path(longest))


# Wrong values: each names the key, where it stands, what was found and what would be right

BAD = [
    ("[api]\nsockett = 1\n", ["api.sockett is not a setting", ":2", "did you mean api.socket?"]),
    ("[migration]\nstall = 1\n", ["migration.stall is", "did you mean migration.stall_s?"]),
    ("stall_s = 1\n", ["stall_s is not a setting", "did you mean migration.stall_s?"]),
    ("[peerz.b]\n", ["peerz is not a setting"]),
    ("[watch]\ninterval_s = 0\n", ["watch.interval_s = 0", ":2", "greater than or equal to 0.05"]),
    ("[watch]\ninterval_s = inf\n", ["watch.interval_s = inf", "finite"]),
    ("[watch]\ninterval_s = true\n", ["watch.interval_s", "should not be true or false"]),
    ('[log]\nlevel = "loud"\n', ['log.level = "loud"', "'warning'"]),
    ("[log]\nlevel = 3\n", ["log.level = 3", "'warning'"]),
    ('[api]\nsocket = "run/x"\n', ['api.socket = "run/x"', "absolute path"]),
    ('[api]\nsocket_mode = "0999"\n', ['api.socket_mode = "0999"', "octal"]),
    ("[api]\nsocket_mode = 0o7777\n", ['api.socket_mode = "7777"', "at most 0777"]),
    ("[api]\nallow_uids = [0, -1]\n", ["api.allow_uids[1] = -1", "greater than or equal to 0"]),
    ('[api]\nallow_uids = "root"\n', ['api.allow_uids = "root"', "valid list"]),
    ("[api]\nbody_limit_bytes = 10\n", ["api.body_limit_bytes = 10", "equal to 1024"]),
    ("api = 5\n", ["api = 5", "should be a table, [api]"]),
    (
        "[api.tcp]\nport = 70000\ntoken_file = '/t'\n",
        ["api.tcp.port = 70000", "less than or equal to 65535"],
    ),
    ("[peers.b]\n", ["peers.b.url is missing", "https://"]),
    ('[peers."a b"]\nurl = "https://x:1"\n', ["peers.a b", "plain name"]),
    ('[peers.b]\nurl = "http://x:1"\n', ["peers.b.url", "https://<address>:<port>"]),
    ('[peers.b]\nurl = "https://u:p@x:1"\n', ["peers.b.url", "without user"]),
    ('[host]\nname = "a b"\n', ['host.name = "a b"', "plain name"]),
    ("[migration]\nport_range = [5, 70000]\n", ["migration.port_range[1] = 70000", "65535"]),
    ("[migration]\nport_range = [200, 100]\n", ["migration.port_range", "ends before it begins"]),
    ("[migration]\nport_range = [100, 100]\n", ["migration.port_range", "incoming_slots = 2"]),
    ('[migration]\nlisten_host = "0.0.0.0"\n', ["migration.listen_host", "reach this one by"]),
    ('[migration]\ntls = "maybe"\n', ['migration.tls = "maybe"', "'required' or 'off'"]),
    ("[migration]\nmax_throttle_percent = 100\n", ["max_throttle_percent = 100", "equal to 99"]),
    ("[api.tcp]\n", ["api.tcp.token_file is not set", "without authentication"]),
    (
        '[api.tcp]\ntoken_file = "/t"\nhost = "192.0.2.1"\n',
        ["api.tcp.tls_cert is not set", "192.0.2.1"],
    ),
    ('[api.tcp]\ntoken_file = "/t"\nhost = "example.org"\n', ["api.tcp.tls_cert is not set"]),
    (
        '[api.tcp]\ntoken_file = "/t"\ntls_cert = "/c"\n',
        ["api.tcp.tls_key is not set", "go together"],
    ),
    (
        PEER + '[host]\nname = "host-b"\n',
        ["peers.host-b is this host itself"],
    ),
    (
        PEER + '[peers.host-c]\nurl = "https://192.0.2.2:7443/"\n',
        ["peers.host-c.url", "also the url of peers.host-b"],
    ),
    (PEER.replace('listen_host = "192.0.2.1"\n', ""), ["peer.listen_host is not set"]),
    (PEER.replace('ca = "/a"\n', ""), ["peer.ca is not set", "mutual TLS"]),
    (PEER.replace('tls_dir = "/t"\n', ""), ["migration.tls_dir is not set", "required"]),
    (
        PEER + '[api.tcp]\nport = 7443\nhost = "192.0.2.1"\ntoken_file = "/t"\n'
        'tls_cert = "/c"\ntls_key = "/k"\n',
        ["peer.listen_port = 7443", "api.tcp.port"],
    ),
    (f'[api]\nsocket = "/{"x" * 107}"\n', ["api.socket", "108 bytes", "at most 107"]),
    (f'[host]\nruntime_dir = "/{"r" * 70}"\n', ["host.runtime_dir", "71 bytes", "each QEMU"]),
    (
        "[devices]\nrescan_interval_s = 0.1\n",
        ["devices.rescan_interval_s = 0.1", "greater than or equal to 1"],
    ),
    ('[devices]\ntracking_policy = "maybe"\n', ["devices.tracking_policy", "'auto', 'always'"]),
    (
        '[devices]\nforbidden_tracking_policies = ["never", "auto"]\n',
        ['devices.tracking_policy = "auto" is among', "always, require"],
    ),
    (
        '[devices]\nforbidden_tracking_policies = ["auto", "always", "never", "require"]\n',
        ["devices.forbidden_tracking_policies names every policy"],
    ),
    ('[devices]\nexpected = ["41:00.2"]\n', ["devices.expected[0]", "such as 0000:41:00.2"]),
    ("[api\n", ["not TOML", "line 1"]),
    ("[api]\n[api]\n", ["not TOML"]),
    ("a = " + "[" * 3000, ["not TOML"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD, ids=[said[0][:40] for _, said in BAD])
def test_each_wrong_setting_is_named_with_its_cure(
    load_text: Load, text: str, said: list[str]
) -> None:
    lines = complaints(load_text, text)
    assert len(lines) == 1, lines
    for part in said:
        assert part in lines[0], lines[0]


def test_all_problems_are_reported_at_once_of_single_settings_and_of_rules(load_text: Load) -> None:
    text = '[api.tcp]\nport = 0\n[log]\nlevel = "loud"\n[peers.b]\nurl = "x"\n[watch]\nwat = 1\n'
    lines = complaints(load_text, text, {"MIGRD_JOURNAL__KEEP_DAYS": "soon"})
    assert lines[0] == "the configuration has 6 problems:"
    found = "\n".join(lines[1:])
    for key in (
        "api.tcp.port", "log.level", "peers.b.url", "watch.wat", "api.tcp.token_file",
        "journal.keep_days",
    ):  # fmt: skip
        assert f"  {key} " in found, found
    assert "MIGRD_JOURNAL__KEEP_DAYS" in found


def test_an_unknown_variable_is_an_error_too(load_text: Load) -> None:
    (line,) = complaints(load_text, "", {"MIGRD_WATCH__INTERVALL_S": "2"})
    assert "watch.intervall_s is not a setting" in line
    assert "MIGRD_WATCH__INTERVALL_S" in line
    assert "did you mean watch.interval_s?" in line


def test_a_variable_that_is_no_list_where_one_is_wanted_is_named(load_text: Load) -> None:
    (line,) = complaints(load_text, "", {"MIGRD_API__ALLOW_UIDS": "[1, 2"})
    assert "api.allow_uids" in line
    assert "MIGRD_API__ALLOW_UIDS" in line


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load(tmp_path / "none.toml", {})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not TOML"):
        load(tmp_path / "binary.toml", {})
    (tmp_path / "huge.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="longer than"):
        load(tmp_path / "huge.toml", {})


def test_a_long_wrong_value_is_not_shown_whole(load_text: Load) -> None:
    (line,) = complaints(load_text, f'[log]\nlevel = "{"x" * 5000}"\n')
    assert len(line) < 600


def test_the_line_is_that_of_the_key_under_its_own_header(load_text: Load) -> None:
    text = '[peers.a]\nurl = "https://x:1"\n\n# url = "no"\n[peers."b.c"]\nurl = "wrong"\n'
    (line, *_) = complaints(load_text, text)[1:]
    assert "migrd.toml:6" in line


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        ('[arbiter]\nkind = "etcd"\nendpoints = ["https://root:s3/cr@et@192.0.2.1:2379"]', {}),
        ('[arbiter]\nkind = "etcd"\nendpoints = "https://root:s3/cr@et@192.0.2.1:2379"', {}),
        ('[arbiter]\nkind = "etcd"\nuser = "root"\npassword_file = "s3/cr@et"', {}),
        ('[api.tcp]\ntoken_file = "s3/cr@et"', {}),
        ('[peers.host-b]\nurl = "https://me:s3/cr@et@host-b:7443"', {}),
        ("", {"MIGRD_ARBITER__ENDPOINTS": "http://root:s3/cr@et@192.0.2.1:2379"}),
        ("", {"MIGRD_ARBITER__ENDPOINTS": '["http://root:s3/cr@et@192.0.2.1:2379"]'}),
    ],
)
def test_a_password_in_a_wrong_place_is_refused_without_being_shown(
    load_text: Load, text: str, environ: Mapping[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(text, environ)
    assert "should be" in caught.value.message
    for part in ("s3", "cr@", "root:", "me:"):
        assert part not in caught.value.message
