"""What the plugin adds to vLLM's HTTP server; on with ``VLLM_PLUGINS=adaspark,adaspark_http``.

``plugin`` is what vLLM loads.  ``usage``: ``usage.adaspark`` in answers.  ``metrics``: our series
in ``/metrics``.  ``traces`` and ``viewer/``: what requests chose, as JSON and as a page.
``refusals``: counts of refused requests.  ``engine``: how all of these ask the workers.
"""
