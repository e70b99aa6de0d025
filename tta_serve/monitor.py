"""Looking at streams now and then.

Some of their rows go through the frozen network too, and the probe's images through what they have learned.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapters import Groups, Pipeline
from adapters.drift import Drift, flip_rate, marginal_divergence, mean_probs
from adapters.forgetting import Forgetting, forgets
from adapters.losses import entropy
from tta_serve.watch import CHECK_ROWS, Reading, Watch

WATCHES_MAX = 10_000  # streams whose checks are remembered; the others' begin anew


class Served(NamedTuple):
    """Rows of one stream and what they were answered with."""

    x: Tensor  # float32 in [0, 1], [n, …]
    logits: Tensor  # [n, C]


class Forgotten(NamedTuple):
    """What a stream's learned parameters lost on the probe."""

    points: float  # error added, as a share
    standard_error: float
    too_much: bool  # the guard's verdict


class Monitor:
    """The checks of all streams of one model.

    Args:
        pipeline: the model.
        drift: None where no source images are known: drift is then NaN.
        forgetting: None where there is no probe.
        forgetting_max: error added, as a share, that the guard lets pass.
        gate: whether a stream that is like the source is spared its steps.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        drift: Drift | None = None,
        forgetting: Forgetting | None = None,
        forgetting_max: float = 0.02,
        *,
        gate: bool = True,
    ) -> None:
        self._pipeline = pipeline
        self._drift = drift
        self._forgetting = forgetting
        self._forgetting_max = forgetting_max
        self._gate = gate
        self._watches: OrderedDict[tuple[str, int], Watch] = OrderedDict()
        self._lock = threading.Lock()  # of `_watches`: a life may end in any thread

    def anew(self) -> "Monitor":
        """The same instruments, and no stream was looked at yet."""
        return Monitor(self._pipeline, self._drift, self._forgetting, self._forgetting_max, gate=self._gate)

    def watch(self, stream: str, incarnation: int) -> Watch:
        """The checks of a stream's present life, begun where there were none."""
        with self._lock:
            watch = self._watches.get((stream, incarnation))
            if watch is None:
                watch = self._watches[stream, incarnation] = Watch(may_close=self._gate)
            self._watches.move_to_end((stream, incarnation))
            if len(self._watches) > WATCHES_MAX:
                self._watches.popitem(last=False)
            return watch

    def known(self, stream: str, incarnation: int) -> Watch | None:
        """The checks of a stream, if there were any."""
        return self._watches.get((stream, incarnation))

    def forget(self, stream: str, incarnation: int) -> None:
        with self._lock:
            self._watches.pop((stream, incarnation), None)

    @torch.no_grad()
    def check(self, served: Sequence[Served]) -> tuple[list[Reading], list[Tensor]]:
        """Compare what streams were answered with what the frozen network says: one forward for all of them.

        Returns:
            A reading of each stream, from its last `CHECK_ROWS` rows, and the frozen logits [n, C] of these rows.
        """
        parts = [Served(each.x[-CHECK_ROWS:], each.logits[-CHECK_ROWS:]) for each in served]
        x, adapted = torch.cat([part.x for part in parts]), torch.cat([part.logits for part in parts])
        sizes = tuple(len(part.x) for part in parts)
        groups = Groups.of(sizes, x.device)
        if self._drift is not None:
            measured = self._drift.measure(x, groups)
            drift, frozen = measured.drift, measured.frozen_logits
        else:
            frozen = self._pipeline.network(x).logits
            drift = frozen.new_full((len(sizes),), torch.nan)
        flips = flip_rate(adapted, frozen, groups)
        divergence = marginal_divergence(mean_probs(adapted, groups), mean_probs(frozen, groups))
        each_entropy = entropy(adapted)
        mean_entropy = torch.stack([part.mean() for part in torch.split(each_entropy, list(sizes))])
        found = torch.stack([drift, flips, divergence, mean_entropy]).T.tolist()
        return [Reading(*numbers) for numbers in found], list(torch.split(frozen, list(sizes)))

    def forgotten(self, states: object) -> Forgotten | None:
        """What a table of one norm state has lost on the probe; None where there is no probe or nothing to guard."""
        if self._forgetting is None or self._pipeline.norm is None:
            return None
        found = self._forgetting.measure(self._pipeline.norm, states)
        return Forgotten(
            found.points.item(), found.standard_error.item(), bool(forgets(found, self._forgetting_max).item())
        )
