"""What `build_service` refuses before a request is taken."""

import sys
import types
import warnings

import pytest
import torch
from torch import Tensor, nn

from tta_serve.config import LimitSettings, ModelSettings
from tta_serve.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, on import
    from tta_serve.replica import build_service


class TimeInBatch(nn.Module):
    """Normalises with a leading dimension that is not the batch: each image's rows are taken for images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.mean(dim=1).flatten(0, 1)  # [B · 8, 8]
        return self.head(self.norm(rows).unflatten(0, (-1, 8)).mean(dim=1))


def test_a_model_that_runs_frozen_and_cannot_adapt_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("models_of_a_user")
    module.build = TimeInBatch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "models_of_a_user", module)
    settings = ModelSettings.model_validate(
        {
            "name": "time",
            "source": {"python": "models_of_a_user:build"},
            "input": {"size": [8, 8]},
            "device": "cpu",
            "adapter": {"eata": {"anchor": "none"}},
        }
    )
    assert TimeInBatch()(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    with pytest.raises(
        ConfigError, match=r"models\.time: the model loads, but a trial of predicting and adapting fails: "
    ):
        build_service(settings, LimitSettings(), 1, "r")
