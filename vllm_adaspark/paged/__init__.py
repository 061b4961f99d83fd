"""What every method shares over vLLM's paged KV cache.

``state``: the rows of a step, and the sum of each block's keys.  ``tiles``: a step cut into query
tiles.  ``plan``: the plan of a step, as layers, accounts and traces read it.  ``tables``: from kept
blocks to a kernel's block tables.  ``backend``: where this plugs into vLLM's attention layer.
``adapters``: one per stock attention backend, and ``heads_apart`` the layout that the CPU's is
fastest with.  ``heads``: choices that do not depend on the number of tensor-parallel ranks.
``scratch``: memory that the layers of a step share.
"""
