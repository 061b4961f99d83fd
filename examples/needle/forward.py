"""The forward pass for training: the same mathematics as Hugging Face's, arranged for speed.

The vision tower runs on temporal patches one by one (they do not attend to each other). The
language model runs on a shared prefix, the video, and on many questions that all continue it: each
question sees the prefix and itself. The last layer is computed for the questions only.
`tests/unit/test_needle.py` holds it against Hugging Face's own forward pass.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
TAPS = (2, 4)  # `hints.py` reads the states after so many layers
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def pixels(frames) -> torch.Tensor:
    """What the processor makes of frames whose sides are multiples of 28.

    Args:
        frames: RGB uint8 [2 × patches, height, width, 3].

    Returns:
        float32 [patches, height/14 × width/14, 1176].
    """
    x = torch.from_numpy(frames).float().permute(0, 3, 1, 2)
    x = (x - 255 * MEAN[:, None, None]) / (255 * STD[:, None, None])
    count, _, height, width = x.shape
    rows, columns = height // 28, width // 28
    x = x.view(count // 2, 2, 3, rows, 2, 14, columns, 2, 14)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(count // 2, rows * columns * 4, 1176)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, but a CPU without AVX-512 computes it many times slower than float32."""
    native = device.type != "cpu" or torch.cpu._is_avx512_supported()
    return torch.bfloat16 if native else torch.float32


