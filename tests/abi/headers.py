"""What migrd.abi claims about the kernel's headers, as C that only compiles if it is true.

    migrd.abi.* --(introspection)--> _Static_assert(...) --(C compiler, real headers)--> true?

One file of assertions for all modules. The headers are Linux' own, unpacked from a package of
a newer kernel than the machine's; nothing of the machine's headers is seen (`-nostdinc`).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pkgutil
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import migrd.abi
from migrd.abi.ioctl import UapiEnum, UapiFlag, UapiStruct
from tests.setup import debian

SIGNED = (ctypes.c_int8, ctypes.c_int16, ctypes.c_int32, ctypes.c_int64)
UNSIGNED = (ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64)


def mirrors() -> list[ModuleType]:
    """Every module of migrd.abi that mirrors headers."""
    names = [found.name for found in pkgutil.iter_modules(migrd.abi.__path__, "migrd.abi.")]
    modules = [importlib.import_module(name) for name in names if name != "migrd.abi.ioctl"]
    without = [module.__name__ for module in modules if not hasattr(module, "HEADERS")]
    assert not without, f"these do not say in HEADERS what they mirror: {without}"
    return modules


def structs(module: ModuleType) -> list[type[UapiStruct]]:
    return [
        found
        for found in vars(module).values()
        if isinstance(found, type)
        and issubclass(found, UapiStruct)
        and found.__module__ == module.__name__
    ]


def numbers(module: ModuleType) -> Iterator[tuple[str, int]]:
    """Name in the header and value: constants, and the members of enums and flags."""
    for name, found in vars(module).items():
        if isinstance(found, int) and name.isupper():
            yield name, int(found)
        elif (
            isinstance(found, type)
            and issubclass(found, UapiEnum | UapiFlag)
            and found.__module__ == module.__name__
        ):
            for member, value in found.__members__.items():
                yield found.__header_prefix__ + member, int(value)


def assertions(modules: list[ModuleType]) -> str:
    """The C source for all of them."""
    headers = dict.fromkeys(header for module in modules for header in module.HEADERS)
    lines = [f"#include <{header}>" for header in headers]
    for module in modules:
        for name, value in numbers(module):
            lines.append(_assert(f"{name} == {value:#x}", name))
        for struct in structs(module):
            lines += struct_assertions(struct, struct.__name__)
    return "\n".join([*lines, ""])


def struct_assertions(struct: type[UapiStruct], name: str) -> list[str]:
    """That `struct` and its fields have the size, place and sign of C's `struct <name>`."""
    lines = [_assert(f"sizeof(struct {name}) == {ctypes.sizeof(struct)}", f"size of {name}")]
    for field in struct._fields_:
        label, kind = f"{name}.{field[0]}", field[1]
        offset = getattr(struct, field[0]).offset
        lines.append(_assert(f"__builtin_offsetof(struct {name}, {field[0]}) == {offset}", label))
        if ctypes.sizeof(kind) == 0:  # a flexible array has a place and no size
            continue
        member = f"((struct {name} *)0)->{field[0]}"
        lines.append(_assert(f"sizeof({member}) == {ctypes.sizeof(kind)}", f"size of {label}"))
        if issubclass(kind, SIGNED + UNSIGNED):
            sign = "<" if issubclass(kind, SIGNED) else ">"
            lines.append(_assert(f"(__typeof__({member}))-1 {sign} 0", f"sign of {label}"))
    return lines


def _assert(condition: str, subject: str) -> str:
    return f'_Static_assert({condition}, "{subject}");'


def compiler(target: str) -> list[str]:
    """A C compiler for `target` and its headers. Raises SetUpError if it cannot be had."""
    include = debian.linux_headers()
    paths = ["-nostdinc", "-isystem", str(include / target), "-isystem", str(include)]
    return [*_front_end(target), "-fsyntax-only", "-std=gnu11", *paths]


def _front_end(target: str) -> list[str]:
    native = target.startswith(os.uname().machine)
    for name in (f"{target}-gcc", *(["gcc", "cc"] if native else [])):
        if found := shutil.which(name):
            return [found, "-xc"]
    if found := shutil.which("clang"):
        return [found, f"--target={target}", "-xc"]
    if target.startswith("aarch64"):
        return [str(debian.arm64_compiler()), "-quiet"]
    raise debian.SetUpError(f"no C compiler for {target}: install gcc, or run sh tests/run")


def complaints(source: str, target: str, directory: Path) -> str:
    """What the compiler says against `source`; empty when everything in it is true."""
    path = directory / "abi.c"
    path.write_text(source)
    done = subprocess.run(
        [*compiler(target), str(path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) == (not done.stderr), done.stderr
    return done.stderr
