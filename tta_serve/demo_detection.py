"""What `tta-serve demo --detection` plays: the same held-out scenes in colour, in infrared, mixed, and in colour again.

A client like any other: PNG files over one connection, one after the other. It never says which modality a picture is
of. Each answer has the boxes of the frozen detector alone beside those with a translator, so a request costs what two
do. What is really in the scenes is needed only for AP50, and never leaves the client.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from adapters.detection import Boxes, Detections
from tta_serve import demo_detection_screen, demo_picture
from tta_serve.builtin import scenes
from tta_serve.builtin.scenes import Scene
from tta_serve.coco import average_precision
from tta_serve.demo import TIMEOUT_S, DemoError, Model
from tta_serve.demo_detection_figures import DetectionFigures, DetectionSummary
from tta_serve.demo_picture import Column, View

SEED = 2024  # of the scenes: made of digits that neither the detector nor its translator was trained on
SHOWN_EVERY = 25  # answers between two looks at the figures: AP50 takes longer than an answer
KEPT = 4  # scenes that are kept for a picture: the first ones, whatever comes of them

Modality = Literal["rgb", "ir"]


class Phase(NamedTuple):
    """One part of the demo; scene i is shown in modality i, from the beginning again where they end."""

    name: str
    modalities: tuple[Modality, ...]


RGB, INFRARED = Phase("rgb", ("rgb",)), Phase("ir", ("ir",))
MIXED, RGB_AGAIN = Phase("mixed", ("rgb", "ir")), Phase("rgb again", ("rgb",))
PHASES = (RGB, INFRARED, MIXED, RGB_AGAIN)


class Answer(NamedTuple):
    """To one picture."""

    modality: str  # as the server recognised it
    translated: Detections
    frozen: Detections
    latency_s: float


class Kept(NamedTuple):
    """A scene in both modalities, and what was found in it."""

    rgb: Scene
    infrared: Scene
    rgb_answer: Answer
    infrared_answer: Answer


class Outcome(NamedTuple):
    """What the demo came to."""

    summary: DetectionSummary
    kept: tuple[Kept, ...]  # the first scenes


def play(
    url: str, model: str, *, stream: str, draws: int = 200, console: Console, client: httpx.Client | None = None
) -> Outcome:
    """Play every phase once against a running server and show how the detector does, alone and with translators.

    Args:
        url: of the server, such as `http://127.0.0.1:8000`.
        model: its name there; it must be `builtin: digit-scenes`.
        stream: which stream the requests are of.
        draws: scenes in each phase, always the same ones.
        console: a terminal shows a live table; anything else gets a line for each phase and the table at the end.
        client: another one than a plain connection to the server.

    Raises:
        DemoError: the server cannot be reached or refused a request, or its answer cannot be read.
    """
    source: dict[Modality, list[Scene]] = {
        "rgb": list(scenes.scenes(draws, SEED, held_out=True)),
        "ir": list(scenes.infrared_scenes(draws, SEED, held_out=True)),
    }
    tallies: list[_Tally] = []
    done: list[DetectionFigures] = []
    with nullcontext(client) if client else httpx.Client(timeout=TIMEOUT_S) as connection:
        server = Model.at(url, model, connection)
        with demo_detection_screen.screen(console, model, [phase.name for phase in PHASES], draws) as screen:
            for phase in PHASES:
                tallies.append(_Tally(phase))
                for _ in _answered(server, stream, source, tallies[-1]):
                    if console.is_terminal:
                        screen.show([*done, tallies[-1].figures()], running=True)
                done.append(tallies[-1].figures())
                screen.show(done, running=False)
            answers = {tally.phase: tally.answers for tally in tallies}
            same = sum(map(_same, answers[RGB], answers[RGB_AGAIN]))
            summary = DetectionSummary(tuple(done), same)
            screen.close(summary)
    kept = zip(source["rgb"], source["ir"], answers[RGB], answers[INFRARED], strict=True)
    return Outcome(summary, tuple(Kept(*each) for each in islice(kept, KEPT)))


def draw(outcome: Outcome) -> Image.Image:
    """The scenes that were kept, in rows: in colour, in infrared, and in infrared with the translator."""
    rgb, infrared = outcome.summary.phases[:2]
    columns = (
        Column(
            "RGB: the frozen detector",
            f"AP50 {rgb.frozen_ap50:.3f}",
            tuple(_view(kept.rgb, kept.rgb_answer.frozen) for kept in outcome.kept),
        ),
        Column(
            "Infrared: the frozen detector",
            f"AP50 {infrared.frozen_ap50:.3f}",
            tuple(_view(kept.infrared, kept.infrared_answer.frozen) for kept in outcome.kept),
        ),
        Column(
            "Infrared: the same, with its translator",
            f"AP50 {infrared.translated_ap50:.3f}",
            tuple(_view(kept.infrared, kept.infrared_answer.translated) for kept in outcome.kept),
        ),
    )
    title = f"One frozen detector, two kinds of pictures: the first {len(outcome.kept)} of {rgb.draws:,} scenes"
    return demo_picture.draw(title, columns, scenes.LABELS)


def _view(scene: Scene, found: Detections) -> View:
    return View(scene.image, _truth(scene), found)


def _truth(scene: Scene) -> Boxes:
    return Boxes(torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels))


def _answered(
    server: Model, stream: str, source: Mapping[Modality, Sequence[Scene]], tally: "_Tally"
) -> Iterator[None]:
    """Play a phase; stops by after every few answers, but not after the last."""
    modalities, draws = tally.phase.modalities, len(source["rgb"])
    for i in range(draws):
        modality = modalities[i % len(modalities)]
        scene = source[modality][i]
        tally.add(scene, modality, find(server, stream, scene.image))
        if (i + 1) % SHOWN_EVERY == 0 and i + 1 < draws:
            yield


@dataclass
class _Tally:
    """Collects one phase."""

    phase: Phase
    truth: list[Boxes] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    recognised: int = 0

    def add(self, scene: Scene, modality: Modality, answer: Answer) -> None:
        self.truth.append(_truth(scene))
        self.sizes.append((scene.image.shape[0], scene.image.shape[1]))
        self.answers.append(answer)
        self.recognised += answer.modality == modality

    def figures(self) -> DetectionFigures:
        latencies_s = [answer.latency_s for answer in self.answers]
        p50_s, p99_s = np.percentile(latencies_s, (50, 99))
        frozen, translated = (
            average_precision(self.truth, found, self.sizes).ap50
            for found in ([answer.frozen for answer in self.answers], [answer.translated for answer in self.answers])
        )
        return DetectionFigures(
            name=self.phase.name,
            infrared="ir" in self.phase.modalities,
            draws=len(self.answers),
            frozen_ap50=frozen,
            translated_ap50=translated,
            recognised=self.recognised,
            images_per_s=len(latencies_s) / max(sum(latencies_s), 1e-9),
            p50_ms=1000 * float(p50_s),
            p99_ms=1000 * float(p99_s),
        )


def find(server: Model, stream: str, image: NDArray[np.uint8]) -> Answer:
    """What the detector finds in a picture, alone and with a translator.

    Args:
        server: the model there.
        stream: of the request.
        image: uint8 [H, W, 3] or [H, W, 1].

    Raises:
        DemoError: as `Model.ask`; or the answer is not one of a detector.
    """
    headers = {"content-type": "image/png", "x-session-id": stream, "x-answer": "both"}
    reply, latency_s = server.ask("predict", png(image), headers)
    try:
        (translated,), (frozen,) = reply["predictions"], reply["frozen_predictions"]
        modality = str(translated["modality"]["name"])
        return Answer(modality, _detections(translated), _detections(frozen), latency_s)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DemoError(
            f"{server.url} should answer one picture with 'predictions' and 'frozen_predictions', each with its "
            f"modality and detections; in its answer ({', '.join(reply)}) that fails: {error!r}"
        ) from error


def png(image: NDArray[np.uint8]) -> bytes:
    """A picture as a file; one channel stays one."""
    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(content, "PNG", compress_level=1)
    return content.getvalue()


def _detections(answered: Mapping[str, Any]) -> Detections:
    """From JSON.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is of another form.
    """
    listed = answered["detections"]
    boxes = torch.tensor([each["box"] for each in listed], dtype=torch.float32)
    labels = torch.tensor([each["index"] for each in listed], dtype=torch.int64)
    scores = torch.tensor([each["score"] for each in listed], dtype=torch.float32)
    if listed and boxes.shape != (len(listed), 4):
        raise ValueError(f"boxes of shape {list(boxes.shape)}")
    if not all(map(math.isfinite, [*boxes.flatten().tolist(), *scores.tolist()])):
        raise ValueError("a number that is not finite")
    return Detections(boxes.reshape(-1, 4), labels, scores)


def _same(one: Answer, other: Answer) -> bool:
    """Whether two answers are the same in every digit that the server gave."""
    pairs = zip(one.translated, other.translated, strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)
