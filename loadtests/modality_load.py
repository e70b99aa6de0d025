"""Requests per second of one modality and of two, half and half, on the same server in alternating rounds.

Each request holds one image, and the next is sent when an answer has come, over 16 connections (wrk). The mix sends
scene by scene its colour picture and its infrared one. Both are measured with the modality named in each request, and
then once more without, so that the server recognises each image's.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from loadtests import plots, wrk
from loadtests.client import Encoded
from loadtests.errors import LoadTestError
from loadtests.modality_client import encode
from loadtests.modality_scenes import Scenes
from loadtests.rounds import Interval, Round, Spread, alternate, ratio

CONNECTIONS = 16
WARM_SECONDS = 2
IMAGES = 32  # scenes that are sent in turn

RGB, MIXED = "rgb", "mixed"
RGB_ROUTED, MIXED_ROUTED = "rgb_routed", "mixed_routed"
PAIRS = ((RGB, MIXED), (RGB_ROUTED, MIXED_ROUTED))
RATIOS = {"mixed_over_rgb_throughput": PAIRS[0], "mixed_routed_over_rgb_routed_throughput": PAIRS[1]}

Load = Callable[[str, int], wrk.Load]  # variant, seconds


def requests(made: Scenes, stream: str) -> dict[str, list[Encoded]]:
    """What each variant sends in turn."""
    alone = [(picture, "rgb") for picture in made.rgb[:IMAGES]]
    infrared = [(picture, "ir") for picture in made.infrared[:IMAGES]]
    mixed = [picture for both in zip(alone, infrared, strict=True) for picture in both]
    return {
        RGB: [encode(picture, stream=stream, modality=modality) for picture, modality in alone],
        MIXED: [encode(picture, stream=stream, modality=modality) for picture, modality in mixed],
        RGB_ROUTED: [encode(picture, stream=stream) for picture, _ in alone],
        MIXED_ROUTED: [encode(picture, stream=stream) for picture, _ in mixed],
    }


def wrk_load(url: str, sent: Mapping[str, Sequence[Encoded]]) -> Load:
    """Load the route with a variant's requests."""
    return lambda variant, seconds: wrk.load(url, sent[variant], CONNECTIONS, seconds)


def measure(load: Load, pairs: int, seconds: int, told: Callable[[str], object]) -> list[Round]:
    """All variants in every round; one modality and the mix of two follow each other at once.

    Args:
        load: gives one interval of load.
        pairs: rounds.
        seconds: of an interval.
        told: gets a line for each interval.

    Raises:
        LoadTestError: a variant got no answer at all.
    """

    def interval(variant: str) -> Interval:
        found = load(variant, seconds)
        told(f"{CONNECTIONS} connections, {variant}: {found.rps:.0f} requests/s, p99 {found.p99_ms:.1f} ms")
        return Interval(found, math.nan)

    series: list[list[Round]] = []
    for pair in PAIRS:
        for variant in pair:  # buffers and caches fill before anything counts
            if not (warm := load(variant, WARM_SECONDS)).answered:
                raise LoadTestError(f"{variant}: no request was answered; {warm.failed} failed, {warm.refused} got 429")
        series.append(alternate(pair, pairs, interval))
    return [{**named, **routed} for named, routed in zip(*series, strict=True)]


def ratios(rounds: Sequence[Round]) -> dict[str, Spread]:
    """The mix's requests/s ÷ those of RGB alone, within each round."""
    return {name: ratio(rounds, mixed, rgb, lambda load: load.rps) for name, (rgb, mixed) in RATIOS.items()}


def spreads(rounds: Sequence[Round], of: Callable[[wrk.Load], float]) -> dict[str, Spread]:
    """Median and range over the rounds, by variant."""
    return {variant: Spread.of(of(each[variant].load) for each in rounds) for pair in PAIRS for variant in pair}


def figures(rounds: Sequence[Round]) -> dict[str, float]:
    """All figures in the names of the JSON form."""
    found: dict[str, float] = {}
    of: dict[str, Callable[[wrk.Load], float]] = {
        "rps": lambda load: load.rps,
        "p50_ms": lambda load: load.p50_ms,
        "p99_ms": lambda load: load.p99_ms,
    }
    for what, figure in of.items():
        for variant, spread in spreads(rounds, figure).items():
            found |= _with_range(what, f"{variant}/{CONNECTIONS}", spread)
    for name, spread in ratios(rounds).items():
        found |= _with_range("ratio", name, spread)
    for variant in rounds[0]:
        loads = [each[variant].load for each in rounds]
        found[f"failed_requests/{variant}/{CONNECTIONS}"] = sum(load.failed for load in loads)
        found[f"refused_requests/{variant}/{CONNECTIONS}"] = sum(load.refused for load in loads)
    return found


def _with_range(what: str, which: str, spread: Spread) -> dict[str, float]:
    return {
        f"{what}/{which}": spread.median,
        f"{what}_min/{which}": spread.low,
        f"{what}_max/{which}": spread.high,
    }


def panel(rounds: Sequence[Round]) -> plots.Bars:
    """Requests/s of each variant and their range."""
    found = spreads(rounds, lambda load: load.rps)
    groups = list(zip(*PAIRS, strict=True))  # RGB alone both ways, the mix both ways
    names = ("RGB alone", "RGB and IR, half and half")
    return plots.Bars(
        title=f"{CONNECTIONS} connections, one image a request: median and range",
        unit="requests/s, higher is better",
        labels=["modality named", "modality recognised"],
        series={name: [found[each].median for each in group] for name, group in zip(names, groups, strict=True)},
        ranges={
            name: [(found[each].low, found[each].high) for each in group]
            for name, group in zip(names, groups, strict=True)
        },
        numbers=True,
    )
