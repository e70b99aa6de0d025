"""EATA against the paper, told a second time and straight, and against numbers made by hand."""

import math
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
    EATAState,
    Groups,
    Network,
    Pipeline,
    Statistics,
    UnsupportedModel,
    anchors,
    tree,
)

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
    print(counts)
    assert counts[0][0] == counts[0][1] > 0  # no mean yet, so no second filter
    assert counts[4][1] == 0  # and no step
    assert sum(0 < selected < reliable for reliable, selected in counts) >= 5
    assert states.norm.optimizer.step.item() == sum(selected > 0 for _, selected in counts)
    moved = (states.norm.params[0] - pipeline.init().norm.params).abs().max()
    assert moved > 0.01
