"""The back ends of `migrd.core.bits`, each as a context in which it computes.

What the C extension chooses by the processor it runs on can be set, so that the portable way is
tried where the fast one is there. Where the extension was not built there is one back end, and
`test_bits_in_c` says that.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Final

from migrd.core import bits, bits_numpy


@contextmanager
def in_numpy() -> Iterator[ModuleType]:
    yield bits_numpy


def in_c(level: str) -> Callable[[], AbstractContextManager[ModuleType]]:
    @contextmanager
    def computing() -> Iterator[ModuleType]:
        from migrd.core import _bits

        before = _bits.use(level)
        try:
            yield _bits
        finally:
            _bits.use(before)

    return computing


def c_levels() -> list[str]:
    """What this processor can do; none where the extension was not built."""
    if bits.BACKEND != "c":
        return []
    from migrd.core import _bits

    fast = _bits.use("portable")
    _bits.use(fast)
    return sorted({"portable", fast})


BACKENDS: Final[Mapping[str, Callable[[], AbstractContextManager[ModuleType]]]] = {
    "numpy": in_numpy,
    **{f"c-{level}": in_c(level) for level in c_levels()},
}
