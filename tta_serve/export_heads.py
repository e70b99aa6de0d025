"""Heads that have learned, as plain modules: from features to scores in operators that ONNX has.

What a head does while it serves is written for tables that grow and for any mix of streams. Here is one table that
never changes: what was told stands in the module as constants. Codes are made as `Head.encode` makes them, and scores
as `Head.score` does; the head's own code stays the measure (`export_onnx.py` compares).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters import ClassMeans, Components, Counts, Fusion, KVGradient, Ridge
from adapters.class_means import ClassMeansTable
from adapters.class_sums import GRID
from adapters.fusion import ABSENT
from adapters.heads import AnyHead, Readable
from adapters.keys import Keys
from adapters.kv_bottleneck import CountsTable
from adapters.kv_gradient import KVGradientTable
from adapters.ridge import RidgeTable
from tta_serve.errors import InvalidInput

UNTOLD = -1e30  # log evidence for a class that the head was never told: its exponential is 0, and it is finite


class FixedHead(nn.Module):
    """A head behind a network's logits: see `Fusion.score`, for one table with at least one class.

    Args:
        fusion: the head, and how it is joined to the network.
        table: from the head's `read`.

    Raises:
        InvalidInput: a head that cannot be exported.
    """

    columns: Tensor  # of the head's K scores and one that says nothing, which is whose: int64 [C + E]
    prior: Tensor  # log(n_y / (n_y + 1)), [K]

    def __init__(self, fusion: Fusion, table: Readable) -> None:
        super().__init__()
        self.score = score_of(fusion.head, table)
        self.alone = fusion.answers == "head"
        added = [number for number in table.classes if number >= fusion.labels]
        places = {number: place for place, number in enumerate(table.classes)}
        wanted = [*range(fusion.labels), *added]
        labels = torch.tensor(table.images, dtype=torch.float32)
        self.added = len(added)
        self.register_buffer("columns", torch.tensor([places.get(number, len(places)) for number in wanted]))
        self.register_buffer("prior", (labels / (labels + 1)).log())

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        """One answer of both, [n, C + E].

        Args:
            logits: of the network, [n, C].
            features: [n, F].
        """
        evidence = self.score(features) + self.prior  # log e_y, [n, K]
        nothing = ABSENT if self.alone else UNTOLD
        of_class = functional.pad(evidence, (0, 1), value=nothing).index_select(1, self.columns)
        if self.alone:
            return of_class
        wide = functional.pad(logits, (0, self.added), value=ABSENT)
        none = _log_sum(functional.pad(evidence, (0, 1)))  # −log P(none)
        return _log_add(wide, _log_sum(wide) + of_class) - none


class ClassMeansScore(nn.Module):
    """See `ClassMeans`."""

    mean: Tensor  # [F]
    directions: Tensor  # [F, K]

    def __init__(self, head: ClassMeans, table: ClassMeansTable) -> None:
        super().__init__()
        self.scale = head.config.scale
        self.register_buffer("mean", head.prior.mean.cpu())
        self.register_buffer("directions", table.directions.T.float().cpu().contiguous())

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * (_on_grid(features - self.mean) @ self.directions)


class RidgeScore(nn.Module):
    """See `Ridge`."""

    weights: Tensor  # [D, K]

    def __init__(self, head: Ridge, table: RidgeTable) -> None:
        super().__init__()
        self.scale = head.config.scale
        self.project = _Project(head.prior)
        self.register_buffer("weights", table.weights.float().cpu().contiguous())

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * (_on_grid(self.project(features)) @ self.weights)


class CountsScore(nn.Module):
    """See `Counts`: the values that were computed from counts stand in the file, not the counts."""

    values: Tensor  # of all keys, [C · J, K]

    def __init__(self, head: Counts, table: CountsTable) -> None:
        super().__init__()
        self.scale = head.config.scale
        self.find = _FindInTree(head.keys)
        self.register_buffer("values", torch.stack(table.values, dim=1).cpu())

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * functional.embedding(self.find(features), self.values).mean(dim=1)


class GradientScore(nn.Module):
    """See `KVGradient`. Few of its cells were ever touched: all others have one row of zeros in common."""

    first: Tensor  # of each codebook's cells, int64 [C]
    row: Tensor  # where the values of each cell are, int64 [C · J]
    values: Tensor  # of the cells that were touched, and zeros, [T + 1, K + 1]
    projections: Tensor  # all codebooks' side by side, [F, C · d]
    keys: Tensor  # [C, d, J]
    lengths: Tensor  # [C, 1, J]

    def __init__(self, head: KVGradient, table: KVGradientTable) -> None:
        super().__init__()
        self.scale = head.config.scale
        self.books, count, self.width = head.prior.keys.shape
        row = torch.full((self.books * count,), len(table.cells))
        row[table.cells.long().cpu()] = torch.arange(len(table.cells))
        self.register_buffer("first", head.first_cells.long().cpu())
        self.register_buffer("row", row)
        self.register_buffer("values", functional.pad(table.values.cpu(), (0, 0, 0, 1)))
        self.register_buffer("projections", head.projections.cpu().permute(1, 0, 2).flatten(1).contiguous())
        self.register_buffer("keys", head.prior.keys.cpu().transpose(1, 2).contiguous())
        self.register_buffer("lengths", head.lengths.cpu().unsqueeze(1))

    def forward(self, features: Tensor) -> Tensor:
        points = (features @ self.projections).view(-1, self.books, self.width).transpose(0, 1)  # [C, n, d]
        nearest = (self.lengths - 2 * (points @ self.keys)).argmin(dim=2)  # [C, n]
        touched = functional.embedding(self.row[nearest.T + self.first], self.values)  # [n, C, K + 1]
        logits = touched.mean(dim=1)
        return self.scale * (logits[:, :-1] - logits[:, -1:])


def score_of(head: AnyHead, table: Readable) -> nn.Module:
    """What scores features [n, F] against each class of a table, [n, K].

    Raises:
        InvalidInput: there is no such module for this head.
    """
    if isinstance(head, Counts) and isinstance(table, CountsTable):
        return CountsScore(head, table)
    if isinstance(head, ClassMeans) and isinstance(table, ClassMeansTable):
        return ClassMeansScore(head, table)
    if isinstance(head, Ridge) and isinstance(table, RidgeTable):
        return RidgeScore(head, table)
    if isinstance(head, KVGradient) and isinstance(table, KVGradientTable):
        return GradientScore(head, table)
    raise InvalidInput(
        f"a head of kind {type(head).__name__} (with a {type(table).__name__}) cannot be exported; those that can are "
        "counts, gradient, ridge and class_means"
    )


class _Project(nn.Module):
    """See `components.project`."""

    mean: Tensor  # [F]
    directions: Tensor  # [F, D]

    def __init__(self, components: Components) -> None:
        super().__init__()
        self.register_buffer("mean", components.mean.cpu())
        self.register_buffer("directions", components.directions.cpu())

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) @ self.directions


class _FindInTree(nn.Module):
    """The cell of the nearest key of each codebook, int64 [n, C]: see `Keys.encode`."""

    first: Tensor  # of each codebook's cells at the deepest level, int64 [C]
    projection: Tensor  # [D, C · k]

    def __init__(self, keys: Keys) -> None:
        super().__init__()
        config = keys.config
        self.books, self.width, self.branches = config.codebooks, config.key_dim, config.branches
        self.project = _Project(keys.prior.components)
        self.register_buffer("projection", keys.projection.cpu())
        self.register_buffer("first", torch.arange(self.books) * config.keys)
        for level, centres in enumerate(keys.prior.centres):
            flat = centres.flatten(0, 1).cpu()
            self.register_buffer(f"centres{level}", flat)  # [C · cells, k]
            self.register_buffer(f"half{level}", flat.square().sum(dim=1, keepdim=True) / 2)  # [C · cells, 1]
            self.register_buffer(
                f"parents{level}", torch.arange(self.books) * (centres.shape[1] // config.branches[level])
            )

    def forward(self, features: Tensor) -> Tensor:
        points = (self.project(features) @ self.projection).view(-1, self.books, self.width, 1)
        cells = torch.zeros_like(points[:, :, 0, 0], dtype=torch.int64)  # of the level above, within its codebook
        for level, branch in enumerate(self.branches):
            parents = cells + self.get_buffer(f"parents{level}")
            children = (parents * branch).unsqueeze(2) + torch.arange(branch)  # [n, C, branch]
            centres = functional.embedding(children, self.get_buffer(f"centres{level}"))
            half = functional.embedding(children, self.get_buffer(f"half{level}"))
            distances = (half - centres @ points).squeeze(3)
            cells = cells * branch + distances.argmin(dim=2)
        return cells + self.first


def _on_grid(vectors: Tensor) -> Tensor:
    """The directions that a head's codes stand for: see `class_sums.unit_codes` and `unit_vectors`."""
    return (functional.normalize(vectors, dim=1) * GRID).round() / GRID


def _log_sum(x: Tensor) -> Tensor:
    """Logsumexp over dimension 1, which stays."""
    most = x.amax(dim=1, keepdim=True)
    return most + (x - most).exp().sum(dim=1, keepdim=True).log()


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """`log(exp a + exp b)`. torch's own becomes just that in ONNX, and overflows."""
    return torch.maximum(a, b) + (1 + (-(a - b).abs()).exp()).log()
