"""What a training of a translator is: its settings, its history, and who watches it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from adapters.translator import TranslatorConfig

BEFORE = 0  # the epoch in which nothing was learned yet

# what a seed is for: each draws its own numbers
ORDER, LOSS, SPLIT, WEIGHTS = range(1, 5)


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


def best_epoch(history: Sequence[Epoch]) -> int:
    """The epoch with the best AP50, and of these the best AP, and of these the first."""
    return max(history, key=lambda line: (line.ap50, line.ap, -line.epoch)).epoch


def finished(history: Sequence[Epoch], settings: TrainSettings) -> bool:
    """Whether a training has had all its epochs, or enough without a better one."""
    last = history[-1].epoch
    return last >= settings.epochs or last - best_epoch(history) >= settings.patience_epochs


def seed_of(purpose: int, seed: int, number: int) -> int:
    """The seed of one of many independent draws."""
    return int(np.random.SeedSequence([purpose, seed, number]).generate_state(1, np.uint64)[0])
