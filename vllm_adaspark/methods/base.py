"""What a sparsity method is: an essay for whoever adds the next one.

A *method* decides, for the requests of a step, what their layers leave out.  It lives in a folder
of its own, with its settings, its plan, its choice and its twin, and knows neither vLLM's model
runner nor a model: those call it, at six moments of a request's life.

1. **Settings.**  A frozen dataclass derived from :class:`~vllm_adaspark.settings.Settings` names
   the method's keys, their ranges, and who may set them.  vLLM's processor checks what a request
   asks for, and attaches it to the request's videos.
   :meth:`Method.check_server` has had its say before that, when the server starts.
2. **A request arrives** (:meth:`Method.describe`).  Every worker is told of it by the scheduler, on
   the host, and the method makes of that whatever its plans need.  :meth:`Method.refuse` has said
   before, in the API server, what the request may not ask: an error there is an HTTP 400, while
   one in a worker ends the engine for everybody.
3. **A step begins** (:meth:`Method.plan`).  From the step's rows and what it knows of their
   requests the method makes one plan for all layers, on the host.  It reads nothing back from the
   device, and no choice may depend on which requests happen to share the step.  Without anything to
   do the plan is None and the step takes the stock path, untouched.
4. **A layer attends** (:meth:`Method.attend`), if the plan says that the method runs this layer.
   A :class:`AttentionCall` has the queries, the block summaries, and the kernel of the backend that
   vLLM chose, which takes any choice of KV blocks.  A method may have weights of its own there
   (:meth:`Method.attention_modules`).  Nothing here may wait for the device.
5. **A layer's FFN runs** (:meth:`Method.ffn`): a method may run it on some of the tokens; None
   means all of them, by the stock path.  Between layers it may drop tokens, if the plan has
   ``depths`` (:meth:`Method.observe`, :meth:`Method.survivors`).
6. **The step is over.**  Accounts, metrics and traces read the plan: what it kept in each layer.
   They are the same for every method whose plan is a :class:`~vllm_adaspark.paged.plan.StepPlan`;
   one that is not made of tiles says itself what it cost (``StepPlan.tell``).

What methods share over vLLM's paged KV cache (query tiles, block summaries, tables, kernels) is in
``paged/``.  A method that no server uses costs nothing, and one needs no registration: a server is
started with ``--additional-config '{"method": "my_package.module:MyMethod"}'``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch

from ..accounts.flops import ModelShape
from ..paged.heads import HeadRanks
from ..paged.plan import StepPlan
from ..paged.state import BlockSummaries, BlockSums, StepRows
from ..requests import Prompt, Request
from ..settings import METHOD_KEY, Settings, SettingsError, shown
from . import OF_ARCHITECTURE

BUILT_IN = {
    "adaspark": "vllm_adaspark.methods.adaspark.method:AdaSpark",
    "adatp": "vllm_adaspark.methods.adatp.method:AdaTP",
    "videonsa": "vllm_adaspark.methods.videonsa.method:VideoNSA",
}

# For ``scheduler_config.scheduler_cls``: it heeds ``Settings.one_step`` and Method.uncut_blocks.
SCHEDULER = "vllm_adaspark.scheduler.scheduler_for"


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in one step, as a method sees it.

    Attributes:
        layer: its index in the model.
        query: ``[tokens, heads, head_size]``, this rank's.
        key: ``[tokens, kv_heads, head_size]``, this rank's; already in the cache.
        value: the same of the values.
        hidden: ``[tokens, hidden]`` the layer's normed input; None unless ``wants_hidden``.
        output: ``[tokens, heads, head_size]``, to be written.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, the layer's; how keys and
            values lie in a block is the backend's, so only kernels for one look inside.
        kv_heads: this rank's.
        scale: of the logits.
        key_summaries: what is kept of each block's keys (``Settings.key_summary``); None if no plan
            has asked for any yet.
        value_summaries: the sums of each block's values; None unless
            ``Settings.summaries_per_block`` is 2.
        modules: the layer's, as :meth:`Method.attention_modules` made them, by name.
        head_ranks: the tensor-parallel ranks that hold the model's heads; None for a single rank.
        choose: for a plan made of tiles: makes the tables of a choice ``[sparse tiles, kv_heads,
            blocks]`` (bool, candidates to keep), and notes it for accounts and traces.
        run: for a plan made of tiles: attends by such tables, and writes the layer's output.
        run_sequences: attends by any sequences over the layer's KV cache, with the kernel of the
            backend that vLLM chose: ``(query [queries, heads, head_size], sequences, output)``.
            ``window=n`` lets a query see its last n keys only.  ``one_kv_head=True`` is for
            sequences that see one KV head each, whose block b is ``b * kv_heads + head`` in their
            tables, and whose queries have the heads of one GQA group.  ``cache`` is a scratch cache
            to attend over in place of the layer's.
        scratch_cache: a paged cache like the layer's, for keys and values that are not the
            model's: ``(key, value [n, kv_heads, head_size])``, which fill its blocks 0, 1, ...
        mapped: a context for calling ``modules`` on some of the step's tokens, which it is given
            as an index: LoRA adapters are found by position (models/token_mapping.py).
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    hidden: torch.Tensor | None
    output: torch.Tensor
    kv_cache: torch.Tensor
    kv_heads: int
    scale: float
    key_summaries: BlockSummaries | None
    value_summaries: BlockSums | None
    modules: Mapping[str, torch.nn.Module]
    head_ranks: HeadRanks | None
    choose: Callable[[torch.Tensor], Any]
    run: Callable[[Any], None]
    run_sequences: Callable[..., None]
    scratch_cache: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    mapped: Callable[[Any], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class FFNCall:
    """One layer's FFN in one step, as a method sees it.

    Attributes:
        layer: its index in the model.
        x: ``[tokens, hidden]`` the FFN's input.
        residual: ``[tokens, hidden]`` the stream before the norm that made ``x``.
        dense: the stock FFN, ``[n, hidden]`` to ``[n, hidden]``, token by token.
        agree: makes a choice of tokens the same on all tensor-parallel ranks.
        fused: runs the FFN of some tokens without the host knowing how many,
            ``(x, active, plan)`` to ``[tokens, hidden]``; None where that cannot be done.
        mapped: a context for calling ``dense`` on inputs that stand for some of the step's tokens,
            as in :class:`AttentionCall`.
    """

    layer: int
    x: torch.Tensor
    residual: torch.Tensor
    dense: Callable[[torch.Tensor], torch.Tensor]
    agree: Callable[[torch.Tensor], torch.Tensor]
    fused: Callable[..., torch.Tensor] | None
    mapped: Callable[[Any], AbstractContextManager] = nullcontext


class Method:
    """A sparsity method, made once per worker and once per API server.

    A method derives from this class and overrides what it needs; what it leaves alone does nothing.

    Args:
        settings: the server's.
        text_config: of the language model, Hugging Face's.
        device_type: where the layers run, as PyTorch says it.

    Attributes:
        settings_class: the class of its settings.
        media: the kinds of multimodal items whose tokens count as ``is_video``.  A request that
            has none of them never reaches the method, and runs as in stock vLLM.
        wants_hidden: whether attention needs the layer's normed input (``AttentionCall.hidden``).
            Only then does the attention op carry it.
        tokens_choose: whether each video token makes a choice of its own, so that traces need more
            room than with one for each cube.
        settings: the server's.
        step_tokens: the most tokens that a step of this server holds; None where nobody said.
        agree: makes a tensor the same on all tensor-parallel ranks; the model sets it.
    """

    settings_class: ClassVar[type[Settings]]
    media: ClassVar[tuple[str, ...]] = ("video",)
    wants_hidden: ClassVar[bool] = False
    tokens_choose: ClassVar[bool] = False

    settings: Settings
    step_tokens: int | None = None
    agree: Callable[[torch.Tensor], torch.Tensor] = staticmethod(lambda tensor: tensor)

    def __init__(self, settings: Settings, text_config: Any, device_type: str) -> None:
        self.settings, self._text_config, self._device_type = settings, text_config, device_type

    @cached_property
    def shape(self) -> ModelShape:
        """Sizes of a layer, which FLOPs are counted by."""
        return ModelShape.of(self._text_config, self._device_type, self.settings.key_summary)

    @classmethod
    def check_server(cls, settings: Settings, vllm_config: Any) -> None:
        """Settle what the method needs of vLLM's configuration, before anything is built.

        Raises:
            SettingsError: the method cannot work with this model or these options.
        """

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load what the method needs beside the model, in a worker.

        It is called while the model is made, so that vLLM counts the memory.
        """

    @classmethod
    def attention_modules(
        cls, text_config: Any, quant_config: Any, prefix: str
    ) -> dict[str, torch.nn.Module]:
        """Weights of its own in a layer's attention, by their name there.

        They are made with the layer, before weights are loaded, and must be sharded as the layer's
        own heads are.  ``prefix`` is the attention's name in the model.
        """
        return {}

    def step_bytes(self, tokens: int, heads: int, kv_heads: int, head_size: int, item: int) -> int:
        """Memory that a layer takes in a step of so many tokens.

        Where KV blocks have sums, block tables and queries come on top.  On a GPU the
        KV cache leaves room for it.  ``heads`` and ``kv_heads`` are a rank's, ``item`` the bytes of
        an activation's number.
        """
        return 0

    def refuse(self, settings: Settings, named: Any, prompt: Prompt) -> None:
        """Raise a ValueError for a request whose prompt cannot be run as its settings ask.

        Args:
            settings: the request's, the server's under it.
            named: what the request itself named.
            prompt: where its videos and images lie.
        """

    def describe(self, settings: Settings, prompt: Prompt) -> Request:
        """What plans need to know of a request that has some of ``media``."""
        return Request(settings, prompt.of(self.media))

    def told(self, request: Request) -> dict[str, Any]:
        """What a request runs under, for its account: JSON-ready.

        ``off`` says that nothing can be left out; ``budget``, where there is one, what was asked
        and whether it can be kept.  The rest is shown as the request's settings.
        """
        raise NotImplementedError

    @classmethod
    def uncut_blocks(cls, settings: Settings, prompt: Prompt) -> np.ndarray | None:
        """``[blocks]`` int: the KV blocks of a prompt that no chunk should end in; None for none.

        A chunk that would end in a block ends before the one that is named here, which is itself or
        the first of those that it chooses together with; -1 lets a chunk end anywhere in it.  No
        prefix hit ends between blocks that choose together either.

        So that a choice does not depend on where the scheduler ends a chunk, which follows from
        what else is in a step.  The scheduler sees to it (scheduler.py), if :meth:`check_server`
        has chosen ours.
        """
        return None

    def plan(
        self, rows: StepRows, requests: Sequence[Any], device: torch.device
    ) -> StepPlan | None:
        """The plan of a step; ``requests [rows]`` as :meth:`describe` made them, None without."""
        raise NotImplementedError

    def attend(self, plan: StepPlan, call: AttentionCall) -> None:
        """Run the attention of a layer for which ``plan.attends(layer)``."""
        raise NotImplementedError

    def observe(
        self,
        plan: StepPlan,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        head_ranks: HeadRanks | None,
    ) -> None:
        """Look at a layer's attention, for which ``plan.drops_after(layer)``, before it runs.

        Args:
            plan: of the step.
            layer: its index in the model.
            query: ``[tokens, heads, head_size]`` after RoPE, this rank's.
            key: ``[tokens, kv_heads, head_size]`` likewise.
            scale: of the logits.
            head_ranks: as in :class:`AttentionCall`.
        """

    def survivors(self, plan: StepPlan, layer: int) -> torch.Tensor:
        """Which tokens go on after a layer for which ``plan.drops_after(layer)``.

        Returns:
            ``[tokens of the layer]`` bool; as many are True as the next depth has tokens
            (paged/depths.py).
        """
        raise NotImplementedError

    def ffn(self, plan: StepPlan, call: FFNCall) -> torch.Tensor | None:
        """The FFN's output ``[tokens, hidden]``, or None for the stock one.

        It is asked for in steps whose ``plan.ffn`` is not None.  What it leaves out is counted and
        traced if it says so (``StepPlan.ran``).
        """
        return None


