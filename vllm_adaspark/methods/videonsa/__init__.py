"""VideoNSA (arXiv 2510.02295): learned sparse attention for vision tokens, mixed by gates.

Read in this order: settings, request, plan, method, gates, compress, attend.  ``reference.py`` is
the slow twin of one layer.  docs/videonsa.md says what of the paper and of its code this is.
"""
