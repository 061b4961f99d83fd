"""vllm-adaspark: long video in vLLM with AdaSpark's adaptive sparsity (arXiv 2604.08077).

vLLM calls :func:`register` in every process through the ``vllm.general_plugins`` entry point.
Importing this package imports neither vLLM nor the model; that happens when a server asks for our
architecture name.
"""

from __future__ import annotations

ARCHITECTURE = "AdaSparkQwen2_5_VLForConditionalGeneration"
# Our name for a model, by the ``model_type`` of its checkpoint's config.json.
ARCHITECTURES = {
    "qwen2_5_vl": ARCHITECTURE,
    "llava_onevision": "AdaSparkLlavaOnevisionForConditionalGeneration",
}
LANGUAGE_MODEL = "AdaSparkQwen2ForCausalLM"  # its text part; not meant to be served alone

__version__ = "0.1.0"


def register() -> None:
    """Tell vLLM about the architectures; cheap, and harmless when called again."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .startup import StartupCheck

    MODELS_CONFIG_MAP.update(dict.fromkeys(ARCHITECTURES.values(), StartupCheck))
    known = ModelRegistry.get_supported_archs()
    for architecture, path in (
        (ARCHITECTURES["qwen2_5_vl"], "vllm_adaspark.models.qwen2_5_vl:AdaSparkQwen2_5_VL"),
        (
            ARCHITECTURES["llava_onevision"],
            "vllm_adaspark.models.llava_onevision:AdaSparkLlavaOnevision",
        ),
        (LANGUAGE_MODEL, "vllm_adaspark.models.qwen2:AdaSparkQwen2ForCausalLM"),
    ):
        if architecture not in known:
            ModelRegistry.register_model(architecture, path)
