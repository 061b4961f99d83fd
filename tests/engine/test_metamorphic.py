"""What a request chooses depends on its circumstances in nothing; `make fuzz` has more of this."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz import metamorphic

pytestmark = pytest.mark.engine


def test_neighbours_order_chunks_prefix_hits_and_preemption_change_no_choice(checkpoint) -> None:
    names = ("odd chunks, prefix cache", "small cache")
    result = metamorphic.check(checkpoint, np.random.default_rng(5), names)
    assert result.choices > 3000
    assert not result.failed, result
