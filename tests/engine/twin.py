"""Whole naive models with AdaSpark: Hugging Face's modules, the reference's rules.

No vLLM, no pages, no batching: what the engine must agree with.  Positions are vLLM's; those of
Qwen2.5-VL differ from Hugging Face's after a video, whose largest position + 1 is the text's first.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    AutoProcessor,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from vllm_adaspark.methods.adaspark.reference import Tile, tile_attention, tile_ffn
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.video.order import cube_order


class TwinModel:
    """Qwen2.5-VL: one request at a time, token by token after the prompt, in float32."""

    model_class = Qwen2_5_VLForConditionalGeneration

    def __init__(self, checkpoint, config: AdaSparkConfig) -> None:
        self.config = config
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = self.model_class.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.text = self.model.model.language_model
        self.tiles: list[list[Tile]] = []  # per layer, of the last forward
        self.kept: list[set[int]] = []  # per video of the last prompt: the tokens not dropped
        self.margins: list[float] = []  # per video of which some were

    @torch.inference_mode()
    def logprobs(self, prompt: str, video, answer: list[int], images=()) -> list[torch.Tensor]:
        """Log-probabilities ``[vocab]`` of each token of ``answer``, given the tokens before.

        ``video`` is one video or a list of several.
        """
        embeddings, positions, is_video = self._prompt(prompt, video, images)
        caches = [None] * len(self.text.layers)
        result = []
        for token in [None, *answer[:-1]]:
            if token is not None:
                embeddings = self.text.embed_tokens(torch.tensor([token]))
                positions = positions[:, -1:].max() + 1 + torch.zeros_like(positions[:, :1])
                is_video = torch.cat([is_video, torch.tensor([False])])
            hidden = self._forward(embeddings, positions, is_video, caches)
            result.append(self.model.lm_head(hidden[-1]).log_softmax(-1))
        return result

    def _prompt(self, prompt: str, video, images=()):
        """(embeddings ``[n, hidden]``, positions ``[3, n]``, is_video ``[n]``), token by token."""
        videos = video if isinstance(video, list) else [video]
        inputs = self.processor(
            text=[prompt],
            images=list(images) or None,
            videos=[list(frames) for frames, _ in videos],
            video_metadata=[
                {k: v for k, v in metadata.items() if k != "do_sample_frames"}
                for _, metadata in videos
            ],
            do_sample_frames=False,
            return_tensors="pt",
        )
        video_token, image_token = (
            getattr(self.model.config, name) for name in ("video_token_id", "image_token_id")
        )
        media = {video_token: self._videos(inputs), image_token: self._images(inputs)}
        embeddings, positions, is_video = [], [], []
        self.kept, self.margins = [], []
        ids, at, free = inputs["input_ids"][0].tolist(), 0, 0  # free: the next position
        while at < len(ids):
            if ids[at] not in media:
                embeddings.append(self.text.embed_tokens(torch.tensor(ids[at])))
                positions.append((free, free, free))
                is_video.append(False)
                at, free = at + 1, free + 1
                continue
            encoded, (t, h, w), per_frame, token_order, keep = next(media[ids[at]])
            places = [(int(i // (h * w) * per_frame), i // w % h, i % w) for i in range(t * h * w)]
            for i in token_order:
                if i in keep:
                    embeddings.append(encoded[i])
                    positions.append(tuple(free + place for place in places[i]))
                    is_video.append(ids[at] == video_token)
            free += 1 + max(max(place) for place in places)  # of the whole video
            at += len(places)
        return torch.stack(embeddings), torch.tensor(positions).T, torch.tensor(is_video)

    def _videos(self, inputs):
        """Of each: embeddings, grid, positions per frame, token order, tokens that are kept."""
        per_second = self.model.config.vision_config.tokens_per_second
        seconds = torch.as_tensor(inputs["second_per_grid_ts"]).flatten().tolist()
        encoded = self._encode(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        for (video, grid), apart in zip(encoded, seconds, strict=True):
            token_order = cube_order(grid, self.config.cube, self.config.order).tolist()
            self.kept.append(self._most_novel(video, grid))
            yield video, grid, apart * per_second, token_order, self.kept[-1]

    def _images(self, inputs):
        if "pixel_values" in inputs:
            for image, grid in self._encode(inputs["pixel_values"], inputs["image_grid_thw"]):
                yield image, grid, 1, range(len(image)), range(len(image))

    def _encode(self, pixels, grids):
        encoded = self.model.model.visual(pixels, grid_thw=grids)
        encoded = getattr(encoded, "pooler_output", encoded)
        sizes = [(t, h // 2, w // 2) for t, h, w in grids.tolist()]
        yield from zip(encoded.split([int(np.prod(size)) for size in sizes]), sizes, strict=True)

    def _most_novel(self, video, grid) -> set[int]:
        """The tokens that ``prune`` keeps; ``margins`` says how clear the choice was."""
        t, h, w = grid
        number, frame = t * h * w, h * w
        novelty = [3.0] * frame
        for i in range(frame, number):
            now, before = video[i].double(), video[i - frame].double()
            novelty.append(float(1 - now @ before / (now.norm() * before.norm())))
        stay = max(frame, number * (1000 - round(1000 * self.config.dropped_share)) // 1000)
        ranked = sorted(range(number), key=lambda i: -novelty[i])
        if stay < number:
            self.margins.append(novelty[ranked[stay - 1]] - novelty[ranked[stay]])
        return set(ranked[:stay])

    def _forward(self, x, positions, is_video, caches) -> torch.Tensor:
        start = len(is_video) - len(x)
        cos, sin = self._rope(x[None], positions)
        self.tiles = []
        for index, layer in enumerate(self.text.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(x)
            q, k, v = (
                projection(normed).unflatten(-1, (-1, attention.head_dim))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = self._rotate(q, k, cos, sin)
            if caches[index] is not None:
                past_k, past_v = caches[index]
                k, v = torch.cat([past_k, k]), torch.cat([past_v, v])
            caches[index] = (k, v)
            q = torch.cat([q.new_zeros(start, *q.shape[1:]), q])
            attended = self._attend(q, k, v, normed, is_video, start, index)
            x = x + attention.o_proj(attended.flatten(1))
            normed = layer.post_attention_layernorm(x)
            x = x + self._ffn(x, normed, is_video, start, index)
        return self.text.norm(x)

    def _rope(self, x, positions):
        """cos and sin ``[1, n, d]`` of positions ``[3, n]``."""
        return self.text.rotary_emb(x, positions[:, None])

    def _attend(self, q, k, v, normed, is_video, start: int, index: int) -> torch.Tensor:
        """Attention of the tokens from ``start`` on, ``[n, heads, d]``; q, k, v are of all."""
        step = (start, len(is_video))
        block = self.config.cube_volume
        attended, tiles = tile_attention(q, k, v, is_video, block, step, self.config, layer=index)
        self.tiles.append(tiles)
        return attended

    def _ffn(self, x, normed, is_video, start: int, index: int) -> torch.Tensor:
        """The FFN's output of the tokens from ``start`` on, ``[n, hidden]``."""
        pad = x.new_zeros(start, x.shape[1])
        branch, _ = tile_ffn(
            torch.cat([pad, x]),
            torch.cat([pad, normed]),
            self.text.layers[index].mlp,
            is_video,
            self.config.cube_volume,
            (start, len(is_video)),
            self.config,
            layer=index,
        )
        return branch

    @staticmethod
    def _rotate(q, k, cos, sin):
        """RoPE on ``[n, heads, d]``."""
        q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q[0].transpose(0, 1), k[0].transpose(0, 1)