def vision(model, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Video tokens of temporal patches.

    Args:
        patches: from `pixels`, [patches, grid height × width × 4, 1176].
        grid: height and width in merged tokens.

    Returns:
        [patches, grid height × width, hidden], dtype of `patches`.
    """
    tower = model.model.visual
    heads = tower.config.num_heads
    x = F.linear(patches, tower.patch_embed.proj.weight.flatten(1).to(patches.dtype))
    count, length, width = x.shape
    cos, sin = _vision_rope(tower, grid, x)
    for block in tower.blocks:
        qkv = _linear(block.attn.qkv, _norm(block.norm1, x)).view(count, length, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + _linear(block.attn.proj, mixed)
        x = x + _mlp(block.mlp, _norm(block.norm2, x))
    merged = _norm(tower.merger.ln_q, x).reshape(count, length // 4, 4 * width)
    return _linear(tower.merger.mlp[2], F.gelu(_linear(tower.merger.mlp[0], merged)))


@dataclass
class Pass:
    """What one pass through the language model leaves.

    hidden: normed last states of the questions, [batch, S, hidden].
    prefix, questions: states at each of `TAPS` below the last layer, [batch, N, hidden] and
        [batch, S, hidden].
    looks: for each layer above the first tap how the watched question tokens share their attention
        to the prefix out, mean over the heads, float32 [batch, watched, N].
    linked: for each layer between the first tap and the second the attention of the watched prefix
        tokens, float32 [L, heads, N].
    """

    hidden: torch.Tensor = None
    prefix: list[torch.Tensor] = field(default_factory=list)
    questions: list[torch.Tensor] = field(default_factory=list)
    looks: list[torch.Tensor] = field(default_factory=list)
    linked: list[torch.Tensor] = field(default_factory=list)


def language(
    model,
    prefix,
    questions,
    prefix_at,
    questions_at,
    question_mask,
    prefix_mask=None,
    watched=None,
    links=None,
    choose=None,
) -> Pass:
    """Run the language model over a prefix and the questions that go on from it.

    Args:
        prefix: embeddings of the prompt up to the end of the videos, [batch, N, hidden].
        questions: embeddings of all questions one after the other, [batch, S, hidden].
        prefix_at, questions_at: M-RoPE positions, [3, batch, N] and [3, batch, S].
        question_mask: bool [S, N + S] or [batch, 1, S, N + S], what each question token sees.
        prefix_mask: bool [N, N], what each prefix token sees; None is causal.
        watched: question tokens whose attention is wanted, [batch, watched]; None for no tokens.
        links: prefix tokens whose attention is wanted, [L, 2 or more] (video, token, ...); None for
            no tokens. They are taken to see what comes before them.
        choose: what is seen in each layer, in place of both masks: called with the prefix's queries
            (None in the last layer, where nothing asks) and keys and the questions' queries, all
            [batch, heads, tokens, head size] after RoPE, it gives a bool mask of the prefix and one
            of the questions, [batch, heads, tokens, what they see].
    """
    decoder = model.model.language_model
    config = decoder.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head = config.hidden_size // heads
    group = heads // kv_heads
    x, y = prefix, questions
    rope_x, rope_y = (_text_rope(decoder, at, x.dtype) for at in (prefix_at, questions_at))
    made = Pass()
    mask = question_mask if question_mask.dim() == 4 else question_mask[None, None]

    def project(linear, states, rope=None):
        split = _linear(linear, states).view(*states.shape[:2], -1, head).transpose(1, 2)
        split = split if rope is None else _rotate(split, *rope)
        return split.repeat_interleave(group, 1) if split.shape[1] == kv_heads else split

    def join(mixed):
        return mixed.transpose(1, 2).flatten(2)

    for number, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        x_in, y_in = _norm(layer.input_layernorm, x), _norm(layer.input_layernorm, y)
        x_key, y_key = (
            project(attention.k_proj, states, rope)
            for states, rope in ((x_in, rope_x), (y_in, rope_y))
        )
        x_value, y_value = project(attention.v_proj, x_in), project(attention.v_proj, y_in)
        y_query = project(attention.q_proj, y_in, rope_y)
        more = number + 1 < len(decoder.layers)
        x_query = project(attention.q_proj, x_in, rope_x) if more else None
        if choose is not None:
            prefix_mask, mask = choose(x_query, x_key, y_query)
        if watched is not None and number >= TAPS[0]:
            rows = watched[:, None, :, None].expand(-1, heads, -1, head)
            scores = y_query.gather(2, rows).float() @ x_key.float().transpose(2, 3) * head**-0.5
            made.looks.append(scores.softmax(-1).mean(1))
        mixed = F.scaled_dot_product_attention(
            y_query,
            torch.cat((x_key, y_key), 2),
            torch.cat((x_value, y_value), 2),
            attn_mask=mask,
        )
        y = y + _linear(attention.o_proj, join(mixed))
        y = y + _mlp(layer.mlp, _norm(layer.post_attention_layernorm, y))
        if more:
            if links is not None and TAPS[0] <= number < TAPS[1]:
                made.linked.append(_attention_of(links, x_query, x_key))
            mixed = F.scaled_dot_product_attention(
                x_query, x_key, x_value, attn_mask=prefix_mask, is_causal=prefix_mask is None
            )
            x = x + _linear(attention.o_proj, join(mixed))
            x = x + _mlp(layer.mlp, _norm(layer.post_attention_layernorm, x))
        if number + 1 in TAPS and more:
            made.prefix.append(x)
            made.questions.append(y)
    made.hidden = _norm(decoder.norm, y)
    return made


def _attention_of(links, query, key):
    """Causal attention of the tokens `links` [L, 2 or more], float32 [L, heads, N]."""
    shares = [query.new_zeros(0, *key.shape[1:3], dtype=torch.float32)]
    for video in range(len(query)):
        tokens = links[links[:, 0] == video, 1].to(query.device)
        scores = query[video, :, tokens].float() @ key[video].float().transpose(1, 2)
        later = torch.arange(key.shape[2], device=query.device) > tokens[:, None]
        scores = (scores * query.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
        shares.append(scores.softmax(-1).transpose(0, 1))
    return torch.cat(shares)


def _linear(layer, x):
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def _norm(layer, x):
    return F.rms_norm(x, x.shape[-1:], layer.weight.to(x.dtype), layer.variance_epsilon)


def _mlp(layer, x):
    return _linear(layer.down_proj, F.silu(_linear(layer.gate_proj, x)) * _linear(layer.up_proj, x))


def _rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _vision_rope(tower, grid: tuple[int, int], like: torch.Tensor):
    """cos and sin [1, 1, patches of a frame, head size], patches in the processor's 2×2 order."""
    rows, columns = torch.meshgrid(
        torch.arange(2 * grid[0]), torch.arange(2 * grid[1]), indexing="ij"
    )
    at = torch.stack((rows, columns), -1).view(grid[0], 2, grid[1], 2, 2)
    at = at.permute(0, 2, 1, 3, 4).reshape(-1, 2).to(like.device)
    head = tower.config.hidden_size // tower.config.num_heads
    inverse = 1 / 10000 ** (torch.arange(0, head // 2, 2, device=like.device) / (head // 2))
    angles = (at[..., None] * inverse).flatten(1)
    angles = torch.cat((angles, angles), -1)[None, None]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _text_rope(decoder, at: torch.Tensor, dtype):
    """cos and sin [batch, 1, tokens, head size] for M-RoPE positions [3, batch, tokens]."""
    rope = decoder.config.rope_parameters
    inverse = decoder.rotary_emb.inv_freq.float()
    angles = at[..., None].float() * inverse
    if rope.get("mrope_interleaved"):
        axes = [n % 3 if n < 3 * rope["mrope_section"][n % 3] else 0 for n in range(len(inverse))]
        angles = torch.stack([angles[axis, ..., n] for n, axis in enumerate(axes)], -1)
    else:
        sections = angles.split(rope["mrope_section"], -1)
        angles = torch.cat([part[index % 3] for index, part in enumerate(sections)], -1)
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
