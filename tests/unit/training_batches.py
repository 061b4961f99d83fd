"""Batches for training passes, as a processor would make them, and what is left of them."""

from __future__ import annotations

import torch


def inputs(model, *sequences: list, pad: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch, padded on the right; a number in a sequence is so much text, a grid a video."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    rows, grids = [], []
    for parts in sequences:
        ids = []
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(30, 200, (part,), generator=generator).tolist()
            else:
                t, h, w = part
                ids += [config.video_token_id] * (t * h * w)
                grids.append([t, 2 * h, 2 * w])
        rows.append(ids)
    longest = max(map(len, rows)) + pad
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    types = (ids == config.video_token_id).int() * 2
    made = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    if grids:
        patches = sum(t * h * w for t, h, w in grids)
        made["pixel_values_videos"] = torch.randn(patches, 1176, generator=generator)
        made["video_grid_thw"] = torch.tensor(grids)
        made["second_per_grid_ts"] = [1.0] * len(grids)
    return made


def gradients(model) -> dict[str, torch.Tensor]:
    """Of the language model; they are taken away."""
    taken = {}
    for name, weight in model.model.language_model.named_parameters():
        taken[name], weight.grad = weight.grad, None
    return taken
