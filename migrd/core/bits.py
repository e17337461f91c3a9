"""Operations on bits of a buffer: in C where the extension was built, else in numpy.

    bits ── _bits (C)          memory's speed; built with the package where there is a compiler
         └─ bits_numpy         the same functions; merging half as fast, extents a tenth

`_bits.pyi` says what each function does. All take any contiguous buffer of little-endian 64-bit
words (`or_bits` any bytes to read from), check every number they are given, and let go of the GIL.
"""

from typing import Final

try:
    from migrd.core import _bits as _chosen
except ImportError:
    from migrd.core import bits_numpy as _chosen  # type: ignore[no-redef]  # the same functions

BACKEND: Final = "c" if _chosen.__name__.endswith("._bits") else "numpy"

and_not = _chosen.and_not
count = _chosen.count
extents = _chosen.extents
mark_runs = _chosen.mark_runs
move = _chosen.move
or_all = _chosen.or_all
or_bits = _chosen.or_bits
region_counts = _chosen.region_counts
