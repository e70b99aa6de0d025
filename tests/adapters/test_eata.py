"""EATA against the paper, told a second time and straight, and against numbers made by hand."""

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from adapters import (
    EATA,
    AdapterError,
    Batch,
    EATAConfig,
    EATAPrior,
    Groups,
    Guarded,
    Network,
    Output,
    Pipeline,
    Statistics,
    UnsupportedModel,
    anchors,
    tree,
)
from adapters.eata import CLASS_MIX_MIN

Build = Callable[..., nn.Module]
Images = Callable[..., Tensor]
LN3 = math.log(3)


def batch(x: Tensor, *sizes: int) -> Batch:
    return Batch(x, Groups.of(sizes or (len(x),)), torch.ones(len(x), dtype=x.dtype))


def one_stream(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64)


# The paper, told again with an ordinary optimizer and boolean indexing.


def norm_parameters(model: nn.Module) -> list[Tensor]:
    """All γ, then all β: the order of a state's parameters."""
    layers = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    return [layer.weight for layer in layers] + [layer.bias for layer in layers]


def straighten(model: nn.Module) -> nn.Module:
    """Batch-norm by the batch's own statistics; nothing but its scales and shifts is trained."""
    model.train().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
    for parameter in norm_parameters(model):
        parameter.requires_grad_()
    return model


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().clone() for tensor in tensors])


