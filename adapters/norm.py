"""A frozen network whose normalisation layers do, row by row, what a `Modulation` says.

The layers are replaced once, when a `Network` is built, by ones that share the frozen tensors. What a forward shall do
travels beside it in a thread-local slot, so that a predicting and a learning thread use one network at the same time,
and nothing is copied or swapped in and out.

Batch-norm with statistics that are known before the forward is `y = a·x + b` per channel, with `a = γ/√(σ² + ε)` and
`b = β − a·μ`: one forward then serves any mix of streams, each row with its own stream's `a` and `b`.

References:
    Ioffe & Szegedy, arXiv 1502.03167; Chan, Golub & LeVeque 1979 for the pooling of means and variances.
"""

import enum
import threading
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.base import Groups, Moments, Output

CONTRADICT_MIN_ROWS = 8  # a smaller request says too little about the spread of images to contradict anything
CONTRADICTION_MAX = 1e6  # known statistics are then worth a millionth of an image


class Statistics(enum.Enum):
    """Where batch-norm's mean and variance come from. Chosen on the host, one for a whole forward."""

    KNOWN = "known"  # the table's: nothing is measured on the batch
    OWN = "own"  # each request's own rows
    BLEND = "blend"  # the table's and the request's own rows, each by its `Evidence`


class Evidence(NamedTuple):
    """How many images known statistics and a request's own are worth; BLEND weighs them in that proportion.

    Known statistics that a request contradicts are worth less: see `_contradiction`.
    """

    known: Tensor  # images behind the table's statistics, [S]
    own: Tensor  # what the request's own statistics are worth, [G]; 0: not used
    tolerance: Tensor | float  # contradiction taken for chance (a request's classes are not its stream's), [G] or one


class Modulation(NamedTuple):
    """What all normalisation layers shall do in one forward. Channels of all layers lie end to end: P in all."""

    scale: Tensor  # γ, [S, P]
    shift: Tensor  # β, [S, P]
    mean: Tensor  # μ, [S, P]; read unless statistics are OWN
    var: Tensor  # σ², [S, P]; read unless statistics are OWN
    rows: Tensor  # int64 [B]: which of the S rows each row of the batch uses
    groups: Groups
    statistics: Statistics
    evidence: Evidence | None = None  # for BLEND


class _Slot(threading.local):
    """What the forward that runs in this thread was told, and what it leaves behind."""

    modulation: Modulation | None = None
    moments: dict[int, list[tuple[Tensor, Tensor, Tensor]]] | None = None  # by a layer's first channel: one a call
    features: Tensor | None = None


