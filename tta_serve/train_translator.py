"""Train a translator through a frozen detector's own losses, and compare it with what else could be done.

Medeiros et al., "Modality Translation for Object Detection Adaptation Without Forgetting Prior Knowledge", ECCV 2024,
arXiv 2404.01492, Eq. 4: the detector's losses are minimised over the translator's parameters alone. The detector looks
once at each batch.

Everything random in step k (order, mirrored images, which proposals a detector samples) is a function of the seed and
k, so a training that is killed and started again takes the very steps that it would have taken. On a CPU, with as many
threads, its weights are the same to the last bit; CUDA adds in any order.
"""

import contextlib
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.transforms import functional

from adapters.detection import Boxes
from adapters.translator import Translator, TranslatorConfig, with_channels
from tta_serve import coco, router, translators
from tta_serve.coco import AP, Example
from tta_serve.detectors import Detector, scale_boxes
from tta_serve.errors import ConfigError
from tta_serve.router import Router

CHECKPOINT_FORMAT = "tta-serve-training"
ROUTER_IMAGES = 200  # of the modality, and of everything else, that a router is fitted on
BEFORE = 0  # the epoch in which nothing was learned yet

# what a seed is for: each draws its own numbers
_ORDER, _LOSS, _SPLIT, _WEIGHTS = range(1, 5)


@dataclass(frozen=True)
class TrainSettings:
    """How a translator is trained, and the fine-tuned detector that it is compared with."""

    modality: str = "ir"
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    epochs: int = 50  # at most
    patience_epochs: int = 10  # without a better AP50 on the validation part
    batch_images: int = 8
    learning_rate: float = 1e-4  # AdamW's at its highest; half a cosine down to 0
    weight_decay: float = 0.01
    loss_scale: float = 0.1  # of the summed losses
    gradient_norm_max: float = 1.0
    flips: bool = True  # mirror every other image, left to right
    validation_share: float = 0.15  # of the images, where there is no folder for it
    seed: int = 0
    checkpoint_steps: int = 50  # between checkpoints within an epoch
    fine_tune: bool = True  # compare with a fine-tuned detector, which takes longer than the translator


class Epoch(NamedTuple):
    """One line of a training's history."""

    epoch: int  # 0: before any step
    loss: float | None  # mean over its steps, not scaled
    ap: float  # on the validation part
    ap50: float


class TrainResult(NamedTuple):
    """What was learned, and how good it is."""

    figures: dict[str, float]  # "ap50/ir/modtr": 0.83
    epochs: tuple[Epoch, ...]
    best_epoch: int  # whose weights are kept
    fine_tuned_epochs: tuple[Epoch, ...]  # none without `fine_tune`
    metrics: dict[str, Any]  # all of this as JSON, as it is in the file's header


class Progress(Protocol):
    """Who watches."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Something of `total` parts begins, or goes on; what began before has ended."""
        ...

    def advance(self, loss: float | None = None) -> None:
        """One part more is done."""
        ...

    def note(self, text: str) -> None:
        """Something that is worth a line."""
        ...


class Unwatched:
    """Nobody."""

    def start(self, what: str, total: int, done: int = 0) -> None: ...
    def advance(self, loss: float | None = None) -> None: ...
    def note(self, text: str) -> None: ...


