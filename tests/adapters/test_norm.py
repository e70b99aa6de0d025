import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters import Groups, Modulation, Moments, Network, Output, Statistics
from adapters.norm import CONTRADICTION_MAX, Evidence, _contradiction, _own_share, _own_statistics, pool

Build = Callable[..., nn.Module]
Images = Callable[..., Tensor]
KINDS = ["batch_norm_2d", "batch_norm_1d", "group_norm", "layer_norm"]
TINY = 1e-12  # an ε that no literal below can see


def of_source(network: Network, rows: Tensor, groups: Groups, statistics: Statistics, **other: Any) -> Modulation:
    """Every stream of a table of three has the source's own numbers."""
    scale, shift, mean, var = (t.expand(3, -1) for t in (network.scale, network.shift, network.mean, network.var))
    return Modulation(scale, shift, mean, var, rows, groups, statistics, **other)


def evidence(known: float, *own: float, tolerance: float = math.inf) -> Evidence:
    """The same images behind each of three streams; unless told otherwise, nothing is contradicted."""
    return Evidence(torch.full((3,), known), torch.tensor(own), tolerance)


def one_request(rows: int) -> Groups:
    return Groups.of((rows,))


def contradiction_of(network: Network, told: Modulation, answer: Output) -> Tensor:
    """How far each request of a forward lies from what was known of its stream, mean over layers."""
    assert answer.moments is not None
    assert told.evidence is not None
    of_group = told.groups.of_rows(told.rows)
    known = Moments(told.mean[of_group], told.var[of_group])
    return network.contradiction(answer.moments, known, told.groups.sizes, told.evidence.tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_network_is_the_model(kind: str, build: Build, images: Images) -> None:
    x = images(5)
    torch.testing.assert_close(Network(build(kind))(x).logits, build(kind).eval()(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sources_own_numbers_give_the_frozen_answer(kind: str, build: Build, images: Images) -> None:
    x, rows = images(5), torch.tensor([2, 0, 0, 1, 2])
    told = of_source(network := Network(build(kind)), rows, Groups.of((1, 2, 1, 1)), Statistics.KNOWN)
    torch.testing.assert_close(network(x, told).logits, network(x).logits, atol=1e-5, rtol=0)


def test_every_row_has_its_own_scale_shift_and_statistics() -> None:
    network = Network(nn.Sequential(nn.BatchNorm1d(2, eps=TINY)))
    told = Modulation(
        scale=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        shift=torch.tensor([[0.0, 0.0], [10.0, 20.0]]),
        mean=torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        var=torch.tensor([[1.0, 1.0], [4.0, 4.0]]),
        rows=torch.tensor([0, 1]),
        groups=Groups.of((1, 1)),
        statistics=Statistics.KNOWN,
    )
    answer = network(torch.tensor([[2.0, 3.0], [5.0, 7.0]]), told).logits
    # 2·1, 3·2; then 3·(5 − 1)/2 + 10, 4·(7 − 1)/2 + 20
    torch.testing.assert_close(answer, torch.tensor([[2.0, 6.0], [16.0, 32.0]]))


def test_every_row_has_its_own_numbers_in_batch_norm_2d() -> None:
    network = Network(nn.Sequential(nn.BatchNorm2d(1, eps=TINY), nn.Flatten()))
    two = torch.tensor([[2.0], [-1.0]])
    told = Modulation(two, two, 0 * two, 4 * two.square(), torch.tensor([1, 0]), Groups.of((1, 1)), Statistics.KNOWN)
    answer = network(torch.tensor([[[[2.0, 4.0]]], [[[2.0, 4.0]]]]), told).logits
    # variances 16 and 4; state 1: −x/2 − 1; state 0: 2 x/4 + 2
    torch.testing.assert_close(answer, torch.tensor([[-2.0, -3.0], [3.0, 4.0]]))


def test_group_norm_by_hand() -> None:
    network = Network(nn.Sequential(nn.GroupNorm(2, 4, eps=TINY)))
    scale, shift = torch.tensor([[1.0, 1, 1, 1], [1, 2, 3, 4]]), torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 5]])
    told = Modulation(scale, shift, shift, scale, torch.tensor([0, 1]), Groups.of((2,)), Statistics.KNOWN)
    x = torch.tensor([[1.0, 3.0, 10.0, 20.0], [1.0, 3.0, 10.0, 20.0]])  # each group normalised: −1, 1
    torch.testing.assert_close(network(x, told).logits, torch.tensor([[-1.0, 1, -1, 1], [-1, 2, -3, 9]]))


