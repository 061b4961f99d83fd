"""AdaTP (arXiv 2505.20100): video tokens are dropped between the layers, by what the question asks.

Read in this order.  ``settings``: what can be set.  ``segments`` cuts a video where it changes,
``encoder`` is what sees frames and question beside the model, if there is one, ``relevance`` says
which segments the question is about, ``flops`` how much a budget leaves.
``request``: what is known of one request, and how many of its tokens go on.  ``plan`` makes the
lengths of a step's layers, on the host.  While the layers run, ``score`` rates the video tokens,
``prune`` chooses the survivors, and ``state`` keeps both for a prompt.  ``method`` puts these
together, as ``methods.base`` asks.  ``reference`` is the slow twin.

The machinery that lets layers see fewer tokens is ``paged/depths.py``, and the scheduler it needs
``scheduler.py``.  What of all this is the authors' is said in docs/adatp.md.
"""
