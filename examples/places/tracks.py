"""Windows encoded once, to compose videos from: the tower is frozen in stage B.

A *track* is the tokens of one window over 64 temporal patches, with at most one mark in it.  Since
windows do not see each other, any sixteen tracks of a haystack are a video.
"""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

from dataclasses import dataclass, field, replace

import footage
import grounds
import marks
import numpy as np
import places
import torch
import tower as towers
from places import HAYSTACKS, WINDOWS, Mark, Scene

PATCHES = 64
MARKED = 14  # windows of a video that get a mark; two of them are boards


@dataclass
class Track:
    """tokens: bf16 [patches, 4, hidden].  naming: bool [patches, 4], tokens that name the mark."""

    tokens: torch.Tensor
    mark: Mark | None = None
    naming: torch.Tensor | None = None


@dataclass
class Tracks:
    """Those of one haystack; marked ones by colour and whether it is a board."""

    plain: list[Track] = field(default_factory=list)
    marked: dict[tuple[int, bool], list[Track]] = field(default_factory=dict)


@torch.no_grad()
def naming(heads, tokens: torch.Tensor, mark: Mark, corner: tuple[int, int]) -> torch.Tensor:
    """Which tokens of the mark's window tell its digit and colour.

    Args:
        tokens: [patches, 4, hidden] of its window.
        corner: top and left of the mark in its window.

    Returns:
        bool [patches, 4].
    """
    tokens = tokens.float()
    right = heads["digit"](tokens).argmax(-1) == mark.digit
    right &= heads["colour"](tokens).argmax(-1) == mark.colour
    touched = marks.shares(*corner, mark.side).ravel() > 0
    there = torch.zeros_like(right)
    there[max(0, mark.start) : mark.end] = torch.from_numpy(touched).to(there.device)
    return right & there


def make(model, heads, seed: int, videos: int) -> dict[str, Tracks]:
    """Tracks of `videos` videos of each haystack; half of them have been through a codec."""
    made = {}
    for number, haystack in enumerate(HAYSTACKS):
        made[haystack] = Tracks()
        for video in range(videos):
            rng = np.random.default_rng((seed, number, video))
            _add(rng, made[haystack], model, heads, haystack, coded=bool(video % 2))
    return made


def _add(rng, to: Tracks, model, heads, haystack: str, coded: bool) -> None:
    pictures = grounds.ground(rng, haystack, PATCHES)
    chosen, corners = {}, {}
    for number, window in enumerate(rng.permutation(WINDOWS)[:MARKED].tolist()):
        colour, digit = int(rng.integers(8)), int(rng.integers(10))
        mark = Mark(window, colour, digit, "", 0, 0, board=number < 2)
        chosen[window] = places.timed(rng, mark, 1, PATCHES)
        corners[window] = marks.put(rng, pictures, chosen[window])
    frames = grounds.grained(rng, pictures)
    tokens = towers.encode_frames(
        model.model.visual, footage.through_codec(frames) if coded else frames
    )
    for window in range(WINDOWS):
        mark, own = chosen.get(window), tokens[:, window].clone()
        if mark is None:
            to.plain.append(Track(own))
            continue
        names = naming(heads, own, mark, corners[window])
        if names.any():  # a mark that nothing names cannot be asked for
            to.marked.setdefault((mark.colour, mark.board), []).append(Track(own, mark, names))


def compose(rng, tracks: Tracks, scene: Scene):
    """A video like the scene, of tracks: its marks get digits and onsets that the tracks have.

    Returns:
        Tokens bf16 [patches, 64, hidden] in the language model's order, the scene as it became, and
        for each of its marks the tokens that name it, bool [marks, patches, 64].
    """
    hidden = tracks.plain[0].tokens.shape[-1]
    tokens = torch.empty(scene.patches, WINDOWS, 4, hidden, dtype=torch.bfloat16)
    for window in range(WINDOWS):
        tokens[:, window] = _filler(rng, tracks.plain, scene.patches)
    became, named = [], []
    for mark in scene.marks:
        track = _fitting(rng, tracks, mark)
        if track is None:
            continue
        length = min(mark.length, track.mark.length)
        shift = mark.start - track.mark.start
        first, last = max(0, shift), min(scene.patches, shift + len(track.tokens))
        if length < track.mark.length:  # it ends, with all that is around it
            last = mark.start + length
        tokens[first:last, mark.window] = track.tokens[first - shift : last - shift]
        names = torch.zeros(scene.patches, WINDOWS, 4, dtype=torch.bool)
        names[first:last, mark.window] = track.naming[first - shift : last - shift]
        became.append(replace(track.mark, window=mark.window, start=mark.start, length=length))
        named.append(towers.in_order(names))
    order = sorted(range(len(became)), key=lambda i: (became[i].start, became[i].window))
    scene = replace(scene, marks=tuple(became[i] for i in order))
    return towers.in_order(tokens), scene, torch.stack([named[i] for i in order])


def _filler(rng, plain: list[Track], patches: int) -> torch.Tensor:
    pieces, left = [], patches
    while left > 0:
        tokens = plain[int(rng.integers(len(plain)))].tokens
        length = min(left, len(tokens))
        first = int(rng.integers(len(tokens) - length + 1))
        pieces.append(tokens[first : first + length])
        left -= length
    return torch.cat(pieces)


def _fitting(rng, tracks: Tracks, mark: Mark) -> Track | None:
    """A track of the mark's colour, of its kind if there is one, and no longer if there is one."""
    choices = tracks.marked.get((mark.colour, mark.board), [])
    choices = [track for track in choices if track.mark.change < mark.length]
    for fits in (
        lambda track: track.mark.kind == mark.kind,
        lambda track: track.mark.length <= mark.length,
    ):
        choices = [track for track in choices if fits(track)] or choices
    return choices[int(rng.integers(len(choices)))] if choices else None
