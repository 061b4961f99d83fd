"""What a request chooses depends on its circumstances in nothing; `make fuzz` has more of this."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz import metamorphic

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("tile_cubes", [1, 2])
def test_neighbours_order_chunks_prefix_hits_and_preemption_change_no_choice(
    checkpoint, tile_cubes
) -> None:
    names = ("odd chunks, prefix cache", "small cache")
    rng = np.random.default_rng(5)
    result = metamorphic.check(checkpoint, rng, names, tile_cubes=tile_cubes)
    assert result.choices > 3000
    assert not result.failed, result
