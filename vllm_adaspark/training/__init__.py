"""Sparse fine-tuning: Qwen2.5-VL in Hugging Face transformers, with the served semantics.

The paper fine-tunes with both sparsities on.  :func:`enable_sparse_training` does that to a model
that is trained with any loop: what a forward pass computes is what the plugin computes for the same
prompt in one chunk, and it can be differentiated.  The same code decides: the plan, the scores and
the choice are those of ``methods.adaspark``, run over a made-up block table.

Read in this order: ``prompt`` (where the videos of a batch are, their order and positions),
``packing`` (a padded batch to the tokens of a step, and back), ``attention`` and ``ffn`` (what a
layer does), ``enable`` (how it gets into a model).

Choices are made without gradient; attention over what was chosen, and the FFN of the tokens that
run, pass it on.  Needs torch and transformers, never vLLM.  Not covered: generation (serve the
checkpoint instead), and caches of keys and values.
"""

from .enable import disable_sparse_training, enable_sparse_training

__all__ = ["disable_sparse_training", "enable_sparse_training"]
