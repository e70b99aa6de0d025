"""Several replicas learn about one stream; the same laws for states of all kinds of leaves, and numbers by hand."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from adapters import (
    EATA,
    Averages,
    Contribution,
    EATAConfig,
    Fading,
    Groups,
    Guarded,
    Latest,
    Merged,
    Merging,
    ModTr,
    Moments,
    Network,
    Pipeline,
    Pooled,
    Steps,
    Totals,
    Translator,
    TranslatorConfig,
    contribute,
    optim,
    rebase,
    tree,
)

Build = Callable[..., nn.Module]
State = dict[str, Tensor]

MEMORY, IMAGES_MAX = 50.0, 64.0
MERGING = Merging(
    (
        Steps(("w",), by="n"),
        Averages(("p",), by="n"),
        Totals(("n",)),
        Pooled("mean", "var", "images", "discount", IMAGES_MAX),
        Fading(("faded",), rows="rows", memory_rows=MEMORY),
    ),
    local=("optimizer.first",),
)


def new_state(**leaves: Any) -> State:
    state = {
        "w": torch.tensor([1.0, -2.0]),
        "p": torch.zeros(2),
        "n": torch.tensor(0),
        "mean": torch.tensor([0.5, -1.0]),
        "var": torch.tensor([1.0, 0.25]),
        "images": torch.tensor(0.0),
        "discount": torch.tensor(0.0, dtype=torch.float64),
        "faded": torch.zeros(2),
        "rows": torch.tensor(0),
        "mode": torch.tensor(0),
        "optimizer.first": torch.zeros(0),
    }
    return state | {name: torch.as_tensor(value, dtype=state[name].dtype) for name, value in leaves.items()}


class Lesson(NamedTuple):
    """What a replica meets between two states."""

    step: float
    rows: int
    share: float  # the first class's
    kept: float  # of the past images
    images: float
    value: float  # what the images and the fading mean are about
    anew: bool = False
    mode: int = 0


def learn(state: Mapping[str, Tensor], lesson: Lesson) -> State:
    """One lesson, as an adapter would take it: in float32."""
    if not lesson.rows:
        return dict(state)
    new = dict(state)
    new["w"] = state["w"] + lesson.step * torch.tensor([1.0, 0.5])
    new["n"] = state["n"] + lesson.rows
    share = torch.tensor([lesson.share, 1 - lesson.share])
    new["p"] = torch.lerp(state["p"], share, 0.3) if state["p"].any() else share
    past = lesson.kept * state["images"]
    weight = lesson.images / (past + lesson.images).clamp(min=1e-30)
    between = lesson.value - state["mean"]
    new["mean"] = state["mean"] + weight * between
    new["var"] = (1 - weight) * state["var"] + weight * 0.5 + weight * (1 - weight) * between.square()
    new["images"] = (past + lesson.images).clamp(max=IMAGES_MAX)
    left = past / state["images"] * new["images"] / (past + lesson.images) if state["images"] > 0 else torch.tensor(1.0)
    new["discount"] = state["discount"] - left.double().log()
    faded, rows = (torch.zeros(2), 0) if lesson.anew else (state["faded"], int(state["rows"]))
    new["faded"] = torch.lerp(faded, torch.tensor([abs(lesson.value), 1.0]), 1 - math.exp(-lesson.rows / MEMORY))
    new["rows"] = torch.tensor(rows + lesson.rows)
    new["mode"] = torch.tensor(lesson.mode)
    return new


def contributions_of(state: State, chains: Sequence[tuple[str, bool, Sequence[tuple[int, Lesson]]]]) -> list[Any]:
    """Each replica's, from the same state; one that was told to goes on from what it has learned itself."""
    found = []
    for replica, goes_on, lessons in chains:
        base = state
        for sequence, lesson in lessons:
            found.append(Contribution(replica, sequence, base, learn(base, lesson)))
            base = found[-1].state if goes_on else state
    return found


def merge(state: State, contributions: Sequence[Contribution], window: int = 2) -> Merged:
    merged = Merged(state)
    for each in contributions:
        merged = contribute(MERGING, merged, each, window=window)
    return merged


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), (name, found[name], expected[name])


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        if expected[name].is_floating_point():
            torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)
        else:
            assert torch.equal(found[name], expected[name]), name


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


lessons = st.builds(
    Lesson,
    step=numbers(-0.5, 0.5),
    rows=st.integers(0, 100),
    share=numbers(0, 1),
    kept=numbers(0.125, 1),
    images=numbers(0.5, 32),
    value=numbers(-2, 2),
    anew=st.just(False),
    mode=st.integers(0, 2),
)
lessons_anew = st.tuples(lessons, st.booleans()).map(lambda drawn: drawn[0]._replace(anew=drawn[1]))
states = st.builds(lambda past: learn(new_state(), past), lessons)


