"""Print the reference configuration: `python -m migrd.config > config/migrd.toml`."""

import sys

from migrd.config.reference import reference

sys.stdout.write(reference())
