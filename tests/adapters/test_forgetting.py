"""Forgetting and source mismatch on four images of two pixels, whose answers can be worked out in the head."""

import math

import pytest
import torch
from torch import Tensor, nn

from adapters import (
    EATA,
    EATAConfig,
    Forgetting,
    Forgot,
    Groups,
    Guarded,
    Modulation,
    Network,
    Pipeline,
    Probe,
    Source,
    Statistics,
    forgetting,
    tree,
)


def sign_network() -> Network:
    """One batch-norm of one channel, mean 0 and variance 1: answers 1 where the number is above 0, else 0."""
    model = nn.Sequential(nn.BatchNorm1d(1, eps=1e-12), nn.Linear(1, 2))
    model[1].weight.data.copy_(torch.tensor([[0.0], [1.0]]))
    model[1].bias.data.zero_()
    return Network(model)


def eata(network: Network) -> EATA:
    return EATA(network, 2, config=EATAConfig(anchor="l2", statistics="evidence"))


# Mean 1: the probe's own statistics put the border at 1, and the source's at 0.
PROBE = Probe(torch.tensor([[-2.0], [0.5], [1.5], [4.0]]), torch.tensor([0, 0, 1, 1]))


def states(adapter: EATA, *shifts: float, mean: float = 0.0) -> object:
    """One state for each shift β that was learned, with the statistics of a stream that saw very many images."""
    fresh = adapter.init()
    return tree.stack(
        [
            fresh._replace(
                params=torch.tensor([1.0, shift]), mean=torch.tensor([mean]), images=torch.tensor(1e6 if mean else 0.0)
            )
            for shift in shifts
        ]
    )


def test_forgetting_is_measured_under_the_probes_own_statistics() -> None:
    """The source answers all four rightly then; a large β calls all of them 1, and so errs in two of four."""
    network = sign_network()
    adapter = eata(network)
    found = Forgetting(network, PROBE).measure(adapter, states(adapter, 0.0, 9.0, -0.5, mean=50.0))
    # β = −0.5: 1.5 is 0.5/σ above the mean with σ² = 4.625, and falls below the border
    torch.testing.assert_close(found.points, torch.tensor([0.0, 0.5, 0.25]))
    # differences 0, 0, 1, 1: variance 1/3 of four; 0, 0, 0, 1: 1/4
    torch.testing.assert_close(found.standard_error, torch.tensor([0.0, math.sqrt(1 / 3) / 2, math.sqrt(1 / 4) / 2]))


def test_source_parameters_forget_nothing_whatever_the_batches() -> None:
    network = sign_network()
    for adapter in (eata(network), Source(network), Guarded(eata(network))):
        table = tree.stack([adapter.init()] * 2)
        for batch_rows in (2, 3, 200):
            found = Forgetting(network, PROBE, batch_rows).measure(adapter, table)
            assert set(found.points.tolist()) == {0.0}
            assert set(found.standard_error.tolist()) == {0.0}


def test_batches_are_of_nearly_the_same_size_and_the_same_for_both() -> None:
    """Three images in batches of two: 2 and 1, and never an image that is forgotten."""
    network = sign_network()
    sizes: list[int] = []

    class Watched(Source):
        def modulate(self, states: object, rows: Tensor, groups: Groups) -> Modulation:
            sizes.append(groups.sizes[0])
            return super().modulate(states, rows, groups)

    five = Probe(torch.tensor([[-2.0], [0.5], [1.5], [4.0], [5.0]]), torch.tensor([0, 0, 1, 1, 1]))
    Forgetting(network, five, batch_rows=4).measure(Watched(network), ())
    assert sizes == [3, 2]


def test_better_than_the_source_is_negative() -> None:
    network = sign_network()
    adapter = eata(network)
    upside_down = PROBE._replace(labels=torch.tensor([1, 1, 1, 1]))
    found = Forgetting(network, upside_down).measure(adapter, states(adapter, 9.0))
    assert found.points.tolist() == [-0.5]


def test_the_lower_bound_has_to_be_above_the_limit() -> None:
    forgot = Forgot(torch.tensor([0.03, 0.03, 0.01, -0.5]), torch.tensor([0.005, 0.01, 0.0, 0.0]))
    # lower bounds: 0.0218, 0.0136, 0.01, −0.5
    assert forgetting.forgets(forgot, 0.02).tolist() == [True, False, False, False]


def test_a_probe_needs_two_images() -> None:
    with pytest.raises(ValueError, match="at least two images, not 1"):
        Forgetting(sign_network(), Probe(PROBE.x[:1], PROBE.labels[:1]))


def test_without_labels_the_frozen_networks_answers_are_right() -> None:
    probe = forgetting.unlabelled_probe(sign_network(), PROBE.x, batch_rows=3)
    assert probe.labels.tolist() == [0, 1, 1, 1]
    assert torch.equal(probe.x, PROBE.x)


def test_source_mismatch_is_the_error_of_the_whole_state() -> None:
    """Source statistics put the border at 0: one error. A stream that lives around 50 calls all images 0: two."""
    network = sign_network()
    adapter = eata(network)
    pipeline = Pipeline(network, norm=adapter)

    def mismatch(norm: object) -> list[float]:
        table = tree.stack([pipeline.init()] * len(norm.params))._replace(norm=norm)  # type: ignore[attr-defined]
        return forgetting.source_mismatch(pipeline, table, PROBE, batch_rows=3).tolist()

    assert mismatch(states(adapter, 0.0)) == [0.25]
    assert mismatch(states(adapter, 0.0, 99.0, mean=50.0)) == [0.5, 0.5]
    learned = states(adapter, 99.0, mean=50.0)
    assert Forgetting(network, PROBE).measure(adapter, learned).points.tolist() == [0.5]
    harmless = states(adapter, 0.0, mean=50.0)
    assert Forgetting(network, PROBE).measure(adapter, harmless).points.tolist() == [0.0]


def test_source_mismatch_lets_the_other_sites_take_part() -> None:
    network = sign_network()

    class Mirror:
        site = "input"

        def init(self) -> tuple[()]:
            return ()

        def transform(self, states: object, rows: Tensor, x: Tensor) -> Tensor:
            return -x

    class Swap:
        site = "head"

        def init(self) -> tuple[()]:
            return ()

        def score(self, states: object, rows: Tensor, features: None, logits: Tensor) -> Tensor:
            return logits.flip(1)

    def mismatch(**sites: object) -> float:
        pipeline = Pipeline(network, **sites)  # type: ignore[arg-type]
        return forgetting.source_mismatch(pipeline, pipeline.init(), PROBE).item()

    assert mismatch() == 0.25
    assert mismatch(input=Mirror()) == 0.75
    assert mismatch(input=Mirror(), head=Swap()) == 0.25


def test_known_statistics_are_asked_for_even_where_requests_bring_their_own() -> None:
    network = sign_network()
    asked: list[Statistics] = []

    class Watched(Network):
        def __call__(self, x: Tensor, modulation: Modulation | None = None) -> object:
            assert modulation is not None
            asked.append(modulation.statistics)
            return super().__call__(x, modulation)

    watched = Watched(nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2)))
    published = EATA(watched, 2, config=EATAConfig(anchor="none", statistics="batch"))
    pipeline = Pipeline(watched, norm=published)
    forgetting.source_mismatch(pipeline, tree.stack([pipeline.init()]), PROBE)
    assert asked == [Statistics.KNOWN]
    asked.clear()
    adapter = eata(network)
    Forgetting(watched, PROBE).measure(adapter, states(adapter, 0.0, mean=3.0))
    assert asked == [Statistics.OWN, Statistics.OWN]
