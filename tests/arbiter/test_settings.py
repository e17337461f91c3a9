"""`[arbiter]`: what is right becomes the arbiter's options, what is wrong names its cure."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from migrd.arbiter.access import AccessFiles
from migrd.config import ArbiterKind, Settings, load
from migrd.engine_settings import etcd_options
from migrd.errors import ConfigError
from tests.test_config import PEER

ETCD = """
[arbiter]
kind = "etcd"
endpoints = ["https://192.0.2.10:2379"]
"""


def read(directory: Path, text: str, environ: Mapping[str, str] | None = None) -> Settings:
    path = directory / "migrd.toml"
    path.write_text(text)
    return load(path, environ or {})


def test_an_arbiter_is_what_the_settings_say(tmp_path: Path) -> None:
    assert Settings().arbiter.kind is ArbiterKind.JOURNAL
    (tmp_path / "etcd-password").write_text("x")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    text = f'[host]\nname = "Alpha"\n{PEER}{ETCD}user = "migrd"\nrequest_timeout_ms = 1500\n'
    options = etcd_options(read(tmp_path, text, environ))
    assert (options.host, options.endpoints) == ("alpha", ("https://192.0.2.10:2379",))
    assert (options.within_s, options.lease_ttl_s, options.prefix) == (1.5, 15, "/migrd")
    assert options.files == AccessFiles(user="migrd", password_file=tmp_path / "etcd-password")
    assert options.about["peer"] == "192.0.2.1:7443"
    assert options.about["api"] is None


BAD = [
    ('[arbiter]\nkind = "zookeeper"\n', ['arbiter.kind = "zookeeper"', "'journal' or 'etcd'"]),
    (
        '[arbiter]\nkind = "etcd"\n',
        ["arbiter.endpoints is not set", 'arbiter.kind = "etcd"', "https://192.0.2.10:2379"],
    ),
    (
        '[arbiter]\nendpoints = ["http://127.0.0.1:2379"]\n',
        ['arbiter.kind = "journal"', 'set kind = "etcd"', "remove the endpoints"],
    ),
    (
        '[arbiter]\nkind = "etcd"\nendpoints = ["127.0.0.1:2379"]\n',
        ["arbiter.endpoints[0]", "https://<address>:<port>"],
    ),
    (
        '[arbiter]\nkind = "etcd"\nendpoints = ["https://u:p@h:2379"]\n',
        ["arbiter.endpoints[0]", "without user"],
    ),
    (
        '[arbiter]\nkind = "etcd"\nendpoints = ["https://h:0"]\n',
        ["arbiter.endpoints[0]", "https://<address>:<port>"],
    ),
    (
        '[arbiter]\nkind = "etcd"\nendpoints = ["https://h:1", "https://h:1/"]\n',
        ["arbiter.endpoints", "names https://h:1 twice"],
    ),
    (
        '[arbiter]\nkind = "etcd"\nendpoints = ["https://h:1", "http://i:1"]\n',
        ["arbiter.endpoints", "mixed", "use https:// for all"],
    ),
    (
        ETCD.replace("https", "http") + 'user = "u"\npassword_file = "/p"\n',
        ["arbiter.endpoints", "http://192.0.2.10:2379", "in the clear", "use https://"],
    ),
    (ETCD + 'user = "u"\n', ["arbiter.password_file is not set", "go together"]),
    (ETCD + 'password_file = "/p"\n', ["arbiter.user is not set", "go together"]),
    (ETCD + 'cert = "/c"\n', ["arbiter.key is not set", "go together"]),
    (ETCD + 'ca = "ca.pem"\n', ["arbiter.ca", "absolute path"]),
    (ETCD + 'prefix = "migrd/"\n', ["arbiter.prefix", "should be as /migrd"]),
    (ETCD + "lease_ttl_s = 1\n", ["arbiter.lease_ttl_s = 1", "equal to 5"]),
    (ETCD + "request_timeout_ms = 10\n", ["arbiter.request_timeout_ms = 10", "equal to 100"]),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[said[0][:40] for _, said in BAD])
def test_each_wrong_setting_is_named_with_its_cure(
    tmp_path: Path, text: str, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    (line,) = refused.value.message.removeprefix("the configuration has a problem: ").splitlines()
    for words in said:
        assert words in line
