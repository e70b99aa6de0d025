"""How good a translator is beside the other ways: nothing, histogram equalisation, a fine-tuned detector."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import functional

from adapters.translator import Translator, with_channels
from tta_serve import coco, router
from tta_serve.coco import AP, Example
from tta_serve.detectors import Detector
from tta_serve.errors import ConfigError
from tta_serve.router import Router
from tta_serve.training import Progress, TrainSettings
from tta_serve.training_data import Parts, prepared

ROUTER_IMAGES = 200  # of the modality, and of everything else, that a router is fitted on

View = Callable[[Tensor], Tensor]  # from an image as it was read, uint8 [C, H, W], to what the detector sees [3, h, w]


def translated(translator: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """Each image [C, h, w] as [3, h, w]; those of one size go through together."""
    sizes: dict[torch.Size, list[int]] = {}
    for number, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(number)
    done: dict[int, Tensor] = {}
    for numbers in sizes.values():
        done |= zip(numbers, translator(torch.stack([images[number] for number in numbers])), strict=True)
    return [done[number] for number in range(len(images))]


@torch.no_grad()
def evaluate(detector: Detector, examples: Sequence[Example], view: View, batch_images: int, progress: Progress) -> AP:
    """Average precision of a detector that is shown images in this way.

    Raises:
        ConfigError: none of them has a box.
    """
    found = []
    for first in range(0, len(examples), batch_images):
        batch = examples[first : first + batch_images]
        seen = [view(coco.read_image(example.file)) for example in batch]
        found += [
            type(each)(*(tensor.cpu() for tensor in each))
            for each in detector.detect(seen, [example.size for example in batch])
        ]
        for _ in batch:
            progress.advance()
    try:
        return coco.average_precision(
            [example.truth for example in examples], found, [example.size for example in examples]
        )
    except ValueError as error:
        raise ConfigError(f"nothing to measure on: {error}") from None


def compare(
    detector: Detector,
    translator: Translator,
    tuned: Detector | None,
    parts: Parts,
    settings: TrainSettings,
    progress: Progress,
) -> dict[str, float]:
    """AP and AP50 of every way to look at the modality, and of what is left of the detector's own.

    Ways: `zero_shot` (as it is), `equalised` (its histogram), `modtr` (translated), `fine_tuned` (by a detector that
    was trained on it); and on the detector's own modality: `frozen`, `fine_tuned`.
    """

    def plain(image: Tensor) -> Tensor:
        return with_channels(prepared(detector, image), 3)

    def equalised(image: Tensor) -> Tensor:
        return plain(functional.equalize(image))

    def translation(image: Tensor) -> Tensor:
        (seen,) = translated(translator.eval(), [with_channels(prepared(detector, image), channels)])
        return seen

    modality, channels = settings.modality, translator.config.in_channels
    ways: list[tuple[str, Detector, View, Sequence[Example]]] = [
        (f"{modality}/zero_shot", detector, plain, parts.test),
        (f"{modality}/equalised", detector, equalised, parts.test),
        (
            f"{modality}/modtr",
            detector,
            translation,
            parts.test,
        ),
    ]
    if tuned:
        ways.append((f"{modality}/fine_tuned", tuned, plain, parts.test))
    if parts.rgb:
        ways.append(("rgb/frozen", detector, plain, parts.rgb))
    if parts.rgb and tuned:
        ways.append(("rgb/fine_tuned", tuned, plain, parts.rgb))
    figures: dict[str, float] = {}
    for name, looking, view, examples in ways:
        progress.start(f"comparing: {name}", len(examples))
        measured = evaluate(looking, examples, view, settings.batch_images, progress)
        figures[f"ap/{name}"], figures[f"ap50/{name}"] = measured.ap, measured.ap50
    if tuned and figures[f"ap50/{modality}/fine_tuned"] > 0:
        figures["ratio/modtr_over_finetuned"] = (
            figures[f"ap50/{modality}/modtr"] / figures[f"ap50/{modality}/fine_tuned"]
        )
    return {name: round(figure, 6) for name, figure in figures.items()}


def fit_router(parts: Parts, settings: TrainSettings, progress: Progress) -> Router | None:
    """What recognises the modality, from a few of its images; None where there are too few."""
    if len(parts.train) < router.IMAGES_MIN:
        progress.note(f"{len(parts.train)} images are too few for a router: requests must name the modality")
        return None
    if not parts.rgb:
        progress.note("without --rgb the router knows only what the modality looks like, and nothing else")
    progress.start("fitting the router", 0)
    own, others = (
        [coco.read_image(example.file) for example in examples[:: math.ceil(len(examples) / ROUTER_IMAGES) or 1]]
        for examples in (parts.train, parts.rgb)  # evenly: neighbours may be frames of one film
    )
    return router.fit(own, others, settings.seed)
