"""The paper's pre-study and analysis plots for any model that can be served (``analyze``).

``measure``: the numbers, in plain PyTorch.  ``probe``: hooks that take them from a running model.
``study``: the runs.  ``plots`` and ``report``: what is made of them.
"""