def paper_fisher(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Eq. 9: squared gradients of the cross-entropy with the model's own labels, averaged over batches."""
    parameters = norm_parameters(straighten(model))
    fisher = [torch.zeros_like(parameter) for parameter in parameters]
    for x in batches:
        model.zero_grad()
        logits = model(x)
        functional.cross_entropy(logits, logits.max(dim=1).indices).backward()
        fisher = [f + p.grad**2 / len(batches) for f, p in zip(fisher, parameters, strict=True)]
    return fisher


def paper_replay(
    model: nn.Module,
    batches: list[Tensor],
    fisher: list[Tensor],
    *,
    entropy_margin: float,
    redundancy_margin: float,
    anchor_weight: float,
    optimizer: str,
) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Logits, parameters after the step, and how many rows passed the first and both filters; batch after batch."""
    parameters = norm_parameters(straighten(model))
    source = [parameter.detach().clone() for parameter in parameters]
    descent: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, lr=1e-2)
        if optimizer == "adam"
        else torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    )
    moving_mean = None
    for x in batches:
        logits = model(x)
        entropies = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
        sure = entropies < entropy_margin  # Eq. 2 and 3
        entropies, probs = entropies[sure], logits.detach().softmax(1)[sure]
        reliable = len(entropies)
        if moving_mean is not None:  # Eq. 5
            fresh = functional.cosine_similarity(moving_mean.unsqueeze(0), probs, dim=1).abs() < redundancy_margin
            entropies, probs = entropies[fresh], probs[fresh]
        if len(entropies):
            mean = probs.mean(0)
            moving_mean = mean if moving_mean is None else 0.9 * moving_mean + 0.1 * mean  # Eq. 4
            loss = (entropies / (entropies.detach() - entropy_margin).exp()).mean()  # Eq. 2, 6 and 7
            for f, p, p0 in zip(fisher, parameters, source, strict=True):
                loss = loss + anchor_weight * (f * (p - p0) ** 2).sum()  # Eq. 8
            descent.zero_grad()
            loss.backward()
            descent.step()
        yield logits.detach(), flat(parameters), reliable, len(entropies)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_papers_trajectory(optimizer: Any, dtype: torch.dtype, build: Build, images: Images) -> None:
    source_images = [images(16, start=20.0 + i).to(dtype) for i in range(3)]
    batches = [1.5 * images(16, start=float(i)).to(dtype) + 0.2 for i in range(12)]
    batches[4] = batches[4][:1].repeat(16, 1, 1, 1)  # all rows alike
    fisher = paper_fisher(build("batch_norm_2d", classes=5).to(dtype), source_images)
    network = Network(build("batch_norm_2d", classes=5).to(dtype))
    prior = EATAPrior(anchors.fisher_diagonal(network, source_images))
    torch.testing.assert_close(prior.fisher.to(dtype), flat(fisher), atol=1e-6, rtol=1e-5)

    margins = {"entropy_margin": 1.1, "redundancy_margin": 0.8, "anchor_weight": 20.0}
    config = EATAConfig(**margins, optimizer=optimizer, learning_rate=1e-2)
    pipeline = Pipeline(network, norm=EATA(network, classes=5, prior=EATAPrior(flat(fisher)), config=config))
    states = tree.stack([pipeline.init()])
    model = build("batch_norm_2d", classes=5).to(dtype)
    told = paper_replay(model, batches, fisher, **margins, optimizer=optimizer)
    counts = []
    for x, (logits, params, reliable, selected) in zip(batches, told, strict=True):
        answer = pipeline.predict(states, one_stream(x), Groups.of((16,)), x).logits
        torch.testing.assert_close(answer, logits, atol=1e-6, rtol=0)
        states, report = pipeline.adapt(states, one_stream(x), batch(x))
        torch.testing.assert_close(states.norm.params[0], params, atol=1e-6, rtol=0)
        assert (report.reliable.item(), report.selected.item()) == (reliable, selected)
        assert report.applied.item() == (selected > 0)
        counts.append((reliable, selected))
    assert counts[0][0] == counts[0][1] > 0  # no mean yet, so no second filter
    assert counts[4][1] == 0  # and no step
    assert sum(0 < selected < reliable for reliable, selected in counts) >= 5
    assert states.norm.optimizer.step.item() == sum(selected > 0 for _, selected in counts)
    moved = (states.norm.params[0] - pipeline.init().norm.params).abs().max()
    assert moved > 0.01


# All numbers by hand. Logits are the inputs, normalised: (γ, −γ) or (−γ, γ), so p is 3/4 where γ = ln 3 / 2.

OPPOSITE = torch.tensor([[3.0, -1.0], [1.0, 1.0], [3.0, -1.0], [1.0, 1.0]])


def bare(gamma: float, **settings: Any) -> EATA:
    layer = nn.BatchNorm1d(2, eps=1e-12)
    layer.weight.data.fill_(gamma)
    config = EATAConfig(**{"entropy_margin": 0.6, "optimizer": "sgd", "learning_rate": 0.1, "anchor": "l2", **settings})
    return EATA(Network(nn.Sequential(layer)), classes=2, config=config)


def test_two_steps_by_hand() -> None:
    eata = bare(LN3 / 2, redundancy_margin=0.9, anchor_weight=0.5)
    states = tree.stack([eata.init()])
    # H = 0.562335, factor e^(0.6 − H) = 1.038383, ∂H/∂γ = −3/4 (ln 3/4 + H) = −0.205990: gradient −0.213896
    states, report = eata.adapt(states, one_stream(OPPOSITE), batch(OPPOSITE))
    torch.testing.assert_close(states.params, torch.tensor([[0.570696, 0.570696, 0, 0]]), atol=1e-6, rtol=0)
    assert report.entropy.item() == pytest.approx(0.562335, abs=1e-6)
    assert states.mean_probs.tolist() == [[0.5, 0.5]]
    # now p = 0.757935, H = 0.553449, cos = √½/‖p‖ = 0.8887 < 0.9, factor 1.047652, ∂H/∂γ = −0.209411: −0.219389;
    # the anchor pulls by 2 · 0.5 · (0.570696 − 0.549306) = 0.021390; momentum adds 0.9 · −0.213896: −0.390506
    states, report = eata.adapt(states, one_stream(OPPOSITE), batch(OPPOSITE))
    torch.testing.assert_close(states.params, torch.tensor([[0.609746, 0.609746, 0, 0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(states.optimizer.first[0, :2], torch.tensor([-0.390506] * 2), atol=1e-6, rtol=0)
    assert (states.seen.item(), states.reliable.item(), states.selected.item()) == (8, 8, 8)
    assert (report.seen.item(), report.reliable.item(), report.selected.item()) == (4, 4, 4)


def test_redundant_rows_stop_the_second_step() -> None:
    eata = bare(LN3 / 2, redundancy_margin=0.88)  # cos is 0.8887
    states, _ = eata.adapt(tree.stack([eata.init()]), one_stream(OPPOSITE), batch(OPPOSITE))
    again, report = eata.adapt(states, one_stream(OPPOSITE), batch(OPPOSITE))
    assert torch.equal(again.params, states.params)
    assert torch.equal(again.optimizer.first, states.optimizer.first)
    assert (again.optimizer.step.item(), again.selected.item(), again.reliable.item()) == (1, 4, 8)
    assert (report.reliable.item(), report.selected.item(), report.applied.item()) == (4, 0, False)


def test_weights_scale_a_row_s_pull() -> None:
    eata = bare(LN3 / 2, anchor="none", redundancy_margin=1.0)
    half = batch(OPPOSITE)._replace(weights=torch.full((4,), 0.5))
    states, report = eata.adapt(tree.stack([eata.init()]), one_stream(OPPOSITE), half)
    expected = LN3 / 2 + 0.1 * 0.5 * 0.213896
    torch.testing.assert_close(states.params[0, :2], torch.tensor([expected] * 2), atol=1e-6, rtol=0)
    assert report.seen.item() == 4


class Passing(nn.Module):
    """Logits are the inputs, whatever the layer does: for filters by hand."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(classes)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.norm(x)


def passing(classes: int, **settings: Any) -> EATA:
    return EATA(Network(Passing(classes)), classes, config=EATAConfig(anchor="l2", **settings))


def test_filters_and_moving_mean_by_hand() -> None:
    eata = passing(2, entropy_margin=0.5, redundancy_margin=0.8)
    x = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]]).log()  # entropies 0.325, 0.693, 0.325
    states, report = eata.adapt(tree.stack([eata.init()]), one_stream(x), batch(x))
    assert [field.item() for field in report[:3]] == [3, 2, 2]
    torch.testing.assert_close(states.mean_probs, torch.tensor([[0.5, 0.5]]))
    assert report.entropy.item() == pytest.approx((0.325083 + 0.693147 + 0.325083) / 3, abs=1e-6)
    # entropies 0.325, 0.423, 0.500402; cosines √½/‖p‖ = 0.7809, 0.8192 (redundant), 0.8575
    x = torch.tensor([[0.9, 0.1], [0.85, 0.15], [0.8, 0.2]]).log()
    states, report = eata.adapt(states, one_stream(x), batch(x))
    assert [field.item() for field in report[:3]] == [3, 2, 1]
    torch.testing.assert_close(states.mean_probs, torch.tensor([[0.54, 0.46]]))  # 0.9 · 0.5 + 0.1 · (0.9, 0.1)


def test_margins_follow_the_number_of_classes() -> None:
    found = {classes: passing(classes) for classes in (2, 10, 100, 1000)}
    assert found[10].entropy_margin == pytest.approx(0.921034)  # 0.4 · ln 10
    assert [round(eata.redundancy_margin, 4) for eata in found.values()] == [0.9192, 0.4, 0.1, 0.05]


@pytest.mark.parametrize(("margin", "selected"), [(None, 10), (0.4, 10), (0.05, 0)])
def test_the_redundancy_margin_of_imagenet_selects_nothing_among_ten_classes(
    margin: float | None, selected: int
) -> None:
    """The mean of ten sure rows, one a class, is 0.1 everywhere: its cosine with each is 1/√10 = 0.316."""
    eata = passing(10, redundancy_margin=margin)
    x = 20 * torch.eye(10)
    states, report = eata.adapt(tree.stack([eata.init()]), one_stream(x), batch(x))
    assert report.selected.item() == 10
    torch.testing.assert_close(states.mean_probs, torch.full((1, 10), 0.1))
    _, report = eata.adapt(states, one_stream(x), batch(x))
    assert (report.reliable.item(), report.selected.item()) == (10, selected)


