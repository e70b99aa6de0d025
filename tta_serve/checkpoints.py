"""Where a training is kept, so that it goes on after a kill as if it had never stopped."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tta_serve.errors import ConfigError
from tta_serve.training import Epoch

CHECKPOINT_FORMAT = "tta-serve-training"


class Saved(NamedTuple):
    """All that a training needs to go on as if it had never stopped."""

    history: tuple[Epoch, ...]  # of the epochs that are over
    losses: tuple[float, ...]  # of the steps of the one that is not
    weights: dict[str, Tensor]  # parameters and buffers
    best: dict[str, Tensor]  # the same, as they were in the best epoch
    moments: dict[str, Tensor]  # AdamW's of each parameter, by "<number>.<name>"; none before the first step


def write_checkpoint(path: Path, saved: Saved, identity: Mapping[str, Any]) -> None:
    """Replace a checkpoint: who reads sees the whole old one or the whole new one.

    Raises:
        ConfigError: it cannot be written.
    """
    groups = {"weights": saved.weights, "best": saved.best, "moments": saved.moments}
    tensors = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    tensors |= {f"best/{name}": tensor.clone() for name, tensor in saved.best.items()}  # may be `weights` themselves
    place = {"history": saved.history, "losses": saved.losses}
    header = {"format": CHECKPOINT_FORMAT, "identity": json.dumps(identity), "place": json.dumps(place)}
    replace_file(path, safetensors.torch.save(tensors, header))


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> Saved | None:
    """What was saved there; None where nothing was.

    Raises:
        ConfigError: it is of another training, or no checkpoint at all.
    """
    remedy = "give --restart to throw it away, or another --out"
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        if header.get("format") != CHECKPOINT_FORMAT:
            raise ValueError("its header does not say so")
        of, place = json.loads(header["identity"]), json.loads(header["place"])
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no checkpoint of a training ({error}); {remedy}") from None
    wanted = json.loads(json.dumps(identity))
    if of != wanted:
        other = [
            f"{name} {of.get(name)!r} (now {wanted.get(name)!r})"
            for name in sorted(of.keys() | wanted.keys())
            if of.get(name) != wanted.get(name)
        ]
        raise ConfigError(f"{path} is the checkpoint of another training: {', '.join(other)}; {remedy}")
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "moments": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    return Saved(tuple(Epoch(*line) for line in place["history"]), tuple(place["losses"]), **groups)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error}") from None


def copied(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as they are now, on the host."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers, by "<number of the parameter>.<name>"."""
    states = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, state in states.items() for name, tensor in state.items()}


def load_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Give an optimizer back what `moments_of` took."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        number, _, name = key.partition(".")
        states.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
