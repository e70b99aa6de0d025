"""Train a translator through a frozen detector's own losses, and compare it with what else could be done.

Medeiros et al., "Modality Translation for Object Detection Adaptation Without Forgetting Prior Knowledge", ECCV 2024,
arXiv 2404.01492, Eq. 4: the detector's losses are minimised over the translator's parameters alone. The detector looks
once at each batch.

Everything random in step k (order, mirrored images, which proposals a detector samples) is a function of the seed and
k, so a training that is killed and started again takes the very steps that it would have taken. On a CPU, with as many
threads, its weights are the same to the last bit; CUDA adds in any order.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from adapters.detection import Boxes
from adapters.translator import Translator, with_channels
from tta_serve import coco, translators
from tta_serve.checkpoints import (
    Saved,
    copied,
    load_moments,
    moments_of,
    read_checkpoint,
    replace_file,
    write_checkpoint,
)
from tta_serve.comparison import compare, evaluate, fit_router, translated
from tta_serve.detectors import Detector
from tta_serve.errors import ConfigError
from tta_serve.training import (
    BEFORE,
    LOSS,
    WEIGHTS,
    Epoch,
    Progress,
    TrainSettings,
    Unwatched,
    best_epoch,
    finished,
    seed_of,
)
from tta_serve.training_data import Parts, order, prepared, read_batch, read_parts


class Course(NamedTuple):
    """What learns, and through which detector."""

    name: str
    learner: nn.Module  # all of its parameters learn
    detector: Detector
    channels: int  # of the images that `see` takes
    see: Callable[[Sequence[Tensor]], list[Tensor]]  # prepared images [C, h, w] → what the detector is given
    train_mode: Callable[[bool], object]  # before steps and after them


class TrainResult(NamedTuple):
    """What was learned, and how good it is."""

    figures: dict[str, float]  # "ap50/ir/modtr": 0.83
    epochs: tuple[Epoch, ...]
    best_epoch: int  # whose weights are kept
    fine_tuned_epochs: tuple[Epoch, ...]  # none without `fine_tune`
    metrics: dict[str, Any]  # all of this as JSON, as it is in the file's header


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
    parts = read_parts(data, validation, test, rgb, labels, settings)
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
                replace_file(save_fine_tuned, safetensors.torch.save(copied(tuned.model)))
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
    weights, fitted = copied(translator), fit_router(parts, settings, watching)
    translators.save(
        out, translators.TranslatorFile(settings.modality, digest, settings.translator, weights, fitted, metrics)
    )
    for path in (checkpoint, tuned_checkpoint):
        path.unlink(missing_ok=True)
    return TrainResult(figures, history, best, tuned_history, metrics)


def new_translator(settings: TrainSettings) -> Translator:
    """The untrained translator of a seed."""
    return Translator(settings.translator, torch.Generator().manual_seed(seed_of(WEIGHTS, settings.seed, 0)))


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
        start = copied(course.learner)
        saved = Saved((validated(BEFORE, None),), (), start, start, {})
        progress.note(_line(course.name, saved.history[0]))
    else:
        progress.note(f"{course.name}: going on from {checkpoint}, {_place(saved)}")
    history, losses, best = saved.history, list(saved.losses), saved.best
    course.learner.load_state_dict(saved.weights)
    load_moments(optimizer, saved.moments)
    batches = math.ceil(len(parts.train) / settings.batch_images)
    while not finished(history, settings):
        epoch = len(history)
        progress.start(f"{course.name}, epoch {epoch} of {settings.epochs}", batches, len(losses))
        course.train_mode(True)
        for number, batch in list(enumerate(order(len(parts.train), settings, epoch)))[len(losses) :]:
            step = (epoch - 1) * batches + number
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, batches * settings.epochs, settings)
            images, truth = read_batch(parts.train, batch, prepare, course.channels)
            losses.append(take_step(course, images, truth, optimizer, step, settings))
            progress.advance(losses[-1])
            if len(losses) % settings.checkpoint_steps == 0 and len(losses) < batches:
                weights = copied(course.learner)
                write_checkpoint(
                    checkpoint, Saved(history, tuple(losses), weights, best, moments_of(optimizer)), identity
                )
        course.train_mode(False)
        history = (*history, validated(epoch, sum(losses) / len(losses)))
        losses = []
        weights = copied(course.learner)
        if best_epoch(history) == epoch:
            best = weights
        write_checkpoint(checkpoint, Saved(history, (), weights, best, moments_of(optimizer)), identity)
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
    torch.manual_seed(seed_of(LOSS, settings.seed, step))  # some detectors sample proposals with the global generator
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


def _prepared_view(course: Course, prepare: Detector, image: Tensor) -> Tensor:
    (seen,) = course.see([with_channels(prepared(prepare, image), course.channels)])
    return seen


def _translating(translator: Translator, detector: Detector) -> Course:
    see = partial(translated, translator)
    return Course("translator", translator, detector, translator.config.in_channels, see, translator.train)


def _fine_tuning(tuned: Detector) -> Course:
    """The whole detector; its normalisation layers stay in evaluation mode, as `Detector` keeps them."""
    return Course("fine-tuned detector", tuned.model, tuned, 3, list, lambda _: None)


def _identity(digest: str, parts: Parts, settings: TrainSettings) -> dict[str, Any]:
    """What two trainings have in common if and only if they take the same steps."""
    ignored = ("checkpoint_steps", "fine_tune")
    return {
        "detector": digest,
        "training images": coco.digest(parts.train),
        "validation images": coco.digest(parts.validation),
        **{name: value for name, value in asdict(settings).items() if name not in ignored},
    }


def _line(name: str, epoch: Epoch) -> str:
    loss = "" if epoch.loss is None else f"loss {epoch.loss:.4f}, "
    return f"{name}, epoch {epoch.epoch}: {loss}validation AP50 {epoch.ap50:.3f}, AP {epoch.ap:.3f}"


def _place(saved: Saved) -> str:
    return f"{len(saved.history) - 1} epochs and {len(saved.losses)} steps done"