def test_layer_norm_by_hand() -> None:
    network = Network(nn.Sequential(nn.LayerNorm(2, eps=TINY), nn.Flatten()))
    scale, shift = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    told = Modulation(scale, shift, shift, scale, torch.tensor([1, 0]), Groups.of((2,)), Statistics.OWN)
    x = torch.tensor([[[4.0, 8.0], [8.0, 4.0]], [[4.0, 8.0], [8.0, 4.0]]])  # every token normalised: ∓1, ±1
    torch.testing.assert_close(network(x, told).logits, torch.tensor([[-3.0, 4, 3, -4], [-1, 3, 1, -1]]))


@pytest.mark.parametrize("kind", ["batch_norm_2d", "batch_norm_1d"])
@pytest.mark.parametrize("sizes", [(9,), (4, 5), (2, 3, 4)], ids=str)
def test_own_statistics_are_those_of_separate_forwards(
    kind: str, sizes: tuple[int, ...], build: Build, images: Images
) -> None:
    x, model = images(9), build(kind).train()
    expected = torch.cat([model(part) for part in x.split(list(sizes))]).detach()
    network = Network(build(kind))
    told = of_source(network, torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2]), Groups.of(sizes), Statistics.OWN)
    torch.testing.assert_close(network(x, told).logits, expected, atol=1e-5, rtol=0)


def test_own_statistics_of_rows_that_lie_apart(build: Build, images: Images) -> None:
    network, x = Network(build("batch_norm_2d")), images(6)
    apart = torch.tensor([0, 2, 4, 1, 3, 5])
    rows = torch.zeros(6, dtype=torch.int64)
    together = network(x, of_source(network, rows, Groups.of((3, 3)), Statistics.OWN)).logits
    groups = Groups(torch.tensor([0, 1, 0, 1, 0, 1]), (3, 3))
    mixed = network(x[apart.argsort()], of_source(network, rows, groups, Statistics.OWN)).logits
    torch.testing.assert_close(mixed[apart], together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(1,), (1, 2)], ids=str)
def test_one_value_per_channel_takes_the_sources_statistics(sizes: tuple[int, ...]) -> None:
    layer = nn.BatchNorm1d(2, eps=TINY)
    layer.running_mean, layer.running_var = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 16.0])
    network = Network(nn.Sequential(layer))
    x = torch.tensor([[5.0, 6.0], [1.0, 3.0], [3.0, 1.0]])[: sum(sizes)]
    rows = torch.tensor([0] * len(x))
    answer = network(x, of_source(network, rows, Groups.of(sizes), Statistics.OWN)).logits
    expected = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])[: sum(sizes)]  # (5 − 1)/2, (6 − 2)/4; then ±1
    torch.testing.assert_close(answer, expected)


def test_blend_by_hand() -> None:
    network = Network(nn.Sequential(nn.BatchNorm1d(1, eps=TINY)))
    x = torch.tensor([[1.0], [3.0], [7.0]])
    rows, groups = torch.tensor([0, 0, 1]), Groups.of((2, 1))
    told = of_source(network, rows, groups, Statistics.BLEND, evidence=evidence(8.0, 8.0, 0.0))
    answer, _, moments, _ = network(x, told)
    # request 0 has mean 2, variance 1, the source 0 and 1; half of each: mean 1, variance 1 + 0.25·4 = 2
    torch.testing.assert_close(answer, torch.tensor([[0.0], [2 / 2**0.5], [7.0]]))
    assert moments is not None
    # between images 1 and 3, the variance is 2; one image has none
    expected = Moments(*(torch.tensor(values) for values in ([[2.0], [7.0]], [[1.0], [0.0]], [[2.0], [0.0]])))
    torch.testing.assert_close(moments, expected)
    assert contradiction_of(network, told, Output(answer, None, moments)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("known", "own", "same_as"), [(5.0, 0.0, Statistics.KNOWN), (0.0, 5.0, Statistics.OWN)])
