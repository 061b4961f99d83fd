"""Which setting a model can take on one's own videos: ``vllm-adaspark tune``.

A model answers the same questions dense and under a grid of settings, and the answers are compared.

``questions``: what is asked.  ``grid``: the settings.  ``journal``: what was answered, on disk.
``engine``: the process that has an engine and asks it.  ``run``: the loop over engines, which goes
on where it was stopped.  ``intervals``: the statistics.  ``compare``: what each setting cost and
lost, and which to take.  ``report`` and ``picture``: the files that are left.
"""
