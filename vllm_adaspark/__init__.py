"""vllm-adaspark: long video in vLLM, with adaptive sparsity (AdaSpark, arXiv 2604.08077).

vLLM calls :func:`register` in every process through the ``vllm.general_plugins`` entry point.
Importing this package imports neither vLLM nor the model; that happens when a server asks for one
of our architectures.
"""

from __future__ import annotations

ARCHITECTURE = "AdaSparkQwen2_5_VLForConditionalGeneration"
LLAVA_ARCHITECTURE = "AdaSparkLlavaOnevisionForConditionalGeneration"
# By the ``model_type`` of a checkpoint's config.json.
ARCHITECTURES = {"qwen2_5_vl": ARCHITECTURE, "llava_onevision": LLAVA_ARCHITECTURE}
VIDEONSA_ARCHITECTURE = "VideoNSAForConditionalGeneration"  # as VideoNSA's checkpoints call it
LANGUAGE_MODEL = "AdaSparkQwen2ForCausalLM"  # its text part; not meant to be served alone

__version__ = "0.1.0"


def register() -> None:
    """Tell vLLM about the architectures; cheap, and harmless when called again."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .startup import StartupCheck

    models = {
        ARCHITECTURE: "vllm_adaspark.models.qwen2_5_vl:AdaSparkQwen2_5_VL",
        LLAVA_ARCHITECTURE: "vllm_adaspark.models.llava_onevision:AdaSparkLlavaOnevision",
        VIDEONSA_ARCHITECTURE: "vllm_adaspark.models.qwen2_5_vl:AdaSparkQwen2_5_VL",
    }
    MODELS_CONFIG_MAP.update(dict.fromkeys(models, StartupCheck))
    models[LANGUAGE_MODEL] = "vllm_adaspark.models.qwen2:AdaSparkQwen2ForCausalLM"
    known = ModelRegistry.get_supported_archs()
    for architecture, path in models.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, path)