class LlavaTwin(TwinModel):
    """LLaVA-OneVision: one position a token, kept where the order is not the raster's."""

    model_class = LlavaOnevisionForConditionalGeneration

    def _prompt(self, prompt: str, video, images=()):
        frames, _ = video
        inputs = self.processor(text=prompt, videos=[list(frames)], return_tensors="pt")
        ids = inputs["input_ids"][0]
        encoded = self.model.model.get_video_features(
            inputs["pixel_values_videos"],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        encoded = getattr(encoded, "pooler_output", encoded)
        encoded = encoded.reshape(-1, encoded.shape[-1])[: len(frames) * self._side**2]
        grid = (len(frames), self._side, self._side)
        token_order = torch.from_numpy(cube_order(grid, self.config.cube, self.config.order).copy())
        (place,) = (ids == self.model.config.video_token_id).nonzero(as_tuple=True)
        place, newline = place[:-1], place[-1]
        embeddings = self.text.embed_tokens(ids)
        embeddings[place] = encoded[token_order]
        embeddings[newline] = self.model.model.image_newline
        positions = torch.arange(len(ids))
        positions[place] = place[0] + token_order
        is_video = torch.zeros(len(ids), dtype=torch.bool)
        is_video[place] = True
        return embeddings, positions[None], is_video

    @property
    def _side(self) -> int:
        vision = self.model.config.vision_config
        return -(-(vision.image_size // vision.patch_size) // 2)

    def _rope(self, x, positions):
        return self.text.rotary_emb(x, positions)
