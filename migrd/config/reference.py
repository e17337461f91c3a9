"""The reference configuration file, rendered from the settings themselves.

Every section is there, every setting is commented out with its default: taking the `#` away changes
nothing, which is what the test does to prove that file and code agree.
"""

import textwrap
from collections.abc import Iterator
from typing import Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from migrd.config.loading import as_toml, section_of
from migrd.config.settings import Settings

WIDTH: Final = 98
EXAMPLE_PEER: Final = "host-b"

_HEAD: Final = """\
# Settings of migrd on this host. Read once at start, from /etc/migrd/migrd.toml or --config.
#
# A line that begins with "#key =" shows the default, or an example where nothing is set by
# default; take the "#" away to set it. A key that is not listed here is an error. Check a file with
#
#     migrd config check --config FILE
#
# Each setting can also come from the environment, which wins over this file: MIGRD_, then the
# key in capitals with "__" for each dot, e.g. MIGRD_API__TCP__PORT=8443; lists as JSON.
# Files with keys and tokens can come as systemd credentials (LoadCredential=): api-token,
# api-tls-cert, api-tls-key, peer-cert, peer-key, peer-ca, etcd-ca, etcd-cert, etcd-key and
# etcd-password stand in for settings left out here.
#
# Rendered from the settings by: python -m migrd.config
"""

EXAMPLES: Final = {
    "host.name": '"host-a"',
    "host.adopt_dir": '"/run/qemu-monitors"',
    "api.socket_group": '"migrd"',
    "direct.socket_group": '"migrd"',
    "api.tcp.token_file": '"/etc/migrd/api-token"',
    "api.tcp.tls_cert": '"/etc/migrd/api-cert.pem"',
    "api.tcp.tls_key": '"/etc/migrd/api-key.pem"',
    "peer.listen_host": '"192.0.2.1"',
    "peer.cert": '"/etc/migrd/peer-cert.pem"',
    "peer.key": '"/etc/migrd/peer-key.pem"',
    "peer.ca": '"/etc/migrd/peer-ca.pem"',
    "peers.host-b.url": '"https://192.0.2.2:7443"',
    "peers.host-b.migration_host": '"198.51.100.2"',
    "arbiter.ca": '"/etc/migrd/etcd-ca.pem"',
    "arbiter.cert": '"/etc/migrd/etcd-cert.pem"',
    "arbiter.key": '"/etc/migrd/etcd-key.pem"',
    "arbiter.user": '"migrd"',
    "arbiter.password_file": '"/etc/migrd/etcd-password"',
    "migration.port_range": "[49152, 49215]",
    "migration.tls_dir": '"/etc/migrd/tls"',
    "migration.switchover_deadline_s": "5.0",
}
"""Shown where there is no default to show."""


def reference() -> str:
    """The text of config/migrd.toml."""
    return _HEAD + "".join(_section(Settings, ()))


def _section(model: type[BaseModel], above: tuple[str, ...]) -> Iterator[str]:
    inner: list[tuple[str, FieldInfo, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            yield from _setting((*above, name), field)
        else:
            inner.append((name, field, section))
    for name, field, section in inner:
        is_roster = str(field.annotation).startswith("dict")
        path = (*above, name, EXAMPLE_PEER) if is_roster else (*above, name)
        is_there = not is_roster and field.default is not None
        yield "\n\n" + _comment(section.__doc__ or "")
        if not is_there:
            each = "one such section for each" if is_roster else "this line adds it"
            yield f"# Not there by default; {each}.\n"
        yield f"{'' if is_there else '#'}[{'.'.join(path)}]\n"
        yield from _section(section, path)


def _setting(path: tuple[str, ...], field: FieldInfo) -> Iterator[str]:
    yield "\n" + _comment(field.description or "")
    yield f"#{path[-1]} = {_value(path, field)}\n"


def _value(path: tuple[str, ...], field: FieldInfo) -> str:
    example = EXAMPLES.get(".".join(path))
    if example is not None:
        return example
    default = field.get_default()
    if default is None or default is PydanticUndefined:
        raise LookupError(f"{'.'.join(path)} has no default: write an example for it")
    return as_toml(default, path[-1])


def _comment(text: str) -> str:
    lines = textwrap.wrap(" ".join(text.split()), WIDTH, break_long_words=False)
    return "".join(f"# {line}\n" for line in lines)
