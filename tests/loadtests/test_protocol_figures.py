"""Errors, paired differences and verdicts by hand."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from loadtests import protocol_figures, protocol_table
from loadtests.errors import LoadTestError
from loadtests.protocol_figures import Cell, Estimate, figures, forgetting, lowest, paired, remembers, row
from loadtests.protocol_full_rate import Costs
from loadtests.protocol_jobs import METHODS, Job, Run
from loadtests.protocol_orders import Orders
from loadtests.protocol_probe import Probe

ORDERS = Orders(("fog", "snow"), images=2, batch=2, mixed=np.array([3, 1, 0, 2]), correlated=np.array([1, 0]))


def wrong(*answers):
    return np.array(answers, dtype=bool)


def test_paired_standard_error_by_hand():
    # differences 1, −1, 1, 1, 0: mean 0.4, squares about it 0.36·3 + 1.96 + 0.16 = 3.2, s² = 0.8, s/√5 = 0.4
    found = paired(wrong(1, 0, 1, 1, 1), wrong(0, 1, 0, 0, 1))
    assert found == (pytest.approx(40.0), pytest.approx(40.0))


def test_equal_answers_differ_by_nothing():
    assert paired(wrong(1, 0, 1), wrong(1, 0, 1)) == (0.0, 0.0)


def test_one_answer_has_no_standard_error():
    assert math.isnan(paired(wrong(1), wrong(0)).standard_error)


def test_forgetting_by_hand():
    # of two streams: the first image is lost by one of them, the last is won by both: 0.5, 0, 0, −1
    probe = Probe(learned=np.array([0.5, 0, 1, 0]), source=np.array([0.0, 0, 1, 1]), state=np.zeros(4))
    # mean −0.125; squares about it 0.390625 + 2·0.015625 + 0.765625 = 1.1875; √(1.1875/3/4) = 0.31458
    assert forgetting(probe) == (pytest.approx(-12.5), pytest.approx(31.458, abs=1e-3))


def cell(error, over=None, forgets=None):
    return Cell(error, {}, over and Estimate(*over), forgets and Estimate(*forgets), None, 0.0)


@pytest.mark.parametrize(
    ("of_eata", "held"),
    [
        ((21.0, (1.0, 0.1)), True),  # the default itself is lowest
        ((19.8, (-0.2, 0.1)), True),  # within two standard errors
        ((19.7, (-0.3, 0.1)), False),
        ((20.0, (0.0, 0.0)), True),  # as good
    ],
)
def test_lowest_or_as_good(of_eata, held):
    assert lowest({"frozen": cell(40, (20, 0.2)), "eata": cell(*of_eata), "default": cell(20.0, (0.0, 0.0))}) is held


def test_only_the_lowest_counts():
    # eata is outside of its two standard errors, but batch statistics are lower, and within theirs
    cells = {
        "eata": cell(19.7, (-0.3, 0.1)),
        "batch_statistics": cell(19.6, (-0.4, 0.3)),
        "default": cell(20.0, (0.0, 0.0)),
    }
    assert lowest(cells)


@pytest.mark.parametrize(("forgets", "held"), [((0.7, 0.2), True), ((0.71, 0.2), False), ((-1.0, 0.2), True)])
def test_forgetting_has_a_limit(forgets, held):
    assert remembers({"default": cell(20.0, (0.0, 0.0), forgets)}) is held


def test_without_the_default_there_is_no_verdict():
    assert remembers({"eata": cell(20.0, None, (9.0, 0.1))}) is None


def run(*answers, probe=None, share=0.0):
    return Run(wrong(*answers), np.arange(len(answers)), probe, share)


PROBE = Probe(learned=np.array([1.0, 0, 1, 1]), source=np.array([0.0, 0, 1, 1]), state=np.array([1.0, 0, 1, 0]))
RUNS = {
    Job("frozen", "per_shift"): run(1, 1, 1, 0),
    Job("eata", "mixed"): run(0, 1, 1, 0, probe=PROBE, share=1.0),
    Job("default", "mixed"): run(0, 1, 0, 0, probe=PROBE, share=1.0),
}


def test_row_and_the_names_of_its_figures():
    told = figures([row("mixed", ["frozen", "eata", "default"], RUNS, ORDERS)])
    assert told == {
        "error/mixed/frozen": 75.0,
        "error/mixed/frozen/fog": 100.0,
        "error/mixed/frozen/snow": 50.0,
        "difference/mixed/frozen": 50.0,
        "standard_error/mixed/frozen": pytest.approx(100 * math.sqrt(1 / 3) / 2),
        "error/mixed/eata": 50.0,
        "error/mixed/eata/fog": 50.0,
        "error/mixed/eata/snow": 50.0,
        "difference/mixed/eata": 25.0,
        "standard_error/mixed/eata": 25.0,
        "forgetting/mixed/eata": 25.0,
        "standard_error/forgetting/mixed/eata": 25.0,
        "source_mismatch/mixed/eata": 50.0,
        "share_learned/mixed/eata": 1.0,
        "error/mixed/default": 25.0,
        "error/mixed/default/fog": 50.0,
        "error/mixed/default/snow": 0.0,
        "forgetting/mixed/default": 25.0,
        "standard_error/forgetting/mixed/default": 25.0,
        "source_mismatch/mixed/default": 50.0,
        "share_learned/mixed/default": 1.0,
        "lowest/mixed/default": 1.0,
        "remembers/mixed/default": 1.0,
    }


def test_recurring_tells_every_visit():
    runs = {
        Job("frozen", "per_shift"): run(1, 1, 0, 1),
        Job("default", "recurring"): run(1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, probe=PROBE),
    }
    found = row("recurring", ["frozen", "default"], runs, ORDERS)
    assert found.cells["frozen"].error == 75.0
    assert found.cells["default"].parts == {
        "fog/1": 100.0,
        "snow/1": 50.0,
        "fog/2": 50.0,
        "snow/2": 0.0,
        "fog/3": 0.0,
        "snow/3": 0.0,
    }
    text = printed(protocol_table.visits(found))
    assert "100.00 · 50.00 · 0.00" in text
    assert "75.00 · 25.00 · 0.00" in text  # the mean of both corruptions


def test_a_run_that_failed_leaves_the_others():
    runs = {job: each for job, each in RUNS.items() if job.method != "eata"}
    found = row("mixed", ["frozen", "eata", "default"], runs, ORDERS)
    assert set(found.cells) == {"frozen", "default"}
    assert found.lowest is None
    assert found.remembers is True
    assert "failed" in printed(protocol_table.errors([found], ["frozen", "eata", "default"], reference=False))


def printed(table, width=110):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_tables_tell_the_verdicts():
    methods = ["frozen", "eata", "default"]
    found = row("mixed", methods, RUNS, ORDERS)
    text = printed(protocol_table.errors([found, found._replace(lowest=False)], methods, reference=True))
    for part in ("mixed", "75.00", "+25.00 ± 25.00", "yes", "NO", "reference", "36.30"):
        assert part in text
    text = printed(protocol_table.memory([found], ["eata", "default"]))
    for part in ("EATA", "forgetting", "+25.00 ± 25.00", "50.00", "yes"):
        assert part in text


@pytest.mark.parametrize("width", [80, 110])
def test_tables_of_all_methods_fit_a_terminal(width):
    cells = {m: Cell(41.13, {}, Estimate(-17.43, 0.31), Estimate(0.25, 0.31), 44.8, 1.0) for m in METHODS}
    rows = [protocol_figures.Row("batch_of_one", cells, True, True)]
    for table in (
        protocol_table.errors(rows, METHODS, reference=True),
        protocol_table.memory(rows, ["eata", "default"]),
    ):
        text = printed(table, width)
        assert "batch_of_one" in text
        assert "…" not in text


def test_costs_are_told_with_the_share_of_rows():
    line = protocol_table.costs_line(Costs(2.5, 4.0, 0.25), row("mixed", ["eata", "default"], RUNS, ORDERS))
    for part in ("250 ms", "2.50", "4.00", "EATA 100%"):
        assert part in line


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    methods = ["frozen", "eata", "default"]
    found = row("mixed", methods, RUNS, ORDERS)
    file = tmp_path / "protocols.png"
    protocol_table.plot(file, [found], methods)
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LoadTestError, match="nothing to draw"):
        protocol_table.plot(file, [found], [*methods, "batch_statistics"])