def test_rows_of_nan_are_seen_and_never_selected() -> None:
    eata = passing(2, entropy_margin=0.5)
    x = torch.tensor([[float("nan"), 0.0], [5.0, 0.0]])
    states, report = eata.adapt(tree.stack([eata.init(), eata.init()]), torch.tensor([0, 1]), batch(x, 1, 1))
    assert [field.tolist() for field in report[:3]] == [[1, 1], [0, 1], [0, 1]]
    assert states.params.isfinite().all()


# What a state is.


def eata(network: Network, classes: int = 4, **settings: Any) -> EATA:
    config = EATAConfig(**{"entropy_margin": 1.1, "redundancy_margin": 0.95, "anchor": "l2", **settings})
    return EATA(network, classes, config=config)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("statistics", ["batch", "evidence"])
def test_reset_restores_every_field(optimizer: str, statistics: str, build: Build, images: Images) -> None:
    settings = {"class_mix_rate": 0.2, "stream_images_max": 12.0}  # so few that the past is discounted
    adapter = eata(Network(build("batch_norm_2d")), optimizer=optimizer, statistics=statistics, **settings)
    start = {name: leaf.clone() for name, leaf in tree.leaves(adapter.init())}
    states = tree.stack([adapter.init()])
    for number in (0, 1, 2, 2, 2):
        x = images(9, start=float(number)) + 1  # far enough from the source to contradict it
        states, report = adapter.adapt(states, one_stream(x), batch(x))
        assert report.applied.all()
    after = dict(tree.leaves(tree.row(states, 0)))
    never = {"optimizer.second"} if optimizer == "sgd" else set()
    kept = {"mean", "var", "images", "discount", "source_images", "class_mix", "marginal"}
    never |= set() if statistics == "evidence" else kept
    assert {name for name in start if torch.equal(after[name], start[name])} == never  # all else has moved
    reset = dict(tree.leaves(adapter.init()))
    assert reset.keys() == start.keys()
    assert len(start) == 15
    for name in start:
        assert torch.equal(reset[name], start[name]), name


@pytest.mark.parametrize(
    "layer", [nn.Identity(), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm((1, 2))], ids=str
)
def test_a_model_without_known_normalisation_is_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match="this model has none that it knows"):
        eata(Network(nn.Sequential(layer, nn.Linear(2, 2))), classes=2)


def test_a_prior_of_another_model_is_refused(build: Build) -> None:
    network = Network(build("batch_norm_2d"))
    with pytest.raises(AdapterError, match="holds 22 Fisher values, this model has 20"):
        EATA(network, 4, EATAPrior(torch.ones(22)))


def test_a_missing_prior_is_refused_where_it_is_needed(build: Build) -> None:
    network = Network(build("batch_norm_2d"))
    with pytest.raises(AdapterError, match="needs a prior"):
        EATA(network, 4)
    for config in (EATAConfig(anchor="l2"), EATAConfig(anchor="none"), EATAConfig(anchor_weight=0.0)):
        assert EATA(network, 4, config=config).init().params.shape == (20,)


def test_evidence_without_statistics_is_the_published_method(build: Build) -> None:
    assert eata(Network(build("layer_norm")), statistics="evidence").config.statistics == "batch"
    assert eata(Network(build("batch_norm_2d")), statistics="evidence").config.statistics == "evidence"


@pytest.mark.parametrize("statistics", ["batch", "evidence"])
@pytest.mark.parametrize("kind", ["batch_norm_2d", "group_norm"])
def test_two_streams_interleaved_are_two_separate_runs(
    kind: str, statistics: str, build: Build, images: Images
) -> None:
    adapter = eata(Network(build(kind)), statistics=statistics)
    both = tree.stack([adapter.init(), adapter.init()])
    apart = [tree.stack([adapter.init()]) for _ in range(2)]
    for number in range(4):
        x = torch.cat([images(8, start=float(number)), 2 * images(5, start=9.0 - number)])
        rows = torch.tensor([0] * 8 + [1] * 5)
        both, report = adapter.adapt(both, rows, batch(x, 8, 5))
        apart = [adapter.adapt(apart[s], one_stream(part), batch(part))[0] for s, part in enumerate((x[:8], x[8:]))]
    assert report.applied.all()
    for (name, found), *alone in zip(tree.leaves(both), *map(tree.leaves, apart), strict=True):
        expected = torch.cat([leaf for _, leaf in alone])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 10)), min_size=1, max_size=5),
    statistics=st.sampled_from(["batch", "evidence"]),
)
def test_any_mix_of_streams_and_sizes_is_answered_and_learned_like_each_alone(
    requests: list[tuple[int, int]], statistics: str, build: Build, images: Images
) -> None:
    network = Network(build("batch_norm_2d"))
    adapter = eata(network, statistics=statistics)
    pipeline = Pipeline(network, norm=adapter)
    states = tree.stack([pipeline.init()] * 3)
    warm = torch.cat([images(4), 2 * images(4, start=1.0)])
    states, _ = pipeline.adapt(states, torch.tensor([0] * 4 + [1] * 4), batch(warm, 4, 4))
    sizes = tuple(size for _, size in requests)
    rows = torch.tensor([stream for stream, size in requests for _ in range(size)])
    x = images(sum(sizes), start=3.0)
    mixed = pipeline.predict(states, rows, Groups.of(sizes), x).logits.split(list(sizes))
    for (stream, size), found, part in zip(requests, mixed, x.split(list(sizes)), strict=True):
        own = tree.stack([tree.row(states, stream)])
        alone = pipeline.predict(own, one_stream(part), Groups.of((size,)), part).logits
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    new, _ = pipeline.adapt(states, rows, batch(x, *sizes))
    for stream in range(3):
        own_sizes = [size for owner, size in requests if owner == stream]
        expected = tree.stack([tree.row(states, stream)])
        if own_sizes:
            mine = x[rows == stream]
            expected, _ = pipeline.adapt(expected, one_stream(mine), batch(mine, *own_sizes))
        for (_, found), (_, wanted) in zip(tree.leaves(tree.row(new, stream)), tree.leaves(expected), strict=True):
            torch.testing.assert_close(found, wanted[0], atol=1e-5, rtol=1e-5)


