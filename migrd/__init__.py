"""migrd: live migration of virtual machines with passthrough devices."""

__version__ = "0.1.0"
