"""The features that a served head reads, in process: for what no server hosts.

The one place of this comparison that imports the server.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters import Network
from tta_serve import models, pipelines
from tta_serve.config import ModelSettings
from tta_serve.engine import to_unit

BATCH = 16  # images of one forward: larger ones are slower, see `incremental.MALLOC`


def load(entry: dict[str, Any]) -> Network:
    """The encoder of an entry of `models:` in a server's configuration, without what learns."""
    kept = {key: value for key, value in entry.items() if key in ("name", "source", "input")}
    settings = ModelSettings.model_validate({**kept, "adapter": "source"})
    return pipelines.build(settings, models.load(settings), torch.device("cpu")).network


@torch.no_grad()
def features(network: Network, images: NDArray[np.uint8]) -> Tensor:
    """What the last linear layer reads of images [N, 3, H, W]; float32 [N, F]."""
    found = []
    for batch in torch.split(torch.from_numpy(images), BATCH):
        read = network(to_unit(batch)).features
        assert read is not None  # the models here end in a linear layer
        found.append(read)
    return torch.cat(found)
