"""What this host shows to etcd: a certificate, a password; both are files, and may be renewed.

Blocking parts run in threads. Files that cannot be used at the start are a ConfigError; later ones
leave the old in place, and `problem` says so.
"""

import os
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from migrd.engine.threads import in_thread
from migrd.errors import ConfigError

log = structlog.get_logger(__name__)

_PASSWORD_BYTES: Final = 4096
_OTHERS: Final = stat.S_IRWXO | stat.S_IWGRP


@dataclass(frozen=True)
class AccessFiles:
    """What is configured; None: not used."""

    ca: Path | None = None
    """None: the system's authorities."""
    cert: Path | None = None
    key: Path | None = None
    user: str | None = None
    password_file: Path | None = None


class Access:
    """The newest usable ones. Made by `load`."""

    def __init__(self, files: AccessFiles, tls: ssl.SSLContext, stamp: object) -> None:
        self._files = files
        self._stamp = stamp
        self.tls = tls
        """For the next connection."""
        self.problem: str | None = None

    @classmethod
    async def load(cls, files: AccessFiles) -> "Access":
        """Raises ConfigError naming file and cure."""
        stamp, tls = await in_thread(_load, files)
        if files.password_file is not None:
            await in_thread(_password, files.password_file)
        return cls(files, tls, stamp)

    @property
    def user(self) -> str | None:
        return self._files.user

    async def password(self) -> str:
        """As it is in the file now. Raises ConfigError."""
        if self._files.password_file is None:
            return ""
        return await in_thread(_password, self._files.password_file)

    async def reload_if_changed(self) -> None:
        """Look at the files of TLS; newer ones are in use from the next connection on."""
        try:
            if await in_thread(_stamp_of, self._files) == self._stamp:
                return
            self._stamp, self.tls = await in_thread(_load, self._files)
        except ConfigError as failure:
            if failure.message != self.problem:
                log.error("arbiter.tls_not_reloaded", error=failure.message)
            self.problem = failure.message
            return
        self.problem = None
        log.info("arbiter.tls_reloaded")


def _stamp_of(files: AccessFiles) -> object:
    stamps: list[object] = []
    for path in (files.ca, files.cert, files.key):
        if path is None:
            continue
        try:
            seen = path.stat()
        except OSError as failure:
            raise _unreadable(path, failure) from failure
        stamps.append((seen.st_ino, seen.st_size, seen.st_mtime_ns))
    return tuple(stamps)


def _load(files: AccessFiles) -> tuple[object, ssl.SSLContext]:
    stamp = _stamp_of(files)  # before reading: a change meanwhile is then seen as one
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if files.ca is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(cafile=files.ca)
    except (OSError, ssl.SSLError) as failure:
        raise ConfigError(f"arbiter.ca {files.ca}: not usable ({_reason(failure)})") from failure
    if files.cert is not None:
        try:
            context.load_cert_chain(files.cert, files.key, password=lambda: "")
        except (OSError, ssl.SSLError) as failure:
            raise ConfigError(
                f"arbiter.cert {files.cert}, arbiter.key {files.key}: not usable "
                f"({_reason(failure)}); they must be issued together, without a passphrase"
            ) from failure
    return stamp, context


def _password(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & _OTHERS:
                raise ConfigError(f"arbiter.password_file {path}: others may read it: chmod 0600")
            text = file.read(_PASSWORD_BYTES + 1).decode().strip()
    except OSError as failure:
        raise _unreadable(path, failure) from failure
    except UnicodeDecodeError:
        raise ConfigError(f"arbiter.password_file {path}: should be one line of text") from None
    if not text or "\n" in text or len(text) > _PASSWORD_BYTES:
        raise ConfigError(f"arbiter.password_file {path}: should be one line of text")
    return text


def _unreadable(path: Path, failure: OSError) -> ConfigError:
    return ConfigError(
        f"arbiter: {path}: {failure.strerror}: user {os.geteuid()}, as which migrd runs, must be "
        "able to read it"
    )


def _reason(failure: OSError | ssl.SSLError) -> str:
    return getattr(failure, "reason", None) or failure.strerror or str(failure)