class Parts(NamedTuple):
    """What is learned from, what decides when to stop, and what is reported on."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]  # the validation part where there is no other
    rgb: tuple[Example, ...]  # in the detector's own modality; none: not measured


View = Callable[[Tensor], Tensor]  # from an image as it was read, uint8 [C, H, W], to what the detector sees [3, h, w]


class Course(NamedTuple):
    """What learns, and through which detector."""

    name: str
    learner: nn.Module  # all of its parameters learn
    detector: Detector
    channels: int  # of the images that `see` takes
    see: Callable[[Sequence[Tensor]], list[Tensor]]  # prepared images [C, h, w] → what the detector is given
    train_mode: Callable[[bool], object]  # before steps and after them


def train(
    detector: Detector,
    digest: str,
    labels: Sequence[str],
    data: Path,
    out: Path,
    settings: TrainSettings,
    *,
    validation: Path | None = None,
    test: Path | None = None,
    rgb: Path | None = None,
    save_fine_tuned: Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a translator, compare it, fit its router, and write its file.

    While it runs, `OUT.checkpoint` (and `OUT.fine-tuned.checkpoint`) hold what is needed to go on after a kill; call it
    again with the same arguments. They are removed once the file is written.

    Args:
        detector: frozen here; not a bit of it changes.
        digest: names the detector in the file.
        labels: of the detector, by class index.
        data: COCO-format images of the modality; see `coco.read`. So are `validation`, `test` and `rgb`.
        out: the translator's file, written at the end; one that is there is replaced.
        settings: see there.
        validation: what decides when to stop; None: a share of `data`, drawn with the seed.
        test: what the figures are of; None: the validation part.
        rgb: images of the detector's own modality: for what fine-tuning forgets, and for the router.
        save_fine_tuned: where to write the fine-tuned detector's weights (safetensors).
        restart: throw away checkpoints that are there.
        progress: who watches.

    Raises:
        ConfigError: data, settings or a checkpoint cannot be used; the message says which and what to do.
        InvalidInput: no modality can have that name.
    """
    watching = progress or Unwatched()
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is no folder to write {out.name} to")
    translators.check_modality(settings.modality)
    detector.freeze()
    parts = _parts(data, validation, test, rgb, labels, settings)
    identity = _identity(digest, parts, settings)
    checkpoint, tuned_checkpoint = (out.with_name(out.name + end) for end in (".checkpoint", ".fine-tuned.checkpoint"))
    if restart:
        for path in (checkpoint, tuned_checkpoint):
            path.unlink(missing_ok=True)
    with torch.random.fork_rng(devices=[detector.device] if detector.device.type == "cuda" else []):
        translator = new_translator(settings).to(detector.device)
        history = learn(_translating(translator, detector), parts, settings, checkpoint, identity, watching)
        tuned_history: tuple[Epoch, ...] = ()
        tuned: Detector | None = None
        if settings.fine_tune:
            tuned = Detector(copy.deepcopy(detector.model).requires_grad_(True))
            course = _fine_tuning(tuned)
            tuned_history = learn(course, parts, settings, tuned_checkpoint, identity, watching, prepare=detector)
            if save_fine_tuned:
                _replace(save_fine_tuned, safetensors.torch.save(_copied(tuned.model)))
    figures = compare(detector, translator, tuned, parts, settings, watching)
    best = best_epoch(history)
    metrics: dict[str, Any] = {
        "figures": figures,
        "figures_of": "test" if test else "validation",
        "images": {part: len(examples) for part, examples in parts._asdict().items()},
        "settings": asdict(settings),
        "best_epoch": best,
        "epochs": [epoch._asdict() for epoch in history],
        "fine_tuned_epochs": [epoch._asdict() for epoch in tuned_history],
    }
    weights, fitted = _copied(translator), fit_router(parts, settings, watching)
    translators.save(
        out, translators.TranslatorFile(settings.modality, digest, settings.translator, weights, fitted, metrics)
    )
    for path in (checkpoint, tuned_checkpoint):
        path.unlink(missing_ok=True)
    return TrainResult(figures, history, best, tuned_history, metrics)


def new_translator(settings: TrainSettings) -> Translator:
    """The untrained translator of a seed."""
    return Translator(settings.translator, torch.Generator().manual_seed(_seed(_WEIGHTS, settings.seed, 0)))


