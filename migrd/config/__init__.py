"""The daemon's settings: read once at start, checked whole, passed on as frozen values.

    systemd credentials --+
    /etc/migrd/migrd.toml |--(sources: merged key by key, remembering where each value came from)
    MIGRD_… environment --+          |
                                     v
                        settings.Settings (one model, frozen, nothing unknown)
                                     |
                        checks.conflicts (rules over more than one setting)
                                     v
                        load() -> Settings, or one ConfigError that lists every problem

Rules
1. The later source wins: credentials, then the file, then the environment.
2. A key that nobody knows is an error, in the file and in the environment: a typing error in
   `switchover_deadline_s` must not leave the default in force unnoticed.
3. All problems are reported at once, each with its key, where it stands, the value found and what
   would be right.
4. Defaults and descriptions stand in one place, `settings`. `config/migrd.toml` is rendered from it
   (`python -m migrd.config`), and a test keeps the two equal.
5. No secret stands in a setting: keys and tokens are files, named by path.

Environment: `MIGRD_` and the path of the key with `__` for each dot: `MIGRD_API__TCP__PORT=8443`,
`MIGRD_PEERS__HOST_B__URL=…` (names in lower case). Lists are written as JSON.

pydantic-settings is not used: it drops unknown environment variables without a word and cannot say
where a value came from, and what is left of it is a dozen lines.
"""

from migrd.config.loading import DEFAULT_PATH, Explained, explain, load
from migrd.config.settings import (
    ApiSettings,
    ApiTcpSettings,
    ArbiterKind,
    ArbiterSettings,
    DevicesSettings,
    EventsSettings,
    HostSettings,
    JournalSettings,
    LogSettings,
    MigrationSettings,
    PeerSettings,
    QemuSampling,
    RosterEntry,
    SamplingSettings,
    Settings,
    Tls,
    WatchSettings,
)

__all__ = [
    "DEFAULT_PATH",
    "ApiSettings",
    "ApiTcpSettings",
    "ArbiterKind",
    "ArbiterSettings",
    "DevicesSettings",
    "EventsSettings",
    "Explained",
    "HostSettings",
    "JournalSettings",
    "LogSettings",
    "MigrationSettings",
    "PeerSettings",
    "QemuSampling",
    "RosterEntry",
    "SamplingSettings",
    "Settings",
    "Tls",
    "WatchSettings",
    "explain",
    "load",
]
