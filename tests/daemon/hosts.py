"""A host in a directory, for the doctor to look at."""

from collections.abc import Iterable
from pathlib import Path

import trustme

from migrd.config import Settings, load
from migrd.doctor.finding import Finding, Status

PROFILE = """
description = "for the doctor"
binary = "{binary}"
machine = "pc-q35-7.2"
accelerator = "{accelerator}"
cpu = "qemu64"
memory_mib = 64
"""


class Host:
    """A host in a directory: everything that the configuration names is there."""

    def __init__(self, root: Path, name: str = "host-a") -> None:
        self.root, self.name = root, name
        for directory in ("state", "run", "profiles", "tls"):
            (root / directory).mkdir(parents=True)
        self.authority = trustme.CA()
        self.issue(self.authority)
        self.token = root / "token"
        self.token.write_text("a-token-that-is-long-enough-0123456789\n")
        self.token.chmod(0o600)
        self.more = ""

    def issue(self, authority: trustme.CA, role: str | None = None) -> None:
        tls = self.root / "tls"
        authority.cert_pem.write_to_path(str(tls / "ca-cert.pem"))
        for one in ("server", "client") if role is None else (role,):
            issued = authority.issue_cert(self.name, "127.0.0.1")
            issued.private_key_pem.write_to_path(str(tls / f"{one}-key.pem"))
            (tls / f"{one}-key.pem").chmod(0o600)
            chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
            (tls / f"{one}-cert.pem").write_bytes(chain)

    def profile(self, binary: str, accelerator: str = "tcg") -> None:
        text = PROFILE.format(binary=binary, accelerator=accelerator)
        (self.root / "profiles" / "small.toml").write_text(text)

    def settings(self) -> Settings:
        path = self.root / "migrd.toml"
        path.write_text(
            f"""
[host]
name = "{self.name}"
state_dir = "{self.root}/state"
runtime_dir = "{self.root}/run"
profiles_dir = "{self.root}/profiles"
[api.tcp]
token_file = "{self.token}"
[peer]
listen_host = "127.0.0.1"
cert = "{self.root}/tls/server-cert.pem"
key = "{self.root}/tls/server-key.pem"
ca = "{self.root}/tls/ca-cert.pem"
[migration]
tls_dir = "{self.root}/tls"
{self.more}"""
        )
        return load(path, {})

    @property
    def config(self) -> Path:
        self.settings()
        return self.root / "migrd.toml"


def bad(findings: Iterable[Finding] | Finding) -> list[Finding]:
    if isinstance(findings, Finding):
        findings = [findings]
    return [finding for finding in findings if finding.status is not Status.OK]
