"""Random steps through a small model whose layers drop video tokens (AdaTP, FastV), against loops.

Requests, plan, depths, scores, survivors and KV slots are the ones that serve; the model around
them is a few random matrices, and attention reads the cache slot by slot.  The twin sees one
request at a time, has a list of tokens for each layer, and lets ``reference.py`` choose.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import sizes
from kernels.scenes import relative_rms

from vllm_adaspark.methods.adatp import reference
from vllm_adaspark.methods.adatp.method import AdaTP
from vllm_adaspark.methods.adatp.request import AdaTPRequest
from vllm_adaspark.methods.adatp.settings import AdaTPSettings
from vllm_adaspark.paged.state import StepRows
from vllm_adaspark.requests import Prompt, Video

from .cases import Case, Request

LAYERS, HEADS, KV_HEADS, SIZE = 4, 4, 2, 8
HIDDEN, BLOCK, BLOCKS = HEADS * SIZE, 64, 40
SCALE = SIZE**-0.5
TIE = 1e-6


def random_adatp(rng: np.random.Generator) -> Case:
    """``layout`` counts frames of a video, each of ``extra["places"]`` tokens."""
    places, requests = int(rng.choice([1, 4, 6])), []
    for _ in range(int(rng.choice([1, 2, 3, 4]))):
        layout = [("text", int(rng.integers(0, 20)))]
        for _ in range(int(rng.choice([0, 1, 1, 1, 2]))):
            layout += [("video", int(rng.integers(1, 25))), ("text", int(rng.integers(0, 9)))]
        layout.append(("text", int(rng.integers(1, 20))))
        events = sorted(rng.choice(LAYERS - 1, int(rng.integers(1, 4)), replace=False) + 1)
        settings = {
            "enabled": bool(rng.random() > 0.1),
            "layers": [int(layer) for layer in events],
            "keep": [float(rng.choice([0.2, 0.5, 0.8, 1.0])) for _ in events],
            "tau_s": float(rng.choice([-1, 0.5, 0.9, 1.5])),
            "dedup": str(rng.choice(["first", "all", "off"])),
            "refill": bool(rng.random() < 0.5),
            "queries": str(rng.choice(["all", "last"])),
        }
        if rng.random() < 0.2:
            settings["keep"] = settings["keep"][:1]
        requests.append(
            Request(
                [piece for piece in layout if piece[1]],
                settings,
                seed=int(rng.integers(1 << 31)),
                answer=int(rng.choice([1, 2, 5])),
            )
        )
    return Case(
        "adatp", {"dtype": "float32"}, requests, _steps(rng, requests), 0, {"places": places}
    )


def _steps(rng: np.random.Generator, requests: list[Request]) -> list[list[list]]:
    """A prompt in one step, then its answer; now and then all of it again: ["again", request]."""
    made, steps = [-1] * len(requests), []  # answer tokens so far; -1 before the prompt
    again = 2
    while any(n < request.answer for n, request in zip(made, requests)):
        step: list[list] = []
        for i, request in enumerate(requests):
            if made[i] == request.answer or rng.random() < 0.3:
                continue
            if made[i] >= 0 and again and rng.random() < 0.15:
                step.append(["again", i])
                again -= 1
            else:
                made[i] += 1
                step.append([i, 1])
        rng.shuffle(step)
        if step:
            steps.append(step)
    return steps


@dataclass
class Live:
    """A request as it runs."""

    known: AdaTPRequest
    x: torch.Tensor  # [prompt and answer, hidden] what goes into the first layer
    blocks: np.ndarray
    done: int = 0


class Model:
    """A few random matrices."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        width = (HEADS + 2 * KV_HEADS) * SIZE
        self.qkv = [torch.randn(HIDDEN, width) * HIDDEN**-0.5 for _ in range(LAYERS)]
        self.out = [torch.randn(HIDDEN, HIDDEN) * HIDDEN**-0.5 for _ in range(LAYERS)]

    def project(self, layer: int, x: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v of tokens at ``positions [n]``, which turn q and k a little."""
        q, k, v = (x @ self.qkv[layer].to(x.dtype)).split(
            [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], dim=1
        )
        turn = torch.sin(0.1 * positions.to(x.dtype))[:, None]
        return [each.unflatten(1, (-1, SIZE)) for each in (1.5 * q + turn, k - turn, v)]

    def after(self, layer: int, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + attended.flatten(1) @ self.out[layer].to(x.dtype))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Causal; ``q`` are the last of the keys' tokens.  Output, and probabilities [heads, q, k]."""
    keys, values = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, keys) * SCALE
    future = torch.arange(len(k)) > torch.arange(len(k) - len(q), len(k))[:, None]
    probs = logits.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs, values), probs