def test_blend_has_known_and_own_as_its_ends(
    known: float, own: float, same_as: Statistics, build: Build, images: Images
) -> None:
    network, x = Network(build("batch_norm_2d")), images(6)
    rows, groups = torch.tensor([0, 0, 0, 1, 1, 1]), Groups.of((3, 3))
    blend = network(x, of_source(network, rows, groups, Statistics.BLEND, evidence=evidence(known, own, own)))
    other = network(x, of_source(network, rows, groups, same_as))
    torch.testing.assert_close(blend.logits, other.logits, atol=1e-5, rtol=0)
    assert other.moments is None


# What a request's own statistics are worth against known ones. EIGHT has means 2 and 10 and variances 1 and 4; between
# its images they are 8/7 and 32/7, so eight images miss a mean by 1/7 and 4/7, squared, anyway.

EIGHT = torch.tensor([[3.0, 12.0], [1.0, 8.0]] * 4)
NAN = float("nan")


def contradicted(
    x: Tensor, mean: list[float], var: list[float], *sizes: int, tolerance: float = 0.0, eps: float = TINY
) -> Tensor:
    """The contradiction of each request with one known mean and variance."""
    groups = Groups.of(sizes or (len(x),))
    image_means = x.flatten(2).mean(2) if x.dim() > 2 else x
    own_mean = torch.stack([part.mean(0) for part in image_means.split(list(groups.sizes))])
    known = (torch.tensor(mean).expand_as(own_mean), torch.tensor(var).expand_as(own_mean))
    between = _own_statistics(x, groups, torch.zeros(x.shape[1]))[2]
    return _contradiction(own_mean, between, known, groups.sizes, tolerance, eps)


def test_variance_between_images_by_hand() -> None:
    x = torch.cat([EIGHT, EIGHT[:1], EIGHT[:3]])
    found = _own_statistics(x, Groups.of((8, 1, 3)), torch.zeros(2))[2]
    # eight: 8/7 and 32/7; one: none; 3, 1, 3 and 12, 8, 12: (2 · 4/9 + 16/9)/2 = 4/3, and four times as much
    torch.testing.assert_close(found, torch.tensor([[8 / 7, 32 / 7], [0, 0], [4 / 3, 16 / 3]]))
    # rows that lie apart; and images of four values each, whose means alone count
    mixed = torch.tensor([8, 0, 9, 1, 2, 3, 10, 4, 5, 6, 7, 11])
    groups = Groups(Groups.of((8, 1, 3)).index[mixed], (8, 1, 3))
    torch.testing.assert_close(_own_statistics(x[mixed], groups, torch.ones(2))[2], found)
    spread = x[:, :, None, None] + torch.tensor([[9.0, -9.0], [5.0, -5.0]])
    torch.testing.assert_close(_own_statistics(spread, Groups.of((8, 1, 3)), torch.zeros(2))[2], found)


@pytest.mark.parametrize(
    ("mean", "var", "expected"),
    [
        ([0.0, 10.0], [1.0, 4.0], 1.625),  # ((4 − 1/7) + (0 − 4/7)/4) / (8/7 + 8/7) = 26/16
        ([0.0, 14.0], [1.0, 4.0], 3.375),  # (27/7 + (16 − 4/7)/4) / (16/7) = 54/16
        ([0.0, 10.0], [4.0, 4.0], 0.575),  # ((27/7)/4 − 1/7) / (2/7 + 8/7) = 23/40
        ([2.0, 10.0], [1.0, 4.0], 0.0),  # the same means: −2/7 / …, which is nothing
        ([2.5, 10.0], [1.0, 4.0], 0.0),  # 1/4 − 2/7 < 0: within chance
        ([3.0, 10.0], [1.0, 4.0], 0.3125),  # (1 − 2/7) / (16/7) = 5/16
    ],
    ids=str,
)
def test_contradiction_by_hand(mean: list[float], var: list[float], expected: float) -> None:
    torch.testing.assert_close(contradicted(EIGHT, mean, var), torch.tensor([expected]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("tolerance", "expected"), [(0.0, 1.625), (0.125, 1.5), (1.625, 0.0), (2.0, 0.0), (math.inf, 0.0)]
)
def test_tolerance_is_taken_off_a_contradiction(tolerance: float, expected: float) -> None:
    found = contradicted(EIGHT, [0.0, 10.0], [1.0, 4.0], tolerance=tolerance)
    torch.testing.assert_close(found, torch.tensor([expected]))


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_fewer_than_eight_rows_contradict_nothing(rows: int, mean: float) -> None:
    assert contradicted(EIGHT[:rows], [mean, mean], [1.0, 4.0]).tolist() == [0.0]
    # nor among larger ones
    x = torch.cat([EIGHT[:rows], EIGHT])
    found = contradicted(x, [0.0, 10.0], [1.0, 4.0], rows, 8)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.625]))


