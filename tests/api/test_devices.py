"""What this host can pass through, over HTTP."""

import asyncio
from dataclasses import replace

import pytest

from migrd.api.models import Device, DeviceList, Host
from migrd.core.devices import Capability, IommuKind, Unknown
from migrd.engine.threads import in_thread
from tests.api.running import Api
from tests.fakes.inventory import CAN, CANNOT, NOT_KNOWN, inventory, mixed_host, pci

VF = "0000:41:00.1"
NVME = "0000:81:00.0"
GPU = "0000:c1:00.0"
MDEV = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


async def the_host(api: Api) -> Host:
    return Host.model_validate_json((await api("GET", "/v1/host")).body)


async def addresses(api: Api, query: str = "") -> list[str]:
    got = await api("GET", f"/v1/devices{query}")
    return [device.address for device in DeviceList.model_validate_json(got.body).items]


# The one boolean


async def test_t3_one_instance_that_cannot_makes_the_one_boolean_false_and_is_named(
    api: Api,
) -> None:
    host = await the_host(api)
    assert host.all_iommus_track_dirty is False
    assert host.all_iommus_track_dirty_why.startswith("1 of 2 cannot: dmar1")
    assert [iommu.name for iommu in host.iommus] == ["dmar0", "dmar1"]


async def test_all_that_can_make_it_true_and_an_estimate_says_so(api: Api) -> None:
    api.service.set_inventory(inventory([CAN]))
    host = await the_host(api)
    assert host.all_iommus_track_dirty is True
    assert host.all_iommus_track_dirty_why.startswith("estimated from registers of 1 of 1: dmar0")
    probed = replace(CAN, dirty_tracking=Capability.probed(True))
    api.service.set_inventory(inventory([probed]))
    assert (await the_host(api)).all_iommus_track_dirty_why == "the kernel says so of all 1"


async def test_what_is_not_known_is_null_and_says_of_which(api: Api) -> None:
    api.service.set_inventory(inventory([CAN, NOT_KNOWN]))
    host = await the_host(api)
    assert host.all_iommus_track_dirty is None
    assert host.all_iommus_track_dirty_why.startswith(f"not known of 1 of 2: {NOT_KNOWN.name}")
    assert "no registers" in host.all_iommus_track_dirty_why


async def test_a_host_without_an_iommu_is_null_and_says_so(api: Api) -> None:
    api.service.set_inventory(inventory([]))
    host = await the_host(api)
    assert host.all_iommus_track_dirty is None
    assert "shows no IOMMU" in host.all_iommus_track_dirty_why


async def test_each_instance_carries_its_evidence(api: Api) -> None:
    iommu = (await the_host(api)).iommus[0]
    assert iommu.kind is IommuKind.INTEL_VTD
    assert iommu.dirty_tracking.evidence.value == "estimated"
    assert iommu.registers == {"cap": "0x19ed008c40780c66", "ecap": "0x3ee9e86f050df"}
    assert (iommu.hardware_type, iommu.capability_bits) == (1, "0x5")
    assert iommu.unknown_capability_bits == "0x4"
    assert iommu.devices == 3


async def test_t5_features_belong_to_instances_and_each_device_points_to_its_own(api: Api) -> None:
    answers = {iommu.name: iommu.dirty_tracking.answer for iommu in (await the_host(api)).iommus}
    for address in (VF, NVME, GPU):
        device = Device.model_validate_json((await api("GET", f"/v1/devices/{address}")).body)
        assert device.iommu is not None
        assert device.iommu_dirty_tracking.answer is answers[device.iommu]


async def test_the_kernel_is_told(api: Api) -> None:
    kernel = (await the_host(api)).kernel
    assert kernel is not None
    assert kernel.release == "6.12.117"
    assert kernel.iommufd.answer.value == "yes"
    assert kernel.unsafe_interrupts is False


# Devices


