"""Books of one rank: an account per request, the last finished ones, and totals for metrics.

Everything here only grows, so what is read from it never goes backwards.  No vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..paged.plan import StepPlan
from ..paged.state import StepRows
from ..paged.tiles import Tiles
from ..video.prune import WholePrompt
from .account import Account, count_step
from .flops import ModelShape
from .reports import DENSE_REASONS, mode_of
from .request_ids import search_name, unnumbered

RECENT = 256  # finished requests that are remembered one by one
MOST_CHARACTERS = 1 << 20  # of their ids, which clients may choose
LAYER_GROUPS = 4
# Upper edges of the histograms' buckets; a density is never above 1.
EDGES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def keep_counts(plan: StepPlan | None) -> StepPlan | None:
    """A plan with only what ``count_step`` reads: host arrays, and what the layers counted.

    A step's counts can be read once its device has run it, and by then the host has planned the
    next one.  A plan kept until then would hold tables and scratch memory of two steps at a time,
    of which memory is reserved for one.
    """
    if plan is None:
        return None
    attention, ffn = _host_part(plan.attention), _host_part(plan.ffn)
    return replace(plan.host_part(), attention=attention, ffn=ffn)


def _host_part(part: Any) -> Any:
    """A copy in which every field that may hold device memory is None."""
    if part is None:
        return None
    values = {each.name: getattr(part, each.name) for each in fields(part)}
    return type(part)(**{n: v if _is_on_host(v) else None for n, v in values.items()})


def _is_on_host(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_on_host, value))
    return isinstance(value, int | float | np.ndarray | Tiles)


@dataclass
class Histogram:
    """How often a share fell into each bucket, and the sum of all.

    ``layers``: how many of a group's layers are this rank's; the weight when ranks are merged.
    """

    layers: int
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(EDGES)))
    sum: float = 0.0

    def observe(self, share: float) -> None:
        share = min(share, 1.0)
        self.counts[np.searchsorted(EDGES, share)] += 1
        self.sum += share


def layer_groups(num_layers: int) -> dict[str, range]:
    """A model's layers in up to four groups of about the same size, by their label."""
    edges = np.linspace(0, num_layers, min(LAYER_GROUPS, num_layers) + 1).round().astype(int)
    groups = [range(*pair) for pair in pairwise(edges.tolist())]
    return {
        f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]): group for group in groups
    }


