"""The live states of a model: a stacked table on the device, and the optimizer moments of the streams at work."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adapters import optim, tree

WORKING_MAX = 256  # streams whose optimizer moments are kept; the learner's others begin theirs anew


class Table:
    """Stacked states, without optimizer moments. Row 0 is `init()` and stays so.

    Writing and reading different rows at once is safe; who may use which row is `streams.Rows`' business.

    Args:
        init: the state of a stream that has seen nothing.
        rows: of the table. On the CPU, memory that was never written costs nothing.
    """

    def __init__(self, init: Any, rows: int) -> None:
        self._init = init
        self._rows = rows
        resting = optim.rest(init)
        self.row_bytes = tree.nbytes(resting)
        self._table = tree.apply(lambda leaf: leaf.new_empty((rows, *leaf.shape)), resting)
        self.write([0], tree.stack([resting]))
        self._working: OrderedDict[tuple[str, int], list[optim.OptimizerState]] = OrderedDict()

    @property
    def working_bytes(self) -> int:
        """Of all optimizer moments."""
        return sum(tree.nbytes(tuple(each)) for each in list(self._working.values()))

    def bytes_of(self, stream: tuple[str, int]) -> int:
        """Of one stream that has a row."""
        return self.row_bytes + tree.nbytes(tuple(self._working.get(stream, ())))

    def read(self, rows: Sequence[int]) -> Any:
        """The states of these rows, stacked; without optimizer moments. A single row is a view."""
        if len(rows) == 1:
            (row,) = rows
            return tree.apply(lambda leaf: leaf[row : row + 1], self._table)
        index = self._index(rows)
        return tree.apply(lambda leaf: leaf.index_select(0, index), self._table)

    def write(self, rows: Sequence[int], states: Any) -> None:
        """Put states (without optimizer moments) into these rows; on return they can be read by any thread."""
        index = self._index(rows)

        def put(leaf: Tensor, new: Tensor) -> Tensor:
            # what a step left alone may still be the view that `read` gave
            mine = new.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
            return leaf.index_copy_(0, index, new.clone() if mine else new)

        tree.apply(put, self._table, states)
        if index.is_cuda:  # the reader may be on another CUDA stream
            torch.cuda.current_stream(index.device).synchronize()

    def restructure(self, init: Any, migrate: Callable[[Any, Any], Any]) -> None:
        """Let the states have another structure; nobody may read or write meanwhile. Optimizer moments are dropped.

        Args:
            init: the state of a stream that has seen nothing, from now on.
            migrate: from the table as it is, and one of the same rows that are all the new `init`, to the new table.
        """
        resting = optim.rest(init)
        fresh = tree.apply(lambda leaf: leaf.expand(self._rows, *leaf.shape).clone(), resting)
        self._table = migrate(self._table, fresh)
        self._init = init
        self.row_bytes = tree.nbytes(resting)
        self._working.clear()
        self.write([0], tree.stack([resting]))

    def wake(self, states: Any, streams: Sequence[tuple[str, int]]) -> Any:
        """States read from the table with their streams' optimizer moments: as they were kept, or fresh.

        Args:
            states: table of S states.
            streams: name and incarnation of each.
        """
        fresh = optim.moments(tree.stack([self._init]))
        if not fresh:
            return states
        kept = [self._working.get(stream, fresh) for stream in streams]
        stacked = [tree.apply(lambda *parts: torch.cat(parts), *each) for each in zip(*kept, strict=True)]
        return optim.with_moments(states, stacked)

    def keep_moments(self, states: Any, streams: Sequence[tuple[str, int] | None]) -> None:
        """Keep the optimizer moments of these states, but for streams that are None.

        States that have none with them leave alone what is kept.
        """
        stacked = optim.moments(states)
        if not any(each.first.shape[-1] for each in stacked):
            return
        for i, stream in enumerate(streams):
            if stream is not None:
                self._working[stream] = [tree.apply(lambda leaf: leaf[i : i + 1].clone(), part) for part in stacked]  # noqa: B023
                self._working.move_to_end(stream)
        while len(self._working) > WORKING_MAX:
            self._working.popitem(last=False)

    def forget_moments(self, stream: tuple[str, int]) -> None:
        self._working.pop(stream, None)

    def _index(self, rows: Sequence[int]) -> Tensor:
        leaf = next((leaf for _, leaf in tree.leaves(self._table)), torch.zeros(0))
        return torch.tensor(rows, dtype=torch.int64).to(leaf.device)
