"""The translator: how it starts, what it takes, how large it is, and that folding changes nothing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.translator import SIZES, Translator, TranslatorConfig, folded, weights, with_channels

FUSIONS = ("multiply", "add", "none")


def translator(in_channels: int = 3, width: int = 4, depth: int = 2, fusion: Any = "multiply") -> Translator:
    config = TranslatorConfig(in_channels, width, depth, fusion)
    return Translator(config, torch.Generator().manual_seed(0)).eval()


def trained(in_channels: int = 3, width: int = 4, depth: int = 2, fusion: Any = "multiply") -> Translator:
    """One whose last layer looks at the image, and whose statistics are those of some images."""
    made = translator(in_channels, width, depth, fusion)
    nn.init.normal_(made.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made.train()(pictures(4, in_channels, 24, 24))
    return made.eval()


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("size", "grey", "colour"),
    [
        ("tiny", 109_651, 109_795),
        ("small", 437_027, 437_315),
        ("base", 1_765_667, 1_765_955),
        ("large", 6_622_502, 6_623_060),
    ],
)
def test_sizes(size: str, grey: int, colour: int) -> None:
    for channels, expected in ((1, grey), (3, colour)):
        made = Translator(TranslatorConfig(channels, *SIZES[size]))
        assert sum(each.numel() for each in made.parameters()) == expected


def test_every_size_is_tested() -> None:
    assert list(SIZES) == ["tiny", "small", "base", "large"]


def test_the_smallest_by_hand() -> None:
    """stem 9 + 2; down 18 + 4 and 36 + 4; narrow 18 + 2; refine 9 + 2; head 3 + 3."""
    made = translator(1, width=1, depth=1)
    assert sum(each.numel() for each in made.parameters()) == 11 + 22 + 40 + 20 + 11 + 6
    assert [each.numel() for each in weights(made)] == [9, 18, 36, 18, 9, 3, 3]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_multiply_starts_within_a_hundredth_of_the_identity(channels: int, training: bool, size: str) -> None:
    x = pictures(2, channels, 16, 16)
    x[0] = 1.0
    with torch.no_grad():
        out = translator(channels, *SIZES[size]).train(training)(x)
    # white loses 1 − σ(5) = 0.0066929, everything else less
    torch.testing.assert_close(out[0], torch.full((3, 16, 16), 0.9933071), atol=1e-6, rtol=0)
    assert (x - out).min() >= 0
    assert (x - out).max() < 0.0067


@pytest.mark.parametrize("channels", [1, 3])
def test_add_starts_as_the_identity_and_none_as_grey(channels: int) -> None:
    x = pictures(2, channels, 16, 16)
    with torch.no_grad():
        assert torch.equal(translator(channels, fusion="add")(x), x.expand(2, 3, 16, 16))
        assert torch.equal(translator(channels, fusion="none")(x), torch.full((2, 3, 16, 16), 0.5))


@pytest.mark.parametrize(
    ("fusion", "logit", "expected"),
    [
        ("multiply", math.log(3), [0.15, 0.6]),  # h = 3/4
        ("add", math.log(3), [0.7, 1.0]),  # + 1/2; 1.3 is clipped
        ("add", -math.log(3), [0.0, 0.3]),  # − 1/2; −0.3 is clipped
        ("none", math.log(3), [0.75, 0.75]),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_fusion_by_hand(fusion: str, logit: float, expected: list[float], channels: int) -> None:
    made = translator(channels, fusion=fusion)
    nn.init.constant_(made.head.bias, logit / 10)  # the last layer's gain is 10
    x = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, channels, 3, 5)
    with torch.no_grad():
        out = made(x)
    torch.testing.assert_close(out, torch.tensor(expected).view(2, 1, 1, 1).expand(2, 3, 3, 5))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (33, 47), (128, 128)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size(fusion: str, size: tuple[int, int], channels: int) -> None:
    x = pictures(2, channels, *size)
    before = x.clone()
    with torch.no_grad():
        out = trained(channels, fusion=fusion)(x)
    assert out.shape == (2, 3, *size)
    assert out.is_contiguous()
    assert bool(((out >= 0) & (out <= 1)).all())
    assert torch.equal(x, before)


def test_a_size_that_is_no_multiple_continues_its_last_row_and_column() -> None:
    made, x = trained(depth=3), pictures(1, 3, 33, 47)
    with torch.no_grad():
        expected = made(functional.pad(x, (0, 1, 0, 7), mode="replicate"))[..., :33, :47]
        torch.testing.assert_close(made(x), expected)
        assert (made(x) - x).abs().max() > 0.1  # it does look at the image


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_folded_answers_the_same(fusion: str, channels: int) -> None:
    made = trained(channels, fusion=fusion)
    before = {name: each.clone() for name, each in made.state_dict().items()}
    serving = folded(made.train())
    assert not any(isinstance(each, nn.BatchNorm2d) for each in serving.modules())
    assert not any(each.requires_grad for each in serving.parameters())
    x = pictures(3, channels, 21, 30)
    with torch.no_grad():
        torch.testing.assert_close(serving(x), made.eval()(x), atol=1e-5, rtol=0)
    for name, each in made.state_dict().items():
        assert torch.equal(each, before[name]), name
    assert all(each.requires_grad for each in made.parameters())


def test_training_leaves_the_saturated_start() -> None:
    """Inverted contrast, by multiplication: a dark square on bright ground shall be the bright one on dark ground."""
    made = translator(1, width=8).train()
    x = torch.full((2, 1, 16, 16), 0.8)
    x[..., 4:9, 6:12] = 0.4
    target = torch.where(x < 0.5, 0.35, 0.1).expand(2, 3, 16, 16)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (made(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 0.4
    assert losses[-1] < 0.02


def test_the_same_generator_draws_the_same_weights() -> None:
    first, second = weights(translator()), weights(translator())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = Translator(TranslatorConfig(width=4, depth=2), torch.Generator().manual_seed(1))
    assert not torch.equal(weights(other)[0], first[0])


def test_with_channels() -> None:
    colour = torch.tensor([0.0, 0.3, 0.9]).view(3, 1, 1).expand(2, 3, 1, 4)
    torch.testing.assert_close(with_channels(colour, 1), torch.full((2, 1, 1, 4), 0.4))
    grey = pictures(2, 1, 5, 4)
    assert torch.equal(with_channels(grey, 3), grey.repeat(1, 3, 1, 1))
    assert torch.equal(with_channels(grey[0], 3), grey[0].repeat(3, 1, 1))
    assert with_channels(grey, 1) is grey


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 2}, "1 or 3 channels, not 2"),
        ({"width": 0}, "at least 1, not 0 and 3"),
        ({"depth": 0}, "at least 1, not 8 and 0"),
        ({"fusion": "minus"}, "one of multiply, add, none, not 'minus'"),
    ],
)
def test_what_no_network_can_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TranslatorConfig(**settings)
