"""What earlier predictions were about, so that feedback need not send it again. Bounded in number, bytes and age."""

import sys
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Key(NamedTuple):
    """A prediction, within its model."""

    stream: str
    id: str


@dataclass
class Memory:
    """What one prediction was about."""

    images: tuple[Tensor, ...]  # of a detector: uint8 or float32, [C, H, W] each; of a classifier their features, [F]
    said: tuple[
        str | None, ...
    ]  # of each image: of a detector its modality, of a classifier the label that was answered
    incarnation: int  # of the stream when it answered
    at_s: float
    used: frozenset[int] = frozenset()  # images that feedback was taken for
    unknown: tuple[float, ...] = ()  # of each image of a classifier, where an open set is looked for

    @property
    def nbytes(self) -> int:
        return sum(image.nbytes for image in self.images)


class Remembered:
    """The latest predictions. Given the time; its caller sees to it that one thread at a time is in it.

    Args:
        images_max, bytes_max: the oldest give way to newer ones.
        age_max_s: older ones are forgotten.

    >>> import torch
    >>> remembered = Remembered(images_max=2, bytes_max=1000, age_max_s=60)
    >>> for number in range(3):
    ...     memory = Memory((torch.zeros(1, 4, 4),), ("ir",), incarnation=1, at_s=number)
    ...     remembered.keep(Key("camera-1", str(number)), memory)
    >>> [remembered.find(Key("camera-1", str(number)), now_s=61.5) is not None for number in range(3)]
    [False, False, True]
    """

    def __init__(self, images_max: int, bytes_max: int, age_max_s: float) -> None:
        self.images_max = images_max
        self.bytes_max = bytes_max
        self.age_max_s = age_max_s
        self.images = 0
        self.bytes = 0
        self._memories: OrderedDict[Key, Memory] = OrderedDict()

    def keep(self, key: Key, memory: Memory) -> None:
        """Remember a prediction, unless it alone is too large; another of the same name is forgotten."""
        self._drop(key)
        cost = self.cost(key, memory)
        if len(memory.images) > self.images_max or cost > self.bytes_max:
            return
        self._memories[key] = memory
        self.images += len(memory.images)
        self.bytes += cost
        while self.images > self.images_max or self.bytes > self.bytes_max:
            self._drop(next(iter(self._memories)))

    @staticmethod
    def cost(key: Key, memory: Memory) -> int:
        """Bytes of a memory and its name: a client's name may be as long as a body."""
        return memory.nbytes + sys.getsizeof(key.id)

    def find(self, key: Key, now_s: float) -> Memory | None:
        """What is remembered of a prediction."""
        self._drop_old(now_s)
        return self._memories.get(key)

    def of(self, stream: str, now_s: float) -> list[tuple[str, Memory]]:
        """All that is remembered of a stream: ids and memories, the latest last."""
        self._drop_old(now_s)
        return [(key.id, memory) for key, memory in self._memories.items() if key.stream == stream]

    def unsay(self, labels: Collection[str]) -> None:
        """Forget that these were answered."""
        for memory in self._memories.values():
            if not set(labels).isdisjoint(memory.said):
                memory.said = tuple(None if label in labels else label for label in memory.said)

    def forget(self, stream: str) -> None:
        """Drop all predictions of a stream."""
        for key in [key for key in self._memories if key.stream == stream]:
            self._drop(key)

    def _drop_old(self, now_s: float) -> None:
        while self._memories:  # the oldest is first
            key, memory = next(iter(self._memories.items()))
            if now_s - memory.at_s <= self.age_max_s:
                return
            self._drop(key)

    def _drop(self, key: Key) -> None:
        memory = self._memories.pop(key, None)
        if memory is not None:
            self.images -= len(memory.images)
            self.bytes -= self.cost(key, memory)
