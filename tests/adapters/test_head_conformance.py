"""Every head obeys every law, and every law can be broken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from adapters import tree
from adapters.class_means import ClassMeans, ClassMeansState, fit_class_means
from adapters.class_sums import ClassSum
from adapters.components import Components
from adapters.flat_keys import FlatKeysConfig, fit_flat_keys
from adapters.head_checks import LAWS, check_head
from adapters.heads import AnyHead, Items
from adapters.keys import Keys, KeysConfig, fit_keys
from adapters.kv_bottleneck import Counts
from adapters.kv_gradient import KVGradient, KVGradientConfig, KVGradientState
from adapters.ridge import Ridge, fit_ridge

WIDTH = 12
KEYS = FlatKeysConfig(codebooks=16, keys=8, width=4, epochs=2, batch=32)


def labelled(count: int = 24) -> tuple[Tensor, Tensor]:
    """Features of the classes 2, 3 and 11 around a mean of their own each, in mixed order."""
    generator = torch.Generator().manual_seed(5)
    means = 2 * torch.randn(3, WIDTH, generator=generator)
    which = torch.randperm(count, generator=generator) % 3
    return means[which] + torch.randn(count, WIDTH, generator=generator), torch.tensor([3, 11, 2])[which]


UNLABELLED = labelled(60)[0]

TREE = KeysConfig(codebooks=8, branches=(4, 2), key_dim=4, components=8)

KINDS: dict[str, Callable[[], AnyHead]] = {
    "counts": lambda: Counts(Keys(fit_keys(UNLABELLED, TREE), TREE)),
    "class_means": lambda: ClassMeans(fit_class_means(UNLABELLED)),
    "ridge": lambda: Ridge(fit_ridge(UNLABELLED, count=8)),
    "gradient": lambda: KVGradient(fit_flat_keys(UNLABELLED, KEYS), WIDTH),
    "gradient-fast": lambda: KVGradient(fit_flat_keys(UNLABELLED, KEYS), WIDTH, KVGradientConfig(rate=30, scale=1)),
}


def test_the_table_of_cases_is_complete() -> None:
    assert len(LAWS) == 20
    assert len(KINDS) == 5


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", KINDS)
def test_head_obeys(kind: str, law: str) -> None:
    check_head(KINDS[kind], *labelled(), laws=[law])


@pytest.mark.parametrize("count", [12, 35])
def test_all_laws_in_one_call_for_other_numbers_of_items(count: int) -> None:
    check_head(KINDS["ridge"], *labelled(count))


@pytest.mark.parametrize("kind", KINDS)
def test_states_survive_safetensors_bit_for_bit(kind: str) -> None:
    head, (features, classes) = KINDS[kind](), labelled()
    state = head.learn(head.init(), Items(head.encode(features), classes))
    decoded = tree.decode(state, load(save(tree.encode(state))))
    for (name, found), (_, expected) in zip(tree.leaves(decoded), tree.leaves(state), strict=True):
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name


def test_too_little_to_go_by_is_refused() -> None:
    features, classes = labelled()
    for some in (features[:11], classes[:11]), (features, classes % 2):
        with pytest.raises(ValueError, match="at least 12 features of 3 classes"):
            check_head(KINDS["ridge"], *some)


def test_an_unknown_law_is_refused() -> None:
    with pytest.raises(ValueError, match="no law is called 'gravity'; there are: init_is_constant"):
        check_head(KINDS["ridge"], *labelled(), laws=["gravity"])


# What follows breaks the laws, one by one. Each fault is the kind that real code has.


class Faulty(ClassMeans):
    """A sound head, to be spoilt in one place."""

    def __init__(self) -> None:
        super().__init__(fit_class_means(UNLABELLED))
        self.calls = 0
        self.told = self.init()


class InitRemembers(Faulty):
    """The classic: what was told first is everyone's beginning."""

    def init(self) -> ClassMeansState:
        return getattr(self, "told", ClassMeansState(()))

    def learn(self, state: ClassMeansState, items: Items) -> ClassMeansState:
        self.told = super().learn(state, items)
        return self.told


