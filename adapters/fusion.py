"""A head's scores and the network's own logits, as one answer.

A head knows the classes that it was told, the network those that it was trained for; either may know what the other
does not. With the head's scores s_y, on which 0 is what an image gets from a class of which nothing is known, and n_y
labels of each class, the image is *none of the head's* with

    P(none | x) = 1 / (1 + Σ_y e_y)     e_y = n_y/(n_y + 1) · exp s_y     one unit of evidence for `none`

and then the network answers. So the answer is the mixture

    P(y | x) = P(none | x) · (P_network(y | x) + e_y)

of experts gated by the image itself (Jacobs et al., "Adaptive mixtures of local experts", Neural Computation 3, 1991,
equation 1). A head that was told nothing leaves P(none) = 1, and the network's own logits untouched, bit for bit.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from adapters.base import AdapterError, Batch, Report, Site
from adapters.heads import AnyHead, Items

ABSENT = -1e4  # the logit of a class that cannot be; finite, so that it can be sent, and its softmax is exactly 0

Answers = Literal["combined", "head"]


class Fusion:
    """A head behind a network: the adapter of the site `head`.

    Its table of states is a tuple, for they grow; and `score` is given what the head's `read` made of each.

    Args:
        head: what learns.
        labels: C, the classes of the network.
        answers: `combined`, or `head`: the head alone answers, and the network only while the head was told nothing.
    """

    site: Site = "head"

    def __init__(self, head: AnyHead, labels: int, answers: Answers = "combined") -> None:
        self.head = head
        self.labels = labels
        self.answers: Answers = answers

    def init(self) -> Any:
        return self.head.init()

    def score(self, states: Sequence[Any], rows: Tensor, features: Tensor | None, logits: Tensor) -> Tensor:
        """The answer to each row.

        Args:
            states: S tables, from the head's `read`.
            rows: int64 [B].
            features: [B, F].
            logits: of the network, [B, C].

        Returns:
            [B, C + E], E the most classes that any of the S tables adds to the network's; a row whose table adds fewer
            has `ABSENT` behind its own. Added classes are in the order of their numbers.

        Raises:
            AdapterError: there are no features.
        """
        if features is None:
            raise AdapterError("a head needs the features of the network, and this one gives none")
        added = [[number for number in table.classes if number >= self.labels] for table in states]
        width = self.labels + max((len(each) for each in added), default=0)
        evidence = self._evidence(states, rows, features)
        if not evidence:
            return logits
        fused = logits.new_full((len(logits), width), ABSENT)
        fused[:, : self.labels] = logits
        for i, (mine, scores) in evidence.items():
            place = {number: self.labels + column for column, number in enumerate(added[i])}
            columns = torch.tensor([place.get(number, number) for number in states[i].classes], device=logits.device)
            joined = self._joined(fused[mine, : self.labels + len(added[i])], columns, scores.to(logits.dtype))
            fused[mine, : joined.shape[1]] = joined
        return fused

    def none(self, states: Sequence[Any], rows: Tensor, features: Tensor) -> Tensor:
        """How likely each row is none of its head's classes, P(none | x), [B]; 1 where that was told nothing.

        Args and Raises: see `score`.
        """
        found = features.new_ones(len(features))
        for mine, scores in self._evidence(states, rows, features).values():
            found[mine] = torch.softmax(_with_none(scores), dim=1)[:, 0]
        return found

    def adapt(self, states: Sequence[Any], rows: Tensor, batch: Batch) -> tuple[tuple[Any, ...], Report]:
        """Learn the labels of a batch, as `batch.targets` gives them.

        Args:
            states: S states.
            rows: int64 [B].
            batch: with `targets` and the `output` that holds features; rows of weight 0 teach nothing.
        """
        report = Report.empty(len(states), batch.x.device)
        if batch.targets is None or batch.output is None or batch.output.features is None:
            return tuple(states), report
        new = list(states)
        seen = report.seen.clone()
        for i in range(len(states)):
            mine = ((rows == i) & (batch.weights > 0)).nonzero().flatten()
            if len(mine):
                codes = self.head.encode(batch.output.features[mine])
                new[i] = self.head.learn(states[i], Items(codes, batch.targets[mine]))
                seen[i] = len(mine)
        return tuple(new), report._replace(seen=seen, reliable=seen, selected=seen, applied=seen > 0)

    def _evidence(self, states: Sequence[Any], rows: Tensor, features: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each table that was told something and has rows here: these, [b], and log e_y of its classes, [b, K]."""
        told = torch.tensor([bool(table.classes) for table in states], device=rows.device)
        mine = told[rows].nonzero().flatten() if len(states) else rows[:0]
        if not len(mine):
            return {}
        codes, owners = self.head.encode(features[mine]), rows[mine]
        found = {}
        for i in torch.unique(owners).tolist():
            here = (owners == i).nonzero().flatten()
            labels = torch.tensor(states[i].images, dtype=features.dtype, device=features.device)
            scores: Tensor = self.head.score(states[i], codes[here])
            found[i] = mine[here], scores + (labels / (labels + 1)).log()
        return found

    def _joined(self, logits: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        """One answer of both.

        Args:
            logits: of the network, `ABSENT` where it has no such class, [b, C + E].
            columns: of the head's classes among these, [K].
            scores: log e_y, [b, K].
        """
        if self.answers == "head":
            return torch.full_like(logits, ABSENT).index_copy(1, columns, scores)
        none = _with_none(scores).logsumexp(dim=1, keepdim=True)  # −log P(none)
        whole = logits.logsumexp(
            dim=1, keepdim=True
        )  # the network's scale is kept: logits stay what they were, shifted
        own = logits - none
        theirs = whole + scores - none
        return own.index_copy(1, columns, torch.logaddexp(own[:, columns], theirs))


def _with_none(scores: Tensor) -> Tensor:
    """One unit of evidence for `none` in front of the classes' [b, K]."""
    return torch.cat([scores.new_zeros(len(scores), 1), scores], dim=1)
