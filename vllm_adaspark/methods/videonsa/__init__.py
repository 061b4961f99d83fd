"""VideoNSA (arXiv 2510.02295): learned sparse attention for vision tokens, mixed by gates.

Read in this order: settings, request, plan, method, gates, compress, attend; ``flops.py`` tells
what a prompt will cost.  ``reference.py`` is the slow twin of one layer.  ``faithful.py`` computes
what the released code computes instead, and ``faithful_reference.py`` says step by step what that
is.  docs/videonsa.md says what of the paper and of its code this is.
"""
