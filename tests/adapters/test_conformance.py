"""Every adapter obeys every law, and every law can be broken."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import adapters
from adapters import (
    EATA,
    Alignment,
    AlignmentPrior,
    Batch,
    Boxes,
    EATAConfig,
    EATAPrior,
    Fusion,
    Groups,
    Guarded,
    Merging,
    ModTr,
    Network,
    Pipeline,
    Source,
    Steps,
    Totals,
    Translator,
    TranslatorConfig,
    tree,
)
from adapters.checks import LAWS, check_adapter

CLASSES = 4
Build = Callable[..., nn.Module]
Images = Callable[..., Tensor]


def eata(network: Network, **settings: Any) -> EATA:
    """EATA that takes about half of the rows of the small networks."""
    config = EATAConfig(**{"entropy_margin": 1.1, "redundancy_margin": 0.95, **settings})
    prior = EATAPrior(torch.linspace(0.1, 2.0, 2 * network.channels)) if config.anchor == "fisher" else None
    return EATA(network, CLASSES, prior, config)


def alignment(network: Network) -> Alignment:
    """Alignment with a source so far away that every window has drifted."""
    far, line = torch.full((CLASSES,), 3.0), torch.tensor([0.1])
    return Alignment(network, AlignmentPrior(far, far, torch.tensor([CLASSES]), torch.tensor([1]), line))


def modtr(fusion: Any) -> ModTr:
    """ModTr around a small translator that has been trained: its last layer looks at the image."""
    translator = Translator(TranslatorConfig(3, width=4, depth=2, fusion=fusion), torch.Generator().manual_seed(0))
    torch.nn.init.normal_(translator.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return ModTr(translator, brightness_in_boxes)


def brightness_in_boxes(images: Sequence[Tensor], targets: Sequence[Boxes]) -> Tensor:
    """A detector's loss in small: inside its box an image shall be as bright as a tenth of the label."""
    losses = []
    for image, (boxes, labels) in zip(images, targets, strict=True):
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels, strict=True):
            losses.append((image[:, y1:y2, x1:x2] - label / 10).square().mean())
    return torch.stack(losses).mean()