# Statistics by evidence: source ⊕ stream ⊕ request.


def evident(**settings: Any) -> EATA:
    """Two channels; the source's means are 0 and 10, its variances 1 and 4, and they count as 16 images."""
    layer = nn.BatchNorm1d(2, eps=1e-12)
    layer.running_mean, layer.running_var = torch.tensor([0.0, 10.0]), torch.tensor([1.0, 4.0])
    return eata(Network(nn.Sequential(layer)), classes=2, statistics="evidence", anchor="none", **settings)


EIGHT = torch.tensor([[3.0, 12.0], [1.0, 8.0]] * 4)  # means 2 and 10, variances 1 and 4


SAME = EIGHT - torch.tensor([2.0, 0.0])  # the source's very means and variances


def pooled(adapter: EATA, states: Any, *requests: Tensor, weights: Tensor | None = None) -> Any:
    """The only stream's states after one step."""
    x = torch.cat(requests)
    learned = batch(x, *map(len, requests))
    learned = learned if weights is None else learned._replace(weights=weights)
    return adapter.adapt(states, one_stream(x), learned)[0]


def answered_by(adapter: EATA, states: Any, x: Tensor) -> tuple[float, Output]:
    """The share that a request's own first mean has in the one it was answered with; and the answer."""
    rows, groups = one_stream(x), Groups.of((len(x),))
    told = adapter.modulate(states, rows, groups)
    output = adapter.network(x, told)
    slope = (output.logits[0, 0] - output.logits[1, 0]) / (x[0, 0] - x[1, 0])
    mean = x[0, 0] - output.logits[0, 0] / slope
    return ((mean - told.mean[0, 0]) / (x[:, 0].mean() - told.mean[0, 0])).item(), output


def test_evidence_by_hand() -> None:
    adapter = evident(entropy_margin=-1.0, class_mix=0.125)  # nothing is selected: statistics alone
    pipeline = Pipeline(adapter.network, norm=adapter)
    states = tree.stack([pipeline.init()])
    rows, groups = one_stream(EIGHT), Groups.of((8,))
    told = adapter.modulate(states.norm, rows, groups)
    assert told.statistics is Statistics.BLEND
    assert told.evidence is not None
    assert told.evidence.known.tolist() == [16.0]
    assert told.evidence.own.tolist() == [4.0]  # 1/(1/8 + 1/8)
    assert told.evidence.tolerance == 0.125
    # between its images, variances are 8/7 and 32/7: the contradiction is ((4 − 1/7) − 1/7) / (16/7) − 1/8 = 1.5; the
    # source's 16 images are worth 16/25, the share is 25/29: mean 50/29, variance 1 + 25/29 · 4/29 · 4 = 1241/29²
    answer = pipeline.predict(states, rows, groups, EIGHT)
    torch.testing.assert_close(answer.logits[0], torch.tensor([37 / 1241**0.5, 1.0]))
    assert answer.moments is not None
    torch.testing.assert_close(answer.moments.mean, torch.tensor([[2.0, 10.0]]))

    states, report = pipeline.adapt(states, rows, batch(EIGHT))
    assert not report.applied.any()
    torch.testing.assert_close(states.norm.mean, torch.tensor([[2.0, 10.0]]))
    torch.testing.assert_close(states.norm.var, torch.tensor([[1.0, 4.0]]))
    assert states.norm.images.item() == 4.0
    # the source's 16 are worth 16/25 from now on: known are 25/29 of the stream's, which 4.64 images are behind
    assert states.norm.source_images.item() == pytest.approx(0.64)
    told = adapter.modulate(states.norm, rows, groups)
    assert told.evidence is not None
    torch.testing.assert_close(told.evidence.known, torch.tensor([4.64]))
    torch.testing.assert_close(told.mean, torch.tensor([[50 / 29, 10.0]]))
    torch.testing.assert_close(told.var, torch.tensor([[1241 / 841, 4.0]]))
    # EIGHT is no further from it than chance; four more are: (((124/29)² − 1/7)/v − 1/7) / ((8/7)/v + 8/7) − 1/8 =
    # 6.212056 at v = 1241/841, so the 4.64 images are worth 0.155580 beside 4
    share, _ = answered_by(adapter, states.norm, EIGHT)
    assert share == pytest.approx(4 / 8.64, abs=1e-5)
    share, _ = answered_by(adapter, states.norm, EIGHT + torch.tensor([4.0, 0.0]))
    assert share == pytest.approx(0.962561, abs=1e-5)


FURTHER = EIGHT + torch.tensor([4.0, 0.0])  # means 6 and 10


def test_pooling_by_hand_with_doubt_of_the_past_and_of_the_source() -> None:
    adapter = evident(entropy_margin=-1.0, class_mix=0.125)
    states = pooled(adapter, tree.stack([adapter.init()]), EIGHT)
    assert (states.images.item(), states.source_images.item()) == (4.0, pytest.approx(0.64))
    states = pooled(adapter, states, FURTHER)
    # from the stream's 2: (16 − 2/7) / (16/7) − 1/8 = 6.75, so its 4 images are worth 4/(1 + 27) = 1/7 beside 4
    assert states.images.item() == pytest.approx(29 / 7)
    torch.testing.assert_close(states.mean, torch.tensor([[170 / 29, 10.0]]))  # 2 + 28/29 · 4
    torch.testing.assert_close(states.var, torch.tensor([[1289 / 841, 4.0]]))  # 1 + 28/29² · 16
    # from the source's 0, not from what was known: (36 − 2/7) / (16/7) − 1/8 = 15.5, and of 16 images, not of 0.64
    assert states.source_images.item() == pytest.approx(16 / 249)
    # known then: 29/7 images of the stream beside 16/249 of the source
    told = adapter.modulate(states, one_stream(EIGHT[:1]), Groups.of((1,)))
    share = (29 / 7) / (29 / 7 + 16 / 249)
    torch.testing.assert_close(told.mean, torch.tensor([[share * 170 / 29, 10.0]]))
    # and back: the source is worth all of its 16 at once; the stream, (170/29)² away, next to nothing beside 4
    states = pooled(adapter, states, SAME)
    assert states.source_images.item() == 16.0
    assert 4.0 < states.images.item() < 4.15
    assert states.mean[0, 0].item() == pytest.approx(0.0, abs=0.2)


