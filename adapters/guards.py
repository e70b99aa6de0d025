"""Guards: wrappers that stand around an adapter and look at what it did before anyone sees it."""

from typing import Any

from torch import Tensor

from adapters import tree
from adapters.base import Batch, Groups, NormAdapter, Report, Site
from adapters.norm import Modulation


class KeepFinite:
    """Keep a stream's old state where the new one would hold an infinity or NaN; the report says `refused`.

    Args:
        adapter: the norm adapter to guard.
    """

    site: Site = "norm"

    def __init__(self, adapter: NormAdapter[Any]) -> None:
        self.adapter = adapter

    def init(self) -> Any:
        return self.adapter.init()

    def modulate(self, states: Any, rows: Tensor, groups: Groups) -> Modulation:
        return self.adapter.modulate(states, rows, groups)

    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> tuple[Any, Report]:
        new, report = self.adapter.adapt(states, rows, batch)
        finite = tree.finite_rows(new, report.applied.shape[0], report.applied.device)
        return tree.where(finite, new, states), report._replace(
            applied=report.applied & finite, refused=report.refused | ~finite
        )