def test_contradiction_counts_images_not_their_values() -> None:
    """Each image is (m + 10, m − 10), m = 3, 1, 3, …: only m varies between images."""
    x = EIGHT[:, :1, None, None] + torch.tensor([10.0, -10.0])
    torch.testing.assert_close(contradicted(x, [0.0], [1.0]), torch.tensor([3.375]))  # (4 − 1/7) / (8/7) = 27/8
    torch.testing.assert_close(contradicted(x, [0.0], [101.0]), torch.tensor([3.375]))  # one channel: σ² cancels


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
@pytest.mark.parametrize("value", [0.1, 0.3, 1.7, 123.456])
@pytest.mark.parametrize("rows", [8, 9, 11, 13])
def test_equal_images_at_the_known_mean_contradict_nothing(tolerance: float, value: float, rows: int) -> None:
    """Both sums are rounding then; their quotient must not be."""
    x = torch.full((2 * rows, 2), value)
    for sizes in ((2 * rows,), (rows, rows)):
        groups = Groups.of(sizes)
        for own in (value, value * (1 + 1e-7), value * (1 - 1e-7)):
            own_mean = torch.full((len(sizes), 2), own)
            known = (torch.full_like(own_mean, value), torch.ones_like(own_mean))
            between = _own_statistics(x, groups, torch.zeros(x.shape[1]))[2]
            found = _contradiction(own_mean, between, known, groups.sizes, tolerance, TINY)
            torch.testing.assert_close(found, torch.zeros(len(sizes)), atol=1e-3, rtol=0)
    network = Network(nn.Sequential(nn.BatchNorm1d(2)))
    told = of_source(network, torch.zeros(2 * rows, dtype=torch.int64), Groups.of((rows, rows)), Statistics.BLEND)
    told = told._replace(mean=torch.full((3, 2), value), evidence=evidence(16.0, 8.0, 8.0, tolerance=tolerance))
    answer = network(x, told)
    torch.testing.assert_close(contradiction_of(network, told, answer), torch.zeros(2), atol=1e-3, rtol=0)
    assert answer.logits.isfinite().all()


@pytest.mark.parametrize("value", [1.0, 50.0, 1e18])
def test_equal_images_off_the_known_mean_are_believed(value: float) -> None:
    found = contradicted(torch.full((8, 2), value), [0.0, 0.0], [1.0, 1.0])
    assert found.tolist() == [CONTRADICTION_MAX]
    share = _own_share(Evidence(torch.tensor([256.0]), torch.tensor([4.0]), 0.0), torch.tensor([0]), found)
    torch.testing.assert_close(share, torch.tensor([1.0]), atol=1e-6, rtol=0)
    # at ∞ tolerance even they are not
    assert contradicted(torch.full((8, 2), value), [0.0, 0.0], [1.0, 1.0], tolerance=math.inf).tolist() == [0.0]


def test_a_channel_without_known_variance_stays_finite() -> None:
    """Its σ² is 0, as where a source never saw anything but zeros: ε stands in for it, as in the normalisation."""
    found = contradicted(EIGHT, [0.0, 0.0], [1.0, 0.0], eps=1e-5)
    # channel 1 outweighs: ((100 − 4/7) + 1e-5 · 27/7) / (32/7 + 1e-5 · 8/7) = 21.75
    torch.testing.assert_close(found, torch.tensor([21.75]), atol=1e-3, rtol=0)
    layer = nn.BatchNorm1d(2)
    layer.running_var = torch.tensor([1.0, 0.0])
    network = Network(nn.Sequential(layer))
    told = of_source(network, torch.tensor([0] * 8), one_request(8), Statistics.BLEND, evidence=evidence(16.0, 8.0))
    for tolerance in (0.1, math.inf):
        weighed = evidence(16.0, 8.0, tolerance=tolerance)
        assert network(1e6 * EIGHT, told._replace(evidence=weighed)).logits.isfinite().all()