def test_doubt_of_a_step_is_the_mean_over_its_large_requests_by_their_worth() -> None:
    adapter = evident(entropy_margin=-1.0, class_mix=0.125)
    start = tree.stack([adapter.init()])
    # contradictions 1.5 and 0, of four images each: 16/(1 + 16 · 0.75)
    assert pooled(adapter, start, EIGHT, SAME).source_images.item() == pytest.approx(16 / 13)
    # 24 rows are worth 6 images, and miss a mean by 1/23: (4 − 2/23) / (48/23) − 1/8 = 1.75; (6 · 1.75 + 4 · 0)/10
    found = pooled(adapter, start, EIGHT.repeat(3, 1), SAME).source_images.item()
    assert found == pytest.approx(16 / (1 + 16 * 1.05), abs=1e-5)
    # at τ = 2 eight rows are worth less than one image, and say as much: (2 (100 − 1/7)) / (16/7) − 2 = 85.375
    wide = evident(entropy_margin=-1.0, class_mix=2.0)
    found = pooled(wide, tree.stack([wide.init()]), SAME + torch.tensor([10.0, 20.0]))
    assert found.source_images.item() == pytest.approx(16 / 1367)
    # small ones beside them have no say, however many and wherever they lie
    for small in ([SAME[:7]], [SAME[:1]] * 30, [SAME[:7] + 1e3, SAME[:1] - 5]):
        assert pooled(adapter, start, EIGHT, *small).source_images.item() == pytest.approx(0.64)


def test_class_mix_follows_how_far_the_classes_of_steps_lie_from_the_streams() -> None:
    adapter = evident(class_mix=0.1, class_mix_rate=0.5)
    zeros = [0.0] * (adapter.classes - 2)
    even, one = torch.tensor([[0.5, 0.5, *zeros]]), torch.tensor([[1.0, 0.0, *zeros]])
    many, chance = torch.tensor([1_000_000]), (adapter.classes - 1) / 40
    first = adapter._follow_classes(tree.stack([adapter.init()]), even, many)
    assert first.class_mix.item() == pytest.approx(0.1)  # there was no past
    torch.testing.assert_close(first.marginal, even)
    alike = adapter._follow_classes(first, even, many)
    assert alike.class_mix.item() == pytest.approx((0.1 + CLASS_MIX_MIN) / 2)
    # of one class where the stream has two: H(3/4, 1/4) − H(1/2, 1/2)/2 = 0.562335 − 0.346574 nats
    apart = adapter._follow_classes(first, one, many)
    assert apart.class_mix.item() == pytest.approx((0.1 + 0.02 + 5 * 0.215762) / 2, abs=1e-5)
    torch.testing.assert_close(apart.marginal, torch.tensor([[0.6, 0.4, *zeros]]))
    ten = adapter._follow_classes(first, one, torch.tensor([10]))  # which lie apart by chance
    assert ten.class_mix.item() == pytest.approx((0.1 + 0.02 + 5 * (0.215762 - chance)) / 2, abs=1e-5)
    for states in (first, tree.stack([adapter.init()])):  # and fewer say nothing
        after = adapter._follow_classes(states, one, torch.tensor([7]))
        assert torch.equal(after.class_mix, states.class_mix)
        assert torch.equal(after.marginal, states.marginal)