class Network:
    """A frozen network that takes a `Modulation` beside its input.

    Takes the model over: puts it in evaluation mode, freezes it and replaces its normalisation layers
    (`BatchNorm1d/2d`, `GroupNorm`, and `LayerNorm` over the last dimension) with ones that share their tensors.

    Args:
        model: maps [B, …] to logits [B, C].

    Attributes:
        channels: P, the channels of all normalisation layers together; 0 where there is none to adapt.
        scale, shift, mean, var: the source's γ, β, μ and σ², each [P].
        has_statistics: whether any layer keeps running statistics (batch-norm).
        head: the last linear layer, whose input is the `features`; None where there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slot = _Slot()
        self.model = model.eval().requires_grad_(False)
        self._layers = layers = _replace_layers(model, self._slot)
        self.channels = sum(layer.channels for layer in layers)
        self.has_statistics = any(isinstance(layer, _BatchNorm) for layer in layers)
        empty = torch.zeros(0)
        self.scale = torch.cat([layer.scale for layer in layers] or [empty])
        self.shift = torch.cat([layer.shift for layer in layers] or [empty])
        self.mean = torch.cat([layer.mean for layer in layers] or [empty])
        self.var = torch.cat([layer.var for layer in layers] or [empty])
        self._eps = torch.cat([torch.full_like(layer.scale, layer.eps) for layer in layers] or [empty])  # [P]
        batch_norm = [torch.full_like(layer.scale, isinstance(layer, _BatchNorm)) for layer in layers]
        self._keeps_statistics = torch.cat(batch_norm or [empty]) > 0  # bool [P]
        self.head = next(reversed([module for module in model.modules() if isinstance(module, nn.Linear)]), None)
        if self.head is not None:
            self.head.register_forward_pre_hook(self._keep_features)

    def __call__(self, x: Tensor, modulation: Modulation | None = None) -> Output:
        """One forward; without a modulation it is the frozen network's.

        Args:
            x: [B, …].
            modulation: for the same B rows.

        Returns:
            Logits [B, C]; `moments` where the modulation asks for BLEND.
        """
        slot = self._slot
        slot.modulation, slot.features = modulation, None
        slot.moments = {} if modulation and modulation.statistics is Statistics.BLEND else None
        try:
            logits = self.model(x)
            moments = None
            if modulation and slot.moments:
                moments = self._collect(slot.moments, len(modulation.groups.sizes))
            return Output(logits, slot.features, moments)
        finally:
            slot.modulation = slot.moments = slot.features = None

    def _collect(self, measured: dict[int, list[tuple[Tensor, Tensor, Tensor]]], requests: int) -> Moments:
        """What the layers measured, in the order of their channels, whatever the order in which they ran.

        A layer that ran twice has the mixture of both; one that did not run or keeps no statistics, the source's.
        """
        found = []
        for layer in self._layers:
            mean, var = layer.mean.expand(requests, -1), layer.var.expand(requests, -1)
            (mean, var, between), *others = measured.get(layer.slice.start, [(mean, var, torch.zeros_like(mean))])
            for number, other in enumerate(others, start=2):
                mean, var = _blend((mean, var), other[:2], 1 / number)
                between = between + (other[2] - between) / number
            found.append((mean, var, between))
        means, variances, betweens = zip(*found, strict=True)
        return Moments(torch.cat(means, dim=1), torch.cat(variances, dim=1), torch.cat(betweens, dim=1))

    def contradiction(self, own: Moments, known: Moments, sizes: tuple[int, ...], tolerance: Tensor | float) -> Tensor:
        """How far requests of these sizes lie from known statistics, mean over the batch-norm layers; [G].

        Args:
            own: of the requests, from a forward with BLEND.
            known: [G, P] or [1, P].
            sizes: rows of each request; fewer than `CONTRADICT_MIN_ROWS` contradict nothing.
            tolerance: see `Evidence`.
        """
        assert own.between is not None
        found = []
        for layer in self._layers:
            if isinstance(layer, _BatchNorm):
                at = layer.slice
                expected = (known.mean[:, at], known.var[:, at])
                found.append(_contradiction(own.mean[:, at], own.between[:, at], expected, sizes, tolerance, layer.eps))
        return torch.stack(found).mean(dim=0)

    @property
    def layers(self) -> tuple["_Layer", ...]:
        """The layers that can be modulated, in the order of their channels."""
        return tuple(self._layers)

    def fold(self, modulation: Modulation) -> tuple[Tensor, Tensor]:
        """What a modulation with KNOWN statistics comes to at every row: a and b of `_Layer.by_row`, [B, P] each."""
        inverse = (modulation.var + self._eps).sqrt().reciprocal()
        a = modulation.scale * torch.where(self._keeps_statistics, inverse, 1.0)
        b = modulation.shift - torch.where(self._keeps_statistics, a * modulation.mean, 0.0)
        return a[modulation.rows], b[modulation.rows]

    def _keep_features(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._slot.features = args[0]


class _Layer(nn.Module):
    """A normalisation layer with C channels, which own the slice `first … first + C` of the P channels."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, layer: nn.Module, channels: int, first: int, eps: float, slot: _Slot) -> None:
        super().__init__()
        self.channels = channels
        self.slice = slice(first, first + channels)
        self.eps = eps
        self.slot = slot
        like = next(iter([*layer.parameters(), *layer.buffers()]), torch.zeros(0))
        ones = torch.ones(channels, dtype=like.dtype if like.is_floating_point() else torch.float32, device=like.device)
        # getattr: a layer built without affine parameters or running statistics holds None there
        for name, source, default in (
            ("scale", "weight", ones),
            ("shift", "bias", torch.zeros_like(ones)),
            ("mean", "running_mean", torch.zeros_like(ones)),
            ("var", "running_var", ones),
        ):
            tensor = getattr(layer, source, None)
            self.register_buffer(name, (default if tensor is None else tensor).detach(), persistent=False)

    def by_row(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`a·x + b` with each row's own a and b, [B, C]; of the normalised x where statistics are the row's own."""
        return torch.addcmul(_per_channel(b, x), _per_channel(a, x), x)


class _BatchNorm(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        told = self.slot.modulation
        if told is None:
            return functional.batch_norm(x, self.mean, self.var, self.scale, self.shift, eps=self.eps)
        if told.statistics is Statistics.KNOWN:
            return self._known(x, told)
        if told.statistics is Statistics.OWN:
            return self._own(x, told)
        return self._blended(x, told)

    def _known(self, x: Tensor, told: Modulation) -> Tensor:
        scale, shift = told.scale[:, self.slice], told.shift[:, self.slice]
        mean, var = told.mean[:, self.slice], told.var[:, self.slice]
        if scale.shape[0] == 1:
            return functional.batch_norm(x, mean[0], var[0], scale[0], shift[0], eps=self.eps)
        return _affine(x, mean, var, told.rows, scale, shift, told.rows, self.eps)

    def _own(self, x: Tensor, told: Modulation) -> Tensor:
        scale, shift = told.scale[:, self.slice], told.shift[:, self.slice]
        values = x[0, 0].numel() if x.dim() > 2 else 1  # a row's values per channel
        enough = [rows * values > 1 for rows in told.groups.sizes]
        if scale.shape[0] == 1 and enough == [True]:
            return functional.batch_norm(x, None, None, scale[0], shift[0], training=True, eps=self.eps)
        mean, var, _ = _own_statistics(x, told.groups, self.mean)
        if not all(enough):
            # One value per channel has no variance; the source's statistics are all that is known about it.
            share = torch.tensor(enough, dtype=x.dtype, device=x.device).unsqueeze(1)
            mean, var = _blend((self.mean, self.var), (mean, var), share)
        return _affine(x, mean, var, told.groups.index, scale, shift, told.rows, self.eps)

    def _blended(self, x: Tensor, told: Modulation) -> Tensor:
        assert self.slot.moments is not None
        assert told.evidence is not None
        of_group = told.groups.of_rows(told.rows)
        known = (told.mean[of_group, self.slice], told.var[of_group, self.slice])
        own_mean, own_var, between = _own_statistics(x, told.groups, self.mean)
        found = (own_mean.detach(), own_var.detach(), between)
        self.slot.moments.setdefault(self.slice.start, []).append(found)
        tolerance = told.evidence.tolerance
        contradiction = _contradiction(found[0], between, known, told.groups.sizes, tolerance, self.eps)
        share = _own_share(told.evidence, of_group, contradiction)
        mean, var = _blend(known, (own_mean, own_var), share.unsqueeze(1))
        scale, shift = told.scale[:, self.slice], told.shift[:, self.slice]
        return _affine(x, mean, var, told.groups.index, scale, shift, told.rows, self.eps)


class _GroupNorm(_Layer):
    """Statistics are each row's own whatever happens; only scale and shift are the stream's."""

    def __init__(self, layer: nn.GroupNorm, first: int, slot: _Slot) -> None:
        super().__init__(layer, layer.num_channels, first, layer.eps, slot)
        self.groups = layer.num_groups

    def forward(self, x: Tensor) -> Tensor:
        y = functional.group_norm(x, self.groups, eps=self.eps)
        scale, shift = self.scale, self.shift
        if told := self.slot.modulation:
            scale, shift = told.scale[told.rows, self.slice], told.shift[told.rows, self.slice]
        return _per_channel(scale, x) * y + _per_channel(shift, x)

    def by_row(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return super().by_row(functional.group_norm(x, self.groups, eps=self.eps), a, b)


class _LayerNorm(_Layer):
    """As `_GroupNorm`, over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        y = functional.layer_norm(x, (self.channels,), eps=self.eps)
        scale, shift = self.scale, self.shift
        if told := self.slot.modulation:
            shape = (x.shape[0], *[1] * (x.dim() - 2), self.channels)
            scale = told.scale[told.rows, self.slice].view(shape)
            shift = told.shift[told.rows, self.slice].view(shape)
        return scale * y + shift

    def by_row(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = functional.layer_norm(x, (self.channels,), eps=self.eps)
        shape = (x.shape[0], *[1] * (x.dim() - 2), self.channels)
        return a.view(shape) * y + b.view(shape)


def _replace_layers(model: nn.Module, slot: _Slot) -> list[_Layer]:
    """Replace every layer that can be modulated, in the order of registration."""
    found: list[_Layer] = []
    replaced: dict[int, _Layer] = {}  # a layer that is used in two places stays one layer
    for parent in list(model.modules()):
        if isinstance(parent, nn.TransformerEncoderLayer):
            continue  # its fast path reads the tensors of its norms and never calls them
        for name, child in list(parent._modules.items()):  # named_children leaves out a layer's second name
            if child is None:
                continue
            if id(child) not in replaced:
                layer = _layer_for(child, sum(each.channels for each in found), slot)
                if layer is None:
                    continue
                found.append(layer)
                replaced[id(child)] = layer
            setattr(parent, name, replaced[id(child)])
    return found


def _layer_for(layer: nn.Module, first: int, slot: _Slot) -> _Layer | None:
    # Exact types: a subclass may compute something else (torchvision's LayerNorm2d permutes), and then stays frozen.
    if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d):
        batch_norm = cast(nn.BatchNorm2d, layer)
        if batch_norm.running_mean is None:
            return None  # it has no source statistics: it already uses the batch's, whatever we would say
        return _BatchNorm(batch_norm, batch_norm.num_features, first, batch_norm.eps, slot)
    if type(layer) is nn.GroupNorm:
        return _GroupNorm(layer, first, slot)
    if type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1:
        return _LayerNorm(layer, layer.normalized_shape[0], first, layer.eps, slot)
    return None


def _per_channel(table: Tensor, x: Tensor) -> Tensor:
    """View [C] or [B, C] so that it broadcasts over x, [B, C, …]."""
    return table.view(*table.shape, *[1] * (x.dim() - 2))


def _own_statistics(x: Tensor, groups: Groups, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every request at every channel: mean and biased variance, and the variance between its images' means.

    All [G, C]; gradients flow through the first two. Pooled from the sums of single images, which do not depend on what
    else is in the batch. Sums of squares are taken about `near` [C] (the source's mean), so that they lose no digits to
    a large mean (Chan et al., "shifted data"); `torch.var_mean` needs no such care, and six times as long on a CPU.
    """
    image_mean, image_square = _ImageMoments.apply(x, near) if x.dim() > 2 else (x - near, (x - near).square())
    sizes = torch.tensor(groups.sizes, dtype=x.dtype, device=x.device).unsqueeze(1)

    def mean_by_group(per_image: Tensor) -> Tensor:
        if len(groups.sizes) == 1:
            return per_image.mean(dim=0, keepdim=True)
        return per_image.new_zeros(len(groups.sizes), per_image.shape[1]).index_add(0, groups.index, per_image) / sizes

    mean = mean_by_group(image_mean)
    within = (image_square - image_mean.square()).clamp(min=0)  # of single images; rounding may fall below 0
    spread = mean_by_group((image_mean - mean[groups.index]).square())
    between = spread.detach() * sizes / (sizes - 1).clamp(min=1)  # unbiased; 0 for a request of one row
    return mean + near, mean_by_group(within) + spread, between


class _ImageMoments(torch.autograd.Function):
    """Of single images: `mean(x − near)` and `mean((x − near)²)`, both [B, C].

    Written out because its gradient is `a·x + b` per image and channel: one pass over x where autograd takes four, and
    nothing kept but x itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, near)
        about = x - _per_channel(near.unsqueeze(0), x)
        over = list(range(2, x.dim()))
        return about.mean(over), about.square().mean(over)

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_square: Tensor) -> tuple[Tensor, None]:
        x, near = ctx.saved_tensors
        values = x[0, 0].numel()
        a = 2 * of_square / values
        b = of_mean / values - a * near
        return torch.addcmul(_per_channel(b, x), _per_channel(a, x), x), None


def _contradiction(
    own_mean: Tensor,
    between: Tensor,
    known: tuple[Tensor, Tensor],
    sizes: tuple[int, ...],
    tolerance: Tensor | float,
    eps: float,
) -> Tensor:
    """How far each request's mean lies from a known one in one layer, beyond chance and `tolerance`; [G], 0 or more.

    In units of the variance between single images: with images' means of variance `v` within a request of n images, and
    known μ and σ² per channel, `B = Σ_c ((mean − μ)² − v/n)/σ² / Σ_c v/σ²`: the squared bias of the known mean, less
    what n images miss it by anyway (the estimate behind James & Stein's shrinkage), so that known statistics are worth
    no more than 1/B images. Fewer than `CONTRADICT_MIN_ROWS` rows contradict nothing.
    """
    rows = torch.tensor(sizes, dtype=own_mean.dtype, device=own_mean.device)
    bias = (own_mean - known[0]).square() - between / rows.unsqueeze(1)
    scale = known[1] + eps  # as in the normalisation: σ² of a channel that is always zero is 0
    # where images are all alike, both sums are rounding; a millionth of σ² lies above that, and below any real spread
    spread = (between / scale).sum(dim=1).clamp(min=1e-6 * own_mean.shape[1])
    found = ((bias / scale).sum(dim=1) / spread).clamp(max=CONTRADICTION_MAX)  # before the tolerance, which may be ∞
    return torch.where(rows < CONTRADICT_MIN_ROWS, 0.0, (found - tolerance).clamp(min=0))


def _own_share(evidence: Evidence, of_group: Tensor, contradiction: Tensor) -> Tensor:
    """The share of each request's own statistics, [G]: its evidence over all that there is."""
    known = evidence.known[of_group]
    known = known / (1 + known * contradiction)  # 1/(1/N + B)
    return evidence.own / (evidence.own + known).clamp(min=torch.finfo(known.dtype).tiny)


def _blend(known: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], share: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture: `share` of `own`, the rest of `known` (Chan et al., eq. 2.1)."""
    between = own[0] - known[0]
    mean = known[0] + share * between
    var = (1 - share) * known[1] + share * own[1] + share * (1 - share) * between.square()
    return mean, var


def pool(known: Moments, known_images: Tensor, new: Moments, new_images: Tensor) -> Moments:
    """Pool two sets of statistics, [S, P] each, in proportion to the images behind them, [S] each.

    >>> a, b = Moments(torch.zeros(1, 1), torch.zeros(1, 1)), Moments(torch.ones(1, 1), torch.zeros(1, 1))
    >>> pool(a, torch.ones(1), b, torch.ones(1))[:2]
    (tensor([[0.5000]]), tensor([[0.2500]]))
    """
    share = (new_images / (known_images + new_images).clamp(min=torch.finfo(known_images.dtype).tiny)).unsqueeze(1)
    mean, var = _blend((known.mean, known.var), (new.mean, new.var), share)
    return Moments(mean, var)


def _affine(
    x: Tensor, mean: Tensor, var: Tensor, stat_rows: Tensor, scale: Tensor, shift: Tensor, rows: Tensor, eps: float
) -> Tensor:
    """`γ·(x − μ)/√(σ² + ε) + β` as `a·x + b`, with the statistics of `stat_rows` and the parameters of `rows`."""
    inverse = (var + eps).sqrt().reciprocal()
    a = scale[rows] * inverse[stat_rows]
    b = shift[rows] - a * mean[stat_rows]
    return torch.addcmul(_per_channel(b, x), _per_channel(a, x), x)