def test_rows_of_nan_stay_in_their_request() -> None:
    x = torch.cat([EIGHT, EIGHT, EIGHT[:3]])
    x[1, 0] = NAN
    found = contradicted(x, [0.0, 10.0], [1.0, 4.0], 8, 8, 3)
    torch.testing.assert_close(found, torch.tensor([NAN, 1.625, 0.0]), equal_nan=True)
    network = Network(nn.Sequential(nn.BatchNorm1d(2)))
    rows, groups = torch.tensor([0] * 8 + [1] * 8 + [0] * 3), Groups.of((8, 8, 3))
    weighed = evidence(16.0, 8.0, 8.0, 0.0, tolerance=0.1)
    logits = network(x, of_source(network, rows, groups, Statistics.BLEND, evidence=weighed)).logits
    assert logits[8:].isfinite().all()
    weighed = evidence(16.0, 8.0, tolerance=0.1)
    alone = network(EIGHT, of_source(network, rows[:8], one_request(8), Statistics.BLEND, evidence=weighed)).logits
    torch.testing.assert_close(logits[8:16], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("known", "own", "contradiction", "expected"),
    [
        (16.0, 8.0, 0.0, 1 / 3),
        (16.0, 4.0, 1.5, 25 / 29),  # 16 images are worth 16/(1 + 24) = 0.64: 4/4.64
        (1e9, 4.0, 0.25, 0.5),  # however many: no more than 1/B
        (16.0, 0.0, 1.5, 0.0),
        (0.0, 8.0, 1.5, 1.0),
        (0.0, 0.0, 0.0, 0.0),
        (256.0, 4.0, CONTRADICTION_MAX, 1.0),
    ],
)
def test_shares_by_hand(known: float, own: float, contradiction: float, expected: float) -> None:
    """The request is of the second stream."""
    weighed = Evidence(torch.tensor([NAN, known]), torch.tensor([own]), 0.0)
    found = _own_share(weighed, torch.tensor([1]), torch.tensor([contradiction]))
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-6, rtol=1e-6)


def test_blend_by_hand_where_the_request_contradicts() -> None:
    layer = nn.BatchNorm1d(2, eps=TINY)
    layer.running_mean, layer.running_var = torch.tensor([0.0, 10.0]), torch.tensor([1.0, 4.0])
    network = Network(nn.Sequential(layer))
    weighed = evidence(16.0, 4.0, tolerance=0.125)
    told = of_source(network, torch.tensor([1] * 8), one_request(8), Statistics.BLEND, evidence=weighed)
    answer = network(EIGHT, told)
    # the share is 25/29: mean 50/29, variance 1 + 25/29 · 4/29 · 4 = 1241/29²; channel 1 as it was
    expected = torch.tensor([[37 / 1241**0.5, 1.0], [-21 / 1241**0.5, -1.0]] * 4)
    torch.testing.assert_close(answer.logits, expected)
    torch.testing.assert_close(contradiction_of(network, told, answer), torch.tensor([1.5]))


class Beside(nn.Module):
    """One layer for each of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.BatchNorm1d(1, eps=TINY), nn.BatchNorm1d(1, eps=TINY)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x[:, :1]), self.right(x[:, 1:])], dim=1)


def test_each_layer_weighs_for_itself_and_a_contradiction_is_the_mean_over_layers() -> None:
    network = Network(Beside())
    x = EIGHT - torch.tensor([0.0, 10.0])  # contradictions (4 − 1/7) / (8/7) = 27/8, and none
    weighed = evidence(8.0, 1.0, tolerance=0.125)
    told = of_source(network, torch.tensor([0] * 8), one_request(8), Statistics.BLEND, evidence=weighed)
    answer = network(x, told)
    torch.testing.assert_close(contradiction_of(network, told, answer), torch.tensor([3.25 / 2]))
    # left: 8 images are worth 8/27, the share is 27/35: mean 54/35, variance 1 + 27 · 8 · 4/35² = 2089/35²;
    # right: the share is 1/9: mean 0, variance 8/9 · 1 + 1/9 · 4 = 4/3
    expected = torch.tensor([(3 - 54 / 35) * 35 / 2089**0.5, 2 / (4 / 3) ** 0.5])
    torch.testing.assert_close(answer.logits[0], expected)


def test_requests_of_one_forward_have_a_contradiction_each_with_any_known_statistics() -> None:
    """Layers without statistics are left out; a layer's own ε stands in where nothing varies."""
    network = Network(nn.Sequential(nn.GroupNorm(1, 2), nn.BatchNorm1d(2, eps=TINY), nn.LayerNorm(2)))
    between = torch.tensor([0.0, 0, 8 / 7, 32 / 7, 0, 0]).expand(3, -1)
    own = Moments(torch.tensor([9.0, 9, 2, 10, 9, 9]).expand(3, -1), torch.ones(3, 6), between)
    known = Moments(torch.tensor([[0.0, 0, 0, 10, 0, 0]]), torch.tensor([[1.0, 1, 1, 4, 1, 1]]))
    found = network.contradiction(own, known, (8, 7, 16), 0.125)
    # as above; of seven rows nothing; sixteen miss a mean by half as much: ((4 − 1/14) − 1/14) / (16/7) = 27/16
    torch.testing.assert_close(found, torch.tensor([1.5, 0.0, 1.6875 - 0.125]))
    each = Moments(known.mean + torch.tensor([[0.0], [0.0], [2.0]]), known.var.expand(3, -1))
    # the third is expected at 2 and 12: (−1/14 + (4 − 2/7)/4) / (16/7) = 3/8
    torch.testing.assert_close(network.contradiction(own, each, (8, 8, 16), 0.125), torch.tensor([1.5, 1.5, 0.25]))


