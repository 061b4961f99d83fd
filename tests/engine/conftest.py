import checkpoint as demo_checkpoint  # examples/demo
import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small float32 Qwen2.5-VL checkpoint."""
    return demo_checkpoint.build(tmp_path_factory.mktemp("checkpoint"), dtype="float32", seed=3)
