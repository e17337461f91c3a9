"""The commands that speak with the daemon, one module per subject."""