def test_a_share_is_a_constant_to_gradients() -> None:
    """Scale and shift of an earlier layer move what a later one measures, yet not how it is weighed."""
    network = Network(nn.Sequential(nn.BatchNorm1d(2, eps=TINY)))
    x = EIGHT.clone().requires_grad_()
    weighed = evidence(16.0, 4.0, tolerance=0.1)
    told = of_source(network, torch.tensor([0] * 8), one_request(8), Statistics.BLEND, evidence=weighed)
    first = network(x, told)
    assert first.logits.requires_grad
    assert first.moments is not None
    assert not any(each is None or each.requires_grad for each in first.moments)
    contradiction = contradiction_of(network, told, first)
    assert not contradiction.requires_grad
    worth = (16 / (1 + 16 * contradiction)).item()
    second = network(x, told._replace(evidence=evidence(worth, 4.0)))
    torch.testing.assert_close(first.logits, second.logits)
    pull = torch.linspace(-1, 2, 16).reshape(8, 2)
    (one,), (other,) = (torch.autograd.grad((each.logits * pull).sum(), x) for each in (first, second))
    torch.testing.assert_close(one, other)


class Crossed(nn.Module):
    """Layers run in another order than they are registered in, beside one without statistics and one that rests."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.BatchNorm1d(2, eps=TINY)
        self.plain = nn.GroupNorm(1, 2)
        self.resting = nn.BatchNorm1d(3)
        self.first = nn.BatchNorm1d(2, eps=TINY)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.second(10 * self.first(x)))


def test_moments_lie_where_their_channels_do() -> None:
    network = Network(Crossed())
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 4.0], [3.0, 4.0]])  # means 2 and 2, variances 1 and 4
    told = of_source(network, torch.tensor([0] * 4), one_request(4), Statistics.BLEND, evidence=evidence(1.0, 0.0))
    moments = network(x, told).moments
    assert moments is not None
    # the frozen layers scale by nothing; `plain` and `resting` measured nothing and have the source's: 0 and 1
    assert moments.mean.tolist() == [[20.0, 20.0, 0, 0, 0, 0, 0, 2.0, 2.0]]
    assert moments.var.tolist() == [[100.0, 400.0, 1, 1, 1, 1, 1, 1.0, 4.0]]
    assert moments.between is not None  # 4/3 as much, and none of those that measured nothing
    expected = torch.tensor([[400 / 3, 1600 / 3, 0, 0, 0, 0, 0, 4 / 3, 16 / 3]])
    torch.testing.assert_close(moments.between, expected)


def test_a_layer_used_twice_is_one_layer_modulated_twice() -> None:
    shared = nn.BatchNorm1d(1, eps=TINY)
    network = Network(nn.Sequential(shared, nn.Sequential(nn.Identity(), shared), shared))
    assert network.channels == 1
    rows, groups = torch.tensor([0, 1]), Groups.of((1, 1))
    scale, shift = torch.tensor([[2.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    told = Modulation(scale, shift, 0 * scale, scale / scale, rows, groups, Statistics.KNOWN)
    answer = network(torch.tensor([[1.0], [1.0]]), told).logits
    torch.testing.assert_close(answer, torch.tensor([[8.0], [40.0]]))  # 1 → 2 → 4 → 8; 1 → 4 → 13 → 40


def test_moments_of_a_layer_used_twice_are_the_mixture_of_both_uses() -> None:
    shared = nn.BatchNorm1d(1, eps=TINY)
    shared.weight.data.fill_(3.0)
    network = Network(nn.Sequential(shared, nn.ReLU(), shared))
    x, rows = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0])
    told = of_source(network, rows, one_request(2), Statistics.BLEND, evidence=evidence(1.0, 0.0))
    moments = network(x, told).moments
    assert moments is not None
    # first 1, 3; then 3, 9: means 2 and 6, variances 1 and 9; all four: mean 4, variance 5 + 4
    # between its images: 2 and 18, whose mean is 10
    torch.testing.assert_close(moments, Moments(*(torch.tensor([[value]]) for value in (4.0, 9.0, 10.0))))


def test_torchvisions_resnet18_builds_and_answers() -> None:
    model = torchvision.models.resnet18(weights=None)
    x = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
    expected = model.eval()(x).detach()
    network = Network(model)
    # stem 64; four blocks' convolutions of 64, 128, 256, 512 channels, and a projection in the last three
    assert network.channels == 64 + 4 * 64 + 5 * 128 + 5 * 256 + 5 * 512 == 4800
    told = of_source(network, torch.tensor([0, 2]), Groups.of((1, 1)), Statistics.KNOWN)
    with torch.no_grad():
        answer = network(x, told)
    torch.testing.assert_close(answer.logits, expected, atol=1e-4, rtol=1e-4)
    assert answer.features is not None
    assert answer.features.shape == (2, 512)


@pytest.mark.parametrize("statistics", list(Statistics))
def test_a_layer_that_tracks_no_statistics_stays_as_it_is(statistics: Statistics) -> None:
    untracked = nn.BatchNorm1d(2, track_running_stats=False, eps=TINY)
    network = Network(nn.Sequential(untracked, nn.BatchNorm1d(2, eps=TINY)))
    assert network.channels == 2
    assert network.model[0] is untracked
    x = torch.tensor([[1.0, 8.0], [3.0, 4.0]])
    told = of_source(network, torch.tensor([0, 0]), one_request(2), statistics, evidence=evidence(8.0, 8.0))
    torch.testing.assert_close(network(x, told).logits, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    "layer",
    [ChannelsFirst(2), nn.LayerNorm((2, 3)), nn.InstanceNorm1d(2, affine=True)],
    ids=lambda each: type(each).__name__,
)
def test_layers_that_mean_something_else_are_left_frozen(layer: nn.Module) -> None:
    network = Network(nn.Sequential(layer, nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(6, 2)))
    assert network.model[0] is layer
    assert network.channels == 2


def test_a_transformer_layer_whose_fast_path_reads_its_norms_is_left_frozen() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        return nn.Sequential(layer, nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 2)).eval()

    network, x = Network(model()), torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    assert network.channels == 4
    with torch.no_grad():
        torch.testing.assert_close(network(x).logits, model()(x), atol=1e-6, rtol=0)


def test_layers_without_affine_parameters_count_as_one_and_zero() -> None:
    network = Network(nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.LayerNorm(2, elementwise_affine=False)))
    assert network.scale.tolist() == [1.0, 1.0, 1.0, 1.0]
    assert network.shift.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_the_model_is_shared_not_copied() -> None:
    layer, linear = nn.BatchNorm1d(2), nn.Linear(2, 3)
    pointers = [t.data_ptr() for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var, linear.weight)]
    model = nn.Sequential(layer, linear)
    network = Network(model)
    assert network.model is model
    ours = network.model[0]
    assert [t.data_ptr() for t in (ours.scale, ours.shift, ours.mean, ours.var, model[1].weight)] == pointers


def test_the_model_is_frozen_and_evaluating(build: Build) -> None:
    network = Network(build("batch_norm_2d").train())
    assert not network.model.training
    assert not any(parameter.requires_grad for parameter in network.model.parameters())


def test_features_are_what_the_last_linear_layer_read() -> None:
    network = Network(nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 3)))
    network.model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert network(torch.tensor([[1.0, 3.0]])).features.tolist() == [[4.0, 0.0]]
    assert Network(nn.Sequential(nn.BatchNorm1d(2)))(torch.ones(1, 2)).features is None


def test_a_forward_that_fails_leaves_nothing_behind(build: Build, images: Images) -> None:
    network, x = Network(build("batch_norm_2d")), images(2)
    expected = network(x).logits
    told = of_source(network, torch.tensor([0, 0]), one_request(2), Statistics.OWN)
    with pytest.raises(RuntimeError):
        network(x[:, :2], told)
    assert torch.equal(network(x).logits, expected)


class Meeting(nn.Module):
    """Two forwards wait for each other here, so that both are under way at once."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(2, timeout=10)

    def forward(self, x: Tensor) -> Tensor:
        self.barrier.wait()
        return x


