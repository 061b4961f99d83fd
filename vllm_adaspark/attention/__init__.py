"""AdaS-Attn: sparse attention as a smaller block table for vLLM's own paged kernels.

Read in this order: ``state`` (what a KV block is), ``plan`` (once per step: query tiles and their
candidate cubes; ``planner`` makes it), ``score`` (once per layer: which cubes a tile keeps),
``tables`` (kept blocks to block tables), ``backend`` (where it plugs into vLLM).  All but
``backend`` import without vLLM.
"""
