"""The contract of every adapter.

A *model* is a frozen network. An *adapter* is an algorithm around it, immutable once built: nothing on `self` ever
changes. Everything that adaptation changes is a *state*: a named tuple of tensors, made by `init()`. One state belongs
to one stream; *states* is a stacked table of S of them. `rows[i]` says which state row i of a batch uses.

An adapter has a *site*, the place where it meets the network, and the one method of that site:

    input   transform(states, rows, x) -> x'
    norm    modulate(states, rows, groups) -> Modulation
    head    score(states, rows, features, logits) -> logits

and all have `adapt(states, rows, batch) -> (states', report)`, which leaves the old states alone. (A head
grows with the labels that it is told, so that its table is a tuple of S states; see `heads.py`.) So reset is `init()`,
rollback is an older value, a snapshot is an encoding, and forgetting a stream is deleting its row.

Laws, which `checks.check_adapter` proves for each adapter:

1. `init()` always gives the same value, and `adapt` neither changes its arguments nor `self`.
2. A stream's new state depends on its own rows only: streams adapted in one batch end where they end alone (1e-5).
3. A request's answer depends on its own rows and state only: any micro-batch gives the same answer (1e-5).
4. A request whose rows all have weight 0 teaches nothing. (A single row of weight 0 is not selected, but still shares
   in the statistics of its request.)
5. A state survives encoding bit for bit.

An adapter of the sites `input` and `norm` also says what its leaves mean when several replicas learn about one stream:
`merging()`. The laws of that are in `merging.py`. (A head is what its feedback makes of it, and is never merged.)
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from adapters import tree
from adapters.detection import Boxes
from adapters.merging import Merging

if TYPE_CHECKING:  # norm.py stands on this file
    from adapters.norm import Modulation, Network

Site = Literal["input", "norm", "head"]


class AdapterError(Exception):
    """Root of the errors raised in this package.

    AdapterError
    └── UnsupportedModel
    """


class UnsupportedModel(AdapterError):
    """The model has nothing that the adapter could adapt; the message says what is missing."""


class Groups(NamedTuple):
    """Which request each row of a batch came in. Sizes are known on the host, so that no device is waited for."""

    index: Tensor  # type: ignore[assignment]  # int64 [B]: the request's number, 0 ≤ index < G
    sizes: tuple[int, ...]  # rows of each of the G requests

    @classmethod
    def of(cls, sizes: tuple[int, ...], device: torch.device | str = "cpu") -> "Groups":
        """Requests laid one after the other: the first `sizes[0]` rows are request 0, and so on.

        >>> Groups.of((2, 1)).index
        tensor([0, 0, 1])
        """
        numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
        return cls(numbers.to(device), sizes)

    def of_rows(self, rows: Tensor) -> Tensor:
        """The state row of each request, int64 [G]: a request belongs to one stream."""
        return rows.new_zeros(len(self.sizes)).scatter_(0, self.index, rows)


class Moments(NamedTuple):
    """A request's own statistics at every channel of every normalisation layer, P channels in all."""

    mean: Tensor  # [G, P]
    var: Tensor  # biased, [G, P]
    between: Tensor | None = None  # variance between the means of single images, [G, P]


class Output(NamedTuple):
    """What one forward gives."""

    logits: Tensor  # [B, C]
    features: Tensor | None  # what the last linear layer read, [B, F]; None where there is no such layer
    moments: Moments | None  # where the forward used them
    network_logits: Tensor | None = None  # before the head, where there is one, [B, C]


class Batch(NamedTuple):
    """Rows to learn from, as they were served."""

    x: Tensor  # [B, …], what `transform` would receive
    groups: Groups
    weights: Tensor  # float [B]; 0 teaches nothing
    output: Output | None = None  # as answered; None where it was not kept
    frozen_logits: Tensor | None = None  # of the frozen network for the same rows; NaN where it was not asked; [B, C]
    targets: Tensor | None = None  # labels, from feedback
    boxes: tuple[Boxes, ...] | None = None  # what is in each of the B images, from feedback


class Report(NamedTuple):
    """What one call of `adapt` did, per row of the table; tensors, so that reading them is the caller's choice."""

    seen: Tensor  # rows of weight > 0, int64 [S]
    reliable: Tensor  # of these, rows that passed the first filter, int64 [S]
    selected: Tensor  # of these, rows that were learned from, int64 [S]
    entropy: Tensor  # mean entropy of the rows seen, nats, [S]; 0 where none was
    mean_probs: Tensor  # mean probabilities of the rows seen, [S, C]; 0 where none was
    applied: Tensor  # whether parameters were updated, bool [S]
    refused: Tensor  # whether a guard kept the old state, bool [S]
    trips: Tensor  # which guards tripped, bits of `guards.Trip`, int64 [S]

    @classmethod
    def empty(cls, states: int, device: torch.device | str = "cpu") -> "Report":
        """Nothing seen, nothing done."""
        count = torch.zeros(states, dtype=torch.int64, device=device)
        no = torch.zeros(states, dtype=torch.bool, device=device)
        zero = torch.zeros(states, device=device)
        return cls(count, count, count, zero, zero.new_zeros(states, 0), no, no, count)


S = TypeVar("S")


