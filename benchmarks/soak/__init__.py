"""A server under mixed traffic for as long as you like: ``make soak`` (``__main__.py``)."""
