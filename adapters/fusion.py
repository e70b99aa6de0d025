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
        told = [i for i, table in enumerate(states) if table.classes]
        added = [[number for number in table.classes if number >= self.labels] for table in states]
        width = self.labels + max((len(each) for each in added), default=0)
        if not told:
            return logits
        fused = logits.new_full((len(logits), width), ABSENT)
        fused[:, : self.labels] = logits
        for i in told:
            mine = (rows == i).nonzero().flatten()
            if len(mine):
                scores = self.head.score(states[i], self.head.encode(features[mine])).to(logits.dtype)
                known = [n if n < self.labels else self.labels + added[i].index(n) for n in states[i].classes]
                columns = torch.tensor(known, device=logits.device)
                labels = torch.tensor(states[i].images, dtype=logits.dtype, device=logits.device)
                own = fused[mine, : self.labels + len(added[i])]
                joined = self._joined(own, columns, scores + (labels / (labels + 1)).log())
                fused[mine, : joined.shape[1]] = joined
        return fused

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

    def _joined(self, logits: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
        """One answer of both.

        Args:
            logits: of the network, `ABSENT` where it has no such class, [b, C + E].
            columns: of the head's classes among these, [K].
            scores: log e_y, [b, K].
        """
        if self.answers == "head":
            return torch.full_like(logits, ABSENT).index_copy(1, columns, scores)
        none = torch.cat([scores.new_zeros(len(scores), 1), scores], dim=1).logsumexp(dim=1, keepdim=True)  # −log P
        whole = logits.logsumexp(
            dim=1, keepdim=True
        )  # the network's scale is kept: logits stay what they were, shifted
        own = logits - none
        theirs = whole + scores - none
        return own.index_copy(1, columns, torch.logaddexp(own[:, columns], theirs))
