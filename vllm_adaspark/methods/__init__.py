"""Sparsity methods, a folder each: what the layers leave out, step by step.

``base`` is the protocol, and an essay to read before adding a method; ``adaspark`` is the one that
is there.  A method knows neither vLLM's model runner nor a model.
"""