def test_a_step_on_few_rows_is_short_and_ends_nearer_the_source() -> None:
    adapter = evident(learning_rate=0.01, full_step_rows=8, source_pull=0.5)
    states = tree.stack([adapter.init()])._replace(params=adapter.source_params.unsqueeze(0) + 1)
    grad = torch.ones_like(states.params)
    for selected, share in ((2, 0.25), (8, 1.0), (100, 1.0)):
        params, _ = adapter._step(states, grad, torch.tensor([selected]))
        # Adam's first step is as long as its rate; then half of the way back, or an eighth
        expected = (1 - 0.01 * share) * (1 - 0.5 * share)
        torch.testing.assert_close(
            params - adapter.source_params, torch.full_like(grad, expected), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("sizes", [(1,), (7,), (7, 7, 2)], ids=str)
def test_requests_of_fewer_than_eight_rows_leave_the_sources_worth_alone(sizes: tuple[int, ...]) -> None:
    adapter = evident(entropy_margin=-1.0)
    start = tree.stack([adapter.init()])
    for states, far in ((start, 100.0), (pooled(adapter, start, EIGHT), 0.0), (pooled(adapter, start, EIGHT), 100.0)):
        after = pooled(adapter, states, *(SAME[:size] + far for size in sizes))
        assert after.images.item() > states.images.item()
        assert torch.equal(after.source_images, states.source_images)


def test_a_request_of_which_fewer_than_eight_rows_were_seen_leaves_the_sources_worth_alone() -> None:
    adapter = evident(entropy_margin=-1.0)
    states = pooled(adapter, tree.stack([adapter.init()]), EIGHT)
    after = pooled(adapter, states, SAME, weights=torch.tensor([1.0] * 7 + [0.0]))
    assert torch.equal(after.source_images, states.source_images)
    after = pooled(adapter, states, SAME, weights=torch.full((8,), 0.1))  # seen all the same
    assert after.source_images.item() == 16.0


def test_the_sources_worth_is_each_streams_own() -> None:
    adapter = evident(entropy_margin=-1.0, class_mix=0.125)
    x = torch.cat([EIGHT, SAME, SAME[:3]])
    rows = torch.tensor([1] * 8 + [0] * 8 + [2] * 3)
    states, _ = adapter.adapt(tree.stack([adapter.init()] * 4), rows, batch(x, 8, 8, 3))
    torch.testing.assert_close(states.source_images, torch.tensor([16.0, 0.64, 16.0, 16.0]))
    told = adapter.modulate(states, torch.tensor([1] * 8 + [0]), Groups.of((8, 1)))
    assert told.evidence is not None
    torch.testing.assert_close(told.evidence.known, torch.tensor([20.0, 4.64, 16 + 24 / 11, 16.0]))


def test_a_source_that_counts_for_nothing_stays_so() -> None:
    adapter = evident(entropy_margin=-1.0, source_images=0.0)
    states = tree.stack([adapter.init()])
    for x in (EIGHT, SAME + 100, SAME):
        states = pooled(adapter, states, x)
        assert states.source_images.item() == 0.0
        told = adapter.modulate(states, one_stream(x[:1]), Groups.of((1,)))
        torch.testing.assert_close(told.mean, states.mean)


def test_without_contradiction_evidence_is_a_count_of_images() -> None:
    """Seven rows contradict nothing, and `adapt` uses their own statistics all the same."""
    adapter = evident(entropy_margin=-1.0, class_mix=0.0)
    states = pooled(adapter, tree.stack([adapter.init()]), EIGHT[:4] + torch.tensor([100.0, 0.0]))
    assert states.images.item() == 4.0
    states = pooled(adapter, states, EIGHT[:4] + torch.tensor([104.0, 0.0]))
    assert states.images.item() == 8.0
    torch.testing.assert_close(states.mean, torch.tensor([[104.0, 10.0]]))
    torch.testing.assert_close(states.var, torch.tensor([[1.0 + 4.0, 4.0]]))
    told = adapter.modulate(states, one_stream(EIGHT), Groups.of((8,)))  # known: 1/3 of it
    torch.testing.assert_close(told.mean, torch.tensor([[104 / 3, 10.0]]))
    torch.testing.assert_close(told.var, torch.tensor([[2 / 3 * 1 + 1 / 3 * 5 + 2 / 9 * 104**2, 4.0]]))


def test_two_requests_of_one_stream_pool_their_statistics_up_to_the_cap() -> None:
    adapter = evident(entropy_margin=-1.0, stream_images_max=7.0, class_mix=0.125)
    x = torch.cat([EIGHT, EIGHT + torch.tensor([2.0, 0.0])])
    states, _ = adapter.adapt(tree.stack([adapter.init()]), one_stream(x), batch(x, 8, 8))
    torch.testing.assert_close(states.mean, torch.tensor([[3.0, 10.0]]))
    torch.testing.assert_close(states.var, torch.tensor([[1.0 + 1.0, 4.0]]))
    assert states.images.item() == 7.0


def test_requests_pool_by_their_worth_in_images() -> None:
    """At τ = 1/8, eight rows are worth 4 images, and 24 rows 6: sixteen more rows of one request say little more."""
    adapter = evident(entropy_margin=-1.0, class_mix=0.125)
    states = pooled(adapter, tree.stack([adapter.init()]), SAME, EIGHT.repeat(3, 1))
    assert states.images.item() == pytest.approx(10.0)
    torch.testing.assert_close(states.mean, torch.tensor([[0.6 * 2, 10.0]]))
    torch.testing.assert_close(states.var, torch.tensor([[1 + 0.24 * 4, 4.0]]))


def test_images_grow_to_the_cap_while_requests_are_alike() -> None:
    adapter = evident(entropy_margin=-1.0, stream_images_max=20.0)  # τ = 0.1: eight rows are worth 40/9
    states, found = tree.stack([adapter.init()]), []
    for _ in range(6):
        states = pooled(adapter, states, SAME)
        found.append(states.images.item())
    assert found == pytest.approx([40 / 9, 80 / 9, 120 / 9, 160 / 9, 20, 20])
    torch.testing.assert_close(states.mean, torch.tensor([[0.0, 10.0]]))
    torch.testing.assert_close(states.var, torch.tensor([[1.0, 4.0]]))


@pytest.mark.parametrize("rows", [8, 64])
def test_images_grow_to_the_cap_on_requests_drawn_alike(rows: int) -> None:
    network = Network(nn.Sequential(nn.BatchNorm1d(64)))
    adapter = eata(network, classes=64, statistics="evidence", anchor="none", entropy_margin=-1.0)
    states, found = tree.stack([adapter.init()]), [0.0]
    drawn = torch.Generator().manual_seed(0)
    for _ in range(60):
        states = pooled(adapter, states, torch.randn(rows, 64, generator=drawn))
        found.append(states.images.item())
    assert found == sorted(found)
    assert found[-1] == 256.0


def far_from_source(rows: int, channels: int, means: list[float], steps: int) -> Iterator[tuple[EATA, Any]]:
    """States after each step on images of N(mean, 1), `steps` for each mean; the source's are 0 and 1."""
    network = Network(nn.Sequential(nn.BatchNorm1d(channels)))
    adapter = eata(network, classes=channels, statistics="evidence", anchor="none", entropy_margin=-1.0)
    states, drawn = tree.stack([adapter.init()]), torch.Generator().manual_seed(0)
    for mean in means:
        for _ in range(steps):
            states = pooled(adapter, states, mean + torch.randn(rows, channels, generator=drawn))
            yield adapter, states


def known_for_a_row(adapter: EATA, states: Any) -> tuple[Tensor, Tensor]:
    told = adapter.modulate(states, torch.tensor([0]), Groups.of((1,)))
    assert told.statistics is Statistics.KNOWN
    return told.mean[0], told.var[0]


@pytest.mark.parametrize(("rows", "channels"), [(8, 64), (16, 16), (64, 16)])
def test_images_grow_to_the_cap_in_a_steady_domain_far_from_the_source(rows: int, channels: int) -> None:
    run = list(far_from_source(rows, channels, [5.0], steps=60))
    found = [states.images.item() for _, states in run]
    assert found == sorted(found)
    assert found[49] >= 200
    assert found[-1] == 256.0
    assert max(states.source_images.item() for _, states in run) < 0.1  # of 16: some 1/25
    mean, var = known_for_a_row(*run[-1])
    torch.testing.assert_close(mean.mean(), torch.tensor(5.0), atol=0, rtol=0.02)
    torch.testing.assert_close(mean, torch.full((channels,), 5.0), atol=0, rtol=0.05)
    torch.testing.assert_close(var, torch.ones(channels), atol=0, rtol=0.3)


def test_few_rows_of_few_channels_doubt_by_chance_and_know_their_domain_all_the_same() -> None:
    """Over 16 channels, eight rows miss τ = 0.1 by chance now and then: `images` falls, and grows again."""
    run = list(far_from_source(8, 16, [5.0], steps=60))
    found = [states.images.item() for _, states in run]
    assert sum(after < before for before, after in itertools.pairwise(found)) <= 6
    assert max(found) > 40
    for step in range(10, 60):
        adapter, states = run[step]
        assert states.source_images.item() < 0.1
        mean, _ = known_for_a_row(adapter, states)
        torch.testing.assert_close(mean.mean(), torch.tensor(5.0), atol=0, rtol=0.03)
        torch.testing.assert_close(mean, torch.full((16,), 5.0), atol=0, rtol=0.25)


@pytest.mark.parametrize(("rows", "channels"), [(16, 32), (64, 16)])
def test_after_a_change_the_past_falls_at_once_and_the_source_is_worth_what_it_was(rows: int, channels: int) -> None:
    run = list(far_from_source(rows, channels, [0.0, 5.0, 0.0], steps=60))
    images = [states.images.item() for _, states in run]
    source = [states.source_images.item() for _, states in run]
    worth = 1 / (1 / rows + 0.1)
    for last in (59, 119, 179):
        assert images[last] == 256.0
    for change in (60, 120):  # the request's own images, and at most 1/25 of one more
        assert worth < images[change] < worth + 0.05
        assert images[change : change + 60] == sorted(images[change : change + 60])
        assert images[change + 5] > 5.9 * worth
    assert source[:60] == [16.0] * 60
    assert max(source[60:120]) < 0.1
    assert source[121:] == [16.0] * 59
    assert source[120] == pytest.approx(16.0, rel=0.1)
    for last, expected in ((59, 0.0), (60, 5.0), (119, 5.0), (179, 0.0)):
        mean, _ = known_for_a_row(*run[last])
        assert mean.mean().item() == pytest.approx(expected, abs=0.15 if last == 60 else 0.05)


def test_a_sudden_change_is_answered_by_the_request_itself_and_the_past_forgotten() -> None:
    adapter = evident(entropy_margin=-1.0, stream_images_max=20.0)
    states = tree.stack([adapter.init()])
    for _ in range(6):
        states = pooled(adapter, states, SAME)
    share, _ = answered_by(adapter, states, SAME + 0.1)
    assert share == pytest.approx((40 / 9) / (40 / 9 + 36), abs=1e-3)
    # ten deviations away: ((100 − 1/7) + (100 − 1/7)) / (16/7) − 0.1 = 87.275; the 36 images known are worth 0.0114545
    changed = SAME + torch.tensor([10.0, 20.0])
    share, answer = answered_by(adapter, states, changed)
    assert share == pytest.approx(0.997429, abs=1e-5)
    torch.testing.assert_close(answer.logits[:2], torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), atol=0.15, rtol=0)
    # and the stream's 20 are worth 20/(1 + 20 · 87.275) = 0.0114515 beside the request's 40/9
    states = pooled(adapter, states, changed)
    assert states.images.item() == pytest.approx(4.455896, abs=1e-5)
    torch.testing.assert_close(states.mean, torch.tensor([[10.0, 30.0]]), atol=0.06, rtol=0)


