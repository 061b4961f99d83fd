"""Traces: what a request selected, for the viewer and for pictures."""
