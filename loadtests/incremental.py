"""Classes that a model was never trained for, learned from labels over HTTP: accuracy, order, cost and forgetting.

The ten classes of CIFAR arrive two at a time through feedback, each image once: it is predicted, and then labelled by
the prediction's id. The encoder is EfficientNet-Lite0, trained on ImageNet and frozen; keys come from images without
labels. For each head of the server, and beside them for a linear layer trained by SGD (with the best rate for this
stream, and 1e-3) and for the ceiling, an offline linear layer on all images:

- `accuracy` in the end on held-out images; `ratio` to the ceiling's; `drop`: of each class from its best, the mean;
  `order_gap`: accuracy with all images shuffled minus accuracy in class order; `prequential`: right before it was told
- the same under `…/rare` with one class 20 times rarer, and that class's `recall`
- `next_request`: the share of single labels that the very next request was answered with; `teach_ms`: the server's time
  for one; `one_label_ms`: the same in process, without log and server, at 256 codebooks of 1,024 keys
- `forget_…`: one class forgotten: its recall, what changed for the others, and whether the server found the state
  equal to one that never saw it

    python loadtests/incremental.py --data DIR [--heads counts,ridge] [--json FILE] [--plot FILE]
    python loadtests/incremental.py --data DIR --url http://127.0.0.1:8000   # has a model for each head, named as it is
    python loadtests/incremental.py --quick                                  # digits: a trial in a minute

Without --url it starts its own server with a model for each head. The models of another server must be as those that
`incremental_server.py` describes; their streams are emptied afterwards. All of it takes 50 minutes on two cores.
"""

import argparse
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import incremental_baselines as baselines
from loadtests import incremental_cost, incremental_effects, incremental_encoder, report
from loadtests.errors import LoadTestError, RequestFailed, run
from loadtests.incremental_client import LabelClient
from loadtests.incremental_figures import (
    accuracy_table,
    ceiling_figures,
    figures_of,
    plot,
    rare_table,
    ratios,
    wanted_table,
)
from loadtests.incremental_images import Material, of_cifar, of_digits
from loadtests.incremental_orders import Orders, Which, compare, orders_of
from loadtests.incremental_play import Served
from loadtests.incremental_server import own_models, server

HEADS = ("counts", "ridge", "class_means", "gradient")
PER_CLASS, QUICK_PER_CLASS = 200, 20
SINGLE_LABELS, QUICK_SINGLE_LABELS = 50, 5
FORGOTTEN = 0  # the class
SEED = 0

Told = Callable[[str], object]


def in_process(entry: dict[str, Any], material: Material, orders: Orders, rare: int, told: Told) -> dict[str, float]:
    """The figures of what no server hosts, from the features of the same encoder.

    Args:
        entry: of `models:`, whose encoder it is.
        material: the images.
        orders: in which they arrive.
        rare: number of the rare class.
        told: gets a line for each method.
    """
    network = incremental_encoder.load(entry)
    parts = (material.train, material.rest, material.test)
    train, rest, test = (incremental_encoder.features(network, part.images) for part in parts)
    seen = baselines.normalised(train.numpy(), rest.numpy(), test.numpy())
    best = {rarely: baselines.best_rate(seen, material, orders[rarely]) for rarely in ("in_order", "rare_in_order")}
    rates: Mapping[str, Callable[[Which], float]] = {
        "sgd_best": lambda which: best["rare_in_order" if which.startswith("rare") else "in_order"],
        "sgd_1e-3": lambda _: baselines.USUAL_RATE,
    }
    found = {"rate/sgd_best": best["in_order"], "rate/rare/sgd_best": best["rare_in_order"]}
    for name, rate_of in rates.items():
        compared = compare(lambda which: baselines.sgd(seen, material, rate_of(which)), orders, material)  # noqa: B023
        found |= figures_of(name, compared, material.test.labels, rare)
        told(_line(name, found))
    balanced, rarer = (
        baselines.ceiling(seen, material, np.sort(np.concatenate(tasks)))
        for tasks in (orders["in_order"], orders["rare_in_order"])
    )
    found |= ceiling_figures(balanced, rarer, material.test.labels, rare)
    told(f"ceiling: {found['accuracy/ceiling']:.2f} %")
    labels, more_labels = torch.from_numpy(material.train.labels), torch.from_numpy(material.rest.labels)
    return found | incremental_cost.one_label(train, labels, rest[:200], more_labels[:200])


