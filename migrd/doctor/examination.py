"""The whole examination: every check of every subject, together, in a fixed order."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from migrd.config import DEFAULT_PATH, Settings, load
from migrd.doctor import arbiter, direct, kernel, network, passthrough, sampling, software, storage
from migrd.doctor.finding import Check, Finding, fail, ok, run_check
from migrd.engine.threads import in_thread
from migrd.errors import ConfigError


async def examine(path: Path | None, environ: Mapping[str, str]) -> tuple[Finding, ...]:
    """All findings about this host, in a fixed order. Raises nothing on purpose.

    With a configuration that cannot be used, only what does not depend on it is looked at.
    """
    settings, first = await in_thread(_configuration, path, environ)
    if settings is None:
        checks = software.checks_of_any_host() + kernel.checks(None) + passthrough.checks(None)
        checks += direct.checks(None)
        return (first, *await _run(checks))
    return (first, *await _run(_checks(settings)))


def _configuration(
    path: Path | None, environ: Mapping[str, str]
) -> tuple[Settings | None, Finding]:
    """Blocking."""
    name = "configuration"
    try:
        settings = load(path, environ)
    except ConfigError as error:
        cure = "mend the file, then: migrd config check" + (f" --config {path}" if path else "")
        return None, fail(name, error.message, cure)
    if path is None and DEFAULT_PATH.exists():
        path = DEFAULT_PATH
    where = str(path) if path else f"{DEFAULT_PATH} is not there: the defaults hold"
    return settings, ok(name, f"{where}; this host is {settings.host.name}")


def _checks(settings: Settings) -> list[Check]:
    return [
        *software.checks_of_any_host(),
        *software.checks(settings),
        *storage.checks(settings),
        *network.checks(settings),
        *arbiter.checks(settings),
        *kernel.checks(settings),
        *passthrough.checks(settings),
        *sampling.checks(settings),
        *direct.checks(settings),
    ]


async def _run(checks: list[Check]) -> tuple[Finding, ...]:
    found = await asyncio.gather(*(run_check(check) for check in checks))
    return tuple(finding for several in found for finding in several)