class Adapter(Protocol[S]):
    """What every adapter has, whatever its site."""

    @property
    def site(self) -> Site: ...

    def init(self) -> S:
        """The state of a stream that has seen nothing."""
        ...

    def adapt(self, states: S, rows: Tensor, batch: Batch) -> tuple[S, Report]:
        """Learn from one batch.

        Args:
            states: table of S states.
            rows: int64 [B], which state each row of the batch belongs to.
            batch: B rows of any mix of streams.

        Returns:
            A new table of S states (rows without data keep their values) and the report.
        """
        ...


class InputAdapter(Adapter[S], Protocol[S]):
    """Changes what the network sees."""

    def transform(self, states: S, rows: Tensor, x: Tensor) -> Tensor: ...

    def merging(self) -> Merging:
        """What the leaves of a state mean when two replicas have changed it."""
        ...


class NormAdapter(Adapter[S], Protocol[S]):
    """Changes what the normalisation layers do."""

    def modulate(self, states: S, rows: Tensor, groups: Groups) -> "Modulation": ...

    def absorb(self, states: S, rows: Tensor, groups: Groups, moments: Moments) -> S:
        """Take the statistics of requests that nothing else is learned from, without a forward.

        Args:
            states: table of S states.
            rows: int64 [G], which state each request belongs to.
            groups: the requests; their sizes count.
            moments: [G, P].
        """
        ...

    def merging(self) -> Merging:
        """What the leaves of a state mean when two replicas have changed it."""
        ...


class HeadAdapter(Adapter[S], Protocol[S]):
    """Changes how features become scores."""

    def score(self, states: S, rows: Tensor, features: Tensor | None, logits: Tensor) -> Tensor: ...


class Forward(Protocol):
    """A network's forward: see `Network.__call__`."""

    def __call__(self, x: Tensor, modulation: "Modulation | None" = None) -> Output: ...


class PipelineState(NamedTuple):
    """The states of the three sites; `()` where a pipeline has no adapter there."""

    input: Any
    norm: Any
    head: Any


class Pipeline:
    """An input, a norm and a head adapter around one network; itself an adapter.

    Args:
        network: the frozen network.
        input, norm, head: at most one adapter for each site.

    Raises:
        AdapterError: an adapter stands at another site than its own.
    """

    def __init__(
        self,
        network: "Network",
        input: InputAdapter[Any] | None = None,
        norm: NormAdapter[Any] | None = None,
        head: HeadAdapter[Any] | None = None,
    ) -> None:
        for site, adapter in (("input", input), ("norm", norm), ("head", head)):
            if adapter is not None and adapter.site != site:
                raise AdapterError(f"an adapter of site {adapter.site!r} cannot stand at {site!r}")
        self.network = network
        self.input = input
        self.norm = norm
        self.head = head

    def init(self) -> PipelineState:
        return PipelineState(*(a.init() if a else () for a in (self.input, self.norm, self.head)))

    def predict(
        self, states: PipelineState, rows: Tensor, groups: Groups, x: Tensor, forward: "Forward | None" = None
    ) -> Output:
        """The pure forward: the same arguments give the same answer, and nothing is changed.

        Args:
            states: table of S states.
            rows: int64 [B].
            groups: which request each row came in.
            x: [B, …].
            forward: runs the network in its place, and gives the same.
        """
        if self.input:
            x = self.input.transform(states.input, rows, x)
        modulation = self.norm.modulate(states.norm, rows, groups) if self.norm else None
        output = (forward or self.network)(x, modulation)
        if self.head:
            logits = self.head.score(states.head, rows, output.features, output.logits)
            output = output._replace(logits=logits, network_logits=output.logits)
        return output

    def adapt(self, states: PipelineState, rows: Tensor, batch: Batch) -> tuple[PipelineState, Report]:
        """Let every site learn from the batch, the head where there are labels; the report is the last site's."""
        report = Report.empty(_table_rows(rows, states), batch.x.device)
        new = states
        if self.input:
            state, report = self.input.adapt(states.input, rows, batch)
            new = new._replace(input=state)
            batch = batch._replace(x=self.input.transform(states.input, rows, batch.x))
        if self.norm:
            state, report = self.norm.adapt(states.norm, rows, batch)
            new = new._replace(norm=state)
        if self.head and batch.targets is not None:
            state, report = self.head.adapt(states.head, rows, batch)
            new = new._replace(head=state)
        return new, report

    def absorb(self, states: PipelineState, rows: Tensor, groups: Groups, moments: Moments) -> PipelineState:
        """Let the norm site take requests' statistics; see `NormAdapter.absorb`."""
        return states._replace(norm=self.norm.absorb(states.norm, rows, groups, moments)) if self.norm else states

    def merging(self) -> Merging:
        """The rules of the input and the norm site; the head's state has none."""
        of_input = self.input.merging().below("input") if self.input else Merging()
        of_norm = self.norm.merging().below("norm") if self.norm else Merging()
        return of_input.joined(of_norm)


def _table_rows(rows: Tensor, states: Any) -> int:
    """S, from the table itself; a table of empty states has none, and then `rows` tells."""
    for _, leaf in tree.leaves(states):
        return leaf.shape[0]
    return int(rows.max()) + 1 if rows.numel() else 0
