"""Alignment by hand-made numbers, and a detector whose backbone does what it says."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from adapters import (
    AdapterError,
    Alignment,
    AlignmentConfig,
    AlignmentPrior,
    AlignmentState,
    Batch,
    Boxes,
    Groups,
    Guarded,
    Modulation,
    Moments,
    Network,
    Statistics,
    Trip,
    UnsupportedModel,
    alignment_prior,
    tree,
)
from adapters.alignment import divergence
from tta_serve.builtin import scene_detector, scenes
from tta_serve.detectors import Detector

# -- one channel ------------------------------------------------------------------------------------------------------


def one_channel(limit: float, **settings: Any) -> Alignment:
    """Around a batch-norm that starts as the identity, with a source of mean 0 and variance 1."""
    network = Network(nn.Sequential(nn.BatchNorm1d(1, eps=0.0)))
    prior = AlignmentPrior(
        torch.zeros(1), torch.ones(1), torch.tensor([1]), torch.tensor([1, 4]), torch.tensor([4 * limit, limit])
    )
    return Alignment(network, prior, AlignmentConfig(**settings))


def batch(x: Tensor, sizes: tuple[int, ...] | None = None, weights: Sequence[float] | None = None) -> Batch:
    weight = torch.ones(len(x)) if weights is None else torch.tensor(weights)
    return Batch(x, Groups.of(sizes or (len(x),)), weight)


def table(adapter: Any, streams: int = 1) -> Any:
    return tree.stack([adapter.init() for _ in range(streams)])


def of_stream(*streams: int) -> Tensor:
    return torch.tensor(streams)


SHIFTED = torch.tensor([[2.0], [4.0]])  # mean 3, variance 1


def test_the_gap_of_two_levels_by_hand() -> None:
    """Level 1: channels with ½ (1 + 1 + 9 · 2) − 1 = 9 and 0; level 2: ½ (2 + ½ + 0) − 1 = ¼."""
    none = torch.zeros(0)
    prior = AlignmentPrior(torch.tensor([0.0, 5.0, 7.0]), torch.tensor([1.0, 1.0, 3.0]), none, none, none)
    features = Moments(torch.tensor([[3.0, 5.0, 7.0]]), torch.tensor([[1.0, 1.0, 6.0]]))
    assert divergence(features, prior, (2, 1)).tolist() == [pytest.approx((4.5 + 0.25) / 2)]


def test_a_channel_that_is_constant_has_a_finite_gap() -> None:
    """Its variance counts as a hundredth of its level's: ½ (100 + 0.01) − 1, and the other channel's 0; mean of two."""
    none = torch.zeros(0)
    prior = AlignmentPrior(torch.zeros(2), torch.ones(2), none, none, none)
    features = Moments(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    assert divergence(features, prior, (2,)).item() == pytest.approx(49.005 / 2)


def test_drift_is_the_gap_over_the_limit_of_as_many_images() -> None:
    """A gap of 9 with 2 images: the limit between 2.0 (1 image) and 0.5 (4 images) is 1.0."""
    alignment = one_channel(limit=0.5)
    states = table(alignment)
    assert alignment.drift(states).tolist() == [0.0]
    states, _ = alignment.adapt(states, of_stream(0, 0), batch(SHIFTED))
    assert (states.feature_mean.item(), states.feature_var.item(), states.feature_images.item()) == (3.0, 1.0, 2.0)
    assert alignment.drift(states).item() == pytest.approx(9.0)


def test_a_step_goes_down_the_gradient_of_the_gap() -> None:
    """`m = 3γ + β`, `v = γ²`: ∂L/∂m = m (1/v + 1) = 6, ∂L/∂v = ½ (1 − 1/v² − m²/v²) = −4.5, so ∂L/∂γ = 18 − 9 and
    ∂L/∂β = 6; Adam's first step is its rate, here 2/8 of 1e-2, whatever the size of the gradient.
    """
    alignment = one_channel(limit=0.5)
    states, report = alignment.adapt(table(alignment), of_stream(0, 0), batch(SHIFTED))
    torch.testing.assert_close(states.params, torch.tensor([[0.9975, -0.0025]]), rtol=0, atol=1e-7)
    torch.testing.assert_close(states.optimizer.first, 0.1 * torch.tensor([[9.0, 6.0]]))
    assert (report.seen.item(), report.reliable.item(), report.selected.item()) == (2, 2, 2)
    assert report.applied.tolist() == [True]
    assert report.mean_probs.shape == (1, 0)
    assert (states.seen.item(), states.selected.item()) == (2, 2)


def test_without_drift_only_statistics_move() -> None:
    alignment = one_channel(limit=100.0)
    old = table(alignment)
    new, report = alignment.adapt(old, of_stream(0, 0), batch(SHIFTED))
    assert torch.equal(new.params, old.params)
    assert new.optimizer.step.item() == 0
    assert (report.seen.item(), report.reliable.item(), report.selected.item()) == (2, 0, 0)
    assert report.applied.tolist() == [False]
    assert (new.mean.item(), new.var.item(), new.images.item()) == (3.0, 1.0, 2.0)
    assert (new.seen.item(), new.selected.item()) == (2, 0)


def test_answers_use_the_sources_statistics_and_the_streams_by_the_images_behind_each() -> None:
    """8 images of mean 0 and variance 1 with 2 of mean 3 and variance 1: 0.6 and 1 + 0.8 · 0.2 · 9."""
    alignment = one_channel(limit=100.0, source_images=8.0)
    states, _ = alignment.adapt(table(alignment, 2), of_stream(1, 1), batch(SHIFTED))
    told = alignment.modulate(states, of_stream(1), Groups.of((1,)))
    assert told.statistics is Statistics.KNOWN
    torch.testing.assert_close(told.mean, torch.tensor([[0.0], [0.6]]))
    torch.testing.assert_close(told.var, torch.tensor([[1.0], [2.44]]))


def test_statistics_are_absorbed_as_they_are_learned() -> None:
    alignment = one_channel(limit=100.0)
    states = table(alignment, 2)
    learned, _ = alignment.adapt(states, of_stream(1, 1), batch(SHIFTED))
    moments = Moments(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    absorbed = alignment.absorb(states, of_stream(1), Groups.of((2,)), moments)
    for field in ("mean", "var", "images"):
        assert torch.equal(getattr(absorbed, field), getattr(learned, field))
    assert absorbed.feature_images.tolist() == [0.0, 0.0]


def test_the_past_is_capped() -> None:
    """Of 2 images kept of the first 4, and 2 new ones: means 3 and 0 count alike."""
    alignment = one_channel(limit=100.0, stream_images_max=2.0, feature_images_max=2.0)
    states, _ = alignment.adapt(table(alignment), of_stream(0, 0, 0, 0), batch(SHIFTED.repeat(2, 1)))
    states = states._replace(mean=torch.tensor([[3.0]]), feature_mean=torch.tensor([[3.0]]))
    states, _ = alignment.adapt(states, of_stream(0, 0), batch(torch.tensor([[-1.0], [1.0]])))
    assert states.mean.item() == pytest.approx(1.5)
    assert (states.images.item(), states.feature_images.item()) == (2.0, 2.0)


def test_a_stream_that_drifted_steps_beside_one_that_did_not() -> None:
    """−1 and 1 have the source's mean and variance."""
    alignment = one_channel(limit=0.5)
    x = torch.cat([SHIFTED, torch.tensor([[-1.0], [1.0]])])
    old = table(alignment, 3)
    new, report = alignment.adapt(old, of_stream(2, 2, 0, 0), batch(x, (2, 2)))
    assert report.seen.tolist() == [2, 0, 2]
    assert report.reliable.tolist() == report.selected.tolist() == [0, 0, 2]
    assert report.applied.tolist() == [False, False, True]
    assert torch.equal(new.params[:2], old.params[:2])
    alone, _ = alignment.adapt(table(alignment), of_stream(0, 0), batch(SHIFTED))
    torch.testing.assert_close(new.params[2], alone.params[0])