def test_a_sudden_change_in_small_requests_takes_nothing_from_the_past() -> None:
    adapter = evident(entropy_margin=-1.0, stream_images_max=20.0)
    states = tree.stack([adapter.init()])
    for _ in range(3):
        states = pooled(adapter, states, SAME)
    states = pooled(adapter, states, SAME[:4] + 100)
    assert states.images.item() == pytest.approx(120 / 9 + 1 / (1 / 4 + 0.1))
    share, answer = answered_by(adapter, states, SAME[:7] + 100)
    assert share == pytest.approx(0.0, abs=1e-5)
    assert answer.moments is None


@pytest.mark.parametrize(("class_mix", "images"), [(0.0, 1.0), (0.25, 0.8)])
def test_a_single_row_counts_for_an_image_at_most(class_mix: float, images: float) -> None:
    adapter = evident(entropy_margin=-1.0, class_mix=class_mix)
    states = pooled(adapter, tree.stack([adapter.init()]), EIGHT[:1])
    assert states.images.item() == pytest.approx(images)
    assert states.mean.tolist() == [[3.0, 12.0]]
    assert states.var.tolist() == [[0.0, 0.0]]
    told = adapter.modulate(states, one_stream(EIGHT[:1]), Groups.of((1,)))
    assert told.statistics is Statistics.KNOWN
    share = images / (16 + images)
    torch.testing.assert_close(told.mean, torch.tensor([[3 * share, 10 + 2 * share]]))
    assert adapter.network(EIGHT[:1], told).logits.isfinite().all()
    states = pooled(adapter, states, EIGHT[1:2])
    assert states.images.item() == pytest.approx(2 * images)
    torch.testing.assert_close(states.mean, torch.tensor([[2.0, 10.0]]))
    torch.testing.assert_close(states.var, torch.tensor([[1.0, 4.0]]))