def in_window(lesson: st.SearchStrategy[Lesson]) -> st.SearchStrategy[Any]:
    """Up to three replicas, each with up to two sequences of two; some go on from what they have learned."""
    own = st.lists(st.tuples(st.sampled_from([5, 6]), lesson), max_size=2, unique_by=lambda each: each[0])
    chain = st.tuples(st.booleans(), own.map(lambda each: sorted(each, key=lambda one: one[0])))
    return st.tuples(chain, chain, chain).map(
        lambda drawn: [(name, *each) for name, each in zip("abc", drawn, strict=True)]
    )


@settings(deadline=None)
@given(states, in_window(lessons_anew), st.data())
def test_the_order_of_arrival_changes_nothing_and_nothing_is_taken_twice(state: State, chains: Any, data: Any) -> None:
    contributions = contributions_of(state, chains)
    expected = merge(state, contributions)
    order = data.draw(st.permutations(contributions))
    merged = merge(state, order)
    assert_near(merged.state, expected.state)
    assert [(each.sequence, each.replicas) for each in merged.rounds] == [
        (each.sequence, each.replicas) for each in expected.rounds
    ]
    for again in contributions:
        assert contribute(MERGING, merged, again, window=2) is merged


@settings(deadline=None)
@given(states, in_window(lessons))
def test_what_is_merged_is_sound(state: State, chains: Any) -> None:
    contributions = contributions_of(state, chains)
    merged = merge(state, contributions).state
    assert merged["n"] == state["n"] + sum(each.state["n"] - each.base["n"] for each in contributions)
    assert merged["rows"] == state["rows"] + sum(each.state["rows"] - each.base["rows"] for each in contributions)
    assert merged["p"].sum().item() == pytest.approx(1 if merged["n"] else 0, abs=1e-6)
    assert (merged["p"] >= 0).all()
    assert (merged["var"] >= 0).all()
    assert 0 <= merged["images"] <= IMAGES_MAX
    weight = 1 - math.exp(-int(merged["rows"]) / MEMORY)  # the second number is 1 in every row
    assert merged["faded"][1].item() == pytest.approx(weight, abs=2e-6)


@settings(deadline=None)
@given(states, in_window(lessons))
def test_a_merged_state_survives_being_stored(state: State, chains: Any) -> None:
    merged = merge(state, contributions_of(state, chains))
    tensors, record = merged.encode()
    found = Merged.decode(load(save(tensors)), json.loads(json.dumps(record)))
    assert_equal(found.state, merged.state)
    assert [each[:2] for each in found.rounds] == [each[:2] for each in merged.rounds]
    late = Contribution("d", 5, state, learn(state, Lesson(0.25, 7, 0.5, 0.5, 4.0, 1.0)))
    assert_equal(
        contribute(MERGING, found, late, window=2).state,
        contribute(MERGING, merged, late, window=2).state,
    )


@settings(deadline=None)
@given(states, st.lists(lessons, min_size=1, max_size=4), st.sampled_from([0, 1, 2]))
def test_alone_is_exact(state: State, met: list[Lesson], window: int) -> None:
    merged = Merged(state)
    for sequence, lesson in enumerate(met):
        after = learn(merged.state, lesson)
        merged = contribute(MERGING, merged, Contribution("a", sequence, merged.state, after), window=window)
        assert_equal(merged.state, after)
    assert len(merged.rounds) <= window


@settings(deadline=None)
@given(states, lessons)
def test_twins_do_not_overshoot(state: State, lesson: Lesson) -> None:
    after = learn(state, lesson)
    merged = merge(state, [Contribution(replica, 5, state, after) for replica in ("a", "b")]).state
    assert_near({n: merged[n] for n in ("w", "p", "mode")}, {n: after[n] for n in ("w", "p", "mode")})
    assert merged["n"] == after["n"] + lesson.rows


@settings(deadline=None)
@given(states, lessons, lessons)
def test_nothing_learned_is_the_identity(state: State, first: Lesson, second: Lesson) -> None:
    merged = merge(state, [Contribution("a", 5, state, learn(state, first))])
    other = learn(state, second)
    assert contribute(MERGING, merged, Contribution("b", 5, other, other), window=2) is merged
    assert_equal(rebase(MERGING, merged.state, other, other), merged.state)
    assert_equal(rebase(MERGING, state, state, other), other)


