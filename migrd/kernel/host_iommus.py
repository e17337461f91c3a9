"""The IOMMU instances of /sys/class/iommu, with their registers.

    dmar0 …           intel-iommu/{version,cap,ecap}
    ivhd0 …           amd-iommu/{cap,features}; features may be two registers, `a:b`
    smmu3.0x… , the bus address of a virtio-iommu, …    nothing

A register that is missing or no number is left out, and told. What they mean: `iommu_registers`.
"""

import re

from migrd.core.devices import IommuInstance, IommuKind
from migrd.kernel.iommu_registers import estimate, kind_of
from migrd.kernel.sysfs import Directory, Roots, shown


def read_iommus(
    roots: Roots, scalable_mode_off: bool, trouble: list[str]
) -> dict[str, IommuInstance]:
    """All of them, by name. `roots.sys` must be a real path."""
    opened = Directory.open(f"{roots.sys}/class/iommu", trouble)
    if opened is None:
        return {}
    with opened as of_class:
        found = {}
        for name in of_class.names():
            if not name.isprintable():
                trouble.append(f"class/iommu: {shown(name)} is no name of an IOMMU")
            elif instance := read_iommu(of_class, name, roots, scalable_mode_off, trouble):
                found[name] = instance
        return found


def read_iommu(
    of_class: Directory, name: str, roots: Roots, scalable_mode_off: bool, trouble: list[str]
) -> IommuInstance | None:
    """One of them; None when it has gone."""
    own: list[str] = []
    opened = of_class.child(name, roots.sys, own)
    if opened is None:
        if not own:
            return None
        kind, registers = kind_of(name, None), dict[str, int]()
    else:
        with opened as directory:
            kind = kind_of(name, _driver(directory))
            registers = _registers(directory, kind)
    trouble += [f"class/iommu/{shown(name)}: {line}" for line in own]
    can = estimate(kind, registers, scalable_mode_off=scalable_mode_off)
    return IommuInstance(name, kind, can, registers)


def _driver(directory: Directory) -> str | None:
    """Of the device that the instance is; a VT-d unit is none."""
    return directory.link("device/driver") if directory.has("device") else None


def _registers(directory: Directory, kind: IommuKind) -> dict[str, int]:
    match kind:
        case IommuKind.INTEL_VTD:
            found = {
                "version": _version(directory),
                "cap": directory.number("intel-iommu/cap", 16),
                "ecap": directory.number("intel-iommu/ecap", 16),
            }
        case IommuKind.AMD_VI:
            found = {"cap": directory.number("amd-iommu/cap", 16), **_features(directory)}
        case _:
            found = {}
    return {name: value for name, value in found.items() if value is not None and value >= 0}


def _version(directory: Directory) -> int | None:
    """VER_REG: sysfs shows `major:minor`, the register has them in four bits each."""
    text = directory.text("intel-iommu/version")
    if text is None:
        return None
    said = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", text)
    if said is None:
        directory.trouble.append(f"intel-iommu/version: is no version: {shown(text)}")
        return None
    return int(said[1]) << 4 | int(said[2])


def _features(directory: Directory) -> dict[str, int | None]:
    text = directory.text("amd-iommu/features")
    if text is None:
        return {}
    found: dict[str, int | None] = {}
    for name, word in zip(("features", "features2"), text.split(":"), strict=False):
        try:
            found[name] = int(word, 16) if word.isalnum() and len(word) <= 16 else None
        except ValueError:
            found[name] = None
    if None in found.values():
        directory.trouble.append(f"amd-iommu/features: is not a number: {shown(text)}")
    return found