def live_of(case: Case, request: Request, method: AdaTP, blocks: np.ndarray) -> Live:
    """The request as a worker knows it."""
    places, tokens, spans, frames = case.extra["places"], 0, [], []
    for kind, count in request.layout:
        n = count * places if kind == "video" else count
        if kind == "video":
            spans.append(_Place(tokens, n))
            frames.append(count)
        tokens += n
    torch.manual_seed(request.seed)
    x = torch.randn(tokens + request.answer, HIDDEN)
    videos = []
    for span, number in zip(spans, frames, strict=True):
        # Frames that are like the one before them, or not.
        base = torch.randn(places, HIDDEN)
        for frame in range(number):
            if torch.rand(()) < 0.4:
                base = torch.randn(places, HIDDEN)
            at = span.offset + frame * places
            x[at : at + places] = base + 0.3 * torch.randn(places, HIDDEN)
        encoded = x[span.offset : span.offset + span.length]
        videos.append(Video((number, 1, places), lambda encoded=encoded: encoded))
    settings = AdaTPSettings().override(request.settings)
    prompt = Prompt(tokens, {"video": spans} if spans else {}, videos=videos)
    return Live(method.describe(settings, prompt) if spans else None, x, blocks)


@dataclass
class _Place:
    """As vLLM's PlaceholderRange."""

    offset: int
    length: int
    is_embed: None = None