def test_two_threads_in_one_network_get_their_own_answers() -> None:
    network = Network(nn.Sequential(Meeting(), nn.BatchNorm1d(1, eps=TINY), Meeting(), nn.BatchNorm1d(1, eps=TINY)))
    answers: dict[float, list[float]] = {2.0: [], 3.0: []}

    def ask(scale: float) -> None:
        rows, groups = torch.tensor([0]), one_request(1)
        scales = torch.full((2, 2), scale)
        told = Modulation(scales, 0 * scales, 0 * scales, scales / scale, rows, groups, Statistics.KNOWN)
        for _ in range(20):
            answers[scale].append(round(network(torch.tensor([[1.0]]), told).logits.item(), 4))

    threads = [threading.Thread(target=ask, args=(scale,)) for scale in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert answers == {2.0: [4.0] * 20, 3.0: [9.0] * 20}


VALUES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(VALUES, VALUES)
def test_pooled_moments_are_those_of_all_values(first: list[float], second: list[float]) -> None:
    def moments(values: list[float]) -> Moments:
        var, mean = torch.var_mean(torch.tensor(values, dtype=torch.float64), correction=0)
        return Moments(mean.reshape(1, 1), var.reshape(1, 1))

    def images(values: list[float]) -> Tensor:
        return torch.tensor([len(values)], dtype=torch.float64)

    found = pool(moments(first), images(first), moments(second), images(second))
    torch.testing.assert_close(found, moments(first + second), atol=1e-8, rtol=1e-8)


def test_pooling_with_nothing_changes_nothing() -> None:
    known = Moments(torch.tensor([[3.0]]), torch.tensor([[2.0]]))
    other = Moments(torch.tensor([[9.0]]), torch.tensor([[9.0]]))
    assert pool(known, torch.tensor([4.0]), other, torch.tensor([0.0])) == known
    assert pool(known, torch.tensor([0.0]), other, torch.tensor([0.0])) == known
    assert pool(other, torch.tensor([0.0]), known, torch.tensor([5.0])) == known


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 10)), min_size=1, max_size=5),
    statistics=st.sampled_from(Statistics),
    kind=st.sampled_from(KINDS),
)
def test_any_mix_of_requests_is_answered_like_each_alone(
    requests: list[tuple[int, int]], statistics: Statistics, kind: str, build: Build, images: Images
) -> None:
    network = Network(build(kind))
    streams, sizes = [stream for stream, _ in requests], tuple(size for _, size in requests)
    x = images(sum(sizes))
    turn = torch.tensor([[1.0], [1.5], [0.5]])

    def ask(part: Tensor, rows: list[int], sizes: tuple[int, ...]) -> Tensor:
        known, own = torch.tensor([16.0, 0.0, 200.0]), torch.tensor([0.0 if size < 3 else size for size in sizes])
        weighed = Evidence(known, own.float(), 0.1)
        told = of_source(network, torch.tensor(rows), Groups.of(sizes), statistics, evidence=weighed)
        told = told._replace(mean=told.mean + turn - 1)  # so that the second and third stream are contradicted
        return network(part, told._replace(scale=told.scale * turn, shift=told.shift + turn)).logits

    each_row = [stream for stream, size in requests for _ in range(size)]
    mixed = ask(x, each_row, sizes)
    alone = [ask(part, [s] * len(part), (len(part),)) for part, s in zip(x.split(list(sizes)), streams, strict=True)]
    torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-5, rtol=1e-5)
