"""This server's default, in process: the classes that serve, in lock-step instead of in threads.

The one place here that imports the server. What the lock-step leaves out (HTTP, the micro-batcher, the learner's
thread) changes when something is computed, not what: `loadtests/shift.py --url … --drain` checks the same over HTTP.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters import Groups, Network, Pipeline, tree
from loadtests import cifar
from loadtests.protocol_images import Images
from loadtests.protocol_orders import Round
from tta_serve import models, pipelines
from tta_serve.building import build_monitor
from tta_serve.config import ModelSettings
from tta_serve.engine import Engine, Query, to_unit
from tta_serve.learner import Pools
from tta_serve.lessons import Lesson, observed
from tta_serve.monitor import Monitor

CPU = torch.device("cpu")

Labels = NDArray[np.int64]
Lessons = Sequence[Lesson]


class Default(NamedTuple):
    """What the configuration's defaults build: immutable, shared by the runs of one process."""

    settings: ModelSettings
    pipeline: Pipeline
    monitor: Monitor | None


def default(data: Path) -> Default:
    """ResNet-20 with `adapter: eata` in `mode: async`, and nothing else said."""
    settings = ModelSettings.model_validate(cifar.served_model(data, "cifar", "eata", mode="async"))
    model = models.load(settings)
    pipeline = pipelines.build(settings, model, CPU)
    return Default(settings, pipeline, build_monitor(settings, model, pipeline))


class Served:
    """An engine and its pools, where time passes when it is told to.

    Args:
        built: by `default`.
        images: where requests find their rows.
        drained: after each round wait until nothing waits; else rows gather until a stream has `step_rows`.
    """

    def __init__(self, built: Default, images: Images, *, drained: bool = True) -> None:
        adaptation = built.settings.adaptation
        self.budget = adaptation.budget
        self.images = images
        self.learned_rows = 0
        monitor = built.monitor.anew() if built.monitor else None
        self._engine = Engine(built.pipeline, CPU, built.settings.streams.max, monitor=monitor)
        self._pools = Pools(adaptation.step_rows, adaptation.step_wait_s, adaptation.queue_rows)
        self._wait_s = 2 * adaptation.step_wait_s if drained else 0.0
        self._now_s = 0.0

    @property
    def network(self) -> Network:
        return self._engine.pipeline.network

    def answer(self, requests: Round, now_s: float | None = None) -> list[Labels]:
        """Answer a round in one forward; its rows wait to be learned from, at `now_s` or the clock's own time."""
        queries = [Query(torch.from_numpy(self.images.at(each.places)), each.stream) for each in requests]
        labels = []
        for answer, lesson in self._engine.predict(queries):
            assert answer.logits is not None  # only a query for the frozen answer alone has none
            labels.append(answer.logits.argmax(axis=1))
            dropped = self._pools.add(lesson, self._now_s if now_s is None else now_s)
            self._engine.absorb(observed(dropped))
        return labels

    def learn(self, requests: Round) -> None:  # noqa: ARG002  # what waits is learned from, whosever it is
        self._now_s += self._wait_s
        while lessons := self.take(self._now_s):
            self.learn_from(lessons)

    def take(self, now_s: float) -> Lessons:
        """What the learner would take for one step."""
        return self._pools.take(now_s)

    def learn_from(self, lessons: Lessons) -> None:
        """One step."""
        learned = self._engine.learn(lessons)
        self.learned_rows += sum(each.seen for each in learned if each.result in ("applied", "filtered", "refused"))

    def params(self, stream: str) -> Tensor:
        """The scales and shifts that a stream has learned, [2 P]."""
        params: Tensor = self._engine.streams.state(stream).norm.inner.params
        return params

    def inputs(self, images: NDArray[np.uint8]) -> Tensor:
        """Images as the network reads them."""
        return to_unit(torch.from_numpy(images))

    @torch.no_grad()
    def label_by_state(self, stream: str, x: Tensor) -> Labels:
        """What the stream's whole state says to x, image by image, so that no statistics but the state's count."""
        table = tree.stack([self._engine.streams.state(stream)])
        rows = torch.zeros(len(x), dtype=torch.int64)
        labels: Labels = (
            self._engine.pipeline.predict(table, rows, Groups.of((1,) * len(x)), x).logits.argmax(1).numpy()
        )
        return labels