class InitKnowsAClass(Faulty):
    def init(self) -> ClassMeansState:
        one = torch.tensor(1)
        return ClassMeansState((ClassSum(one - 1, one, torch.zeros(WIDTH, dtype=torch.int64)),))


class FloatCodes(Faulty):
    def encode(self, features: Tensor) -> Tensor:
        return super().encode(features).float()


class AddsInPlace(Faulty):
    def learn(self, state: ClassMeansState, items: Items) -> ClassMeansState:
        new = super().learn(state, items)
        for entry in state.classes:
            entry.images.add_(1)
        return new


class ScoresInPlace(Faulty):
    def score(self, table: Any, codes: Tensor) -> Tensor:
        found = super().score(table, codes)
        codes.clamp_(-1, 1)
        return found


class CountsCalls(Faulty):
    def read(self, state: ClassMeansState, before: Any = None) -> Any:
        self.calls += 1
        return super().read(state)


class Dithers(Faulty):
    """Rounds at random: codes differ from call to call."""

    def encode(self, features: Tensor) -> Tensor:
        return super().encode(features + 0.001 * torch.rand_like(features))


class DrawsFromTheGlobalGenerator(Faulty):
    def encode(self, features: Tensor) -> Tensor:
        torch.rand(1)
        return super().encode(features)


class NewestColumnFirst(Faulty):
    def learn(self, state: ClassMeansState, items: Items) -> ClassMeansState:
        return ClassMeansState(super().learn(state, items).classes[::-1])


class ScoresAreLogsOfZero(Faulty):
    def score(self, table: Any, codes: Tensor) -> Tensor:
        return super().score(table, codes).clamp(min=0).log()


class KeepsAGraph(Faulty):
    def score(self, table: Any, codes: Tensor) -> Tensor:
        scale = torch.ones((), requires_grad=True)
        return super().score(table, codes) * scale


class ForgetsToCount(Faulty):
    def read(self, state: ClassMeansState, before: Any = None) -> Any:
        table = super().read(state)
        return table._replace(images=tuple(1 for _ in table.images))


class TrustsTheOldTable(Faulty):
    """Refreshes only what is new: a class known before keeps its old direction."""

    def read(self, state: ClassMeansState, before: Any = None) -> Any:
        table = super().read(state)
        for i, number in enumerate(table.classes):
            if before is not None and number in before.classes:
                table.directions[i] = before.directions[before.classes.index(number)]
        return table


class NormalisesOverTheBatch(Faulty):
    """Centres on the batch instead of the prior."""

    def encode(self, features: Tensor) -> Tensor:
        return super().encode(features - features.mean(dim=0) + self.prior.mean)


class ScoresAgainstItsNeighbours(Faulty):
    def score(self, table: Any, codes: Tensor) -> Tensor:
        found = super().score(table, codes)
        return found - found.mean(dim=0) if len(found) else found


class NoImagesCrash(Faulty):
    def score(self, table: Any, codes: Tensor) -> Tensor:
        return torch.stack([super(NoImagesCrash, self).score(table, code.unsqueeze(0))[0] for code in codes])


class NaNIsTaught(Faulty):
    def score(self, table: Any, codes: Tensor) -> Tensor:
        found = super().score(table, codes)
        return found.where(codes.any(dim=1, keepdim=True), float("nan"))


class CountsNothing(Faulty):
    """A lesson without items counts as one."""

    def learn(self, state: ClassMeansState, items: Items) -> ClassMeansState:
        new = super().learn(state, items).classes
        return ClassMeansState(tuple(e._replace(images=e.images + int(not items.rows)) for e in new))


class WeighsByLesson(Faulty):
    """Counts lessons instead of items."""

    def learn(self, state: ClassMeansState, items: Items) -> ClassMeansState:
        told = super().learn(self.init(), items)
        lessons = tuple(e._replace(images=torch.ones_like(e.images)) for e in told.classes)
        return self.merge(state, ClassMeansState(lessons))


