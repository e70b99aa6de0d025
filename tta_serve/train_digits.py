"""Train the built-in model and write the files in `builtin/`: `python -m tta_serve.train_digits`.

It sees digits that are moved, turned and resized a little, and none of the shifts that `tta-serve demo` plays. Takes
about a minute on one core. Run again with the same versions, it gives the same weights.
"""

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from adapters.anchors import fisher_diagonal
from adapters.norm import Network
from tta_serve import models
from tta_serve.builtin import digits
from tta_serve.builtin.digits import Digits
from tta_serve.config import ModelSettings

SEED = 0
EPOCHS = 40
BATCH_IMAGES = 64
LEARNING_RATE = 3e-3  # at its highest; one cycle, cosine
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.05  # keeps the model from being sure of everything: EATA's filters and Fisher anchor need doubts
FISHER_BATCH_IMAGES = 200  # what EATA's anchor weight was chosen for
PROBE_IMAGES = 300  # the first of the held-out images

TURN_DEGREES = 8.0
RESIZE = 0.08  # share of the size, smaller or larger
MOVE = 0.08  # share of the half width


def main() -> None:
    """Train, measure, write."""
    started = time.monotonic()
    torch.set_num_threads(1)  # sums are added in one order, so that a second run agrees
    model, epochs = train()
    save_file(model.state_dict(), digits.WEIGHTS, metadata={"model": "digits"})
    write_prior(digits.PRIOR)
    split = digits.split()
    np.savez_compressed(
        digits.PROBE, images=split.held_out_images[:PROBE_IMAGES], labels=split.held_out_labels[:PROBE_IMAGES]
    )
    log = {
        "model": "digits",
        "digest": digest(),
        "seed": SEED,
        "train_images": len(split.train_labels),
        "held_out_images": len(split.held_out_labels),
        "held_out_accuracy": epochs[-1]["held_out_accuracy"],
        "seconds": round(time.monotonic() - started, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "numpy": np.__version__,
        },
        "epochs": epochs,
    }
    digits.TRAINING_LOG.write_text(json.dumps(log, indent=1) + "\n")
    print(f"held-out accuracy {log['held_out_accuracy']:.2%} after {log['seconds']} s")


def train() -> tuple[Digits, list[dict[str, Any]]]:
    """The trained model, in evaluation mode, and a line of figures for each epoch."""
    split = digits.split()
    images, labels = digits.prepare(split.train_images), torch.from_numpy(split.train_labels)
    torch.manual_seed(SEED)  # initial weights come from the global generator, everything else from this one
    generator = torch.Generator().manual_seed(SEED)
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    steps, step, log = EPOCHS * math.ceil(len(labels) / BATCH_IMAGES), 0, []
    for epoch in range(1, EPOCHS + 1):
        model.train()
        losses = []
        order = torch.randperm(len(labels), generator=generator)
        for first in range(0, len(order), BATCH_IMAGES):
            chosen = order[first : first + BATCH_IMAGES]
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            logits = model(moved(images[chosen], generator))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            step += 1
        model.eval()
        log.append(
            {
                "epoch": epoch,
                "loss": round(sum(losses) / len(losses), 5),
                "train_accuracy": accuracy(model, split.train_images, split.train_labels),
                "held_out_accuracy": accuracy(model, split.held_out_images, split.held_out_labels),
            }
        )
    return model, log


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of [B, 3, H, W] turned, resized and moved a little; what comes in at the edges repeats the border."""

    def uniform(most: float) -> Tensor:
        return (2 * torch.rand(len(x), generator=generator) - 1) * most

    angle, size = uniform(math.radians(TURN_DEGREES)), 1 + uniform(RESIZE)
    across, down = uniform(MOVE), uniform(MOVE)
    sine, cosine = size * angle.sin(), size * angle.cos()
    matrix = torch.stack([cosine, -sine, across, sine, cosine, down], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(matrix, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(model: Digits, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Share of images that get their label."""
    correct = (model(digits.prepare(images)).argmax(dim=1).numpy() == labels).mean()
    return round(float(correct), 5)


def fisher() -> Tensor:
    """The Fisher diagonal of the shipped weights over all training images, float32 [2 P].

    Reckoned in double precision, so that it is the same on every machine: gradients of a model that is right nearly
    everywhere are small differences.
    """
    images = digits.prepare(digits.split().train_images).double()
    batches = (images[first : first + FISHER_BATCH_IMAGES] for first in range(0, len(images), FISHER_BATCH_IMAGES))
    return fisher_diagonal(Network(digits.load().double()), batches).float()


def write_prior(path: Path) -> None:
    """What the adapters need to know of the shipped weights beforehand."""
    network = Network(digits.load())
    prior = {"fisher": fisher(), "mean": network.mean, "var": network.var}
    save_file(prior, path, metadata={"model": "digits", "digest": digest()})


def digest() -> str:
    """How the server names the shipped weights."""
    return models.load(ModelSettings.model_validate({"name": "digits", "source": "builtin/digits"})).digest


if __name__ == "__main__":
    main()
