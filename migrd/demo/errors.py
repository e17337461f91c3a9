"""What can go wrong with the demo's guest, apart from migrating it."""


class ImageError(Exception):
    """The guest cannot be built: a parameter is out of range, or binutils are missing."""


class ProofFailed(Exception):
    """What was to be shown is not so; the text says where it first differs."""


class DemoFailed(Exception):
    """The demo cannot go on; the text says why, and what to do where that is known."""
