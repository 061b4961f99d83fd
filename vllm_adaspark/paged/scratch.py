"""Memory that is used again and again within a step, instead of being asked for each time."""

from __future__ import annotations

import math

import torch

LEAST = 1 << 23  # bytes; untouched ones cost nothing


class Scratch:
    """Buffers by name.

    On a CPU the page faults of fresh memory take half as long as the work in it.  What a name
    held is lost when it is taken again, for whatever and in whatever dtype: the largest buffers of
    choosing are those of the tables, which are made when the choice is.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Uninitialised ``[*shape]``, contiguous."""
        number = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < number:
            buffer = torch.empty(max(number, LEAST), dtype=torch.uint8, device=device)
            self._buffers[name] = buffer
        return buffer[:number].view(dtype).view(shape)