def test_steps_are_averaged_by_rows_in_a_sequence_and_add_up_over_sequences() -> None:
    base = new_state()
    a = Contribution("a", 5, base, base | {"w": torch.tensor([2.0, -2.0]), "n": torch.tensor(30)})
    b = Contribution("b", 5, base, base | {"w": torch.tensor([5.0, -6.0]), "n": torch.tensor(10)})
    merged = merge(base, [a, b])
    assert merged.state["w"].tolist() == [2.75, -3.0]  # 1 + (30 · 1 + 10 · 4)/40, −2 + (30 · 0 − 10 · 4)/40
    assert merged.state["n"].item() == 40
    assert merge(base, [a, b._replace(sequence=6)]).state["w"].tolist() == [6.0, -6.0]


def test_a_step_without_rows_weighs_as_one_row_and_rows_without_a_step_hold_back() -> None:
    base = new_state()
    pulled = Contribution("a", 5, base, base | {"w": torch.tensor([0.0, 0.0])})
    held = Contribution("b", 5, base, base | {"n": torch.tensor(3)})
    assert merge(base, [pulled, held]).state["w"].tolist() == [0.75, -1.5]


def test_moments_by_hand() -> None:
    base = new_state(images=4.0, mean=[0.0, 0.0], var=[1.0, 1.0])
    # half of the past, and 2 images about 4 without a variance
    a = base | new_state(images=4.0, mean=[2.0, 2.0], var=[4.5, 4.5], discount=math.log(2))
    # all of the past, and 4 images about −2 with a variance of 1
    b = base | new_state(images=8.0, mean=[-1.0, -1.0], var=[2.0, 2.0])
    rule = Pooled("mean", "var", "images", "discount", images_max=6.0)
    of_a, of_b = rule.learned("a", base, a), rule.learned("b", base, b)
    assert of_a is not None
    assert of_b is not None
    assert of_a.numbers["images"] == pytest.approx(2)
    assert of_a.tensors["mean"].tolist() == pytest.approx([4.0, 4.0])
    assert of_a.tensors["var"].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert (of_b.numbers["images"], of_b.tensors["mean"].tolist()) == (4.0, [-2.0, -2.0])
    found = rule.onto(base, rule.together(of_a, of_b))
    assert found["mean"].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)  # (2 · 0 + 2 · 4 − 4 · 2)/8
    assert found["var"].tolist() == pytest.approx([6.75, 6.75])  # (2 · 1 + 2 · 16 + 4 · (1 + 4))/8
    assert found["images"].item() == 6.0
    assert found["discount"].item() == pytest.approx(math.log(2) + math.log(8 / 6))


def test_a_fading_mean_by_hand() -> None:
    rule = Fading(("faded",), rows="rows", memory_rows=10.0)

    def after(base: State, rows: int, value: float) -> State:
        faded = torch.lerp(base["faded"], torch.tensor([value, value]), 1 - math.exp(-rows / 10))
        return base | {"faded": faded, "rows": base["rows"] + rows}

    base = after(new_state(), 5, 1.0)
    of_a, of_b = rule.learned("a", base, after(base, 5, 1.0)), rule.learned("b", base, after(base, 10, 3.0))
    assert of_a is not None
    assert of_b is not None
    found = rule.onto(base, rule.together(of_a, of_b))
    # 0.3935 of 1, faded to e^−1.5 = 0.2231; the new rows weigh 0.3935 and 0.6321: their mean is 2.2327
    assert found["rows"].item() == 20
    assert found["faded"][0].item() == pytest.approx(0.3935 * 0.2231 + 0.7769 * 2.2327, abs=2e-4)

    anew = rule.learned("a", base, after(new_state(), 2, 7.0))  # a guard has forgotten what it had compared
    assert anew is not None
    found = rule.onto(base, rule.together(of_b, anew))
    assert found["rows"].item() == 12
    mean = (0.6321 * 3 + 0.1813 * 7) / (0.6321 + 0.1813)
    assert found["faded"][0].item() == pytest.approx((1 - math.exp(-1.2)) * mean, abs=2e-4)


def test_a_long_memory_that_was_begun_anew_is_forgotten() -> None:
    base = new_state(rows=10**6, faded=[1.0, 1.0])
    for rows, faded in ((0, 0.0), (3, 0.05), (10**6, 0.5), (10**6 + 3, 0.5)):
        state = base | new_state(rows=rows, faded=[faded, faded])
        other = Contribution("a", 5, base, base | {"rows": base["rows"] + 20})
        merged = merge(base, [other, Contribution("b", 5, base, state)]).state
        assert merged["rows"].item() == rows + 20
        assert_near(merge(base, [Contribution("b", 5, base, state)]).state, state)