def boxes_for(rows: int) -> tuple[Boxes, ...]:
    """One box an image, of four places, with labels 1 … 7."""
    return tuple(Boxes(torch.tensor([[i % 2, i % 4 // 2, 4.0, 5.0]]), torch.tensor([1 + i % 7])) for i in range(rows))


class Kind(NamedTuple):
    make: Callable[[Network], Any]
    learns: bool = True
    guarded: bool = False


KINDS = {
    "source": Kind(Source, learns=False),
    "eata-batch-adam-fisher": Kind(eata),
    "eata-evidence-adam-l2": Kind(lambda network: eata(network, statistics="evidence", anchor="l2")),
    "eata-batch-sgd-l2": Kind(lambda network: eata(network, optimizer="sgd", anchor="l2")),
    "eata-evidence-sgd-none": Kind(
        lambda network: eata(network, statistics="evidence", optimizer="sgd", anchor="none")
    ),
    "guarded-eata-batch-adam": Kind(lambda network: Guarded(eata(network)), guarded=True),
    "guarded-eata-evidence-sgd": Kind(
        lambda network: Guarded(eata(network, statistics="evidence", optimizer="sgd")), guarded=True
    ),
    "guarded-eata-async": Kind(  # what the server builds
        lambda network: Guarded(
            eata(network, statistics="evidence", full_step_rows=64, source_pull=0.02, class_mix_rate=0.3)
        ),
        guarded=True,
    ),
    "alignment": Kind(alignment),
    "guarded-alignment": Kind(lambda network: Guarded(alignment(network)), guarded=True),
    "guarded-source": Kind(lambda network: Guarded(Source(network)), learns=False, guarded=True),
    "modtr-multiply": Kind(lambda _: modtr("multiply"), guarded=True),  # it guards itself
    "modtr-add": Kind(lambda _: modtr("add"), guarded=True),
}
EVERYWHERE = ("source", "eata-batch-adam-fisher", "eata-batch-sgd-l2", "guarded-eata-batch-adam", "alignment")
INPUT = ("modtr-multiply", "modtr-add")
WITH_STATISTICS = tuple(kind for kind in KINDS if kind not in INPUT)
CASES = [
    *(("batch_norm_2d", kind) for kind in WITH_STATISTICS),
    *(("batch_norm_1d", kind) for kind in WITH_STATISTICS),
    *(("group_norm", kind) for kind in EVERYWHERE),
    *(("layer_norm", kind) for kind in EVERYWHERE),
    *(("batch_norm_2d", kind) for kind in INPUT),
]


def pipeline(build: Build, model: str, kind: str) -> Pipeline:
    network = Network(build(model, CLASSES))
    made = KINDS[kind].make(network)
    return Pipeline(network, **{made.site: made})


def rows_for(kind: str, images: Images, rows: int) -> tuple[Tensor, tuple[Boxes, ...] | None]:
    """Images, and what is in them where the adapter learns from that: then they are between 0 and 1."""
    return (images(rows).sigmoid(), boxes_for(rows)) if kind in INPUT else (images(rows), None)


def test_the_table_of_cases_is_complete() -> None:
    assert len(LAWS) == 21
    assert len(CASES) == 34
    network = Network(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, CLASSES)))
    covered: set[type] = set()
    for kind in KINDS.values():
        adapter = kind.make(network)
        while adapter is not None:  # a guard, then what it stands around
            covered.add(type(adapter))
            adapter = getattr(adapter, "adapter", None)
    # a head's table is a tuple, for heads grow: theirs are the laws of test_head_conformance.py
    assert covered | {Fusion} == discovered()
    assert {model for model, _ in CASES} == {"batch_norm_2d", "batch_norm_1d", "group_norm", "layer_norm"}


def discovered() -> set[type]:
    """Every public class of the package that has a site and adapts; protocols only say what that means."""
    found = set()
    for part in pkgutil.walk_packages(adapters.__path__, "adapters."):
        for name, thing in vars(importlib.import_module(part.name)).items():
            is_class = inspect.isclass(thing) and thing.__module__.startswith("adapters") and not name.startswith("_")
            if (
                is_class
                and hasattr(thing, "site")
                and hasattr(thing, "adapt")
                and not getattr(thing, "_is_protocol", 0)
            ):
                found.add(thing)
    return found


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("model", "kind"), CASES, ids=lambda each: each)
def test_adapter_obeys(law: str, model: str, kind: str, build: Build, images: Images) -> None:
    _, learns, guarded = KINDS[kind]
    x, boxes = rows_for(kind, images, 20)
    check_adapter(lambda: pipeline(build, model, kind), x, boxes=boxes, laws=[law], learns=learns, guarded=guarded)


@pytest.mark.parametrize("rows", [16, 27])
def test_all_laws_in_one_call_for_other_numbers_of_rows(rows: int, build: Build, images: Images) -> None:
    check_adapter(
        lambda: pipeline(build, "batch_norm_2d", "guarded-eata-evidence-sgd"), images(rows, start=2.0), guarded=True
    )


@pytest.mark.parametrize(("model", "kind"), CASES, ids=lambda each: each)
def test_states_survive_safetensors_bit_for_bit(model: str, kind: str, build: Build, images: Images) -> None:
    made = pipeline(build, model, kind)
    states = tree.stack([made.init(), made.init()])
    rows = torch.tensor([0] * 9 + [1])
    x, boxes = rows_for(kind, images, 10)
    states, _ = made.adapt(states, rows, Batch(x, Groups.of((9, 1)), torch.ones(10), boxes=boxes))
    for state in (made.init(), tree.row(states, 0), tree.row(states, 1)):
        decoded = tree.decode(made.init(), load(save(tree.encode(state))))
        for (name, found), (_, expected) in zip(tree.leaves(decoded), tree.leaves(state), strict=True):
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name


# What follows breaks the laws, one by one. Each fault is the kind that real code has.


class Faulty(EATA):
    """A sound adapter, to be spoilt in one place."""

    def __init__(self, network: Network) -> None:
        config = EATAConfig(entropy_margin=1.1, redundancy_margin=0.95, anchor="l2", statistics="evidence")
        super().__init__(network, CLASSES, config=config)
        self.calls = 0
        self.log: list[Any] = []


class InitRemembers(Faulty):
    """The classic: reset does not reset."""

    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        self.source_params.copy_(new.params[0])
        return new, report


class InitIsRandom(Faulty):
    def init(self) -> Any:
        state = super().init()
        return state._replace(params=state.params + 0.01 * torch.rand_like(state.params))


class ForgetsAField(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        return new._replace(mean_probs=()), report


class KeepsTheGraph(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        return new._replace(params=new.params.requires_grad_()), report


class WritesInPlace(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        states.params.copy_(new.params)
        return new, report


class CountsOnItself(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        self.calls += 1
        return super().adapt(states, rows, batch)


class TouchesTheModel(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        self.network.model[-1].bias.mul_(1.001)
        return super().adapt(states, rows, batch)


class WeighsTheBatchInPlace(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        return super().adapt(states, rows, batch._replace(weights=batch.weights.mul_(0.5)))


class AddsNoise(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        return new._replace(params=new.params + 1e-6 * torch.rand_like(new.params)), report


class DrawsAndDropsARandomNumber(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        torch.rand(1)
        return super().adapt(states, rows, batch)


class LogsPredictions(Faulty):
    def modulate(self, states: Any, rows: Tensor, groups: Groups) -> Any:
        self.log.append(rows)
        return super().modulate(states, rows, groups)


class AnswersChange(Faulty):
    def modulate(self, states: Any, rows: Tensor, groups: Groups) -> Any:
        return super().modulate(states, rows, groups)._replace(shift=torch.rand(1, self.network.channels).expand(4, -1))


class LeaksBetweenStreams(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        return new._replace(mean_probs=new.mean_probs[rows].mean(dim=0).expand_as(new.mean_probs)), report


class DecaysEveryone(Faulty):
    """Weight decay reaches streams that sent nothing."""

    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        return new._replace(params=new.params * 0.999), report


class OneGroupForAll(Faulty):
    """Statistics of the whole micro-batch: what every batch-norm method does that knows no requests."""

    def modulate(self, states: Any, rows: Tensor, groups: Groups) -> Any:
        return super().modulate(states, rows, Groups(torch.zeros_like(groups.index), (len(rows),)))


class FirstRowsCountMore(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        return super().adapt(states, rows, batch._replace(weights=batch.weights / torch.arange(1, len(rows) + 1)))


class IgnoresWeights(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        return super().adapt(states, rows, batch._replace(weights=torch.ones_like(batch.weights)))


class CountsRowsOfWeightZero(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        return new._replace(seen=states.seen.index_add(0, rows, torch.ones_like(rows))), report


class UnbiasedVariance(Faulty):
    """Of one value there is none."""

    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        spread = torch.stack([batch.x[rows == each].flatten(1).mean(1).std() for each in rows.unique()])
        return new._replace(images=new.images.index_add(0, rows.unique(), spread)), report


class SumsGradients(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        active = torch.zeros(len(new.params), dtype=torch.bool).index_fill(0, rows, value=True).unsqueeze(1)
        shared = (new.params - states.params).sum(dim=0) * 1e-9  # too little for the other laws to see
        return new._replace(params=torch.where(active, new.params + shared, new.params)), report


class Grows(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        return new._replace(mean_probs=torch.cat([new.mean_probs, new.mean_probs], dim=1)), report


class SharesMemory(Faulty):
    def init(self) -> Any:
        state = super().init()
        return state._replace(selected=state.seen)


class HoldsAFloat(Faulty):
    def init(self) -> Any:
        return super().init()._replace(images=0.0)


class DefaultDtype(Faulty):
    def adapt(self, states: Any, rows: Tensor, batch: Batch) -> Any:
        new, report = super().adapt(states, rows, batch)
        return new._replace(mean_probs=new.mean_probs * torch.where(report.seen > 0, 1.0, 1.0).unsqueeze(1)), report


class DefaultDevice(Faulty):
    def modulate(self, states: Any, rows: Tensor, groups: Groups) -> Any:
        told = super().modulate(states, rows, groups)
        return told._replace(shift=told.shift + torch.zeros(self.network.channels))


class NamesNoLeaf(Faulty):
    """A field was renamed, here and not there."""

    def merging(self) -> Merging:
        return super().merging().joined(Merging((Totals(("steps",)),)))


class NamesALeafTwice(Faulty):
    def merging(self) -> Merging:
        return super().merging().joined(Merging((Totals(("seen",)),)))


class MergesByTurns(Faulty):
    def merging(self) -> Merging:
        self.calls += 1
        rule: Any = Steps if self.calls % 2 else Totals
        return Merging((rule(("params",), "seen") if rule is Steps else rule(("params",)),))


class CountsItsParameters(Faulty):
    """Each replica's whole step is taken."""

    def merging(self) -> Merging:
        others = tuple(rule for rule in super().merging().rules if rule.leaves != ("params",))
        return Merging((Totals(("params",)), *others), super().merging().local)


FAULTS: list[tuple[str, Any]] = [
    ("init_is_constant", InitRemembers),
    ("init_is_constant", InitIsRandom),
    ("layout_is_kept", ForgetsAField),
    ("layout_is_kept", KeepsTheGraph),
    ("layout_is_kept", Grows),
    ("adapt_changes_no_argument", WritesInPlace),
    ("adapt_changes_no_argument", CountsOnItself),
    ("adapt_changes_no_argument", TouchesTheModel),
    ("adapt_changes_no_argument", WeighsTheBatchInPlace),
    ("adapt_is_deterministic", AddsNoise),
    ("adapt_is_deterministic", DrawsAndDropsARandomNumber),
    ("predict_is_pure", LogsPredictions),
    ("predict_is_pure", AnswersChange),
    ("streams_are_independent", LeaksBetweenStreams),
    ("idle_streams_keep_every_bit", DecaysEveryone),
    ("answers_are_independent", OneGroupForAll),
    ("order_does_not_matter", FirstRowsCountMore),
    ("weight_zero_teaches_nothing", IgnoresWeights),
    ("weight_zero_teaches_nothing", DecaysEveryone),
    ("weight_zero_is_absence", CountsRowsOfWeightZero),
    ("weight_zero_is_absence", IgnoresWeights),
    ("one_row_is_enough", UnbiasedVariance),
    ("nan_stays_where_it_is", SumsGradients),
    ("nan_stays_where_it_is", Faulty),  # finite by promise only
    ("encoding_keeps_every_bit", SharesMemory),
    ("encoding_keeps_every_bit", HoldsAFloat),
    ("device_and_dtype_come_from_tensors", DefaultDtype),
    ("device_and_dtype_come_from_tensors", DefaultDevice),
    ("learns_as_promised", Source),
    ("merging_takes_a_contribution_once", NamesNoLeaf),
    ("merging_order_does_not_matter", MergesByTurns),
    ("learning_nothing_merges_to_nothing", NamesALeafTwice),
    ("merging_alone_is_exact", NamesNoLeaf),
    ("merging_does_not_overshoot", CountsItsParameters),
]


@pytest.mark.parametrize(("law", "fault"), FAULTS, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_a_fault_breaks_its_law(law: str, fault: Any, build: Build, images: Images) -> None:
    def make() -> Pipeline:
        network = Network(build("batch_norm_2d", CLASSES))
        return Pipeline(network, norm=fault(network))

    with pytest.raises(AssertionError, match=f"law '{law}' is broken"):
        check_adapter(make, images(20), laws=[law], guarded=fault is Faulty)


def test_every_law_has_a_fault_that_breaks_it() -> None:
    assert {law for law, _ in FAULTS} == set(LAWS)
    assert len(FAULTS) == 34


@pytest.mark.parametrize("law", LAWS)
def test_what_the_faults_are_made_of_is_sound(law: str, build: Build, images: Images) -> None:
    def make() -> Pipeline:
        network = Network(build("batch_norm_2d", CLASSES))
        return Pipeline(network, norm=Faulty(network))

    check_adapter(make, images(20), laws=[law])


def test_an_adapter_that_should_not_learn_is_caught_learning(build: Build, images: Images) -> None:
    with pytest.raises(AssertionError, match="stream 0 moved"):
        check_adapter(
            lambda: pipeline(build, "batch_norm_2d", "eata-batch-sgd-l2"),
            images(20),
            laws=["learns_as_promised"],
            learns=False,
        )


def test_too_few_rows_and_unknown_laws_are_refused(build: Build, images: Images) -> None:
    with pytest.raises(ValueError, match="at least 16 rows, not 15"):
        check_adapter(lambda: pipeline(build, "batch_norm_2d", "source"), images(15))
    with pytest.raises(ValueError, match="no law is called 'gravity'"):
        check_adapter(lambda: pipeline(build, "batch_norm_2d", "source"), images(20), laws=["gravity"])