class Ledger:
    """The accounts of one rank.

    Args:
        shape: sizes of a layer, over all ranks.
        layers: this rank's layers.
        num_layers: layers of the whole model.
    """

    def __init__(self, shape: ModelShape, layers: range, num_layers: int) -> None:
        self._shape, self._layers = shape, layers
        self._settings: dict[str, dict[str, Any]] = {}  # of requests that have not run yet
        self._whole: dict[str, WholePrompt] = {}  # of requests some of whose tokens were dropped
        self._running: dict[str, Account] = {}
        self._finished: dict[str, Account] = {}  # oldest first; a beam search has one account
        self._total = Account(shape, layers)
        self._requests = {("sparse", None): 0, **{("dense", why): 0 for why in DENSE_REASONS}}
        self._groups = {  # the groups that this rank has layers of
            label: mine
            for label, group in layer_groups(num_layers).items()
            if (mine := range(max(group.start, layers.start), min(group.stop, layers.stop)))
        }
        self._density = {label: Histogram(len(mine)) for label, mine in self._groups.items()}
        self._ffn_density = {label: Histogram(len(mine)) for label, mine in self._groups.items()}

    def admit(
        self, request_id: str, settings: dict[str, Any] | None, whole: WholePrompt | None = None
    ) -> None:
        """A request is about to run for the first time.

        Args:
            request_id: the engine's name for it.
            settings: what it runs under (Method.told); None if it has no video.
            whole: the prompt that its own stands for; None if nothing was dropped.
        """
        if whole is not None:
            self._whole[request_id] = whole
        if settings is not None:
            self._settings[request_id] = settings

    def add_step(
        self,
        request_ids: list[str],
        rows: StepRows,
        plan: StepPlan | None,
        video: np.ndarray | None = None,
    ) -> None:
        """Account for a step whose layers have run; ``request_ids`` in row order.

        ``video [rows]``: video tokens, where the plan does not know of all.
        """
        whole = [self._whole.get(request_id) for request_id in request_ids]
        counts = count_step(rows, plan, self._layers, self._shape, whole, video)
        for row, request_id in enumerate(request_ids):
            account = self._running.get(request_id)
            if account is None:
                settings = self._settings.pop(request_id, None)
                account = self._running[request_id] = Account(self._shape, self._layers, settings)
                account.cached_tokens = int(rows.computed[row])
                self._total.cached_tokens += account.cached_tokens
            account.add(counts, row)
        self._total.add(counts)

    def finish(self, request_id: str) -> Account | None:
        """Close a request's account; None if it never ran."""
        self._settings.pop(request_id, None)
        self._whole.pop(request_id, None)
        account = self._running.pop(request_id, None)
        if account is None:
            return None
        self._remember(request_id, account)
        self._requests[mode_of(account)] += 1
        for label, layers in self._groups.items():
            mine = slice(layers.start - self._layers.start, layers.stop - self._layers.start)
            if account.cubes_seen:
                density = account.cubes_attended[mine].mean() / account.cubes_seen
                self._density[label].observe(float(density))
            if account.video_tokens:
                skipped = account.ffn_skipped[mine].mean() / account.video_tokens
                self._ffn_density[label].observe(float(1 - skipped))
        return account

    def _remember(self, request_id: str, account: Account) -> None:
        name = search_name(request_id)
        search = self._finished.pop(name, None) if name else None
        if name and search is None:
            search = Account(self._shape, self._layers, account.settings)
        if search is not None:
            search.merge(account)
        self._finished[name or request_id] = search or account
        characters = sum(map(len, self._finished))
        while len(self._finished) > RECENT or characters > MOST_CHARACTERS:
            oldest = next(iter(self._finished))
            characters -= len(oldest)
            del self._finished[oldest]

    # -- what is sent; msgpack-ready --------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """All requests together, and each of the last ones; see reports.merge_reports."""
        known = [
            *((n, a, True) for n, a in self._finished.items()),
            *((n, a, False) for n, a in self._running.items()),
        ]
        return {
            "total": self._total.to_counts(),
            "requests": [
                {"request_id": name, "finished": finished, "counts": account.to_counts()}
                for name, account, finished in known
            ],
        }

    def usage(self, client_id: str) -> dict[str, Any] | None:
        """Counts of the request that a client knows by this id: all of its n answers or beams.

        If clients use an id more than once, it stands for the newest request (but beam searches of
        the same id are not told apart).
        """
        client_id = search_name(client_id) or client_id
        requests: dict[str, list[Account]] = {}
        for name, account in (*self._finished.items(), *self._running.items()):
            name = search_name(name) or name
            if (whose := unnumbered(name, client_id)) is not None:
                requests.setdefault(whose, []).append(account)
        if not requests:
            return None
        accounts = requests[next(reversed(requests))]
        total = Account(self._shape, self._layers, accounts[0].settings)
        for account in accounts:
            total.merge(account)
        return total.to_counts()

    def metrics(self) -> dict[str, Any]:
        """Totals since start, running requests included; see server/metrics.py."""
        return {
            "total": self._total.to_counts(),
            "requests": [[mode, why, number] for (mode, why), number in self._requests.items()],
            "attention_density": _plain(self._density),
            "ffn_density": _plain(self._ffn_density),
        }


def _plain(histograms: dict[str, Histogram]) -> dict[str, dict[str, Any]]:
    return {
        label: {"layers": h.layers, "counts": h.counts.tolist(), "sum": h.sum}
        for label, h in histograms.items()
    }
