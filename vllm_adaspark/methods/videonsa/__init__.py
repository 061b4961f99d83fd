"""VideoNSA (arXiv 2510.02295): three branches of attention over video tokens, mixed by gates.

``faithful`` computes what the released code computes, ``faithful_reference`` is its slow twin.
"""
