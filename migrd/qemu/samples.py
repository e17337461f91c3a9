"""query-migrate and query-status, read as facts.

QEMU mixes units (megabit/s, byte/s, ms) and leaves numbers out freely: nearly all of them before
the first pass and after `failed` or `cancelled`. Here each becomes seconds and bytes, or None. Two
zeros are "not measured yet" and become None as well:
- `mbps` until the first 100 ms window has passed;
- `dirty-pages-rate` until the second dirty sync, and while syncs follow each other faster than once
  a second: QEMU renews it no more often. A zero beside bytes that were found dirty is that case.
"""

from collections.abc import Mapping
from types import MappingProxyType

from migrd.core.facts import QemuStatus, RunState, TransferSample
from migrd.qemu.passthrough import States, read_reset_devices
from migrd.qemu.wire import json_object

BYTES_PER_MEGABIT = 125_000


def read_sample(
    migrate: object,
    status: object,
    *,
    at_s: float,
    stopped_at_s: float | None = None,
    resumed_at_s: float | None = None,
    device_states: States = (),
    own_names: Mapping[str, str] = MappingProxyType({}),
) -> TransferSample:
    """One TransferSample from the answers to `query-migrate` and `query-status`; `own_names` are
    QEMU's own names of devices, with the id of each."""
    answer = json_object(migrate)
    ram = json_object(answer.get("ram"))
    mbps = _number(ram.get("mbps"))
    return TransferSample(
        at_s=at_s,
        qemu_status=read_status(answer),
        run_state=RunState.of(json_object(status).get("status")),
        total_bytes=_integer(ram.get("total")),
        remaining_bytes=_integer(ram.get("remaining")),
        transferred_bytes=_integer(ram.get("transferred")),
        dirty_pages_per_s=_dirty_rate(ram),
        page_size_bytes=_integer(ram.get("page-size")),
        qemu_dirty_sync_count=_integer(ram.get("dirty-sync-count")),
        bandwidth_bytes_per_s=mbps * BYTES_PER_MEGABIT if mbps else None,
        expected_downtime_s=_seconds(answer.get("expected-downtime")),
        downtime_s=_seconds(answer.get("downtime")),
        setup_time_s=_seconds(answer.get("setup-time")),
        total_time_s=_seconds(answer.get("total-time")),
        throttle_percent=_integer(answer.get("cpu-throttle-percentage")),
        device_transferred_bytes=_integer(json_object(answer.get("vfio")).get("transferred")),
        device_states=device_states,
        reset_devices=read_reset(answer, own_names),
        multifd_bytes=_integer(ram.get("multifd-bytes")),
        postcopy_requests=_integer(ram.get("postcopy-requests")),
        error=_text(answer.get("error-desc")),
        stopped_at_s=stopped_at_s,
        resumed_at_s=resumed_at_s,
    )


def _dirty_rate(ram: dict[str, object]) -> float | None:
    rate = _number(ram.get("dirty-pages-rate"))
    if (_integer(ram.get("dirty-sync-count")) or 0) < 2:
        return None
    return None if rate == 0 and ram.get("remaining") != 0 else rate


def read_status(migrate: object) -> QemuStatus:
    """QEMU says nothing at all before the first migration of its life: that is NONE."""
    return QemuStatus.of(json_object(migrate).get("status", QemuStatus.NONE.value))


def read_blocked_reasons(migrate: object) -> tuple[str, ...]:
    reasons = json_object(migrate).get("blocked-reasons")
    return tuple(str(reason) for reason in reasons) if isinstance(reasons, list) else ()


def read_reset(migrate: object, own_names: Mapping[str, str]) -> tuple[str, ...]:
    """Devices that the last migration, which failed, left without their state."""
    return read_reset_devices(_text(json_object(migrate).get("error-desc")), own_names)


def read_port(migrate: object) -> int | None:
    """The TCP port a waiting destination listens on: the newest, which QEMU lists first."""
    addresses = json_object(migrate).get("socket-address")
    for address in addresses if isinstance(addresses, list) else []:
        fields = json_object(address)
        port = str(fields.get("port", ""))
        if fields.get("type") == "inet" and port.isdecimal() and 0 < int(port) < 65536:
            return int(port)
    return None


def read_memory_bytes(summary: object) -> int | None:
    """From query-memory-size-summary: what it started with and what was plugged since."""
    fields = json_object(summary)
    base = _integer(fields.get("base-memory"))
    return None if base is None else base + (_integer(fields.get("plugged-memory")) or 0)


def loses_dirty_pages(kvm: object, memory_bytes: int | None, *, is_sound: bool) -> bool:
    """Whether QEMU's dirty tracking is known to miss pages of this guest (see `profile`, traps).

    `kvm` is the answer to query-kvm. Without KVM the guest runs by TCG; RAM whose size is a
    multiple of 64 pages is synced the fast way, which QEMU before 9.0 gets wrong.
    """
    is_tcg = json_object(kvm).get("enabled") is False
    is_fast = memory_bytes is not None and memory_bytes % (64 * 4096) == 0
    return is_tcg and is_fast and not is_sound


def read_passthrough(*peripherals: object) -> tuple[str, ...]:
    """QOM ids of VFIO devices (vfio-pci and its kin) among answers to `qom-list`."""
    rows = [json_object(row) for each in peripherals if isinstance(each, list) for row in each]
    return tuple(
        str(row.get("name")) for row in rows if str(row.get("type")).startswith("child<vfio-")
    )


def read_machine_type(qom_type: object) -> str | None:
    """From the QOM type of /machine, e.g. "pc-i440fx-10.0-machine"."""
    return qom_type.removesuffix("-machine") if isinstance(qom_type, str) else None


def read_version(greeting: object) -> str:
    """For people: "10.0.2 (Debian 1:10.0.2+ds-2)"; "unknown" where the greeting does not say."""
    version = json_object(json_object(greeting).get("version"))
    numbers = json_object(version.get("qemu"))
    parts = [numbers.get(part) for part in ("major", "minor", "micro")]
    if not all(isinstance(part, int) for part in parts):
        return "unknown"
    package = _text(version.get("package"))
    return ".".join(str(part) for part in parts) + (f" ({package})" if package else "")


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and isinstance(value, int | float) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _seconds(milliseconds: object) -> float | None:
    number = _number(milliseconds)
    return None if number is None else number / 1000


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
