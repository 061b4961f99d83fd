"""The paper's pre-study and analysis plots for any model that can be served (``analyze``).

``measure``: the numbers, in plain PyTorch.  ``study``: the runs, and the hooks that measure one.
``plots``: the pictures.
"""
