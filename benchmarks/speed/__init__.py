"""What AdaSpark's saved FLOPs are worth in seconds, beside what a user would choose instead.

    make bench          # all of it, for a quiet machine with two cores
    make bench-quick    # a small part

Read in this order: ``record`` (samples and rows), ``attention`` and ``ffn`` (one layer, in this
process), ``videonsa`` (a layer of that method), ``model``, ``instrument``, ``client`` and
``served`` (real servers), ``scaling`` (what the rows say about length), ``report`` and ``plots``
(Markdown and picture).  CPU only: kernels for GPUs have a benchmark of their own.
"""
