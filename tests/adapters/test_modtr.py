"""ModTr: rows are their stream's own, feedback is learned from, and nothing bad gets in."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import (
    Batch,
    Boxes,
    Groups,
    GuardConfig,
    ModTr,
    ModTrConfig,
    ModTrState,
    SharedConfig,
    SharedWeights,
    Translator,
    TranslatorConfig,
    Trip,
    UnsupportedModel,
    folded,
    tree,
)

Loss = Callable[[Sequence[Tensor], Sequence[Boxes]], Tensor]


def trained(in_channels: int = 3, fusion: Any = "multiply") -> Translator:
    """A translator whose last layer looks at the image."""
    config = TranslatorConfig(in_channels, width=4, depth=2, fusion=fusion)
    made = Translator(config, torch.Generator().manual_seed(0))
    nn.init.normal_(made.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return made.eval()


def brightness(images: Sequence[Tensor], targets: Sequence[Boxes]) -> Tensor:
    """A detector's loss in small: an image with n boxes shall be of brightness n/10."""
    each = [(image.mean() - len(known.labels) / 10).square() for image, known in zip(images, targets, strict=True)]
    return torch.stack(each).mean()


def boxes(*counts: int) -> tuple[Boxes, ...]:
    """So many boxes in each image."""
    box = torch.tensor([[1.0, 1.0, 4.0, 5.0]])
    return tuple(Boxes(box.repeat(n, 1), torch.ones(n, dtype=torch.int64)) for n in counts)


def pictures(rows: int, channels: int = 3) -> Tensor:
    return torch.rand(rows, channels, 9, 10, generator=torch.Generator().manual_seed(2))


def batch(x: Tensor, known: tuple[Boxes, ...] | None, weights: Sequence[float] | None = None) -> Batch:
    weight = torch.ones(len(x)) if weights is None else torch.tensor(weights)
    return Batch(x, Groups.of((1,) * len(x)), weight, boxes=known)


def different_states(adapter: ModTr, streams: int) -> ModTrState:
    """Streams that have learned different things."""
    states = tree.stack([adapter.init()] * streams)
    drawn = torch.Generator().manual_seed(3)
    params = adapter.params(states)
    return adapter.with_params(states, params + 0.2 * torch.randn(params.shape, generator=drawn))


def poisoned(images: Sequence[Tensor], targets: Sequence[Boxes]) -> Tensor:
    """NaN for images without boxes, infinite gradients for those with ten."""
    counts = {len(known.labels) for known in targets}
    loss = brightness(images, targets)
    if 0 in counts:
        return loss * float("nan")
    return (images[0] * 0).sum().sqrt() if 10 in counts else loss


