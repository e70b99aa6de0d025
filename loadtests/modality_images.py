"""Images for detectors that are not scenes: scenes with their histogram equalised, and photographs in grey.

The photographs are scikit-learn's two sample images (a temple, a flower); with `--data`, CIFAR's clean images too.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from loadtests import cifar

CROP_SIDE = (32, 400)  # pixels, shortest and longest side of a crop; the photographs are 427 high


def equalised(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image [1, H, W] with its histogram made as flat as it can be: what a client can do by itself."""
    return np.asarray(ImageOps.equalize(Image.fromarray(image[0])))[np.newaxis]


def photographs(count: int, seed: int) -> list[NDArray[np.uint8]]:
    """Crops of photographs in grey, uint8 [1, h, w] each; every second one at half the resolution.

    Places are even, sides are as often between 32 and 64 as between 64 and 128 pixels, and so on.
    """
    from sklearn.datasets import load_sample_images  # slow to import, and only a measurement needs it

    whole = [Image.fromarray(image).convert("L") for image in load_sample_images().images]
    generator = np.random.default_rng(seed)
    shortest, longest = np.log(CROP_SIDE).tolist()
    crops = []
    for number in range(count):
        photograph = whole[number // 2 % len(whole)]
        width, height = np.exp(generator.uniform(shortest, longest, 2)).round().astype(int).tolist()
        left = int(generator.integers(photograph.width - width, endpoint=True))
        top = int(generator.integers(photograph.height - height, endpoint=True))
        crop = photograph.crop((left, top, left + width, top + height))
        crops.append(np.asarray(crop.reduce(2) if number % 2 else crop)[np.newaxis])
    return crops


def grey_cifar(data: Path, count: int) -> list[NDArray[np.uint8]]:
    """The first CIFAR images in grey, uint8 [1, 32, 32] each.

    Raises:
        MissingFile: the folder has none.
    """
    images = cifar.images(data, "clean")[:count]
    return [np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L"))[np.newaxis] for image in images]
