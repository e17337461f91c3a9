"""The benchmark of a restart, small: it finds what it counts. Its figures are the clock's, and are
judged by `python -m tests.bench recovery` alone."""

from tests.bench import recovery


async def test_a_restart_is_measured_with_every_process_and_migration_found() -> None:
    table = await recovery.run(1, vms=16, moving=5)
    assert [figure.unit for figure in table.figures] == ["s", "MiB"]
    assert all(figure.ours > 0 for figure in table.figures)
