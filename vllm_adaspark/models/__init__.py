"""The registered model variants: stock vLLM models with our layers and token order.

``processing`` is the multimodal processor, in the API server's process; ``checks`` and
``sent_items`` are what it refuses and what it takes back.  ``qwen2_5_vl`` is the model, ``qwen2``
its language model, ``sparse_mlp`` the FFN of a layer, ``pruned`` what it does with videos of which
tokens were dropped, ``model_state`` the seam of model runner V2.
"""
