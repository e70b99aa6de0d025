"""What was made and can be made again: kept while there is room."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Cache(Generic[K, V]):
    """The values that were used last, as many as fit; any thread may call.

    Args:
        bytes_max: together; the last one stays, however large.
        cost: bytes of a value.

    >>> cache = Cache[str, bytes](bytes_max=4, cost=len)
    >>> for key, value in {"a": b"12", "b": b"34", "c": b"56"}.items():
    ...     cache.put(key, value)
    >>> cache.get("a"), cache.get("b"), cache.get("c")
    (None, b'34', b'56')
    """

    def __init__(self, bytes_max: int, cost: Callable[[V], int]) -> None:
        self._bytes_max = bytes_max
        self._cost = cost
        self._bytes = 0
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: K, value: V) -> None:
        cost = self._cost(value)
        with self._lock:
            self._bytes += cost - self._values.pop(key, (value, 0))[1]
            self._values[key] = value, cost
            while self._bytes > self._bytes_max and len(self._values) > 1:
                _, (_, freed) = self._values.popitem(last=False)
                self._bytes -= freed

    def drop(self, key: K) -> None:
        """Let go of a value; nothing happens where there is none."""
        with self._lock:
            self._bytes -= self._values.pop(key, (None, 0))[1]

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._values.clear()
            self._bytes = 0

    def drop_where(self, is_gone: Callable[[V], bool]) -> None:
        """Let go of some values."""
        with self._lock:
            for key in [key for key, (value, _) in self._values.items() if is_gone(value)]:
                self._bytes -= self._values.pop(key)[1]