def check_adatp(case: Case) -> Counter:
    """Run a case; count its steps, sets and ties."""
    model, counts = Model(case.requests[0].seed), Counter()
    text = sizes(HEADS, KV_HEADS, SIZE)
    text.num_hidden_layers = LAYERS
    method = AdaTP(AdaTPSettings(), text, "cpu")
    order = np.random.default_rng(case.requests[0].seed).permutation(np.arange(1, BLOCKS))
    free = iter(order.tolist())
    lives = []
    for request in case.requests:
        frames = sum(n for kind, n in request.layout if kind == "video")
        tokens = sum(n for _, n in request.layout) + frames * case.extra["places"] + request.answer
        blocks = np.array([next(free) for _ in range(-(-tokens // BLOCK))], np.int32)
        lives.append(live_of(case, request, method, blocks))
    twins = [Twin(case, request, live, model) for request, live in zip(case.requests, lives)]
    cache = torch.full((LAYERS, BLOCKS * BLOCK, 2, KV_HEADS, SIZE), float("nan"))
    for step in case.steps:
        rows, which = [], []
        for what, which_request in step:
            again = what == "again"
            nth = which_request if again else what
            live, prompt = lives[nth], len(lives[nth].x) - case.requests[nth].answer
            if again:
                live.done, count = 0, live.done
            else:
                count = 1 if live.done else prompt
            if count and live.done + count <= len(live.x):
                rows.append((live, count))
                which.append(nth)
        if not rows:
            continue
        output, alive = run_step(method, model, rows, cache)
        start = 0
        for (live, count), nth in zip(rows, which, strict=True):
            here = slice(start, start + count)
            counts += twins[nth].compare(output[here], alive[here], live.done, count)
            live.done += count
            start += count
        counts["steps"] += 1
    return counts


def run_step(
    method: AdaTP, model: Model, rows: list[tuple[Live, int]], cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[tokens, hidden]`` after the last layer, and ``[tokens]`` bool, which got there."""
    width = max(len(live.blocks) for live, _ in rows)
    table = np.zeros((len(rows), width), np.int32)
    for row, (live, _) in enumerate(rows):
        table[row, : len(live.blocks)] = live.blocks
    state = StepRows(
        np.cumsum([0] + [count for _, count in rows]),
        np.array([live.done + count for live, count in rows]),
        table,
    )
    plan = method.plan(state, [live.known for live, _ in rows], torch.device("cpu"))
    depths = None if plan is None else plan.depths
    x = torch.cat([live.x[live.done : live.done + count] for live, count in rows])
    positions = torch.from_numpy(state.token_position)
    if depths is not None:
        depths.begin(positions)
    for layer in range(LAYERS):
        if depths is None:
            here, block = state, state.token_position // BLOCK
            slots = table[state.token_row, block].astype(np.int64) * BLOCK
            slots += state.token_position % BLOCK
        else:
            here = depths.rows[depths.of(layer)]
            slots = here.slots
            positions = depths.positions if depths.dropping else positions
        q, k, v = model.project(layer, x, positions)
        cache[layer, slots] = torch.stack([k, v], 1)
        if plan is not None and plan.drops_after(layer):
            method.observe(plan, layer, q, k, SCALE, None)
        attended = torch.empty_like(q)
        for row, (live, _) in enumerate(rows):
            number = np.arange(here.seq_lens[row])
            mine = live.blocks[number // BLOCK].astype(np.int64) * BLOCK + number % BLOCK
            part = slice(int(here.query_start[row]), int(here.query_start[row + 1]))
            if part.stop > part.start:
                attended[part] = attention(q[part], *cache[layer, mine].unbind(1))[0]
        x = model.after(layer, x, attended)
        if plan is not None and plan.drops_after(layer):
            x = x[depths.drop(method.survivors(plan, layer))]
    if depths is None or not depths.dropping:
        return x, torch.ones(len(x), dtype=torch.bool)
    alive = depths.restore(torch.ones(len(x), 1), int(state.query_start[-1]))[:, 0] > 0
    return depths.restore(x, int(state.query_start[-1])), alive


class Twin:
    """One request with its whole answer, in float64, token by token where it matters."""

    def __init__(self, case: Case, request: Request, live: Live, model: Model) -> None:
        self.x, self.margin = live.x.double(), float("inf")
        self.tokens = list(range(len(self.x)))
        known = live.known
        settings = AdaTPSettings().override(request.settings)
        on = known is not None and settings.enabled
        prompt = len(self.x) - request.answer
        is_video = [] if known is None else known.is_video.tolist()
        videos = [t for t, video in enumerate(is_video) if video]
        asks = [t for t in range(max(videos, default=prompt) + 1, prompt)]
        asks = asks[-1:] if settings.queries == "last" else asks
        events: dict[int, float] = {}
        if on and asks:
            share = 1.0
            keep = (
                settings.keep * len(settings.layers) if len(settings.keep) == 1 else settings.keep
            )
            for layer, part in zip(settings.layers, keep, strict=True):
                share *= part
                events[layer - 1] = share
            places = case.extra["places"]
            means = [v.encoded().double().unflatten(0, (-1, places)).mean(1) for v in known.videos]
            of_frame = reference.segments(means, settings.tau_s)
            segment = [s for s in of_frame for _ in range(places)]
            place = list(range(places)) * len(of_frame)
        x, alive, first = self.x, list(range(len(videos))), True
        for layer in range(LAYERS):
            q, k, v = model.project(layer, x, torch.tensor(self.tokens))
            attended, probs = attention(q, k, v)
            x = model.after(layer, x, attended)
            if layer not in events:
                continue
            at = {token: i for i, token in enumerate(self.tokens)}
            columns = [at[videos[i]] for i in alive]
            score = probs[:, [at[t] for t in asks]][:, :, columns].mean((0, 1))
            self._note_margin(score)
            shares = [events[layer]] * (max(segment) + 1)
            alive = reference.survivors(
                score.tolist(), alive, segment, place, shares, first, settings
            )
            first, left = False, {videos[i] for i in alive}
            stay = [i for i, t in enumerate(self.tokens) if t in left or t not in set(videos)]
            x, self.tokens = x[stay], [self.tokens[i] for i in stay]
        self.output = dict(zip(self.tokens, x, strict=True))

    def _note_margin(self, score: torch.Tensor) -> None:
        ranked = score.sort().values
        if len(ranked) > 1:
            self.margin = min(self.margin, float((ranked[1:] - ranked[:-1]).min()))

    def compare(self, output: torch.Tensor, alive: torch.Tensor, done: int, count: int) -> Counter:
        """Which of the step's tokens got to the end, and with what."""
        mine = [done + i for i in alive.nonzero().flatten().tolist()]
        theirs = [t for t in self.tokens if done <= t < done + count]
        error = float("inf")
        if mine == theirs:
            error = relative_rms(output[alive], torch.stack([self.output[t] for t in mine]))
        if error < 1e-5:
            return Counter(sets=1)
        assert self.margin < TIE, f"alive {mine} instead of {theirs}, output differs by {error}"
        return Counter(sets=1, ties=1)
