"""What a running engine's layers choose, to compare two runs of the same requests.

:func:`record` is sent to the workers of an engine (``collective_rpc``); from then on every choice
is noted under its request, layer and first token, by logical blocks: the same request
has the same record wherever its blocks lie and whatever shares its steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# (vLLM's request id, what, layer, first token) -> every choice that was made there.  What is
# "cubes" or "ffn" (AdaSpark), "blocks" (VideoNSA) or "alive" (AdaTP).
Choices = dict[tuple[str, str, int, int], list[np.ndarray]]


class Recorder:
    """Notes a worker's choices, by standing before the functions that make them."""

    def __init__(self, runtime: Any) -> None:
        from vllm_adaspark.methods.adaspark import method as adaspark
        from vllm_adaspark.methods.adatp.method import AdaTP
        from vllm_adaspark.methods.videonsa import attend
        from vllm_adaspark.methods.videonsa import method as videonsa

        self._runtime, self._layer = runtime, 0
        self.choices: Choices = {}
        self._stock: list[tuple[Any, str, Any]] = []
        for where, name, noted in (
            (adaspark, "choose_cubes", self._cubes),
            (adaspark, "active_tokens", self._tokens),
            (videonsa, "attend", self._attends),
            (attend, "compress", self._blocks),
            (AdaTP, "survivors", self._alive),
        ):
            self._stock.append((where, name, getattr(where, name)))
            setattr(where, name, noted(getattr(where, name)))

    def stop(self) -> None:
        for where, name, stock in self._stock:
            setattr(where, name, stock)

    def _note(self, what: str, layer: int, row: int, first: int, choice: np.ndarray) -> None:
        request = self._runtime.request_ids()[row]
        kept = self.choices.setdefault((request, what, layer, first), [])
        if not any(np.array_equal(choice, before) for before in kept):
            kept.append(choice)

    def _cubes(self, choose: Any) -> Any:
        def recording(query, sums, plan, scale, layer, *args):
            chosen = choose(query, sums, plan, scale, layer, *args)
            sparse = plan.sparse_tiles.numpy()
            first = self._runtime.rows.token_position[plan.tiles.start[sparse]]
            for nth, tile in enumerate(sparse):
                own = plan.tiles.block[tile]
                # A block that is no candidate counts as kept: it is attended in any case.
                choice = (chosen[nth] | ~plan.candidates[nth])[:, :own].numpy()
                self._note("cubes", layer, plan.tiles.row[tile], int(first[nth]), choice)
            return chosen

        return recording

    def _tokens(self, choose: Any) -> Any:
        def recording(x, residual, plan, layer):
            active = choose(x, residual, plan, layer)
            first = self._runtime.rows.token_position[plan.tokens[:, 0].numpy()]
            for row, start, choice in zip(plan.row, first, active.numpy(), strict=True):
                self._note("ffn", layer, row, int(start), choice.copy())
            return active

        return recording

    def _attends(self, attend: Any) -> Any:
        def recording(step, call):
            self._layer = call.layer
            return attend(step, call)

        return recording

    def _blocks(self, compress: Any) -> Any:
        """What each token selects, which ``compress`` also writes down for traces."""

        def recording(query, plan, *args):
            *args, traced = args
            if traced is None:
                traced = torch.zeros(plan.number, query.shape[1], plan.blocks, dtype=torch.bool)
            output = compress(query, plan, *args, traced)
            rows = self._runtime.rows
            tokens = np.arange(len(rows.token_row))[plan.vision]
            for token, choice in zip(tokens, traced.numpy(), strict=True):
                position = int(rows.token_position[token])
                own = choice[:, : position // 64]
                self._note("blocks", self._layer, rows.token_row[token], position, own.copy())
            return output

        return recording

    def _alive(self, survivors: Any) -> Any:
        """Which tokens of a prompt go on; of an answer all do."""

        def recording(method, plan, layer):
            keep = survivors(method, plan, layer)
            start = plan.depths.rows[plan.depths.of(layer)].query_start
            for prompt in plan.prompts:
                known, pruning = prompt.request, prompt.pruning
                passed = sum(event < layer for event in known.cost.events)
                number = len(known.is_video) - int(pruning.dropped[passed])
                first = int(start[prompt.row])
                mine = keep[first : first + number].numpy().copy()
                self._note("alive", layer, prompt.row, 0, mine)
            return keep

        return recording


def record(worker: Any) -> None:
    """Note all choices from now on."""
    worker.fuzz_recorder = Recorder(worker._runtime)


def stop(worker: Any) -> Choices:
    """The choices since :func:`record`."""
    worker.fuzz_recorder.stop()
    return worker.fuzz_recorder.choices


def recorded(llm: Any, ask: Any) -> tuple[Any, dict[int, dict]]:
    """What ``ask()`` returns, and the choices of each request that it made, by its number in them.

    A request that chose nothing is not among them.  Choices of several ranks are put together, KV
    head behind KV head.
    """
    first = llm.request_counter.counter
    llm.collective_rpc(record)
    try:
        answers = ask()
    finally:
        ranks = llm.collective_rpc(stop)
    by_request: dict[int, dict] = {}
    for key in ranks[0]:
        request, *where = key
        number = int(request.split("-")[0]) - first  # vLLM puts something random behind
        choice = _joined(key[1], [rank[key] for rank in ranks])
        by_request.setdefault(number, {})[tuple(where)] = choice
    return answers, by_request


def _joined(what: str, of_ranks: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The choices of all ranks, which choose tokens together and cubes for their KV heads."""
    if what in ("ffn", "alive") or len(of_ranks) == 1:
        return of_ranks[0]
    return [np.concatenate(each) for each in zip(*of_ranks, strict=True)]
