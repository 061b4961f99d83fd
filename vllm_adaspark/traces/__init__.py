"""Traces: what a request chose, cube by cube and token by token, for the viewer and for pictures.

On the worker: ``worker`` decides which steps are recorded, ``step`` takes what their layers chose
from the device, ``trace`` is one request's record, ``store`` keeps them in bounded memory,
``frames`` makes small JPEGs of what the model saw, ``survivors`` remembers which tokens of a pruned
video it saw.  Outside: ``reader`` merges the ranks,
``picture`` draws a trace.
"""
