"""A fuzz case as plain data: what requests share a paged layer, and what happens in which step.

A case is drawn from a seed, can be made smaller as long as it fails (:func:`shrink`), and prints
itself as a test (:func:`as_test`).
"""

from __future__ import annotations

import pprint
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from kernels.scenes import Request as LayerRequest
from kernels.scenes import random_request


@dataclass
class Request:
    """One request.

    Attributes:
        layout: ("text" | "video", tokens) in turn, of the prompt.
        settings: of the method, the server's among them.
        seed: of its queries, keys and values.
        sharpness: of its queries.
        answer: tokens behind the prompt.
        shares: another request and how many of its first blocks this one finds in the prefix cache;
            its layout, settings and keys are then those of the other so far.
    """

    layout: list[tuple[str, int]]
    settings: dict[str, Any]
    seed: int
    sharpness: float = 1.0
    answer: int = 0
    shares: tuple[int, int] | None = None


@dataclass
class Case:
    """``steps`` list what happens: ``["preempt" | "end", request]``, then ``[request, tokens]`` of
    each row of the step, in row order."""

    family: str
    shape: dict[str, Any]
    requests: list[Request]
    steps: list[list[list]]
    layer: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.shape["dtype"])


def random_layout(
    rng: np.random.Generator, block: int, most_cubes: int, kinds: tuple[str, ...] = ("video",)
) -> list[tuple[str, int]]:
    """Text, then one to three videos or images with or without text between, and text."""
    layout = [("text", int(rng.integers(0, 2 * block)))]
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        layout.append((str(rng.choice(kinds)), int(rng.integers(1, most_cubes * block))))
        layout.append(("text", int(rng.choice([0, 1, 1, 9, 9, block + 3]))))
    layout.append(("text", int(rng.integers(1, 20))))
    return [piece for piece in layout if piece[1]]


def random_requests(
    rng: np.random.Generator,
    block: int,
    settings: Callable[[], dict[str, Any]],
    most_cubes: int,
    kinds: tuple[str, ...] = ("video",),
) -> list[Request]:
    """One to four requests, some without video, some with the beginning of another."""
    made: list[Request] = []
    for _ in range(int(rng.choice([1, 2, 2, 3, 4]))):
        request = Request(
            layout=random_layout(rng, block, most_cubes, kinds),
            settings=settings(),
            seed=int(rng.integers(1 << 31)),
            sharpness=float(rng.choice([0.3, 1.0, 3.0])),
            answer=int(rng.choice([0, 1, 3])),
        )
        if rng.random() < 0.1:
            request.layout = [("text", int(rng.integers(1, 3 * block)))]
        elif made and rng.random() < 0.25:
            other = int(rng.integers(len(made)))
            whole = sum(n for _, n in made[other].layout) // block
            if whole and made[other].shares is None:
                blocks = int(rng.integers(1, whole + 1))
                kept = _first(made[other].layout, blocks * block)
                request = replace(
                    made[other],
                    layout=[*kept, ("text", int(rng.integers(1, block)))],
                    shares=(other, blocks),
                )
        made.append(request)
    return made


def _first(layout: list[tuple[str, int]], tokens: int) -> list[tuple[str, int]]:
    kept = []
    for kind, n in layout:
        kept.append((kind, min(n, tokens)))
        tokens -= kept[-1][1]
    return [piece for piece in kept if piece[1]]


def random_steps(
    rng: np.random.Generator, requests: list[Request], chunk: int, preempts: bool = True
) -> list[list[list]]:
    """Chunks of random requests until all are through; now and then one starts again."""
    length = [sum(n for _, n in r.layout) for r in requests]
    done, over, steps = [0] * len(requests), set(), []
    again = 2 * preempts  # times that some request may be preempted
    while len(over) < len(requests):
        step: list[list] = []
        for i, request in enumerate(requests):
            if i in over or (rng.random() < 0.3 and len(over) < len(requests) - 1):
                continue
            if again and done[i] and rng.random() < 0.08:
                step.append(["preempt", i])
                done[i], again = 0, again - 1
            left = length[i] + request.answer - done[i]
            if not left:
                step.insert(0, ["end", i])
                over.add(i)
                continue
            prompt = length[i] - done[i]
            count = min(chunk if rng.random() < 0.8 else int(rng.integers(1, chunk + 1)), left)
            if prompt <= 0 and rng.random() < 0.9:
                count = 1
            elif 0 < prompt < count:
                count = prompt  # the answer comes later
            step.append([i, count])
            done[i] += count
        if any(isinstance(op[0], int) for op in step):
            steps.append(_shuffled(rng, step))
    return steps


def _shuffled(rng: np.random.Generator, step: list[list]) -> list[list]:
    """Rows in any order; what happens before the step stays first."""
    happens = [op for op in step if not isinstance(op[0], int)]
    rows = [op for op in step if isinstance(op[0], int)]
    rng.shuffle(rows)
    return [*happens, *rows]


