"""The figures of `modality.py`: their names, what they ought to be, tables and pictures."""

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from loadtests import plots
from loadtests.modality_client import Detected
from loadtests.modality_scenes import AP

# name in the JSON form → for people
WAYS = {
    "rgb/frozen": "RGB",
    "ir/zero_shot": "IR, zero-shot",
    "ir/equalised": "IR, histogram equalised",
    "ir/modtr": "IR, translated",
    "ir/fine_tuned": "IR, fine-tuned detector",
    "rgb/fine_tuned": "RGB, fine-tuned detector",
}
MODTR, FINE_TUNED = "ap50/ir/modtr", "ap50/ir/fine_tuned"
FINE_TUNED_SHARE = 0.9  # of the fine-tuned detector's AP50 that the translator has to reach

# the least that each has to be
WANTED = {
    "ratio/modtr_over_finetuned": FINE_TUNED_SHARE,
    "rgb_identical/plain": 1.0,
    "rgb_identical/after_feedback": 1.0,
    "router_right/rgb": 0.99,
    "router_right/ir": 0.99,
    "router_right/photographs": 0.99,
    "router_right/cifar": 0.99,
    "ratio/mixed_over_rgb_throughput": 0.8,
    "ratio/mixed_routed_over_rgb_routed_throughput": 0.8,
}


def precision_figures(precisions: Mapping[str, AP]) -> dict[str, float]:
    """AP50 and AP of each way, and how much of the fine-tuned detector's AP50 the translator reaches."""
    found = {f"ap50/{way}": each.ap50 for way, each in precisions.items()}
    found |= {f"ap/{way}": each.ap for way, each in precisions.items()}
    if MODTR in found and FINE_TUNED in found:
        best = found[FINE_TUNED]
        found["ratio/modtr_over_finetuned"] = found[MODTR] / best if best else math.nan
    return found


def share_same(one: Sequence[Detected], other: Sequence[Detected]) -> float:
    """The share of images for which two passes gave the same bits."""
    return sum(a.same_bits(b) for a, b in zip(one, other, strict=True)) / len(one)


def share_of(modality: str, found: Sequence[Detected]) -> float:
    """The share of images that were taken for this modality's."""
    return sum(each.modality == modality for each in found) / len(found)


def precision_table(figures: Mapping[str, float]) -> Table:
    """A row for each way that was measured."""
    caption = f"{figures['scenes']:.0f} held-out scenes of seed {figures['seed']:.0f}"
    rows = Table(title="COCO's average precision, over HTTP", caption=caption)
    rows.add_column("shown")
    for name in ("AP50", "AP"):
        rows.add_column(name, justify="right")
    for way, told in WAYS.items():
        if f"ap50/{way}" in figures:
            rows.add_row(told, f"{figures[f'ap50/{way}']:.3f}", f"{figures[f'ap/{way}']:.3f}")
    return rows


def wanted_table(figures: Mapping[str, float]) -> Table:
    """What was measured of that which has to reach something; what does not is in red."""
    rows = Table(title="Measured and wanted", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    rows.add_column("figure", no_wrap=True)
    for name in ("measured", "range", "at least"):
        rows.add_column(name, justify="right")
    for name, least in WANTED.items():
        if name in figures:
            what, _, which = name.partition("/")
            ends = [figures.get(f"{what}_{end}/{which}") for end in ("min", "max")]
            told = "" if None in ends else "–".join(f"{end:.3f}" for end in ends)
            # not rounded up to what was wanted
            measured = math.floor(figures[name] * 1e4) / 1e4 if math.isfinite(figures[name]) else math.nan
            missed = not figures[name] >= least  # NaN misses
            rows.add_row(name, f"{measured:.4f}", told, f"{least:g}", style="red" if missed else None)
    return rows


def panels(figures: Mapping[str, float]) -> list[plots.Bars]:
    """Pictures of the average precision and of the router, as far as they were measured."""
    found = []
    if ways := [way for way in WAYS if f"ap50/{way}" in figures]:
        best = figures.get(FINE_TUNED)
        level = {} if best is None else {f"{FINE_TUNED_SHARE:.0%} of the fine-tuned AP50": FINE_TUNED_SHARE * best}
        found.append(
            plots.Bars(
                title="One frozen detector, two modalities: held-out scenes",
                unit="average precision, higher is better",
                labels=[WAYS[way].replace(" ", "\n") for way in ways],  # no wider than its bars
                series={what: [figures[f"{what.lower()}/{way}"] for way in ways] for what in ("AP", "AP50")},
                levels=level,
                numbers=True,
            )
        )
    if kinds := [name for name in figures if name.startswith("router_right/")]:
        found.append(
            plots.Bars(
                title="Whose modality was not named",
                unit="share that was routed rightly",
                labels=[name.removeprefix("router_right/") for name in kinds],
                series={"right": [figures[name] for name in kinds]},
                levels={"wanted": WANTED["router_right/rgb"]},
                numbers=True,
            )
        )
    return found