class RemembersTheLastItem(Faulty):
    """The last item counts twice."""

    def learn(self, state: ClassMeansState, items: Items) -> ClassMeansState:
        twice = Items(torch.cat([items.codes, items.codes[-1:]]), torch.cat([items.classes, items.classes[-1:]]))
        return super().learn(state, twice)


class SumsInHalf(Faulty):
    """Sums that forget their last digits: a difference does not undo them."""

    def merge(self, base: ClassMeansState, own: ClassMeansState) -> ClassMeansState:
        merged = super().merge(base, own).classes
        return ClassMeansState(tuple(e._replace(total=e.total.half().long()) for e in merged))

    def learn(self, state: ClassMeansState, items: Items) -> ClassMeansState:
        for i in range(items.rows):
            one = Items(items.codes[i : i + 1], items.classes[i : i + 1])
            state = self.merge(state, super().learn(self.init(), one))
        return state


class KeepsEmptyClasses(Faulty):
    def unlearn(self, state: ClassMeansState, items: Items, rest: Items) -> ClassMeansState:
        left = {int(e.number): e for e in super().unlearn(state, items, rest).classes}
        empty = [e._replace(images=e.images * 0, total=e.total * 0) for e in state.classes if int(e.number) not in left]
        return ClassMeansState(tuple(sorted([*left.values(), *empty], key=lambda e: int(e.number))))


class ForgetsTooMuch(Faulty):
    """Clears a class where an item of it shall go."""

    def unlearn(self, state: ClassMeansState, items: Items, rest: Items) -> ClassMeansState:
        super().unlearn(state, items, rest)
        gone = set(items.classes.tolist())
        return ClassMeansState(tuple(e for e in state.classes if int(e.number) not in gone))


class ForgetsStrangers(Faulty):
    def unlearn(self, state: ClassMeansState, items: Items, rest: Items) -> ClassMeansState:
        return super().learn(self.init(), rest)


class OwnHidesBase(Faulty):
    """Where both know a class, the stream's own entry is taken."""

    def merge(self, base: ClassMeansState, own: ClassMeansState) -> ClassMeansState:
        entries = {int(e.number): e for e in (*base.classes, *own.classes)}
        return ClassMeansState(tuple(entries[number] for number in sorted(entries)))


class BaseAlone(Faulty):
    """A merge that, like the gradient head's, may not be exact, but is none at all."""

    order_free = False

    def merge(self, base: ClassMeansState, own: ClassMeansState) -> ClassMeansState:
        return base


class SharesItsMemory(Faulty):
    """Two leaves that look at one tensor."""

    def learn(self, state: ClassMeansState, items: Items) -> ClassMeansState:
        new = super().learn(state, items).classes
        return ClassMeansState(tuple(e._replace(number=new[0].number) if e is new[-1] else e for e in new))


class AsksTheDefaultDtype(Faulty):
    def score(self, table: Any, codes: Tensor) -> Tensor:
        return super().score(table, codes).to(torch.get_default_dtype())


class AsksTheDefaultDevice(Faulty):
    def learn(self, state: ClassMeansState, items: Items) -> ClassMeansState:
        new = super().learn(state, items).classes
        return ClassMeansState(tuple(e._replace(images=torch.tensor(int(e.images))) for e in new))


class LearnsNothing(Faulty):
    def score(self, table: Any, codes: Tensor) -> Tensor:
        return super().score(table, codes) * 0


class Backwards(Faulty):
    """Distances where scores were meant."""

    def score(self, table: Any, codes: Tensor) -> Tensor:
        return -super().score(table, codes)


class InsertsNoColumn(KVGradient):
    """Merges by cells and forgets that classes differ."""

    def merge(self, base: KVGradientState, own: KVGradientState) -> KVGradientState:
        return super().merge(base, own._replace(classes=base.classes[: len(own.classes)]) if len(base.classes) else own)


def no_column() -> InsertsNoColumn:
    return InsertsNoColumn(fit_flat_keys(UNLABELLED, KEYS), WIDTH)


class ClaimsToBeOrderFree(KVGradient):
    order_free = True