@pytest.mark.parametrize("sizes", [(8, 8), (16,), (1, 15)], ids=str)
def test_rows_of_weight_zero_pool_nothing_and_contradict_nothing(sizes: tuple[int, ...]) -> None:
    adapter = evident(entropy_margin=-1.0)
    states = pooled(adapter, tree.stack([adapter.init()]), SAME)
    far = [torch.full((size, 2), 1e3) + torch.arange(size).unsqueeze(1) for size in sizes]
    after = pooled(adapter, states, *far, weights=torch.zeros(16))
    for name in ("mean", "var", "images", "source_images"):
        torch.testing.assert_close(getattr(after, name), getattr(states, name), atol=0, rtol=0)
    beside = pooled(adapter, states, EIGHT, *far, weights=torch.tensor([1.0] * 8 + [0.0] * 16))
    alone = pooled(adapter, states, EIGHT)
    assert alone.images.item() != pytest.approx(80 / 9)  # EIGHT does contradict
    for name in ("mean", "var", "images", "source_images"):
        torch.testing.assert_close(getattr(beside, name), getattr(alone, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sizes", "statistics"), [((7,), "KNOWN"), ((1, 7, 3), "KNOWN"), ((8,), "BLEND")], ids=str)
def test_the_path_follows_from_the_size_of_requests(sizes: tuple[int, ...], statistics: str) -> None:
    adapter = evident()
    rows = torch.zeros(sum(sizes), dtype=torch.int64)
    told = adapter.modulate(tree.stack([adapter.init()]), rows, Groups.of(sizes))
    assert told.statistics is Statistics[statistics]
    answer = adapter.network(torch.ones(sum(sizes), 2), told)
    assert (answer.moments is None) == (statistics == "KNOWN")


def test_a_request_of_seven_rows_keeps_its_answer_among_any_mates() -> None:
    adapter = evident()
    pipeline = Pipeline(adapter.network, norm=adapter)
    states, _ = pipeline.adapt(tree.stack([pipeline.init()] * 2), one_stream(EIGHT), batch(EIGHT))
    seven = EIGHT[:7] + 0.5
    alone = pipeline.predict(states, one_stream(seven), Groups.of((7,)), seven).logits
    for mates in (seven[:2] - 3, EIGHT * 100, torch.full((9, 2), float("nan"))):
        for stream in (0, 1):
            rows = torch.tensor([0] * 7 + [stream] * len(mates))
            groups = Groups.of((7, len(mates)))
            answer = pipeline.predict(states, rows, groups, torch.cat([seven, mates])).logits[:7]
            torch.testing.assert_close(answer, alone, atol=1e-6, rtol=1e-6)
    told = adapter.modulate(states.norm, torch.tensor([0] * 15), Groups.of((7, 8)))
    assert told.evidence is not None
    torch.testing.assert_close(told.evidence.own, torch.tensor([0.0, 40 / 9]))


# No device is waited for, nothing is copied.

WAITING = (
    "item",
    "tolist",
    "nonzero",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "masked_select",
)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor's value is forbidden: on an accelerator it would wait for all work queued."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("a tensor's value was read")

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, refuse)


CONFIGS = [
    {"statistics": "batch", "optimizer": "adam"},
    {"statistics": "evidence", "optimizer": "sgd"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["statistics"])
@pytest.mark.parametrize("sizes", [(9,), (1, 8), (2, 3, 4)], ids=str)
def test_neither_predict_nor_adapt_reads_a_tensor(
    config: dict[str, Any], sizes: tuple[int, ...], build: Build, images: Images, request: pytest.FixtureRequest
) -> None:
    network = Network(build("batch_norm_2d"))
    pipeline = Pipeline(network, norm=Guarded(eata(network, **config)))
    states = tree.stack([pipeline.init()] * 3)
    x, groups = images(9), Groups.of(sizes)
    rows = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    request.getfixturevalue("no_waiting")
    with pytest.raises(RuntimeError, match="was read"):
        bool(x.sum() > 0)  # the guard is on
    pipeline.predict(states, rows, groups, x)
    pipeline.adapt(states, rows, Batch(x, groups, torch.ones(9)))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["statistics"])
def test_all_of_it_runs_where_there_are_no_values_at_all(config: dict[str, Any], build: Build, images: Images) -> None:
    """On the meta device a value cannot be read, not even from C++, and a tensor made elsewhere does not fit."""
    network = Network(build("batch_norm_2d").to("meta"))
    pipeline = Pipeline(network, norm=Guarded(eata(network, **config)))
    states = tree.stack([pipeline.init()] * 3)
    rows, groups = torch.zeros(9, dtype=torch.int64, device="meta"), Groups.of((8, 1), "meta")
    x, weights = images(9).to("meta"), torch.ones(9, device="meta")
    assert pipeline.predict(states, rows, groups, x).logits.shape == (9, 4)
    new, _ = pipeline.adapt(states, rows, Batch(x, groups, weights))
    assert {leaf.device.type for _, leaf in tree.leaves(new)} == {"meta"}


def test_streams_share_the_models_tensors(build: Build, images: Images) -> None:
    model = build("batch_norm_2d")
    before = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    network = Network(model)
    adapter = eata(network)
    x = images(9)
    states, _ = adapter.adapt(tree.stack([adapter.init()] * 2), one_stream(x), batch(x))
    after = {t.data_ptr() for t in (*network.model.parameters(), *network.model.buffers())}
    assert after == before
    assert (
        tree.nbytes(tree.row(states, 0)) == 4 * (20 + 10 + 10 + 1 + 1 + 1 + 4 + 4 + 20 + 20) + 8 * 5
    )  # of P = 10, C = 4


@pytest.mark.parametrize("statistics", ["batch", "evidence"])
def test_predicting_and_learning_threads_do_not_see_each_other(statistics: str, build: Build, images: Images) -> None:
    network = Network(build("batch_norm_2d"))
    pipeline = Pipeline(network, norm=eata(network, statistics=statistics))
    states = tree.stack([pipeline.init()])
    x, other = images(9), 2 * images(8, start=4.0)
    answer = pipeline.predict(states, one_stream(x), Groups.of((9,)), x).logits
    learned, _ = pipeline.adapt(states, one_stream(other), batch(other))
    answers, states_after = [], []

    def predict() -> None:
        answers.extend(pipeline.predict(states, one_stream(x), Groups.of((9,)), x).logits for _ in range(30))

    def learn() -> None:
        states_after.extend(pipeline.adapt(states, one_stream(other), batch(other))[0] for _ in range(30))

    threads = [threading.Thread(target=work) for work in (predict, learn, predict)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(answers) == 60
    assert len(states_after) == 30
    assert all(torch.equal(each, answer) for each in answers)
    assert all(torch.equal(each.norm.params, learned.norm.params) for each in states_after)
