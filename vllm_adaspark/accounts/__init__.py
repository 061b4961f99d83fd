"""What a request cost, and what it would have cost dense: counts, FLOPs, densities.

``account``: the counts of a step and of a request, the sizes of a layer, and FLOPs from both.
``ledger``: the accounts that one rank keeps.  ``reports``: one account of all ranks', with mode,
settings and budget, as ``usage.adaspark`` shows it.  ``request_ids``: which of the engine's
requests belong to the one that a client knows.  ``timing``: a stopwatch that never makes a GPU
wait.  ``cost``: the same FLOPs before anything has run, for ``vllm-adaspark inspect``.
"""