def test_of_other_leaves_the_latest_sequence_and_then_the_largest_name_counts() -> None:
    base = new_state()
    a, b, c = (Contribution(name, 5, base, base | {"mode": torch.tensor(i)}) for i, name in enumerate("abc", start=1))
    assert merge(base, [c, a, b]).state["mode"].item() == 3
    assert merge(base, [a._replace(sequence=6), c]).state["mode"].item() == 1
    silent = Contribution("z", 6, base, base | {"n": torch.tensor(1)})  # has not changed it
    assert merge(base, [a, silent]).state["mode"].item() == 1


def test_an_average_that_one_replica_does_not_know_yet_is_the_others() -> None:
    base = new_state()
    knows = Contribution("a", 5, base, base | {"p": torch.tensor([0.25, 0.75]), "n": torch.tensor(1)})
    does_not = Contribution("b", 5, base, base | {"n": torch.tensor(99)})
    assert merge(base, [knows, does_not]).state["p"].tolist() == [0.25, 0.75]


def test_what_is_older_than_the_window_is_dropped() -> None:
    base = new_state()
    merged = merge(base, [Contribution("a", 7, base, learn(base, Lesson(0.5, 1, 0.5, 1.0, 1.0, 0.0)))])
    late = Contribution("b", 5, base, learn(base, Lesson(0.25, 1, 0.5, 1.0, 1.0, 0.0)))
    assert merged.newest == 7
    assert contribute(MERGING, merged, late, window=2) is merged
    taken = contribute(MERGING, merged, late._replace(sequence=6), window=2)
    assert [each.sequence for each in taken.rounds] == [6, 7]
    assert taken.state["w"].tolist() == [1.75, -1.625]


def test_with_a_window_of_0_nothing_but_the_state_is_kept() -> None:
    base = new_state()
    merged = merge(base, [Contribution("a", 5, base, learn(base, Lesson(0.5, 1, 0.5, 1.0, 1.0, 0.0)))], window=0)
    tensors, record = merged.encode()
    assert (merged.rounds, merged.newest, record) == ((), None, {"rounds": []})
    assert_equal(tensors, merged.state)
    other = Contribution("b", 5, base, learn(base, Lesson(0.25, 1, 0.5, 1.0, 1.0, 0.0)))
    assert contribute(MERGING, merged, other, window=0).state["w"].tolist() == [1.75, -1.625]


def test_a_change_of_optimizer_moments_alone_teaches_nothing() -> None:
    base = new_state()
    moved = base | {"optimizer.first": torch.ones(2)}
    merged = merge(base, [Contribution("a", 5, base, moved)])
    assert_equal(merged.state, base)
    assert_equal(rebase(MERGING, base, base, moved), base)
    learned = learn(base, Lesson(0.5, 1, 0.5, 1.0, 1.0, 0.0)) | {"optimizer.first": torch.ones(2)}
    assert_equal(merge(base, [Contribution("a", 5, base, learned)]).state, learned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["base", "state"])
def test_what_is_not_finite_is_refused(value: float, where: str) -> None:
    base = new_state()
    sound = Contribution("a", 5, base, learn(base, Lesson(0.5, 1, 0.5, 1.0, 1.0, 0.0)))
    spoilt = sound._replace(**{where: dict(getattr(sound, where)) | {"var": torch.tensor([1.0, value])}})
    with pytest.raises(ValueError, match="these leaves are not finite: var"):
        contribute(MERGING, Merged(base), spoilt, window=2)
    with pytest.raises(ValueError, match="these leaves are not finite: var"):
        rebase(MERGING, base, spoilt.base, spoilt.state)


def test_states_that_do_not_fit_are_refused() -> None:
    base = new_state()
    short = {name: leaf for name, leaf in base.items() if name != "mode"}
    with pytest.raises(ValueError, match="not in every state: mode"):
        contribute(MERGING, Merged(base), Contribution("a", 5, base, short), window=2)
    with pytest.raises(ValueError, match="several shapes or dtypes: w"):
        contribute(MERGING, Merged(base), Contribution("a", 5, base, base | {"w": torch.zeros(3)}), window=2)
    with pytest.raises(ValueError, match="not in every state: absent"):
        rebase(Merging((Totals(("absent",)),)), base, base, base)
    with pytest.raises(ValueError, match="several rules name the same leaves: n"):
        rebase(MERGING.joined(Merging((Latest("n"),))), base, base, base)


