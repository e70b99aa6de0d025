"""Streams of a detector whose normalisation layers follow them, without labels (adapters/alignment.py)."""

from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor

from adapters import Alignment, Batch, Groups, PipelineState
from adapters.guards import Guarded
from adapters.norm import Modulation
from tta_serve import stepping
from tta_serve.detectors import Detector, Size
from tta_serve.engine import is_good
from tta_serve.judging import Learned
from tta_serve.lessons import Lesson, rows_of
from tta_serve.states import TEACHING_MAX, Held, States
from tta_serve.streams import PULL_SHARE, StreamRecord


class Aligner:
    """Answers with each stream's normalisation, and teaches it; what `learner.Learner` runs.

    Args:
        detector: that it stands in.
        norm: a guarded `Alignment`.
        streams: whose states.
        prepare_thread: called once in each thread that computes.
        stepping: held during a step; see `BoxLearner`.
        keeps: whether its steps make versions to roll back to; not where boxes teach the same streams, since these
            versions are those that the probe has seen.
    """

    def __init__(
        self,
        detector: Detector,
        norm: Guarded,
        streams: States,
        prepare_thread: Callable[..., None],
        stepping: Lock,
        keeps: bool,
    ) -> None:
        self.detector = detector
        assert isinstance(norm.adapter, Alignment)
        self.norm = norm
        self._alignment = norm.adapter
        self.streams = streams
        self._prepare_thread = prepare_thread
        self._stepping = stepping
        self._keeps = keeps
        self._drifts: dict[tuple[str, int], float] = {}  # of each stream's life, after its last step

    @property
    def device(self) -> torch.device:
        return self.detector.device

    def prepare_thread(self, *, learns: bool = False) -> None:
        self._prepare_thread(learns=learns)

    def drift(self, stream: str, incarnation: int) -> float | None:
        """How far its feature maps were from the source's when it was taught last; 1.0 is the alarm line."""
        return self._drifts.get((stream, incarnation))

    def forget(self, stream: str, incarnation: int) -> None:
        """A stream's life is over."""
        self._drifts.pop((stream, incarnation), None)

    def modulation(self, rows: Sequence[int]) -> Callable[[Sequence[int]], Modulation]:
        """What the backbone shall do at images of these rows of the table, which the caller holds: see
        `Detector.detect`.
        """

        def of(places: Sequence[int]) -> Modulation:
            small: dict[int, int] = {}
            own = [small.setdefault(rows[place], len(small)) for place in places]
            states = self.streams.read(list(small)).norm
            groups = Groups.of((1,) * len(own), self.device)
            return self.norm.modulate(states, torch.tensor(own, device=self.device), groups)

        return of

    def lessons(self, stream: str, record: StreamRecord, images: Sequence[Tensor]) -> tuple[Lesson, ...]:
        """What a request teaches: its images as the detector saw them, [3, h, w], a lesson for each size."""
        sizes: dict[Size, list[Tensor]] = {}
        for image in images:
            sizes.setdefault((image.shape[-2], image.shape[-1]), []).append(image)
        return tuple(Lesson(torch.stack(each), stream, record.incarnation, record.version) for each in sizes.values())

    @torch.no_grad()
    def learn(self, lessons: Sequence[Lesson]) -> list[Learned]:
        """Take a step of every stream among the lessons: one forward for each padded size."""
        sizes: dict[Size, list[Lesson]] = {}
        for lesson in lessons:
            canvas = self.detector.canvas((lesson.x.shape[-2], lesson.x.shape[-1]))
            sizes.setdefault(canvas, []).append(lesson)
        done: list[Learned] = []
        for each in sizes.values():
            live, over = stepping.live_of(self.streams, each)
            done += over
            lives = [(stream, lots[0].incarnation) for stream, lots in live.items()]
            for first in range(0, len(lives), TEACHING_MAX):
                with self._stepping, self.streams.teaching(lives[first : first + TEACHING_MAX]) as held:
                    missing = {stream for stream, _ in lives[first : first + TEACHING_MAX]} - set(held.streams)
                    done += [Learned(stream, rows_of(live[stream]), 0, 0.0, "stale") for stream in missing]
                    if held.streams:
                        done += self._step(held, [live[stream] for stream in held.streams])
        return done

    def _step(self, held: Held, lots: Sequence[Sequence[Lesson]]) -> list[Learned]:
        images = [image for lessons in lots for lesson in lessons for image in lesson.x]
        x = self.detector.pixels(images)
        groups = Groups.of(tuple(rows_of(lessons) for lessons in lots), self.device)
        old = self.streams.read_to_teach(held)
        norm, report = self.norm.adapt(old.norm, groups.index, Batch(x, groups, weights=x.new_ones(len(x))))
        report = report._replace(entropy=torch.full_like(report.entropy, torch.nan))  # detections have none to compare

        def pull(new: PipelineState, mask: Tensor) -> PipelineState:
            return new._replace(norm=self.norm.pull(new.norm, mask, PULL_SHARE))

        new = old._replace(norm=norm)
        done = stepping.settle(self.streams, held, old, new, report, {}, pull, self._is_good)
        for (stream, life), drift in zip(held.lives, self._alignment.drift(norm.inner).tolist(), strict=True):
            present = self.streams.find(stream)
            if present is not None and present.incarnation == life:  # else its life ended meanwhile, or just now
                self._drifts[stream, life] = drift
        return done

    def _is_good(self, record: StreamRecord) -> bool:
        return self._keeps and is_good(record)
