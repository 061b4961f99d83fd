"""Naive models whose layers drop video tokens: Hugging Face's modules, our rules in loops.

One request at a time; every layer has a list of the tokens that it sees, and a cache of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.twin import TwinModel
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.methods.adatp import reference
from vllm_adaspark.methods.adatp.settings import AdaTPSettings


@dataclass
class Token:
    """One token on its way through the layers."""

    position: torch.Tensor  # [3], or [1] without M-RoPE
    video: int | None  # which of the prompt's video tokens it is
    asks: bool


class PrunedTwin:
    """Log-probabilities of answers, token by token.

    Args:
        checkpoint: folder of a model in float32.
        model: its twin without pruning, for its prompt and its rotation.
        pairs: frames that a place in time of the video's tokens stands for.
        newlines: tokens behind a video that are neither video nor text.
    """

    def __init__(self, checkpoint, model=TwinModel, pairs: int = 2, newlines: int = 0) -> None:
        self.stock = model(checkpoint, AdaSparkConfig().override({"order": "raster"}))
        self.text = self.stock.text
        self.pairs, self.newlines = pairs, newlines
        # (frames [frames, d], question [d]) of an encoder, for the next answers; None: neither.
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self.alive: list[list[int]] = []  # video tokens after each event, of the last answer

    @torch.inference_mode()
    def logprobs(
        self,
        prompt: str,
        video,
        answer: list[int],
        settings: AdaTPSettings,
        layers: tuple[int, ...] = (),
        shares: tuple[float, ...] = (),
    ) -> list[torch.Tensor]:
        """Log-probabilities ``[vocab]`` of each token of ``answer``, given the tokens before.

        Args:
            prompt: with one video, or none.
            video: frames and metadata; None for text alone.
            answer: token ids.
            settings: of the request.
            layers: after which tokens are dropped, counted from 1; none for a dense request.
            shares: of the video tokens that are left after each of them.
        """
        if video is None:
            ids = torch.tensor(self.stock.processor.tokenizer(prompt)["input_ids"])
            x, positions = self.text.embed_tokens(ids), torch.arange(len(ids)).expand(3, -1)
            is_video = [False] * len(ids)
        else:
            x, positions, is_video = self.stock._prompt(prompt, video)
            is_video = is_video.tolist()
        last = max((i for i, of_video in enumerate(is_video) if of_video), default=len(is_video))
        last += self.newlines
        number = iter(range(len(is_video)))
        tokens = [
            Token(positions[:, i], next(number) if is_video[i] else None, i > last)
            for i in range(len(is_video))
        ]
        if settings.queries == "last":
            for token in tokens[:-1]:
                token.asks = False
        if layers:
            self._cut(x[is_video], video, settings)
        caches: list = [None] * len(self.text.layers)
        result, at = [], int(positions.max())
        for token in [None, *answer[:-1]]:
            if token is not None:
                at += 1
                x = self.text.embed_tokens(torch.tensor([token]))
                tokens = [Token(torch.full((len(positions),), at), None, False)]
            events = dict(zip(layers, shares, strict=True)) if token is None else {}
            hidden = self._forward(x, tokens, caches, events, settings)
            result.append(self.stock.model.lm_head(hidden[-1]).log_softmax(-1))
        return result

    def _cut(self, encoded: torch.Tensor, video, settings: AdaTPSettings) -> None:
        """Segments and places of the video's tokens."""
        frames = len(video[0]) // self.pairs
        of_frame = encoded.unflatten(0, (frames, -1))
        shown = of_frame.mean(1) if self.seen is None else self.seen[0]
        segments = reference.segments([shown], settings.tau_s)
        self.about = [False] * (segments[-1] + 1)
        if self.seen is not None:
            self.about = reference.relevant(*self.seen, segments, settings.tau_t)
        places = of_frame.shape[1]
        self.segment = [segment for segment in segments for _ in range(places)]
        self.place = [*range(places)] * frames

    def _forward(self, x, tokens, caches, events, settings) -> torch.Tensor:
        self.alive = [] if events else self.alive
        for index, layer in enumerate(self.text.layers):
            attention = layer.self_attn
            positions = torch.stack([token.position for token in tokens], dim=1)
            cos, sin = self.stock._rope(x[None], positions)
            normed = layer.input_layernorm(x)
            q, k, v = (
                projection(normed).unflatten(-1, (-1, attention.head_dim))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = self.stock._rotate(q, k, cos, sin)
            if caches[index] is not None:
                k, v = torch.cat([caches[index][0], k]), torch.cat([caches[index][1], v])
            caches[index] = k, v
            group = q.shape[1] // k.shape[1]
            keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            logits = torch.einsum("qhd,khd->hqk", q, keys) * attention.head_dim**-0.5
            future = torch.arange(len(k)) > torch.arange(len(k) - len(q), len(k))[:, None]
            probs = logits.masked_fill(future, float("-inf")).softmax(-1)
            x = x + attention.o_proj(torch.einsum("hqk,khd->qhd", probs, values).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if index + 1 in events:
                asking = [i for i, token in enumerate(tokens) if token.asks]
                videos = [i for i, token in enumerate(tokens) if token.video is not None]
                score = probs[:, asking][:, :, videos].mean((0, 1)).tolist()
                alive = reference.survivors(
                    score,
                    [tokens[i].video for i in videos],
                    self.segment,
                    self.place,
                    reference.boosted(
                        events[index + 1],
                        [self.segment.count(s) for s in range(len(self.about))],
                        self.about,
                        settings,
                    ),
                    not self.alive,
                    settings,
                )
                self.alive.append(alive)
                left = set(alive)
                stay = [i for i, t in enumerate(tokens) if t.video is None or t.video in left]
                x, tokens = x[stay], [tokens[i] for i in stay]
        return self.text.norm(x)
