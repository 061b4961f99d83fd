"""What a sparsity method is: an essay for whoever adds the next one.

A *method* decides, for the requests of a step, what their layers leave out.  It lives in a folder
of its own, with its settings, its plan, its choice and its twin, and knows neither vLLM's model
runner nor a model: those call it, at six moments of a request's life.

1. **Settings.**  A frozen dataclass derived from :class:`~vllm_adaspark.settings.Settings` names
   the method's keys, their ranges, and who may set them.  vLLM's processor checks what a request
   asks for, and attaches it to the request's videos.
2. **A request arrives** (:meth:`Method.describe`).  Every worker is told of it by the scheduler, on
   the host, and the method makes of that whatever its plans need.  :meth:`Method.refuse` has said
   before, in the API server, what the request may not ask: an error there is an HTTP 400, while
   one in a worker ends the engine for everybody.
3. **A step begins** (:meth:`Method.plan`).  From the step's rows and what it knows of their
   requests the method makes one plan for all layers, on the host.  It reads nothing back from the
   device, and no choice may depend on which requests happen to share the step.  Without anything to
   do the plan is None and the step takes the stock path, untouched.
4. **A layer attends** (:meth:`Method.attend`), if the plan says that the method runs this layer.
   A :class:`AttentionCall` has the queries, the block sums, and the kernel of the backend that vLLM
   chose, which takes any choice of KV blocks.  Nothing here may wait for the device.
5. **A layer's FFN runs** (:meth:`Method.ffn`): a method may run it on some of the tokens; None
   means all of them, by the stock path.
6. **The step is over.**  Accounts, metrics and traces read the plan: what it kept in each layer.
   They are the same for every method whose plan is a :class:`~vllm_adaspark.paged.plan.StepPlan`.

What methods share over vLLM's paged KV cache (query tiles, block sums, tables, kernels) is in
``paged/``.  A method that no server uses costs nothing, and one needs no registration: a server is
started with ``--additional-config '{"method": "my_package.module:MyMethod"}'``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from ..paged.heads import HeadRanks
from ..paged.plan import StepPlan
from ..paged.state import KeySums, StepRows
from ..requests import Request
from ..settings import METHOD_KEY, Settings, SettingsError

BUILT_IN = {"adaspark": "vllm_adaspark.methods.adaspark.method:AdaSpark"}


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in one step, as a method sees it.

    Attributes:
        layer: its index in the model.
        query: ``[tokens, heads, head_size]``, this rank's.
        kv_heads: this rank's.
        scale: of the logits.
        sums: the keys' sums of each block; None if no plan has asked for any yet.
        head_ranks: the tensor-parallel ranks that hold the model's heads; None for a single rank.
        choose: makes the tables of a choice ``[sparse tiles, kv_heads, blocks]`` (bool, candidates
            to keep), and notes it for accounts and traces.
        run: attends by such tables, and writes the layer's output.
    """

    layer: int
    query: torch.Tensor
    kv_heads: int
    scale: float
    sums: KeySums | None
    head_ranks: HeadRanks | None
    choose: Callable[[torch.Tensor], Any]
    run: Callable[[Any], None]


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
    """

    layer: int
    x: torch.Tensor
    residual: torch.Tensor
    dense: Callable[[torch.Tensor], torch.Tensor]
    agree: Callable[[torch.Tensor], torch.Tensor]
    fused: Callable[..., torch.Tensor] | None


class Method(Protocol):
    """A sparsity method, made once per worker and once per API server.

    Args:
        settings: the server's.
        text_config: of the language model, Hugging Face's.
        device_type: where the layers run, as PyTorch says it.
    """

    settings_class: ClassVar[type[Settings]]
    settings: Settings

    def __init__(self, settings: Settings, text_config: Any, device_type: str) -> None: ...

    def refuse(self, settings: Settings, named: Any, is_video: np.ndarray) -> None:
        """Raise a ValueError for a request whose prompt cannot be run as its settings ask.

        Args:
            settings: the request's, the server's under it.
            named: what the request itself named.
            is_video: ``[prompt tokens]`` bool.
        """

    def describe(self, settings: Settings, is_video: np.ndarray) -> Request:
        """What plans need to know of a request with video."""

    def told(self, request: Request) -> dict[str, Any]:
        """What a request runs under, for its account: JSON-ready.

        ``off`` says that nothing can be left out; ``budget``, where there is one, what was asked
        and whether it can be kept.  The rest is shown as the request's settings.
        """

    def plan(
        self, rows: StepRows, requests: Sequence[Any], device: torch.device
    ) -> StepPlan | None:
        """The plan of a step; ``requests [rows]`` as :meth:`describe` made them, None without."""

    def attend(self, plan: StepPlan, call: AttentionCall) -> None:
        """Run the attention of a layer for which ``plan.attends(layer)``."""

    def ffn(self, plan: StepPlan, call: FFNCall) -> torch.Tensor | None:
        """The FFN's output ``[tokens, hidden]``, or None for the stock one."""


def load(name: str) -> type[Method]:
    """A method by its name, or by ``module:class``.

    Raises:
        SettingsError: there is none.
    """
    module, _, cls = BUILT_IN.get(name, name).partition(":")
    try:
        return getattr(import_module(module), cls)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise SettingsError(
            f"--additional-config {METHOD_KEY}={name!r}: no such method ({error}); allowed: "
            f"{', '.join(BUILT_IN)}, or module:class"
        ) from error


def of_model(hf_config: Any, device_type: str) -> Method:
    """The server's method, as startup.StartupCheck left it on the model's config."""
    told: Mapping[str, Any] = getattr(hf_config, "adaspark_resolved", None) or {}
    method = load(told.get(METHOD_KEY, "adaspark"))
    settings = method.settings_class().override(told.get("settings"))
    return method(settings, hf_config.get_text_config(), device_type)
