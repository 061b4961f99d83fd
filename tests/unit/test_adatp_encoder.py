"""AdaTP's SigLIP checkpoint: what stands for a frame and for a question."""

import json

import numpy as np
import pytest
import tiny_siglip
import torch
from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

from vllm_adaspark.methods.adatp.encoder import FRAMES_AT_ONCE, SiglipEncoder, check_encoder
from vllm_adaspark.settings import SettingsError


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return tiny_siglip.build(tmp_path_factory.mktemp("siglip"))


def test_pooled_outputs_stand_for_frames_and_question(siglip) -> None:
    encoder = SiglipEncoder(str(siglip), torch.device("cpu"), torch.float32)
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES_AT_ONCE + 3, 60, 84, 3), np.uint8)
    model = SiglipModel.from_pretrained(siglip).eval()
    pixels = AutoImageProcessor.from_pretrained(siglip)(list(frames), return_tensors="pt")
    ids = AutoTokenizer.from_pretrained(siglip)(
        "Which digit?", padding="max_length", max_length=16, return_tensors="pt"
    )["input_ids"]
    with torch.inference_mode():
        want = model.vision_model(**pixels).pooler_output
        asked = model.text_model(input_ids=ids).pooler_output[0]
    assert torch.allclose(encoder.frames("a", lambda: list(frames)), want, atol=1e-5)
    assert torch.allclose(encoder.question("Which digit?"), asked, atol=1e-6)
    assert encoder.question("Which digit is shown on the card? " * 50).shape == asked.shape


def test_a_video_is_looked_at_once(siglip) -> None:
    encoder = SiglipEncoder(str(siglip), torch.device("cpu"), torch.float32)
    first = encoder.frames("a", lambda: [np.zeros((56, 56, 3), np.uint8)])

    def again():
        raise AssertionError("its frames were asked for twice")

    assert encoder.frames("a", again) is first


def test_what_is_no_siglip_is_refused(siglip, tmp_path) -> None:
    check_encoder(str(siglip))
    with pytest.raises(SettingsError, match=r"encoder='/no/where'.*folder of a SigLIP checkpoint"):
        check_encoder("/no/where")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(SettingsError, match="model_type 'clip', expected 'siglip'"):
        check_encoder(str(tmp_path))