def test_rows_of_weight_zero_teach_nothing() -> None:
    """They are not in the features, and a request that has no others gives no statistics."""
    alignment = one_channel(limit=0.5)
    x = torch.cat([SHIFTED, torch.full((1, 1), 50.0)])
    new, report = alignment.adapt(table(alignment), of_stream(0, 0, 0), batch(x, (2, 1), weights=[1, 1, 0]))
    alone, _ = alignment.adapt(table(alignment), of_stream(0, 0), batch(SHIFTED))
    assert report.seen.tolist() == [2]
    for (name, found), (_, expected) in zip(tree.leaves(new), tree.leaves(alone), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_one_row_of_one_pixel_is_a_batch() -> None:
    """Mean 2, no variance, which counts as 0.01: ½ (0.01 + 100 + 4 · 101) − 1."""
    alignment = one_channel(limit=1.0)
    states, report = alignment.adapt(table(alignment), of_stream(0), batch(torch.tensor([[2.0]])))
    assert alignment.drift(states).item() == pytest.approx((0.5 * (0.01 + 100 + 4 * 101) - 1) / 4)
    assert report.applied.item()
    assert bool(states.params.isfinite().all())


def test_nan_is_refused_under_guards_and_its_neighbour_learns() -> None:
    guarded = Guarded(one_channel(limit=0.5))
    x = torch.cat([SHIFTED, torch.full((2, 1), torch.nan)])
    old = table(guarded, 2)
    new, report = guarded.adapt(old, of_stream(0, 0, 1, 1), batch(x, (2, 2)))
    assert report.refused.tolist() == [False, True]
    assert report.applied.tolist() == [True, False]
    assert report.trips[1].item() == Trip.NON_FINITE
    for (name, found), (_, before) in zip(tree.leaves(tree.row(new, 1)), tree.leaves(tree.row(old, 1)), strict=True):
        assert torch.equal(found, before), name


# -- a small backbone -------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Two levels, of 4 and of 6 channels; no statistics of its own where `norm` keeps none."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 6, 3, stride=2)
        for number, tensor in enumerate(self.parameters()):
            waves = (number + 1.7 * torch.arange(tensor.numel(), dtype=torch.float64)).sin().float()
            tensor.data.copy_(0.4 * waves.reshape(tensor.shape) + float(tensor is getattr(self.norm, "weight", None)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        at_1 = self.norm(self.first(x))
        return {"1": at_1, "2": self.second(at_1.relu())}


def test_the_prior_holds_the_moments_of_all_pixels(images: Callable[..., Tensor]) -> None:
    network = Network(Pyramid(nn.BatchNorm2d))
    x = images(8)
    prior = alignment_prior(network, [x[:5], x[5:]])
    assert prior.levels.tolist() == [4, 6]
    assert prior.sizes.tolist() == [1, 2]  # up to a quarter of the images
    maps = network(x).logits
    for level, at in ((maps["1"], slice(0, 4)), (maps["2"], slice(4, 10))):  # type: ignore[call-overload]
        pixels = level.transpose(0, 1).flatten(1)
        torch.testing.assert_close(prior.mean[at], pixels.mean(dim=1))
        torch.testing.assert_close(prior.var[at], pixels.var(dim=1, correction=0))


def test_the_sources_own_images_have_not_drifted_and_shifted_ones_have(images: Callable[..., Tensor]) -> None:
    alignment = Alignment(
        Network(Pyramid(nn.BatchNorm2d)), alignment_prior(Network(Pyramid(nn.BatchNorm2d)), [images(64)])
    )
    x = torch.cat([images(16, start=9.0), images(16, start=9.0) + 3])
    _, report = alignment.adapt(table(alignment, 2), of_stream(*[0] * 16, *[1] * 16), batch(x, (16, 16)))
    assert report.applied.tolist() == [False, True]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(nn.GroupNorm, 2)], ids=["batch norm", "group norm"])
def test_steps_lower_the_gap_until_it_is_under_the_alarm_line(norm: Any, images: Callable[..., Tensor]) -> None:
    """The images are the source's, and the parameters astray: nothing but scale and shift can close it."""
    network = Network(Pyramid(norm))
    alignment = Alignment(
        network, alignment_prior(network, [images(64)]), AlignmentConfig(stream_images_max=0.0, learning_rate=0.05)
    )
    astray = alignment.source_params + torch.tensor([0.9, 0.9, -0.6, 0.9, 0.6, -0.6, 0.6, 0.6])
    states = alignment.with_params(table(alignment), astray.unsqueeze(0))
    drifts, steps = [], []
    for _ in range(100):
        states, report = alignment.adapt(states, of_stream(*[0] * 16), batch(images(16, start=9.0)))
        drifts.append(alignment.drift(states).item())
        steps.append(report.applied.item())
    assert drifts[0] > 2
    assert steps[0]
    assert drifts[-1] <= 1.0
    assert not steps[-1]
    assert states.images.item() == 0


def test_what_cannot_be_aligned_is_refused(images: Callable[..., Tensor]) -> None:
    network = Network(Pyramid(nn.BatchNorm2d))
    prior = alignment_prior(network, [images(8)])
    with pytest.raises(UnsupportedModel, match="this backbone has none"):
        Alignment(Network(Pyramid(lambda _: nn.Identity())), prior)
    with pytest.raises(AdapterError, match=r"levels of \(4, 7\) channels"):
        Alignment(network, prior._replace(levels=torch.tensor([4, 7])))
    with pytest.raises(ValueError, match="at least 4 source images to compare with, not 3"):
        alignment_prior(network, [images(3)])
    with pytest.raises(ValueError, match="not 0"):
        alignment_prior(network, [])


# -- a detector -------------------------------------------------------------------------------------------------------


def frozen_norms() -> nn.Module:
    """Faster R-CNN as torchvision's with pretrained weights: its norms are `FrozenBatchNorm2d`s, and have no ε."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.2, 0.8)
    return FasterRCNN(backbone, 5, min_size=64, max_size=96, box_score_thresh=0.01, box_detections_per_img=10)


@pytest.fixture(scope="module", params=[scene_detector.load, frozen_norms], ids=["scenes", "frozen norms"])
def detector(request: pytest.FixtureRequest) -> Detector:
    return Detector(request.param()).freeze()


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    """Scenes of the sizes 96×64, 64×96, 96×64."""
    made = zip(scenes.scenes(3, 5, held_out=True, size=(96, 96)), ((96, 64), (64, 96), (96, 64)), strict=True)
    return [torch.from_numpy(scene.image[:h, :w]).permute(2, 0, 1) / 255 for scene, (h, w) in made]


def look(detector: Detector, images: Sequence[Tensor], modulation: Any = None) -> list[tuple[Tensor, ...]]:
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    return list(detector.detect([detector.prepare(image) for image in images], sizes, modulation))


def states_for(detector: Detector) -> AlignmentState:
    """Of three streams, the first of which has learned nothing."""
    assert detector.network is not None
    source = torch.cat([detector.network.scale, detector.network.shift])
    spread = torch.linspace(-0.05, 0.05, len(source))
    states = table(alignment_of(detector), 3)
    return states._replace(params=source + torch.tensor([0.0, 1.0, -1.0]).unsqueeze(1) * spread)


def alignment_of(detector: Detector) -> Alignment:
    """With a prior that is as good as any: nothing is learned here."""
    assert detector.network is not None
    one = torch.ones(1)
    return Alignment(detector.network, AlignmentPrior(one, one, torch.tensor([1]), torch.tensor([1]), one))


def by_stream(detector: Detector, states: AlignmentState, streams: Sequence[int]) -> Callable[..., Modulation]:
    def modulation(places: Sequence[int]) -> Modulation:
        rows = torch.tensor([streams[place] for place in places])
        return alignment_of(detector).modulate(states, rows, Groups.of((1,) * len(places)))

    return modulation


def same(found: Any, expected: Any, **tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("build", [scene_detector.load, frozen_norms], ids=["scenes", "frozen norms"])
def test_without_a_modulation_answers_and_losses_are_the_models_own(
    build: Callable[[], nn.Module], pictures: list[Tensor]
) -> None:
    plain, detector = build().eval(), Detector(build())
    side = plain.transform.min_size[-1]
    image = pictures[0].new_zeros(3, side, side)  # needs no resizing, which rounds otherwise before than after
    image[:, :64, :64] = pictures[0][:, :64]
    with torch.no_grad():
        (expected,) = plain([image])
    found = look(detector, [image])
    target = Boxes(torch.tensor([[10.0, 10.0, 40.0, 50.0]]), torch.tensor([2]))
    prepared = detector.prepare(image)
    torch.manual_seed(1)
    before = detector.loss([prepared], [target])
    assert len(expected["scores"]) > 0
    same(found, [(expected["boxes"], expected["labels"], expected["scores"])])
    look(detector, [image], by_stream(detector, states_for(detector), [1]))
    torch.manual_seed(1)
    assert torch.equal(detector.loss([prepared], [target]), before)
    same(look(detector, [image]), found)


def test_the_sources_own_modulation_changes_nothing(detector: Detector, pictures: list[Tensor]) -> None:
    assert detector.network is not None
    x = detector.pixels([detector.prepare(pictures[0])])
    with torch.no_grad():
        expected = detector.model.backbone(x)
    told = alignment_of(detector).modulate(table(alignment_of(detector), 2), of_stream(1), Groups.of((1,)))
    found: Any = detector.network(x, told).logits
    assert found.keys() == expected.keys()
    for name, level in expected.items():
        torch.testing.assert_close(found[name], level, rtol=1e-6, atol=1e-6 * level.abs().max().item())


def test_two_streams_in_one_batch_see_what_each_sees_alone(detector: Detector, pictures: list[Tensor]) -> None:
    """Of different canvases as well: stream 1 has a forward with stream 2, and one of its own."""
    states = states_for(detector)
    streams = [1, 1, 2]
    together = look(detector, pictures, by_stream(detector, states, streams))
    for picture, stream, found in zip(pictures, streams, together, strict=True):
        alone = look(detector, [picture], by_stream(detector, states, [stream]))
        same([found], alone, rtol=1e-4, atol=1e-3)
    frozen = look(detector, pictures)
    changed = [not torch.equal(one[2], other[2]) for one, other in zip(together, frozen, strict=True)]
    assert changed == [True, True, True]


def test_each_forward_asks_for_its_images_places(detector: Detector, pictures: list[Tensor]) -> None:
    asked = []
    states = states_for(detector)

    def modulation(places: Sequence[int]) -> Modulation:
        asked.append(list(places))
        return by_stream(detector, states, [0, 0, 0])(places)

    look(detector, pictures, modulation)
    assert asked == [[0, 2], [1]]


def test_the_backbone_shares_its_memory_and_freezes_nobody_else() -> None:
    detector = Detector(scene_detector.build())
    assert detector.network is not None
    assert all(parameter.requires_grad for parameter in detector.model.parameters())
    copy.deepcopy(detector.model)  # what fine-tunes a detector begins so
    x = torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        for parameter in detector.model.parameters():
            parameter.mul_(1.5)
        expected = detector.model.backbone(x)
        found: Any = detector.network(x).logits
    for name, level in expected.items():
        assert torch.equal(found[name], level)


def test_pixels_are_normalised_and_padded(detector: Detector) -> None:
    image = torch.full((3, 40, 33), 0.5)
    transform = detector.model.transform
    x = detector.pixels([image])
    assert x.shape == (1, 3, 64, 64)
    expected = (0.5 - torch.tensor(transform.image_mean)) / torch.tensor(transform.image_std)
    torch.testing.assert_close(x[0, :, :40, :33], expected.view(3, 1, 1).expand(3, 40, 33))
    assert x[0, :, 40:].count_nonzero() == x[0, :, :, 33:].count_nonzero() == 0


class Nothing(nn.Module):
    """Sees nothing, without a backbone."""

    def forward(self, images: list[Tensor], _targets: Any = None) -> list[dict[str, Tensor]]:
        none = torch.zeros(0)
        return [{"boxes": none.view(0, 4), "labels": none.to(torch.int64), "scores": none} for _ in images]


def test_a_detector_without_a_backbone_takes_no_modulation(detector: Detector) -> None:
    blind = Detector(Nothing())
    image = torch.zeros(3, 32, 32)
    assert blind.network is None
    assert len(look(blind, [image])[0][2]) == 0
    with pytest.raises(UnsupportedModel, match="no `backbone`"):
        blind.pixels([image])
    with pytest.raises(UnsupportedModel, match="no `backbone`"):
        look(blind, [image], by_stream(detector, states_for(detector), [0]))