def test_a_new_stream_is_the_translator() -> None:
    translator, x = trained(), pictures(3)
    adapter = ModTr(translator, brightness)
    out = adapter.transform(tree.stack([adapter.init()]), torch.zeros(3, dtype=torch.int64), x)
    with torch.no_grad():
        torch.testing.assert_close(out, translator(x), atol=1e-6, rtol=0)
    assert not out.requires_grad


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fusion", ["multiply", "add", "none"])
def test_each_row_is_translated_as_its_stream_alone(channels: int, fusion: str) -> None:
    adapter = ModTr(trained(channels, fusion), brightness)
    states, x, rows = different_states(adapter, 3), pictures(5, channels), torch.tensor([2, 0, 1, 2, 0])
    mixed = adapter.transform(states, rows, x)
    assert mixed.shape == (5, 3, 9, 10)
    zero = torch.zeros(1, dtype=torch.int64)
    for i, row in enumerate(rows.tolist()):
        alone = adapter.transform(tree.stack([tree.row(states, row)]), zero, x[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=1e-5, rtol=0)
    swapped = adapter.transform(states, rows.flip(0), x)
    assert (swapped - mixed).abs().max() > 0.01  # streams do differ


def test_feedback_lowers_the_loss_of_each_stream() -> None:
    adapter = ModTr(trained(), brightness, ModTrConfig(learning_rate=5e-3))
    states, x, rows = tree.stack([adapter.init()] * 3), pictures(4), torch.tensor([0, 0, 2, 2])
    known = boxes(1, 1, 4, 4)  # stream 0 shall be dark, stream 2 as bright as it is, nearly

    def losses() -> list[float]:
        out = adapter.transform(states, rows, x)
        return [brightness(out[i : i + 2], known[i : i + 2]).item() for i in (0, 2)]

    before, idle = losses(), tree.row(states, 1)
    for _ in range(30):
        states, report = adapter.adapt(states, rows, batch(x, known))
        assert report.applied.tolist() == [True, False, True]
    after = losses()
    assert after[0] < 0.5 * before[0]
    assert after[1] < before[1]
    assert states.steps.tolist() == [30, 0, 30]
    for (name, now), (_, then) in zip(tree.leaves(tree.row(states, 1)), tree.leaves(idle), strict=True):
        assert torch.equal(now, then), name


def test_a_first_step_is_adams_on_the_paper_s_tenth() -> None:
    """Adam's first step is its rate along the sign of the gradient, and the moments are the gradient's share."""
    adapter, x = ModTr(trained(), brightness), pictures(2)
    states, rows = tree.stack([adapter.init()]), torch.zeros(2, dtype=torch.int64)
    params = adapter.params(states).requires_grad_()
    scale, shift = params.chunk(2, dim=1)
    out = adapter.transform(states._replace(scale=scale, shift=shift), rows, x)
    (grad,) = torch.autograd.grad(0.1 * brightness(list(out), boxes(0, 3)), params)
    new, _ = adapter.adapt(states, rows, batch(x, boxes(0, 3)))
    torch.testing.assert_close(new.optimizer.first, 0.1 * grad, atol=1e-9, rtol=1e-4)
    large = grad.abs() > 1e-5
    assert large.sum() > 20
    moved = adapter.params(new) - adapter.params(states)
    torch.testing.assert_close(moved[large], -1e-3 * grad.sign()[large], atol=0, rtol=2e-3)


def test_streams_do_not_touch_each_other() -> None:
    adapter = ModTr(trained(), brightness)
    states, x, rows = different_states(adapter, 3), pictures(5), torch.tensor([2, 0, 2, 0, 2])
    known = boxes(1, 2, 3, 4, 5)
    mixed, report = adapter.adapt(states, rows, batch(x, known))
    assert report.selected.tolist() == [2, 0, 3]
    for stream in (0, 2):
        own = (rows == stream).nonzero().flatten().tolist()
        alone, _ = adapter.adapt(
            tree.stack([tree.row(states, stream)]),
            torch.zeros(len(own), dtype=torch.int64),
            batch(x[own], tuple(known[i] for i in own)),
        )
        torch.testing.assert_close(adapter.params(mixed)[stream], adapter.params(alone)[0], atol=1e-5, rtol=0)


def test_the_arguments_are_left_alone() -> None:
    translator, x = trained(), pictures(2)
    before = copy.deepcopy(translator.state_dict())
    adapter = ModTr(translator, brightness)
    states = different_states(adapter, 2)
    kept = tree.apply(torch.clone, states)
    adapter.adapt(states, torch.tensor([0, 1]), batch(x, boxes(1, 2)))
    for (name, now), (_, then) in zip(tree.leaves(states), tree.leaves(kept), strict=True):
        assert torch.equal(now, then), name
    assert all(torch.equal(each, before[name]) for name, each in translator.state_dict().items())
    assert all(each.requires_grad for each in translator.parameters())


def test_an_image_with_nothing_in_it_teaches_too() -> None:
    adapter, x = ModTr(trained(), brightness), pictures(1)
    states = tree.stack([adapter.init()])
    assert boxes(0)[0].boxes.shape == (0, 4)
    new, report = adapter.adapt(states, torch.tensor([0]), batch(x, boxes(0)))
    assert report.applied.tolist() == [True]
    out = [adapter.transform(each, torch.tensor([0]), x).mean() for each in (states, new)]
    assert out[1] < out[0]  # none: black


@pytest.mark.parametrize(("known", "weights", "seen"), [(None, [1.0, 1.0], 2), (boxes(1, 2), [0.0, 0.0], 0)], ids=str)
def test_without_boxes_or_weight_nothing_is_learned(known: Any, weights: list[float], seen: int) -> None:
    adapter, x = ModTr(trained(), brightness), pictures(2)
    states = different_states(adapter, 2)
    new, report = adapter.adapt(states, torch.tensor([1, 1]), batch(x, known, weights))
    assert new is states
    assert report.seen.tolist() == [0, seen]
    for field in (report.reliable, report.selected, report.applied, report.refused):
        assert not field.any()
    assert report.trips.tolist() == [0, 0]
    assert report.mean_probs.shape == (2, 0)


def test_rows_of_weight_zero_are_as_absent() -> None:
    adapter, x = ModTr(trained(), brightness), pictures(3)
    states = different_states(adapter, 1)
    rows = torch.zeros(3, dtype=torch.int64)
    new, report = adapter.adapt(states, rows, batch(x, boxes(1, 2, 3), [1.0, 0.0, 1.0]))
    assert report.seen.tolist() == report.reliable.tolist() == report.selected.tolist() == [2]
    expected, _ = adapter.adapt(states, rows[:2], batch(x[[0, 2]], boxes(1, 3)))
    torch.testing.assert_close(adapter.params(new), adapter.params(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [0, 10], ids=["loss", "gradient"])
def test_what_is_not_finite_is_refused(bad: int) -> None:
    adapter, x = ModTr(trained(), poisoned), pictures(3)
    states, rows = different_states(adapter, 3), torch.tensor([0, 1, 0])
    new, report = adapter.adapt(states, rows, batch(x, boxes(2, bad, 3)))
    assert report.refused.tolist() == [False, True, False]
    assert report.applied.tolist() == [True, False, False]
    assert report.trips.tolist() == [0, int(Trip.NON_FINITE), 0]
    assert report.reliable.tolist() == [2, 1, 0]
    assert report.selected.tolist() == [2, 0, 0]
    for (name, now), (_, then) in zip(tree.leaves(tree.row(new, 1)), tree.leaves(tree.row(states, 1)), strict=True):
        assert torch.equal(now, then), name
    alone, _ = adapter.adapt(states, rows[[0, 2]], batch(x[[0, 2]], boxes(2, 3)))
    torch.testing.assert_close(adapter.params(new)[0], adapter.params(alone)[0], atol=1e-5, rtol=0)
    assert bool(adapter.params(new).isfinite().all())


def test_an_image_of_nan_is_refused() -> None:
    adapter, x = ModTr(trained(), brightness), pictures(2)
    x[1] = float("nan")
    new, report = adapter.adapt(different_states(adapter, 2), torch.tensor([0, 1]), batch(x, boxes(1, 1)))
    assert report.refused.tolist() == [False, True]
    assert report.applied.tolist() == [True, False]
    assert bool(adapter.params(new).isfinite().all())


def test_steps_and_displacement_are_capped() -> None:
    limits = GuardConfig(step_rms_max=0.01, step_trip_factor=5.0, displacement_rms_max=0.025)
    adapter = ModTr(trained(), brightness, ModTrConfig(learning_rate=1.0, limits=limits))
    states, rows, x = tree.stack([adapter.init()]), torch.tensor([0]), pictures(1)
    found = []
    for _ in range(4):
        states, report = adapter.adapt(states, rows, batch(x, boxes(1)))
        away = (adapter.params(states) - adapter.source_params).square().mean().sqrt().item()
        found.append((round(away, 4), report.trips.item()))
    assert found[0] == (0.01, int(Trip.STEP_NORM))
    assert found[3][0] == 0.025
    assert found[3][1] & Trip.DISPLACEMENT
    assert states.steps.item() == 4  # a cap shortens a step, and does not refuse it


def test_a_folded_translator_has_nothing_to_adapt() -> None:
    made = folded(trained())
    assert isinstance(made, Translator)
    with pytest.raises(UnsupportedModel, match="no norm layer left"):
        ModTr(made, brightness)


def test_a_state_is_kilobytes() -> None:
    adapter = ModTr(Translator(TranslatorConfig(1, width=8, depth=3)), brightness)
    assert adapter.network.channels == 8 + 2 * (16 + 32 + 64) + (32 + 16 + 8) + (32 + 16 + 8)
    assert tree.nbytes(adapter.init()) == 4 * 6 * 344 + 2 * 8


# The shared half.


@pytest.mark.parametrize(
    "start", [trained, lambda: Translator(TranslatorConfig(width=4, depth=2), torch.Generator().manual_seed(2))]
)
def test_teaching_lowers_the_loss_and_leaves_everything_alone(start: Callable[[], Translator]) -> None:
    translator, x, known = start(), pictures(3), boxes(1, 2, 1)
    before = copy.deepcopy(translator.state_dict())
    shared = SharedWeights(translator, brightness, SharedConfig(learning_rate=1e-3))
    state = first = shared.init()
    kept, old = tree.apply(torch.clone, first), shared.translator(first)
    losses = []
    for _ in range(25):
        state, taught = shared.teach(state, x, known)
        assert bool(taught.applied)
        assert taught.trips.item() == 0
        losses.append(taught.loss.item())
    with torch.no_grad():
        made = shared.translator(state)
        assert 0.1 * brightness(list(made(x)), known).item() < 0.5 * losses[0]
        assert losses[0] == pytest.approx(0.1 * brightness(list(old(x)), known).item(), rel=1e-5)
    assert state.steps.item() == 25
    for (name, now), (_, then) in zip(tree.leaves(first), tree.leaves(kept), strict=True):
        assert torch.equal(now, then), name
    assert all(torch.equal(each, before[name]) for name, each in translator.state_dict().items())
    assert all(torch.equal(each, before[name]) for name, each in old.state_dict().items())
    norms = [name for name in before if made.state_dict()[name].equal(before[name])]
    assert all(".1." in name for name in norms)  # of a block, only the norm layer keeps its tensors
    assert len(norms) == 5 * 9
    assert not any(each.requires_grad for each in made.parameters())


def test_a_taught_translator_takes_the_states_of_streams() -> None:
    shared = SharedWeights(trained(), brightness)
    state, _ = shared.teach(shared.init(), pictures(2), boxes(1, 1))
    adapter = ModTr(trained(), brightness)
    states = different_states(adapter, 2)
    swapped = ModTr(shared.translator(state), brightness)
    assert torch.equal(swapped.source_params, adapter.source_params)
    rows, x = torch.tensor([0, 1]), pictures(2)
    difference = swapped.transform(states, rows, x) - adapter.transform(states, rows, x)
    assert 0 < difference.abs().max() < 0.05  # another translator, by one step


def test_teaching_refuses_what_is_not_finite() -> None:
    shared = SharedWeights(trained(), poisoned)
    state = shared.init()
    for bad in (0, 10):
        new, taught = shared.teach(state, pictures(1), boxes(bad))
        assert bool(taught.refused)
        assert not taught.applied
        assert taught.trips.item() == Trip.NON_FINITE
        for (name, now), (_, then) in zip(tree.leaves(new), tree.leaves(state), strict=True):
            assert torch.equal(now, then), name


def test_teaching_is_capped() -> None:
    config = SharedConfig(learning_rate=1.0, step_rms_max=0.01, displacement_share=0.1)
    shared = SharedWeights(trained(), brightness, config)
    size = shared.source_weights.square().mean().sqrt().item()
    state, trips = shared.init(), []
    for _ in range(8):
        state, taught = shared.teach(state, pictures(1), boxes(2))
        trips.append(taught.trips.item())
    assert trips[0] & Trip.STEP_NORM
    assert trips[-1] & Trip.DISPLACEMENT
    away = (state.weights - shared.source_weights).square().mean().sqrt().item()
    assert away == pytest.approx(0.1 * size, rel=1e-4)


def test_weights_decay_toward_the_source() -> None:
    """Where the loss asks for nothing, a step is the pull alone: half of the way, at a rate of 0.5 and a decay of 1."""
    config = SharedConfig(learning_rate=0.5, weight_decay=1.0, step_rms_max=1.0, displacement_share=10.0)
    shared = SharedWeights(trained(), lambda images, _: 0 * images[0].sum(), config)
    start = shared.init()
    state, _ = shared.teach(start._replace(weights=start.weights + 0.02), pictures(1), boxes(0))
    torch.testing.assert_close(state.weights, start.weights + 0.01, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rows", "known", "message"), [(0, (), "not 0 for 0"), (2, boxes(1), "not 1 for 2")])
def test_teaching_wants_boxes_for_each_image(rows: int, known: tuple[Boxes, ...], message: str) -> None:
    shared = SharedWeights(trained(), brightness)
    with pytest.raises(ValueError, match=message):
        shared.teach(shared.init(), pictures(2)[:rows], known)