class Pages:
    """The requests of a case with tensors and physical blocks, as a KV cache manager gives them.

    Blocks are taken in random order, go back when a request ends or is preempted, and then serve
    others; a shared block goes back when nobody uses it.

    Args:
        case: whose requests.
        configs: the settings of each request, of the method's class.
        kind: what the method knows of a request.
        blocks: physical blocks, block 0 left out.
    """

    def __init__(self, case: Case, configs: list[Any], blocks: int, **kind: Any) -> None:
        self.case, self.size = case, configs[0].cube_volume
        self.rng = np.random.default_rng(case.requests[0].seed)
        self.free, self.users = list(range(1, blocks)), [0] * blocks
        self.requests: list[LayerRequest] = []
        shape = {k: v for k, v in case.shape.items() if k in ("heads", "kv_heads", "head_size")}
        for request, config in zip(case.requests, configs, strict=True):
            layout = [*request.layout, ("text", request.answer)]
            made = random_request(
                np.random.default_rng(request.seed), config, layout, **shape, dtype=case.dtype,
                pool=list(range(1, 4096)), sharpness=request.sharpness,
            )  # fmt: skip
            made.blocks = np.zeros(len(made.blocks), np.int32)
            for name, value in kind.items():
                setattr(made, name, value)
            if request.shares is not None:
                self._share(made, *request.shares)
            self.requests.append(made)

    def _share(self, made: LayerRequest, other: int, blocks: int) -> None:
        n, source = blocks * self.size, self.requests[other]
        for name in "qkv":
            getattr(made, name)[:n] = getattr(source, name)[:n]

    def steps(self) -> Iterator[list[tuple[LayerRequest, int]]]:
        """Each step's rows: a request and how many tokens it runs."""
        for step in self.case.steps:
            rows = []
            for what, which in step:
                if isinstance(what, str):
                    self._give_back(self.requests[which])
                    continue
                request = self.requests[what]
                if not request.done:
                    self._find_prefix(what)
                left = len(request.is_video) - request.done
                if min(which, left) > 0:
                    self._allocate(request, min(which, left))
                    rows.append((request, min(which, left)))
            if rows:
                yield rows
            for request, count in rows:
                request.done += count

    def _find_prefix(self, which: int) -> None:
        """Blocks of another request that are computed, if it has not given them back."""
        shares = self.case.requests[which].shares
        if shares is None:
            return
        other, request = self.requests[shares[0]], self.requests[which]
        found = min(shares[1], other.done // self.size, (len(request.is_video) - 1) // self.size)
        request.blocks[:found] = other.blocks[:found]
        for block in request.blocks[:found]:
            self.users[block] += 1
        request.done = found * self.size

    def _allocate(self, request: LayerRequest, count: int) -> None:
        held = -(-request.done // self.size)
        for nth in range(held, -(-(request.done + count) // self.size)):
            block = self.free.pop(int(self.rng.integers(len(self.free))))
            request.blocks[nth], self.users[block] = block, 1

    def _give_back(self, request: LayerRequest) -> None:
        for block in request.blocks[: -(-request.done // self.size)]:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(int(block))
        request.blocks[:] = 0
        request.done = 0


def shrink(case: Case, fails: Callable[[Case], bool], tries: int = 200) -> Case:
    """A smaller case that still fails: fewer requests, steps and tokens, defaults for settings."""
    smaller = True
    while smaller and tries > 0:
        smaller = False
        for candidate in _smaller(case):
            tries -= 1
            if tries < 0:
                break
            if fails(candidate):
                case, smaller = candidate, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    for i in range(len(case.requests)):
        if len(case.requests) > 1 and not any(r.shares and r.shares[0] == i for r in case.requests):
            yield _without(case, i)
    for i in range(len(case.steps)):
        if len(case.steps) > 1:
            made = deepcopy(case)
            del made.steps[i]
            yield made
    for i, request in enumerate(case.requests):
        for nth, (kind, tokens) in enumerate(request.layout):
            for fewer in (0, tokens // 2):
                if request.shares is None and fewer < tokens:
                    made = deepcopy(case)
                    made.requests[i].layout[nth] = (kind, fewer)
                    made.requests[i].layout = [
                        piece for piece in made.requests[i].layout if piece[1]
                    ]
                    if made.requests[i].layout:
                        yield made
        for key in request.settings:
            made = deepcopy(case)
            del made.requests[i].settings[key]
            yield made


def _without(case: Case, gone: int) -> Case:
    made = deepcopy(case)
    del made.requests[gone]

    def number(i: int) -> int:
        return i - (i > gone)

    for request in made.requests:
        if request.shares:
            request.shares = number(request.shares[0]), request.shares[1]
    steps = []
    for step in made.steps:
        kept = []
        for what, which in step:
            if isinstance(what, str) and which != gone:
                kept.append([what, number(which)])
            elif not isinstance(what, str) and what != gone:
                kept.append([number(what), which])
        steps.append(kept)
    made.steps = [step for step in steps if step]
    return made


def as_test(case: Case, name: str, error: BaseException) -> str:
    """A case as a test to paste into tests/fuzz/test_found.py."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    body = pprint.pformat(asdict(case), width=94, sort_dicts=False, compact=True)
    body = "\n".join("    " + line for line in body.splitlines()).strip()
    return (
        "from fuzz.cases import from_dict\nfrom fuzz.families import check\n\n\n"
        f"def test_{name}() -> None:\n"
        f'    """{type(error).__name__}: {lines[0][:80]}"""\n'
        f"    check(from_dict(\n    {body}\n    ))\n"
    )


def from_dict(plain: dict[str, Any]) -> Case:
    """Undo ``dataclasses.asdict``."""
    requests = [Request(**request) for request in plain["requests"]]
    return Case(**{**plain, "requests": requests})