def over_http(
    client: LabelClient, material: Material, orders: Orders, rare: int, single: int, *, clear: bool, told: Told
) -> dict[str, float]:
    """The figures of one head of a server.

    Args:
        client: of its model, whose name is the head's.
        material: the images.
        orders: in which they arrive; each has a stream of its own.
        rare: number of the rare class.
        single: labels that are timed one by one.
        clear: whether all labels are forgotten in the end.
        told: gets lines.
    """
    name, began = client.model, f"incremental-{secrets.token_hex(4)}"
    learners: dict[Which, Served] = {which: Served(client, material, f"{began}-{which}") for which in orders}
    compared = compare(learners.__getitem__, orders, material)
    found = figures_of(name, compared, material.test.labels, rare)
    told(_line(name, found))
    full = learners["in_order"]
    effects = incremental_effects.single_labels(full, single)
    effects |= incremental_effects.forgotten_class(full, FORGOTTEN, compared["in_order"].answers)
    told(f"{name}: {effects['teach_ms']:.1f} ms a label; {effects['forget_removed']:.0f} labels forgotten")
    if clear:
        for learner in learners.values():
            learner.clear()
    return found | {f"{what}/{name}": value for what, value in effects.items()}


def _line(name: str, figures: Mapping[str, float]) -> str:
    shown = ("accuracy", "drop", "order_gap")
    told = ", ".join(f"{what.replace('_', ' ')} {figures[f'{what}/{name}']:.2f}" for what in shown)
    return f"{name}: {told}"


def present(client: LabelClient, side: int) -> LabelClient:
    """The client, if its model is there and as it ought to be.

    Raises:
        LoadTestError: it is not.
    """
    if not client.ready():
        raise LoadTestError(f"the server has no model {client.model!r} that is ready; see --heads")
    if (there := client.side()) != side:
        raise LoadTestError(
            f"{client.model!r} reads images of {there} pixels, not of {side}; see incremental_server.py"
        )
    return client


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; without it the script starts its own")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the CIFAR files")
    parser.add_argument("--heads", type=_heads, default=HEADS, help=f"some, with commas (default: {','.join(HEADS)})")
    parser.add_argument("--quick", action="store_true", help="a few digits and the built-in model instead: a trial")
    parser.add_argument("--per-class", type=int, help=f"images to teach (default: {PER_CLASS})")
    parser.add_argument("--rare", type=int, default=3, help="number of the rare class (default: 3, cat)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the orders (default: {SEED})")
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.quick == (args.data is not None):
        parser.error("give --data, or --quick")
    if args.per_class is None:
        args.per_class = QUICK_PER_CLASS if args.quick else PER_CLASS
    if args.per_class < 1:
        parser.error(f"--per-class must be 1 or more, not {args.per_class}")
    if not 0 <= args.rare <= 9:
        parser.error(f"--rare must be 0 … 9, not {args.rare}")
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, not {args.seed}")
    return args


def _heads(text: str) -> tuple[str, ...]:
    """Some of the heads, in their known order."""
    names = [name.strip() for name in text.split(",")]
    if unknown := set(names) - set(HEADS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(HEADS)}")
    return tuple(head for head in HEADS if head in names)


def main() -> int:
    args = parse_arguments()
    report.check_outputs(args.json, args.plot)
    console = Console()
    material = of_digits(args.per_class) if args.quick else of_cifar(args.data, args.per_class)
    orders = orders_of(material.train.labels, args.rare, args.seed)

    def models(prior: Path) -> list[dict[str, Any]]:
        return own_models(args.heads, material, None if args.quick else prior)

    figures: dict[str, float] = {"labels": len(material.train.labels), "seed": args.seed}
    encoder = models(Path("unlabelled.npz"))[0]
    figures |= in_process(encoder, material, orders, args.rare, console.print)  # first: nothing else runs yet
    single = QUICK_SINGLE_LABELS if args.quick else SINGLE_LABELS
    failed = False
    with ExitStack() as stack:
        url = args.url or stack.enter_context(server(models, material))
        clients = [present(stack.enter_context(LabelClient(url, head)), material.side) for head in args.heads]
        for client in clients:
            try:
                figures |= over_http(
                    client, material, orders, args.rare, single, clear=args.url is not None, told=console.print
                )
            except RequestFailed as error:  # minutes of the others' figures are worth keeping
                print(f"failed: {client.model}: {error}", file=sys.stderr)
                failed = True
    figures |= ratios(figures)
    for table in (accuracy_table, rare_table, wanted_table):
        console.print(table(figures))
    console.print(report.machine_line(), soft_wrap=True)
    if args.json:
        report.write_json(args.json, "incremental", figures)
    if args.plot:
        plot(args.plot, figures, len(orders["in_order"]))
    return int(failed)


if __name__ == "__main__":
    run(main)