def method_name(additional: Mapping[str, Any] | None, architectures: Sequence[str]) -> str:
    """The method that an operator asked for, or the one that the checkpoint was trained for.

    Args:
        additional: what ``--additional-config`` says.
        architectures: of the checkpoint's config.json.

    Raises:
        SettingsError: the checkpoint was trained for another method than the operator names.
    """
    asked = (additional or {}).get(METHOD_KEY)
    trained = next((OF_ARCHITECTURE[a] for a in architectures if a in OF_ARCHITECTURE), None)
    if asked is not None and trained is not None and asked != trained:
        raise SettingsError(
            f"--additional-config {METHOD_KEY}={asked!r}: a checkpoint of architecture "
            f"{', '.join(architectures)} was trained for {trained} and has weights that no other "
            f"method uses; leave {METHOD_KEY} out"
        )
    return trained or "adaspark" if asked is None else asked


def load(name: str) -> type[Method]:
    """A method by its name, or by ``module:class``.

    Raises:
        SettingsError: there is none.
    """
    try:
        module, _, cls = BUILT_IN.get(name, name).partition(":")
        method = getattr(import_module(module), cls)
        if not issubclass(method, Method) or not issubclass(method.settings_class, Settings):
            raise TypeError("it must derive from Method, and its settings from Settings")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise SettingsError(
            f"--additional-config {METHOD_KEY}={shown(name)}: no such method ({error}); allowed: "
            f"{', '.join(BUILT_IN)}, or module:class"
        ) from error
    return method


def method_class(hf_config: Any) -> type[Method]:
    """The class of the server's method, as startup.StartupCheck left it on the model's config."""
    return load(_resolved(hf_config).get(METHOD_KEY, "adaspark"))


def server_settings(hf_config: Any) -> Settings:
    """The server's settings, as startup.StartupCheck left them on the model's config."""
    settings = method_class(hf_config).settings_class()
    return settings.override(_resolved(hf_config).get("settings"))


def of_model(hf_config: Any, device_type: str) -> Method:
    """The server's method, as startup.StartupCheck left it on the model's config."""
    settings = server_settings(hf_config)
    made = method_class(hf_config)(settings, hf_config.get_text_config(), device_type)
    made.step_tokens = _resolved(hf_config).get("step_tokens")
    return made


def _resolved(hf_config: Any) -> Mapping[str, Any]:
    return getattr(hf_config, "adaspark_resolved", None) or {}
