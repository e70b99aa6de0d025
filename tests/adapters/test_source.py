from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adapters import AdapterError, Batch, Groups, Network, Pipeline, Source, tree

Build = Callable[..., nn.Module]
Images = Callable[..., Tensor]
ROWS, GROUPS = torch.tensor([2, 2, 2, 0, 0]), Groups.of((3, 2))


@pytest.mark.parametrize("kind", ["batch_norm_2d", "batch_norm_1d", "group_norm", "layer_norm"])
def test_answers_are_the_frozen_models(kind: str, build: Build, images: Images) -> None:
    x = images(5)
    expected = build(kind).eval()(x).detach()
    network = Network(build(kind))
    source = Source(network)
    pipeline = Pipeline(network, norm=source)
    answer = pipeline.predict(pipeline.init(), ROWS, GROUPS, x)
    torch.testing.assert_close(answer.logits, expected, atol=1e-6, rtol=0)


def test_a_pipeline_without_adapters_is_the_frozen_model_too(build: Build, images: Images) -> None:
    pipeline = Pipeline(Network(build("batch_norm_2d")))
    x = images(5)
    answer = pipeline.predict(pipeline.init(), ROWS, GROUPS, x).logits
    assert torch.equal(answer, build("batch_norm_2d").eval()(x))
    assert list(tree.leaves(pipeline.init())) == []


def test_nothing_is_learned_and_nothing_is_kept(build: Build, images: Images) -> None:
    network = Network(build("batch_norm_2d"))
    pipeline = Pipeline(network, norm=Source(network))
    states, report = pipeline.adapt(pipeline.init(), ROWS, Batch(images(5), GROUPS, torch.ones(5)))
    assert states == pipeline.init()
    assert tree.nbytes(states) == 0
    assert tree.encode(states) == {}
    assert report.applied.tolist() == [False, False, False]
    assert report.seen.tolist() == [0, 0, 0]


def test_a_model_without_normalisation_layers_is_welcome() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    network = Network(model)
    pipeline = Pipeline(network, norm=Source(network))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    answer = pipeline.predict(pipeline.init(), torch.tensor([0, 0]), Groups.of((2,)), x)
    assert torch.equal(answer.logits, model(x))
    assert network.channels == 0


def test_a_norm_adapter_cannot_stand_elsewhere(build: Build) -> None:
    network = Network(build("batch_norm_2d"))
    with pytest.raises(AdapterError, match="site 'norm' cannot stand at 'head'"):
        Pipeline(network, head=Source(network))  # type: ignore[arg-type]
