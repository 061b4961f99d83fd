"""Sparse fine-tuning: Qwen2.5-VL in Hugging Face transformers, with the served semantics.

The papers fine-tune with sparsity on.  What a forward pass computes here is what the plugin
computes for the same prompt in one chunk, and it can be differentiated, in any training loop:

* AdaSpark: :func:`enable_sparse_training` turns a model's own forward pass into its.  The same code
  decides as when served: the plan, the scores and the choice are those of ``methods.adaspark``, run
  over a made-up block table.
* VideoNSA has weights of its own, so it is a model: :class:`VideoNSAForConditionalGeneration`.

Read in this order: ``prompt`` (where the videos of a batch are, their order and positions),
``packing`` (a padded batch to the tokens of a step, and back), ``passes`` (how a method gets into a
model); then AdaSpark's ``attention``, ``ffn`` and ``enable``, VideoNSA's ``branches`` and
``videonsa``.

Choices are made without gradient; attention over what was chosen, and the FFN of the tokens that
run, pass it on.  Needs torch and transformers, never vLLM.  Not covered: generation (serve the
checkpoint instead), and caches of keys and values.
"""

from .enable import disable_sparse_training, enable_sparse_training
from .videonsa import VideoNSAForConditionalGeneration

__all__ = [
    "VideoNSAForConditionalGeneration",
    "disable_sparse_training",
    "enable_sparse_training",
]
