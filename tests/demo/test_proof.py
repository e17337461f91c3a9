from pathlib import Path

import pytest

from migrd.demo.image import GuestImage, Pattern
from migrd.demo.proof import prove_continuity, verify_memory
from tests.lab.bare_qemu import BareQemu, migrate

pytestmark = pytest.mark.real


@pytest.mark.parametrize("pattern", Pattern)
async def test_each_pattern_is_predicted_byte_for_byte_after_a_move(
    pattern: Pattern, qemu_binary: Path, short_tmp_path: Path
) -> None:
    image = GuestImage(working_set_pages=3000, cold_pages=100, pattern=pattern, noise=True)
    async with (
        BareQemu(qemu_binary, short_tmp_path, image, name="source") as source,
        BareQemu(qemu_binary, short_tmp_path, image, name="dest", incoming=True) as destination,
    ):
        await source.qmp("cont")
        await source.heartbeats_at_least(20)
        await migrate(source, destination)
        await destination.heartbeats_at_least(20)
        await destination.qmp("stop")
        match = await verify_memory(image, 64 << 20, destination.save_memory, short_tmp_path)
        assert match.visits > 2000
        continuity = prove_continuity([source.serial, destination.serial], switches=1)
        assert continuity.blackouts_s[0] < 1.0