async def test_devices_come_by_address_in_pages(api: Api) -> None:
    assert await addresses(api) == sorted(mixed_host().devices)
    first = (await api("GET", "/v1/devices?limit=4")).json
    rest = (await api("GET", f"/v1/devices?limit=4&page_token={first['next_page_token']}")).json
    assert [d["address"] for d in first["items"] + rest["items"]] == sorted(mixed_host().devices)
    assert rest["next_page_token"] is None


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("?driver=mlx5_vfio_pci", [VF, "0000:41:00.2"]),
        ("?iommu=dmar1", [NVME, GPU]),
        ("?iommu=none-such", []),
        ("?passthrough=true&iommu=dmar1", [NVME]),
        ("?passthrough=false", ["0000:41:00.0", GPU]),
        ("?kind=vfio_mdev", [MDEV]),
        ("?iommu_group=9", ["0000:41:00.2"]),
        ("?iommu_dirty_tracking=unknown", []),
        ("?iommu_dirty_tracking=no", [NVME, GPU, MDEV]),
    ],
)
async def test_devices_are_chosen_by_what_they_are(api: Api, query: str, found: list[str]) -> None:
    assert await addresses(api, query) == found


async def test_a_filter_that_is_no_word_is_refused_with_the_words_there_are(api: Api) -> None:
    got = await api("GET", "/v1/devices?kind=usb&iommu_dirty_tracking=maybe")
    problem = got.problem(422, "invalid")
    assert [v.field for v in problem.violations] == ["kind", "iommu_dirty_tracking"]
    assert "vfio_pci, vfio_mdev, emulated" in problem.violations[0].message


async def test_four_thousand_devices_are_listed_without_holding_up_other_calls(api: Api) -> None:
    many = [pci(f"{n >> 8:04x}:{n & 0xFF:02x}:00.0") for n in range(4096)]
    await in_thread(api.service.set_inventory, inventory([CAN], many))  # judging takes a while
    seen, more = 0, ""
    while more is not None:
        page = asyncio.create_task(api("GET", f"/v1/devices?limit=1000{more}"))
        assert (await api("GET", "/healthz")).status == 200
        answer = (await page).json
        seen += len(answer["items"])
        more = (token := answer["next_page_token"]) and f"&page_token={token}"
    assert seen == 4096


async def test_a_device_says_what_it_is_and_what_it_can(api: Api) -> None:
    got = await api("GET", f"/v1/devices/{VF}")
    device = Device.model_validate_json(got.body)
    assert (device.driver, device.iommu, device.iommu_group) == ("mlx5_vfio_pci", "dmar0", 8)
    assert device.physical_function == "0000:41:00.0"
    assert [flag.value for flag in device.migration.flags] == ["stop_copy", "p2p", "pre_copy"]
    assert device.migration.stop_copy_bytes == 8 << 20
    assert (device.vendor_id, device.class_code) == ("0x15b3", "0x020000")
    assert device.passthrough
    assert device.in_use_by is None
    same = await api("GET", f"/v1/devices/{VF}", If_None_Match=got.headers["ETag"])
    assert (same.status, same.body) == (304, b"")


async def test_an_address_may_come_with_its_colons_quoted(api: Api) -> None:
    assert (await api("GET", f"/v1/devices/{VF.replace(':', '%3A')}")).json["address"] == VF
    quoted = await api("POST", f"/v1/devices/{VF.replace(':', '%3A')}:probe")
    assert quoted.json["address"] == VF


