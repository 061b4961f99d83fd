"""AdaSpark (arXiv 2604.08077): cube-selective attention and a token-selective FFN.

Read in this order.  ``settings``: what can be set.  ``request``: what is known of one request.
``planner`` makes ``plan``, once per step on the host.  In each layer ``score`` rates the cubes,
``choose`` keeps some of them, and ``ffn`` does the same for tokens.  ``budget`` turns a FLOPs
budget into a share to keep.  ``method`` puts these together, as ``methods.base`` asks.
``reference`` and ``reference_choice`` are the slow twin in plain loops, which tests trust;
``paper`` is the paper's own rule, likewise.
"""
