import argparse
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from adapters import Network
from loadtests import plots, runtime
from loadtests.errors import LoadTestError
from tta_serve.runtime import Eager

ROUNDS = [
    {"eager": 50.0, "compile": 100.0, "onnx": 125.0},
    {"eager": 40.0, "compile": 90.0, "onnx": 100.0},
    {"eager": 60.0, "compile": 90.0, "onnx": 120.0},
]
COMPILE_S = {"cold": 90.0, "warm": 6.0}


def tiny_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()


def test_figures():
    found = runtime.figures("resnet18", ROUNDS, COMPILE_S)
    assert found["images_per_s/compile/resnet18"] == 90.0
    assert (found["images_per_s_min/onnx/resnet18"], found["images_per_s_max/onnx/resnet18"]) == (100.0, 125.0)
    assert found["ratio/compile_over_eager/resnet18"] == 2.0  # of 2, 2.25 and 1.5, each within its round
    assert (found["ratio_min/compile_over_eager/resnet18"], found["ratio_max/compile_over_eager/resnet18"]) == (
        1.5,
        2.25,
    )
    assert found["ratio/compile_over_onnx/resnet18"] == pytest.approx(0.8)
    assert found["ratio/eager_over_onnx/resnet18"] == pytest.approx(0.4)
    assert (found["compile_s/cold/resnet18"], found["compile_s/warm/resnet18"]) == (90.0, 6.0)


def test_table_and_picture(tmp_path):
    out = io.StringIO()
    Console(file=out, width=120).print(runtime.table({"resnet18": ROUNDS}, {"resnet18": COMPILE_S}))
    for cell in ("compile ÷ onnx", "0.80 (0.75–0.90)", "2.00 (1.50–2.25)", "compiling, warm, s"):
        assert cell in out.getvalue()
    pytest.importorskip("matplotlib")
    plots.draw(tmp_path / "runtime.png", [runtime.panel({"resnet18": ROUNDS})])
    assert (tmp_path / "runtime.png").read_bytes().startswith(b"\x89PNG")


def test_an_interval_counts_the_images_of_whole_forwards():
    now, calls = [0.0], []

    def forward(name, seconds):
        calls.append(name)
        now[0] += seconds
        return torch.zeros(1)

    forwards = {"fast": lambda: forward("fast", 0.25), "slow": lambda: forward("slow", 2.0)}
    rounds = runtime.play(forwards, images=8, rounds=2, clock=lambda: now[0])
    assert rounds == [{"fast": 32.0, "slow": 4.0}] * 2
    assert calls == ["fast"] * 5 + ["slow"] * 4 + ["fast"] * 5  # one more than counts in each interval


def test_every_row_has_a_state_of_its_own():
    network = Network(tiny_model())
    states = runtime.own_states(network, 5)
    assert states.rows.tolist() == [0, 1, 2, 3, 4]
    for field in (states.scale, states.shift, states.mean, states.var):
        assert len(field.unique(dim=0)) == 5
    assert (states.var >= network.var).all()


def test_onnx_runtime_answers_as_the_frozen_model(tmp_path):
    x = torch.rand(3, 3, 4, 4)
    onnx = runtime.onnx_forward(tiny_model(), x, 1, tmp_path)
    with torch.no_grad():
        runtime.check_agreement("both", onnx(), tiny_model()(x))
        with pytest.raises(LoadTestError, match="both: answers differ by"):
            runtime.check_agreement("both", onnx() * 1.01, tiny_model()(x))
    with pytest.raises(LoadTestError, match="nan"):
        runtime.check_agreement("both", onnx() * torch.nan, torch.ones(3, 3))


def test_a_fallback_is_not_timed_as_if_it_were_compiled():
    network = Network(tiny_model())
    with pytest.raises(LoadTestError, match="not compiled"):
        runtime.variants(network, torch.rand(2, 3, 4, 4), Eager(network), lambda: torch.zeros(2, 3))


def test_arguments():
    assert runtime.parse_arguments(["--models", "resnet20,resnet18"]).models == ("resnet20", "resnet18")
    assert runtime.parse_arguments([]).models == tuple(runtime.MODELS)
    with pytest.raises(argparse.ArgumentTypeError, match="no model named alexnet; there are resnet20"):
        runtime.model_names("alexnet")
    for wrong in (["--rounds", "2"], ["--batch", "0"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            runtime.parse_arguments(wrong)
