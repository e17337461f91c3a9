"""What is in a file, as one number that two hosts can compare."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, Final

from migrd.errors import Invalid, Violation

_CHUNK_BYTES: Final = 1 << 20
_KNOWN_LIMIT: Final = 256

_known: dict[tuple[int, int, int, int], str] = {}


def content_digest(path: Path, name: str) -> str:
    """sha256 of a file's contents; remembered until the file changes. Blocking.

    Raises Invalid, naming the parameter or option `name`, when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
            if key not in _known:
                if len(_known) >= _KNOWN_LIMIT:
                    _known.clear()
                _known[key] = _sha256(file)
            return _known[key]
    except OSError as error:
        text = f"{path} cannot be read: {error.strerror}"
        raise Invalid(text, [Violation(f"parameters.{name}", "no_file", text)]) from error


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"