def test_a_record_without_its_tensors_is_refused() -> None:
    base = new_state()
    merged = merge(base, [Contribution("a", 5, base, learn(base, Lesson(0.5, 1, 0.5, 1.0, 1.0, 0.0)))])
    tensors, record = merged.encode()
    del tensors["rounds/5/learned0/float32"]
    with pytest.raises(ValueError, match=r"this is no merged state: KeyError\('rounds/5/learned0/float32'\)"):
        Merged.decode(tensors, record)


def test_the_rules_of_a_pipeline_name_leaves_of_its_state(build: Build) -> None:
    network = Network(build("batch_norm_2d"))
    translator = Translator(TranslatorConfig(3, width=4, depth=1))
    modtr = ModTr(translator, lambda images, _: torch.stack(list(images)).sum())
    pipeline = Pipeline(network, input=modtr, norm=Guarded(EATA(network, 4, config=EATAConfig(anchor="l2"))))
    leaves = tree.encode(pipeline.init())
    merging = pipeline.merging()
    merging.check(leaves)
    named = {leaf for rule in merging.rules for leaf in rule.leaves}
    assert {"input.scale", "norm.inner.params", "norm.compared.rows"} <= named
    assert leaves.keys() - named - set(merging.local) == {
        "norm.inner.source_images",
        "norm.none_selected",
        "norm.all_selected",
    }
    assert merging.local == tuple(name for name in leaves if ".optimizer." in name)
    assert merging.local == tuple(
        f"{where}.optimizer.{f}" for where in ("input", "norm.inner") for f in ("step", "first", "second")
    )


def evidence(build: Build) -> EATA:
    config = EATAConfig(anchor="l2", statistics="evidence", class_mix=0.0, stream_images_max=24.0)
    return EATA(Network(build("batch_norm_2d")), 4, config=config)


def absorb(adapter: EATA, state: State, rows: int, start: float, between: bool) -> State:
    """A request of so many rows, whose statistics are a formula's; `between` lets it contradict the past."""
    place = torch.arange(adapter.network.channels) + start
    own = Moments(
        place.sin().unsqueeze(0), (2 + place.cos()).unsqueeze(0), 0.1 * torch.ones(1, len(place)) if between else None
    )
    states = tree.stack([tree.decode(adapter.init(), state)])
    return tree.encode(tree.row(adapter.absorb(states, torch.tensor([0]), Groups.of((rows,)), own), 0))


def test_statistics_of_two_replicas_are_those_of_one_that_saw_both(build: Build) -> None:
    adapter = evidence(build)
    base = absorb(adapter, tree.encode(adapter.init()), 8, 0.0, between=False)
    a, b = absorb(adapter, base, 4, 1.0, between=False), absorb(adapter, base, 12, 2.0, between=False)
    merged = Merged(base)
    for replica, state in (("a", a), ("b", b)):
        merged = contribute(adapter.merging(), merged, Contribution(replica, 5, base, state), window=2)
    assert merged.state["images"].item() == 24.0
    assert_near(merged.state, absorb(adapter, a, 12, 2.0, between=False))


@pytest.mark.parametrize("warm", [0, 20])
def test_what_a_replica_saw_is_told_from_a_past_that_was_discounted_and_capped(warm: int, build: Build) -> None:
    adapter = evidence(build)
    base = (
        absorb(adapter, tree.encode(adapter.init()), warm, 0.0, between=False) if warm else tree.encode(adapter.init())
    )
    state = absorb(adapter, base, 16, 3.0, between=True)
    rule = next(rule for rule in adapter.merging().rules if isinstance(rule, Pooled))
    part = rule.learned("a", base, state)
    assert part is not None
    place = torch.arange(adapter.network.channels) + 3.0
    torch.testing.assert_close(part.tensors["mean"], place.sin(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.tensors["var"], 2 + place.cos(), rtol=1e-4, atol=1e-5)
    assert part.numbers["images"] == pytest.approx(16.0, rel=1e-4)
    assert (state["discount"] > 0.1) == bool(warm)


def test_states_at_rest_are_merged_as_they_are(build: Build) -> None:
    adapter = evidence(build)
    base = tree.encode(optim.rest(adapter.init()))
    moved = base | {"params": base["params"] + 1, "selected": torch.tensor(5)}
    merged = Merged(base)
    for replica in ("a", "b"):
        merged = contribute(adapter.merging(), merged, Contribution(replica, 5, base, moved), window=2)
    assert merged.state["optimizer.first"].shape == (0,)
    assert torch.equal(merged.state["params"], moved["params"])
    assert merged.state["selected"].item() == 10