def order_free() -> ClaimsToBeOrderFree:
    return ClaimsToBeOrderFree(fit_flat_keys(UNLABELLED, KEYS), WIDTH)


class ReplaysNothing(KVGradient):
    """Takes the class's column out, and leaves what it did to the others."""

    def unlearn(self, state: KVGradientState, items: Items, rest: Items) -> KVGradientState:
        super().unlearn(state, items, rest)
        keep = ~torch.isin(state.classes, items.classes) | torch.isin(state.classes, rest.classes)
        return KVGradientState(state.classes[keep], state.imagess[keep], state.cells, state.values[:, keep])


def no_replay() -> ReplaysNothing:
    return ReplaysNothing(fit_flat_keys(UNLABELLED, KEYS), WIDTH)


class NaNDrownsItsNeighbours(Ridge):
    """Scales by the largest entry of the batch."""

    def encode(self, features: Tensor) -> Tensor:
        return super().encode((features / features.abs().amax()).nan_to_num())


def drowned() -> NaNDrownsItsNeighbours:
    prior = fit_ridge(UNLABELLED, count=8)
    return NaNDrownsItsNeighbours(Components(prior.mean, prior.directions))


FAULTS: list[tuple[Callable[[], AnyHead], str]] = [
    (InitRemembers, "init_is_constant"),
    (InitKnowsAClass, "init_scores_no_class"),
    (FloatCodes, "codes_are_integers"),
    (AddsInPlace, "arguments_stay"),
    (ScoresInPlace, "arguments_stay"),
    (CountsCalls, "arguments_stay"),
    (Dithers, "results_are_deterministic"),
    (DrawsFromTheGlobalGenerator, "results_are_deterministic"),
    (NewestColumnFirst, "columns_are_the_classes_told"),
    (ScoresAreLogsOfZero, "columns_are_the_classes_told"),
    (KeepsAGraph, "columns_are_the_classes_told"),
    (ForgetsToCount, "columns_are_the_classes_told"),
    (TrustsTheOldTable, "reading_again_changes_nothing"),
    (NormalisesOverTheBatch, "images_are_independent"),
    (ScoresAgainstItsNeighbours, "images_are_independent"),
    (NoImagesCrash, "no_images_have_no_scores"),
    (NaNIsTaught, "what_is_not_finite_does_not_spread"),
    (drowned, "what_is_not_finite_does_not_spread"),
    (CountsNothing, "nothing_told_changes_nothing"),
    (WeighsByLesson, "parts_do_not_matter"),
    (RemembersTheLastItem, "parts_do_not_matter"),
    (SumsInHalf, "order_does_not_matter"),
    (order_free, "order_does_not_matter"),
    (SumsInHalf, "unlearning_is_exact"),
    (KeepsEmptyClasses, "unlearning_is_exact"),
    (ForgetsTooMuch, "unlearning_is_exact"),
    (no_replay, "unlearning_is_exact"),
    (ForgetsStrangers, "strangers_are_refused"),
    (OwnHidesBase, "merging_is_learning_both"),
    (BaseAlone, "merging_is_learning_both"),
    (no_column, "merging_is_learning_both"),
    (BaseAlone, "merging_with_nothing_is_nothing"),
    (SharesItsMemory, "encoding_keeps_every_bit"),
    (AsksTheDefaultDtype, "device_and_dtype_come_from_tensors"),
    (AsksTheDefaultDevice, "device_and_dtype_come_from_tensors"),
    (LearnsNothing, "labels_teach"),
    (Backwards, "labels_teach"),
]


@pytest.mark.parametrize(("make", "law"), FAULTS, ids=lambda each: getattr(each, "__name__", each))
def test_a_fault_is_found_and_named(make: Callable[[], AnyHead], law: str) -> None:
    with pytest.raises(AssertionError, match=f"law '{law}' is broken"):
        check_head(make, *labelled(), laws=[law])


def test_every_law_can_be_broken() -> None:
    assert {law for _, law in FAULTS} == set(LAWS)
    assert len(FAULTS) == 37


def test_the_sound_head_under_the_faults_obeys() -> None:
    check_head(Faulty, *labelled())