def learn(
    course: Course,
    parts: Parts,
    settings: TrainSettings,
    checkpoint: Path,
    identity: Mapping[str, Any],
    progress: Progress,
    prepare: Detector | None = None,
) -> tuple[Epoch, ...]:
    """Take a course to its end, from its checkpoint if there is one, and leave the best epoch's weights in the learner.

    Args:
        course: what learns.
        parts: of the data.
        settings: of the training.
        checkpoint: where it is kept.
        identity: what a checkpoint must be of.
        progress: who watches.
        prepare: the detector that resizes images; None: the course's.

    Raises:
        ConfigError: the checkpoint is of another training, or the loss is no number any more.
    """
    identity = {"course": course.name, **identity}
    prepare = prepare or course.detector
    optimizer = torch.optim.AdamW(
        course.learner.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )

    def validated(epoch: int, loss: float | None) -> Epoch:
        progress.start(f"{course.name}, epoch {epoch}: validating", len(parts.validation))
        see = partial(_prepared_view, course, prepare)
        return Epoch(epoch, loss, *evaluate(course.detector, parts.validation, see, settings.batch_images, progress))

    course.train_mode(False)
    saved = read_checkpoint(checkpoint, identity)
    if saved is None:
        start = _copied(course.learner)
        saved = Saved((validated(BEFORE, None),), (), start, start, {})
        progress.note(_line(course.name, saved.history[0]))
    else:
        progress.note(f"{course.name}: going on from {checkpoint}, {_place(saved)}")
    history, losses, best = saved.history, list(saved.losses), saved.best
    course.learner.load_state_dict(saved.weights)
    _load_moments(optimizer, saved.moments)
    batches = math.ceil(len(parts.train) / settings.batch_images)
    while not finished(history, settings):
        epoch = len(history)
        progress.start(f"{course.name}, epoch {epoch} of {settings.epochs}", batches, len(losses))
        course.train_mode(True)
        for number, batch in list(enumerate(order(len(parts.train), settings, epoch)))[len(losses) :]:
            step = (epoch - 1) * batches + number
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, batches * settings.epochs, settings)
            images, truth = _read_batch(parts.train, batch, prepare, course.channels)
            losses.append(take_step(course, images, truth, optimizer, step, settings))
            progress.advance(losses[-1])
            if len(losses) % settings.checkpoint_steps == 0 and len(losses) < batches:
                weights = _copied(course.learner)
                write_checkpoint(
                    checkpoint, Saved(history, tuple(losses), weights, best, _moments(optimizer)), identity
                )
        course.train_mode(False)
        history = (*history, validated(epoch, sum(losses) / len(losses)))
        losses = []
        weights = _copied(course.learner)
        if best_epoch(history) == epoch:
            best = weights
        write_checkpoint(checkpoint, Saved(history, (), weights, best, _moments(optimizer)), identity)
        progress.note(_line(course.name, history[-1]))
    course.learner.load_state_dict(best)
    return history


