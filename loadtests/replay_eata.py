"""Whether `adapters.EATA` takes the same trajectory as the EATA authors' own code.

`reference_eata.npz` records that code on ResNet-20: the Fisher diagonal, the answers to `gaussian_noise` and then,
without reset, `contrast`, both in batches of 200, what its filters let through, and where its parameters ended. This
script plays the same batches through ours, in process and without a server, and prints the largest differences. Exit
code 1 where the logits differ by 1e-3 or more.

    python loadtests/replay_eata.py --data DIR [--json FILE]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from adapters import EATA, Batch, EATAConfig, EATAPrior, Groups, Guarded, Network, Pipeline, anchors, tree
from loadtests import cifar, report, resnet20
from loadtests.errors import run

BATCH = 200
LOGITS_MAX = 1e-3  # a difference of this much or more is another trajectory
RECORDED = ("gaussian_noise", "contrast")
CONFIG = EATAConfig(optimizer="adam", learning_rate=1e-3, anchor_weight=1.0, statistics="batch")

Reference = Mapping[str, NDArray[Any]]


class Comparison(NamedTuple):
    """Ours against the record. Differences are the largest absolute ones."""

    logits: float
    params: float
    mean_probs: float
    fisher: float
    batches: int
    batches_with_other_counts: int  # of rows after the first or the second filter
    errors: dict[str, tuple[float, float]]  # corruption → % (recorded, ours)

    @property
    def same(self) -> bool:
        return self.logits < LOGITS_MAX  # false for NaN


def replay(
    model: nn.Module,
    source: Sequence[Tensor],
    streams: Mapping[str, Sequence[Tensor]],
    labels: NDArray[np.int64],
    reference: Reference,
    config: EATAConfig = CONFIG,
) -> Comparison:
    """Play recorded batches through EATA.

    Args:
        model: maps [B, …] to logits [B, C]; it is frozen and its normalisation layers are replaced.
        source: batches for the Fisher diagonal.
        streams: batches of each corruption, in the order of the record; the state is kept from one to the next.
        labels: of every corruption's rows, int64 [N].
        reference: `<corruption>_logits` [N, C], `<corruption>_reliable` and `_selected` (one number a batch),
            `fisher/<parameter>` and `param/<parameter>` by the model's own names, `final_mean_probs` [C].
        config: EATA's, as recorded.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    network = Network(model)
    fisher = anchors.fisher_diagonal(network, source)
    classes = reference["final_mean_probs"].shape[0]
    pipeline = Pipeline(network, norm=Guarded(EATA(network, classes, EATAPrior(fisher), config)))
    states = tree.stack([pipeline.init()])
    differences, errors, batches, other = [0.0], {}, 0, 0
    for corruption, stream in streams.items():
        answers = []
        for number, x in enumerate(stream):
            rows, groups = torch.zeros(len(x), dtype=torch.int64), Groups.of((len(x),))
            answers.append(pipeline.predict(states, rows, groups, x).logits.numpy())
            states, told = pipeline.adapt(states, rows, Batch(x, groups, torch.ones(len(x))))
            recorded = tuple(int(reference[f"{corruption}_{count}"][number]) for count in ("reliable", "selected"))
            other += (int(told.reliable), int(told.selected)) != recorded
            batches += 1
        ours, theirs = np.concatenate(answers), reference[f"{corruption}_logits"]
        differences.append(_largest(ours, theirs))
        errors[corruption] = (_error(theirs, labels), _error(ours, labels))
    end = tree.row(states, 0).norm.inner
    return Comparison(
        logits=float(np.max(differences)),
        params=_largest(end.params.numpy(), _flat(reference, "param", layers)),
        mean_probs=_largest(end.mean_probs.numpy(), reference["final_mean_probs"]),
        fisher=_largest(fisher.numpy(), _flat(reference, "fisher", layers)),
        batches=batches,
        batches_with_other_counts=other,
        errors=errors,
    )


def _flat(reference: Reference, what: str, layers: Sequence[str]) -> NDArray[Any]:
    """[γ | β] of all layers, as a state lays them out."""
    return np.concatenate([reference[f"{what}/{name}.{part}"] for part in ("weight", "bias") for name in layers])


def _largest(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(np.abs(ours - theirs).max())


def _error(logits: NDArray[Any], labels: NDArray[np.int64]) -> float:
    return float((logits.argmax(axis=1) != labels).mean() * 100)


def replay_files(data: Path) -> Comparison:
    """`replay` on the CIFAR files."""
    model = resnet20.build()
    model.load_state_dict(load_file(cifar.existing(data, "resnet20.safetensors")))
    with np.load(cifar.existing(data, "reference_eata.npz")) as arrays:
        reference = dict(arrays)
    source = torch.split(normalised(cifar.images(data, "source")[: cifar.FISHER_IMAGES]), cifar.FISHER_BATCH)
    streams = {name: torch.split(normalised(cifar.images(data, name)), BATCH) for name in RECORDED}
    return replay(model, source, streams, cifar.labels(data), reference)


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """[N, 3, H, W] uint8 → (x / 255 − mean) / std, float32; a channels-last memory layout is kept."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cifar.MEAN, cifar.STD))
    return (torch.from_numpy(images).float() / 255 - mean) / std


def figures(found: Comparison) -> dict[str, float]:
    """The comparison in the names of the JSON form."""
    named = {f"difference/{what}": float(getattr(found, what)) for what in ("logits", "params", "mean_probs", "fisher")}
    named |= {"batches/all": found.batches, "batches/other_counts": found.batches_with_other_counts}
    for corruption, (theirs, ours) in found.errors.items():
        named |= {f"error/recorded/{corruption}": theirs, f"error/replayed/{corruption}": ours}
    return named


def table(found: Comparison) -> Table:
    rows = Table(title="EATA: the authors' code and ours on the same batches")
    rows.add_column("what")
    rows.add_column("value", justify="right")
    for what in ("logits", "params", "mean_probs", "fisher"):
        rows.add_row(f"largest difference, {what}", f"{getattr(found, what):.3g}")
    equal = found.batches - found.batches_with_other_counts
    rows.add_row("batches with equal reliable and selected counts", f"{equal} of {found.batches}")
    for corruption, (theirs, ours) in found.errors.items():
        rows.add_row(f"error on {corruption}, recorded → ours", f"{theirs:.2f} % → {ours:.2f} %")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the CIFAR files")
    report.add_arguments(parser, plot=False)
    args = parser.parse_args()
    report.check_outputs(args.json)
    torch.set_num_threads(1)  # the record was made so: sums are taken in the same order
    found = replay_files(args.data)
    Console().print(table(found))
    if args.json:
        report.write_json(args.json, "replay_eata", figures(found))
    if not found.same:
        print(f"the trajectories differ: logits by {found.logits:.3g}, allowed is less than {LOGITS_MAX:g}")
    return 0 if found.same else 1


if __name__ == "__main__":
    run(main)
