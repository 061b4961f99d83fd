"""Memory that is used again and again within a step, instead of being asked for each time."""

from __future__ import annotations

import math

import torch

LEAST = 1 << 21  # numbers; untouched ones cost nothing


class Scratch:
    """Room by name.  On a CPU the page faults of fresh memory take half as long as the work in it.

    What a name held is lost when it is taken again.
    """

    def __init__(self) -> None:
        self._rooms: dict[str, torch.Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Uninitialised ``[*shape]``, contiguous."""
        number = math.prod(shape)
        room = self._rooms.get(name)
        if room is None or len(room) < number or room.dtype != dtype:
            room = torch.empty(max(number, LEAST), dtype=dtype, device=device)
            self._rooms[name] = room
        return room[:number].view(shape)