def take_step(
    course: Course,
    images: Sequence[Tensor],
    truth: Sequence[Boxes],
    optimizer: torch.optim.Optimizer,
    step: int,
    settings: TrainSettings,
) -> float:
    """One step; the detector looks once. Returns the loss, not scaled.

    Raises:
        ConfigError: the gradient is no number.
    """
    torch.manual_seed(_seed(_LOSS, settings.seed, step))  # some detectors sample proposals with the global generator
    loss = course.detector.loss(course.see(images), truth)
    optimizer.zero_grad()
    (settings.loss_scale * loss).backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(course.learner.parameters(), settings.gradient_norm_max)
    if not math.isfinite(norm):
        raise ConfigError(
            f"{course.name}: step {step} has loss {loss.item():g} and a gradient of norm {norm:g}; "
            f"use a learning rate below {settings.learning_rate:g}"
        )
    optimizer.step()
    return loss.item()


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Half a cosine (Loshchilov & Hutter, arXiv 1608.03983, Eq. 5, without restarts).

    >>> [learning_rate(step, 4, TrainSettings(learning_rate=1.0)) for step in (0, 2)]
    [1.0, 0.5]
    """
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def order(count: int, settings: TrainSettings, epoch: int) -> list[list[tuple[int, bool]]]:
    """The batches of an epoch: numbers of images, and whether each is mirrored."""
    generator = torch.Generator().manual_seed(_seed(_ORDER, settings.seed, epoch))
    numbers = torch.randperm(count, generator=generator).tolist()
    mirrored = (torch.rand(count, generator=generator) < (0.5 if settings.flips else 0.0)).tolist()
    drawn = list(zip(numbers, mirrored, strict=True))
    return [drawn[first : first + settings.batch_images] for first in range(0, count, settings.batch_images)]


def best_epoch(history: Sequence[Epoch]) -> int:
    """The epoch with the best AP50, and of these the best AP, and of these the first."""
    return max(history, key=lambda line: (line.ap50, line.ap, -line.epoch)).epoch


def finished(history: Sequence[Epoch], settings: TrainSettings) -> bool:
    """Whether a training has had all its epochs, or enough without a better one."""
    last = history[-1].epoch
    return last >= settings.epochs or last - best_epoch(history) >= settings.patience_epochs


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
        return with_channels(_prepare(detector, image), 3)

    def equalised(image: Tensor) -> Tensor:
        return plain(functional.equalize(image))

    modality = settings.modality
    ways: list[tuple[str, Detector, View, Sequence[Example]]] = [
        (f"{modality}/zero_shot", detector, plain, parts.test),
        (f"{modality}/equalised", detector, equalised, parts.test),
        (
            f"{modality}/modtr",
            detector,
            partial(_prepared_view, _translating(translator.eval(), detector), detector),
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


class Saved(NamedTuple):
    """All that a training needs to go on as if it had never stopped."""

    history: tuple[Epoch, ...]  # of the epochs that are over
    losses: tuple[float, ...]  # of the steps of the one that is not
    weights: dict[str, Tensor]  # parameters and buffers
    best: dict[str, Tensor]  # the same, as they were in the best epoch
    moments: dict[str, Tensor]  # AdamW's of each parameter, by "<number>.<name>"; none before the first step


def write_checkpoint(path: Path, saved: Saved, identity: Mapping[str, Any]) -> None:
    """Replace a checkpoint: who reads sees the whole old one or the whole new one.

    Raises:
        ConfigError: it cannot be written.
    """
    groups = {"weights": saved.weights, "best": saved.best, "moments": saved.moments}
    tensors = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    tensors |= {f"best/{name}": tensor.clone() for name, tensor in saved.best.items()}  # may be `weights` themselves
    place = {"history": saved.history, "losses": saved.losses}
    header = {"format": CHECKPOINT_FORMAT, "identity": json.dumps(identity), "place": json.dumps(place)}
    _replace(path, safetensors.torch.save(tensors, header))


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> Saved | None:
    """What was saved there; None where nothing was.

    Raises:
        ConfigError: it is of another training, or no checkpoint at all.
    """
    remedy = "give --restart to throw it away, or another --out"
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        if header.get("format") != CHECKPOINT_FORMAT:
            raise ValueError("its header does not say so")
        of, place = json.loads(header["identity"]), json.loads(header["place"])
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no checkpoint of a training ({error}); {remedy}") from None
    wanted = json.loads(json.dumps(identity))
    if of != wanted:
        other = [
            f"{name} {of.get(name)!r} (now {wanted.get(name)!r})"
            for name in sorted(of.keys() | wanted.keys())
            if of.get(name) != wanted.get(name)
        ]
        raise ConfigError(f"{path} is the checkpoint of another training: {', '.join(other)}; {remedy}")
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "moments": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    return Saved(tuple(Epoch(*line) for line in place["history"]), tuple(place["losses"]), **groups)


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error}") from None


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, state in states.items() for name, tensor in state.items()}


def _load_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        number, _, name = key.partition(".")
        states.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _identity(digest: str, parts: Parts, settings: TrainSettings) -> dict[str, Any]:
    """What two trainings have in common if and only if they take the same steps."""
    ignored = ("checkpoint_steps", "fine_tune")
    return {
        "detector": digest,
        "training images": coco.digest(parts.train),
        "validation images": coco.digest(parts.validation),
        **{name: value for name, value in asdict(settings).items() if name not in ignored},
    }


def _parts(
    data: Path,
    validation: Path | None,
    test: Path | None,
    rgb: Path | None,
    labels: Sequence[str],
    settings: TrainSettings,
) -> Parts:
    examples = coco.read(data, labels).examples
    if validation:
        held_out = coco.read(validation, labels).examples
    else:
        examples, held_out = split(examples, settings)
    if not any(len(example.truth.boxes) for example in held_out):
        raise ConfigError(
            f"{validation or data}: none of the {len(held_out)} validation images has a box; use more, or another --val"
        )
    tested = coco.read(test, labels).examples if test else held_out
    return Parts(examples, held_out, tested, coco.read(rgb, labels).examples if rgb else ())


def split(examples: tuple[Example, ...], settings: TrainSettings) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """What to train on, and the share that is held out, both in their first order.

    Raises:
        ConfigError: fewer than two images.
    """
    if len(examples) < 2:
        raise ConfigError(
            f"{len(examples)} image cannot be split into training and validation; use more, or give --val"
        )
    count = min(max(1, round(settings.validation_share * len(examples))), len(examples) - 1)
    generator = torch.Generator().manual_seed(_seed(_SPLIT, settings.seed, 0))
    held_out = set(torch.randperm(len(examples), generator=generator)[:count].tolist())
    return (
        tuple(example for number, example in enumerate(examples) if number not in held_out),
        tuple(example for number, example in enumerate(examples) if number in held_out),
    )


def _read_batch(
    examples: Sequence[Example], batch: Sequence[tuple[int, bool]], detector: Detector, channels: int
) -> tuple[list[Tensor], list[Boxes]]:
    images, truths = [], []
    for number, mirrored in batch:
        example = examples[number]
        image = with_channels(_prepare(detector, coco.read_image(example.file)), channels)
        boxes, labels = scale_boxes(example.truth, example.size, (image.shape[-2], image.shape[-1]))
        if mirrored:
            image, boxes = mirror(image, boxes)
        images.append(image)
        truths.append(Boxes(boxes.to(detector.device), labels.to(detector.device)))
    return images, truths


def mirror(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """An image [C, h, w] and its boxes [N, 4], left to right."""
    left, top, right, bottom = boxes.unbind(1)
    width = image.shape[-1]
    return image.flip(-1), torch.stack([width - right, top, width - left, bottom], dim=1)


def _prepare(detector: Detector, image: Tensor) -> Tensor:
    return detector.prepare(image.to(detector.device).float() / 255)


def _prepared_view(course: Course, prepare: Detector, image: Tensor) -> Tensor:
    (seen,) = course.see([with_channels(_prepare(prepare, image), course.channels)])
    return seen


def _translating(translator: Translator, detector: Detector) -> Course:
    see = partial(translated, translator)
    return Course("translator", translator, detector, translator.config.in_channels, see, translator.train)


def _fine_tuning(tuned: Detector) -> Course:
    """The whole detector; its normalisation layers stay in evaluation mode, as `Detector` keeps them."""
    return Course("fine-tuned detector", tuned.model, tuned, 3, list, lambda _: None)


def _line(name: str, epoch: Epoch) -> str:
    loss = "" if epoch.loss is None else f"loss {epoch.loss:.4f}, "
    return f"{name}, epoch {epoch.epoch}: {loss}validation AP50 {epoch.ap50:.3f}, AP {epoch.ap:.3f}"


def _place(saved: Saved) -> str:
    return f"{len(saved.history) - 1} epochs and {len(saved.losses)} steps done"


def _seed(purpose: int, seed: int, number: int) -> int:
    return int(np.random.SeedSequence([purpose, seed, number]).generate_state(1, np.uint64)[0])
