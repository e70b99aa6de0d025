"""Train the built-in detector and write the files in `builtin/`: `python -m tta_serve.train_scenes`.

It sees a new scene at every turn, in other tints and sometimes in grey, and nothing of what the infrared rendering does
to one: no inversion, no blur, no noise. Takes about 9 minutes on one core. Run again with the same versions, it gives
the same weights.
"""

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable, Sequence

import faster_coco_eval
import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.detection import Boxes, Detections
from tta_serve import coco
from tta_serve.builtin import scene_detector, scenes
from tta_serve.builtin.scenes import Scene
from tta_serve.coco import AP

SEED = 0
STEPS = 2400
BATCH_IMAGES = 8
LEARNING_RATE = 2e-3  # at its highest; cosine, after a rise
RISE_STEPS = 100
WEIGHT_DECAY = 1e-3
LARGEST_GRADIENT = 5.0  # norm over all parameters
REPORT_STEPS = 100  # between two lines of progress

GREY = 0.25  # share of the scenes that are shown in grey
TINT = 0.2  # share by which a channel is brighter or darker at most
TINTS = 2  # ends the seed of the tints' generator; a scene's has 0 or 1 there

HELD_OUT_SCENES = 500
HELD_OUT_SEED = 0


def main() -> None:
    """Train, write, measure."""
    started = time.monotonic()
    torch.set_num_threads(1)  # sums are added in one order, so that a second run agrees
    model, progress = train(STEPS)
    seconds = time.monotonic() - started
    save_file(model.state_dict(), scene_detector.WEIGHTS, metadata={"model": "digit-scenes"})
    scene_detector.WEIGHTS.chmod(0o644)  # safetensors writes for its owner alone
    in_colour = list(scenes.scenes(HELD_OUT_SCENES, HELD_OUT_SEED, held_out=True))
    visible = measured(model, in_colour)
    in_grey = measured(model, (each._replace(image=grey(each.image)) for each in in_colour))
    infrared = measured(model, scenes.infrared_scenes(HELD_OUT_SCENES, HELD_OUT_SEED, held_out=True))
    log = {
        "model": "digit-scenes",
        "sha256": hashlib.sha256(scene_detector.WEIGHTS.read_bytes()).hexdigest(),
        "seed": SEED,
        "train_scenes": STEPS * BATCH_IMAGES,
        "held_out_scenes": HELD_OUT_SCENES,
        "held_out_seed": HELD_OUT_SEED,
        "rgb": rounded(visible),
        "rgb_in_grey": rounded(in_grey),
        "ir_zero_shot": rounded(infrared),
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "faster-coco-eval": faster_coco_eval.__version__,
        },
        "progress": progress,
    }
    scene_detector.TRAINING_LOG.write_text(json.dumps(log, indent=1) + "\n")
    print(f"AP50 {visible.ap50:.3f} in colour, {infrared.ap50:.3f} in infrared, after {seconds:.0f} s")


def train(steps: int) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained detector, in evaluation mode, and the mean loss of every `REPORT_STEPS` steps, also printed."""
    torch.manual_seed(SEED)  # initial weights come from the global generator, everything else from the scenes' seeds
    model = scene_detector.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    progress, losses, started = [], [], time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        made = [scenes.scene(step * BATCH_IMAGES + i, SEED, held_out=False) for i in range(BATCH_IMAGES)]
        generator = np.random.default_rng([SEED, step, TINTS])
        images = [to_tensor(tinted(each.image, generator)) for each in made]
        loss = torch.stack(list(model(images, targets(made)).values())).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % REPORT_STEPS == 0 or step + 1 == steps:
            progress.append({"step": step + 1, "loss": round(sum(losses) / len(losses), 5)})
            losses = []
            print(f"step {step + 1}/{steps}, loss {progress[-1]['loss']:.3f}, {time.monotonic() - started:.0f} s")
    return model.eval(), progress


def learning_rate(step: int, steps: int) -> float:
    """Rises in a straight line over `RISE_STEPS`, then falls to zero along half a cosine."""
    return LEARNING_RATE * min((step + 1) / RISE_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps)))


def tinted(image: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """The picture [H, W, 3] in grey, now and then, or with each channel a little brighter or darker."""
    if generator.random() < GREY:
        image = grey(image)
    gain = 1 + generator.uniform(-TINT, TINT, 3)
    return (image * gain).round().clip(0, 255).astype(np.uint8)


def grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture [H, W, 3] with its luminance in all three channels."""
    return np.repeat((image @ scenes.LUMINANCE).round().astype(np.uint8)[..., None], 3, axis=2)


def to_tensor(image: NDArray[np.uint8]) -> Tensor:
    """From uint8 [H, W, 3 or 1] to float32 [3, H, W] in [0, 1]; one channel is repeated."""
    return (torch.from_numpy(image).permute(2, 0, 1).float() / 255).expand(3, -1, -1).contiguous()


def targets(made: Sequence[Scene]) -> list[dict[str, Tensor]]:
    """What torchvision's detectors learn from."""
    return [{"boxes": torch.from_numpy(each.boxes), "labels": torch.from_numpy(each.labels)} for each in made]


@torch.no_grad()
def measured(model: nn.Module, made: Iterable[Scene]) -> AP:
    """How well a detector, in evaluation mode, finds the digits of the scenes."""
    truth, found, sizes = [], [], []
    for scene in made:
        (detected,) = model([to_tensor(scene.image)])
        found.append(Detections(detected["boxes"], detected["labels"], detected["scores"]))
        truth.append(Boxes(torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels)))
        sizes.append((scene.image.shape[0], scene.image.shape[1]))
    return coco.average_precision(truth, found, sizes)


def rounded(precision: AP) -> dict[str, float]:
    """For the log."""
    return {name: round(value, 4) for name, value in precision._asdict().items()}


if __name__ == "__main__":
    main()
