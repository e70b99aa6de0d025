import torch

from loadtests import resnet20


def test_published_size_and_names():
    model = resnet20.build()
    assert sum(p.numel() for p in model.parameters()) == 269_722  # He et al., Table 6: 0.27 million
    names = set(model.state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer3.2.bn2.bias", "linear.bias"} <= names
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_shortcut_subsamples_and_pads_with_zeros():
    block = resnet20.Block(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.arange(32.0).view(1, 2, 4, 4)
    y = block(x)
    assert y[0, 0].tolist() == [[0, 0], [0, 0]]
    assert y[0, 1].tolist() == [[0, 2], [8, 10]]
    assert y[0, 2].tolist() == [[16, 18], [24, 26]]
    assert y[0, 3].tolist() == [[0, 0], [0, 0]]