async def test_an_mdev_is_found_by_its_uuid(api: Api) -> None:
    assert (await api("GET", f"/v1/devices/{MDEV}")).json["mdev_parent"] == "0000:00:02.0"


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("41:00.1", "0000:41:00.1"),
        ("0000:C1:00.0", "0000:c1:00.0"),
        ("eth0", "such as 0000:41:00.2"),
        ("0000:41:00", "such as 0000:41:00.2"),
        ("0000:41:20.8", "such as 0000:41:00.2"),
        ("%00", "such as 0000:41:00.2"),
        ("x" * 5000, "such as 0000:41:00.2"),
    ],
)
async def test_a_malformed_address_is_named_with_the_form_that_is_right(
    api: Api, given: str, right: str
) -> None:
    for method, verb in (("GET", ""), ("POST", ":probe")):
        problem = (await api(method, f"/v1/devices/{given}{verb}")).problem(422, "invalid")
        (violation,) = problem.violations
        assert violation.field == "address"
        assert right in violation.message
        assert f'found "{given[:70]}' in violation.message or given == "%00"


async def test_an_unknown_address_is_not_found_by_name(api: Api) -> None:
    for method, verb in (("GET", ""), ("POST", ":probe")):
        problem = (await api(method, f"/v1/devices/0000:ff:1f.7{verb}")).problem(
            404, "unknown_device"
        )
        assert "0000:ff:1f.7" in problem.detail


async def test_a_verb_is_no_part_of_an_address(api: Api) -> None:
    assert (await api("GET", f"/v1/devices/{VF}:probe")).status == 405
    assert (await api("POST", f"/v1/devices/{VF}")).status == 405
    (await api("POST", f"/v1/devices/{VF}:destroy")).problem(404, "no_such_route")


async def test_a_device_is_asked_unless_it_is_in_use_or_has_no_vfio_driver(api: Api) -> None:
    assert (await api("POST", f"/v1/devices/{VF}:probe")).json["address"] == VF
    assert [what for what, _ in api.service.said] == ["probe"]
    (await api("POST", f"/v1/devices/{GPU}:probe")).problem(409, "driver_not_bound")
    api.service.devices_in_use[VF] = "web-1"
    (await api("POST", f"/v1/devices/{VF}:probe")).problem(409, "device_in_use")
    assert (await api("GET", f"/v1/devices/{VF}")).json["in_use_by"] == "web-1"


async def test_a_watcher_of_one_device_hears_of_its_change_only(api: Api) -> None:
    version = (await api("GET", f"/v1/devices/{VF}")).json["resource_version"]
    watching = asyncio.create_task(
        api("GET", f"/v1/devices/{VF}?watch&resource_version={version}&timeout_s=9")
    )
    api.service.add_vm("other")
    changed = [replace(d, driver="vfio-pci") for d in mixed_host().devices.values()]
    api.service.set_inventory(inventory([CAN, CANNOT], changed))
    seen = (await watching).json
    assert seen["driver"] == "vfio-pci"
    assert seen["resource_version"] > version


async def test_what_sysfs_says_in_no_known_encoding_is_still_shown(api: Api) -> None:
    odd = pci(VF, driver="vfio-\udcff\x1b[2J", trouble=tuple(f"line {n}" for n in range(500)))
    api.service.set_inventory(inventory([CAN], [odd], trouble=["\udcff"] * 500))
    device = (await api("GET", f"/v1/devices/{VF}")).json
    assert device["driver"] == "vfio-?\x1b[2J"
    assert len(device["trouble"]) == 100
    assert len((await the_host(api)).inventory_trouble) == 100


async def test_t10_bits_and_flags_never_seen_before_are_shown_as_numbers(api: Api) -> None:
    bits = replace(CAN, capability_bits=2**64 - 1, unknown_capability_bits=2**63)
    strange = replace(
        pci(VF), migration=replace(pci(VF).migration, unknown_flags=0x100), vendor_id=0xFFFF
    )
    api.service.set_inventory(inventory([bits], [strange]))
    assert (await the_host(api)).iommus[0].unknown_capability_bits == "0x8000000000000000"
    device = Device.model_validate_json((await api("GET", f"/v1/devices/{VF}")).body)
    assert device.migration.unknown_flags == "0x100"
    assert device.migration.can.reason == Unknown.NOT_PROBED.value
