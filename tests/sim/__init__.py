"""Random schedules of several faults, from a seed: `python -m tests.sim SEED` runs one again."""
