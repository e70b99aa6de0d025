"""The laws of every adapter (`base.py`, in prose), as a suite to run on your own.

`check_adapter` takes a way to build a pipeline and some images, plays a batch of four requests of two streams on a
table of four states, and raises an `AssertionError` that names the first law broken. One function a law; its docstring
is the law.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters import tree
from adapters.base import Batch, Groups, Output, Pipeline, PipelineState, Report
from adapters.claims import equal_bits, near, reachable, require, same, unchanged
from adapters.detection import Boxes
from adapters.merge_rules import Fading, Pooled
from adapters.merging import Contribution, Merged, contribute, rebase

STREAMS = (2, 0, 2, 0)  # whose request each of the four is; of the table's rows 0 … 3, 1 and 3 stay without data
ACTIVE, IDLE = (0, 2), (1, 3)
MERGED = 1e-6  # largest difference between two orders of arrival, absolute or relative
MIN_ROWS = 16  # requests of 8, 1, 3 and all other rows: on both sides of every threshold that an adapter may have


def check_adapter(
    make: Callable[[], Pipeline],
    x: Tensor,
    *,
    targets: Tensor | None = None,
    boxes: Sequence[Boxes] | None = None,
    learns: bool = True,
    guarded: bool = False,
    tolerance: float = 1e-5,
    laws: Sequence[str] | None = None,
) -> None:
    """Prove the laws of adapters on a pipeline.

    Sums must come in one order for results to be equal bit by bit: run it on the CPU, with few rows or one thread.

    Args:
        make: builds the pipeline with the adapter at its site; called once for each law.
        x: at least 16 rows, [B, …], different enough that every adapter that learns does learn from them.
        targets: labels, for adapters that learn from feedback, [B, …].
        boxes: of each of the B images, for those that learn from boxes.
        learns: whether the adapter shall learn from `x`; a law too, for a suite in which nothing moves proves nothing.
        guarded: whether the adapter promises finite states whatever it is given (`Guarded`).
        tolerance: largest difference, absolute or relative, where laws allow one.
        laws: names out of `LAWS`; None: all.

    Raises:
        AssertionError: a law is broken; says which, and by what.
        ValueError: fewer than 16 rows, or a law that does not exist.

    >>> from torch import nn
    >>> from adapters import Network, Pipeline, Source
    >>> def frozen() -> Pipeline:
    ...     network = Network(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    ...     return Pipeline(network, norm=Source(network))
    >>> check_adapter(frozen, torch.eye(4).repeat(4, 1), learns=False)
    """
    if len(x) < MIN_ROWS:
        raise ValueError(f"the laws need at least {MIN_ROWS} rows, not {len(x)}")
    for name in LAWS if laws is None else laws:
        if name not in _LAWS:
            raise ValueError(f"no law is called {name!r}; there are: {', '.join(LAWS)}")
        law = _LAWS[name]
        try:
            law(_case(make, x, targets, boxes, learns, guarded, tolerance))
        except Exception as error:
            found = str(error) if isinstance(error, AssertionError) else repr(error)
            raise AssertionError(
                f"law {name!r} is broken: {' '.join((law.__doc__ or '').split())} Found: {found}"
            ) from error


class _Case(NamedTuple):
    """A pipeline, and a table of four states of which 0 and 1 have learned already and 2 and 3 are new."""

    pipeline: Pipeline
    states: PipelineState
    x: Tensor
    targets: Tensor | None
    boxes: tuple[Boxes, ...] | None
    learns: bool
    guarded: bool
    tolerance: float

    @property
    def sizes(self) -> tuple[int, ...]:
        return (8, 1, 3, len(self.x) - 12)


def _case(
    make: Callable[[], Pipeline],
    x: Tensor,
    targets: Tensor | None,
    boxes: Sequence[Boxes] | None,
    learns: bool,
    guarded: bool,
    tolerance: float,
) -> _Case:
    pipeline = make()
    fresh = tree.stack([pipeline.init() for _ in range(4)])
    known = None if boxes is None else tuple(boxes)
    case = _Case(pipeline, fresh, x, targets, known, learns, guarded, tolerance)
    backwards = torch.arange(len(x), device=x.device).flip(0)
    warm = case._replace(x=x[backwards], targets=_at(targets, backwards), boxes=_boxes_at(known, backwards))
    rows, batch = _play(warm, streams=(1, 0, 1, 0))
    states, _ = pipeline.adapt(fresh, rows, batch)
    return case._replace(states=states)


def _play(
    case: _Case,
    requests: Sequence[int] = (0, 1, 2, 3),
    *,
    streams: Sequence[int] = STREAMS,
    weights: Sequence[float] = (1, 1, 1, 1),
) -> tuple[Tensor, Batch]:
    """Rows and batch of some of the four requests: request g is `streams[g]`'s, and its rows weigh `weights[g]`."""
    x, sizes = case.x, case.sizes
    place = torch.cat([torch.arange(sum(sizes[:g]), sum(sizes[: g + 1])) for g in requests]).to(x.device)
    counts = torch.tensor([sizes[g] for g in requests])
    rows = torch.tensor([streams[g] for g in requests]).repeat_interleave(counts).to(x.device)
    weight = torch.tensor([weights[g] for g in requests], dtype=x.dtype).repeat_interleave(counts).to(x.device)
    groups = Groups.of(tuple(sizes[g] for g in requests), x.device)
    output = case.pipeline.predict(case.states, rows, groups, x[place])
    targets, boxes = _at(case.targets, place), _boxes_at(case.boxes, place)
    return rows, Batch(x[place], groups, weight, output, targets=targets, boxes=boxes)


def _at(targets: Tensor | None, place: Tensor) -> Tensor | None:
    return None if targets is None else targets[place]


def _boxes_at(boxes: tuple[Boxes, ...] | None, place: Tensor) -> tuple[Boxes, ...] | None:
    return None if boxes is None else tuple(boxes[i] for i in place.tolist())


def _adapt(case: _Case, **how: Any) -> tuple[PipelineState, Report]:
    return case.pipeline.adapt(case.states, *_play(case, **how))


def _predict(case: _Case, **how: Any) -> Output:
    output = _play(case, **how)[1].output
    assert output is not None
    return output


def _alone(case: _Case, stream: int) -> _Case:
    """The same case with a table of one: that stream's state."""
    return case._replace(states=tree.apply(lambda leaf: leaf[stream : stream + 1], case.states))


def _init_is_constant(case: _Case) -> None:
    """`init()` gives the same value bit for bit, before and after adapting: it is the reset."""
    first = case.pipeline.init()
    _adapt(case)
    same("init()", case.pipeline.init(), first)


def _layout_is_kept(case: _Case) -> None:
    """`adapt` gives a table of the same names, shapes and dtypes, without a graph, and a report of one length."""
    new, report = _adapt(case)
    old = dict(tree.leaves(case.states))
    for name, leaf in tree.leaves(new):
        before = old.pop(name, None)
        require(before is not None, f"{name} is new")
        assert before is not None
        now, then = (leaf.shape, leaf.dtype, leaf.device), (before.shape, before.dtype, before.device)
        require(now == then, f"{name} was {then}, is {now}")
        require(not leaf.requires_grad, f"{name} carries a graph")
    require(not old, f"{', '.join(old)} is gone")
    lengths = {field.shape[:1] for field in report}
    require(len(lengths) == 1, f"the report's fields have lengths {lengths}")


def _adapt_changes_no_argument(case: _Case) -> None:
    """`adapt` changes neither its arguments nor anything reachable from the pipeline."""
    rows, batch = _play(case)
    everything = {"pipeline": case.pipeline, "states": case.states, "rows": rows, "batch": batch}
    before = dict(reachable(everything))
    case.pipeline.adapt(case.states, rows, batch)
    unchanged(before, dict(reachable(everything)))


def _adapt_is_deterministic(case: _Case) -> None:
    """`adapt` gives the same bits for the same arguments, and draws nothing from the global random generator."""
    rows, batch = _play(case)
    generator = torch.get_rng_state()
    first = case.pipeline.adapt(case.states, rows, batch)
    second = case.pipeline.adapt(case.states, rows, batch)
    same("the new states", second[0], first[0])
    same("the report", second[1], first[1])
    require(torch.equal(torch.get_rng_state(), generator), "the global random generator was drawn from")


def _predict_is_pure(case: _Case) -> None:
    """`predict` gives the same bits for the same arguments, changes nothing and leaves no graph."""
    rows, batch = _play(case)
    everything = {"pipeline": case.pipeline, "states": case.states, "rows": rows, "batch": batch}
    before = dict(reachable(everything))
    first = case.pipeline.predict(case.states, rows, batch.groups, batch.x)
    second = case.pipeline.predict(case.states, rows, batch.groups, batch.x)
    same("the answer", second.logits, first.logits)
    unchanged(before, dict(reachable(everything)))
    require(not first.logits.requires_grad, "the answer carries a graph")


def _streams_are_independent(case: _Case) -> None:
    """A stream ends, and is reported, in a mixed batch as it is alone."""
    mixed, report = _adapt(case)
    for stream in ACTIVE:
        own = [request for request, owner in enumerate(STREAMS) if owner == stream]
        state, alone = _adapt(_alone(case, stream), requests=own, streams=(0, 0, 0, 0))
        near(f"stream {stream}", tree.row(mixed, stream), tree.row(state, 0), case.tolerance)
        near(f"the report on stream {stream}", tree.row(report, stream), tree.row(alone, 0), case.tolerance)


def _idle_streams_keep_every_bit(case: _Case) -> None:
    """Rows of the table without data keep their values bit for bit."""
    new, _ = _adapt(case)
    for stream in IDLE:
        same(f"stream {stream}", tree.row(new, stream), tree.row(case.states, stream))


def _answers_are_independent(case: _Case) -> None:
    """A request's answer in a mixed batch is its answer alone."""
    mixed = torch.split(_predict(case).logits, list(case.sizes))
    for request, stream in enumerate(STREAMS):
        alone = _predict(_alone(case, stream), requests=[request], streams=(0, 0, 0, 0))
        near(f"request {request}", mixed[request], alone.logits, case.tolerance)


def _order_does_not_matter(case: _Case) -> None:
    """Rows in another order get the same answers and teach the same."""
    rows, batch = _play(case)
    assert batch.output is not None
    order = torch.arange(len(rows), device=rows.device)
    order = torch.cat([order[1::2], order[::2].flip(0)])
    groups = batch.groups._replace(index=batch.groups.index[order])
    output = case.pipeline.predict(case.states, rows[order], groups, batch.x[order])
    near("the answers", output.logits, batch.output.logits[order], case.tolerance)
    targets, boxes = _at(batch.targets, order), _boxes_at(batch.boxes, order)
    shuffled = Batch(batch.x[order], groups, batch.weights[order], output, targets=targets, boxes=boxes)
    expected, _ = case.pipeline.adapt(case.states, rows, batch)
    new, _ = case.pipeline.adapt(case.states, rows[order], shuffled)
    near("the new states", new, expected, case.tolerance)


def _weight_zero_teaches_nothing(case: _Case) -> None:
    """Where every row weighs 0, all states keep every bit, and the report has seen nothing."""
    new, report = _adapt(case, weights=(0, 0, 0, 0))
    same("the states", new, case.states)
    require(not (report.seen.any() or report.selected.any() or report.applied.any()), f"the report says {report}")


def _weight_zero_is_absence(case: _Case) -> None:
    """A request whose rows all weigh 0 might as well not be in the batch."""
    new, _ = _adapt(case, weights=(1, 1, 0, 0))
    expected, _ = _adapt(case, requests=(0, 1))
    near("the new states", new, expected, case.tolerance)


def _one_row_is_enough(case: _Case) -> None:
    """A batch of one row is answered and learned from with finite numbers, by a new stream and by an old one."""
    for stream in ACTIVE:
        single = {"requests": [1], "streams": (stream,) * 4}
        logits = _predict(case, **single).logits
        require(len(logits) == 1 and bool(logits.isfinite().all()), f"stream {stream} is answered {logits}")
        new, _ = _adapt(case, **single)
        require(_finite(new), f"the state of stream {stream} is not finite")


def _nan_stays_where_it_is(case: _Case) -> None:
    """Rows of NaN change no other request's answer and no other stream's state; a guarded state stays finite."""
    x = case.x.clone()
    x[9:12] = float("nan")  # the third request, of stream 2
    poisoned = case._replace(x=x)
    answers, expected = (torch.split(_predict(each).logits, list(case.sizes)) for each in (poisoned, case))
    for request in (0, 1, 3):
        near(f"the answer to request {request}", answers[request], expected[request], case.tolerance)
    new, clean = _adapt(poisoned)[0], _adapt(case)[0]
    near("stream 0", tree.row(new, 0), tree.row(clean, 0), case.tolerance)
    for stream in IDLE:
        same(f"stream {stream}", tree.row(new, stream), tree.row(case.states, stream))
    require(not case.guarded or _finite(new), "the guarded state of stream 2 is not finite")


def _encoding_keeps_every_bit(case: _Case) -> None:
    """A state, new or old, survives `tree.encode` and `tree.decode` bit for bit, as tensors that share no memory."""
    like = case.pipeline.init()
    for state in (like, *(tree.row(_adapt(case)[0], stream) for stream in range(4))):
        tensors = tree.encode(state)
        require(len(tensors) == len(list(tree.leaves(state))), "two leaves have one name")
        places = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
        require(len(set(places)) == len(places), "two leaves share their memory")
        same("the decoded state", tree.decode(like, tensors), state)


def _device_and_dtype_come_from_tensors(case: _Case) -> None:
    """Neither the default device nor the default dtype has a say in states and answers."""
    rows, batch = _play(case)
    states, _ = case.pipeline.adapt(case.states, rows, batch)
    start, default = case.pipeline.init(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if default != torch.float64 else torch.float32)
    try:
        with torch.device("meta"):
            new, report = case.pipeline.adapt(case.states, rows, batch)
            output = case.pipeline.predict(case.states, rows, batch.groups, batch.x)
            init = case.pipeline.init()
    finally:
        torch.set_default_dtype(default)
    assert batch.output is not None
    same("init()", init, start)
    same("the new states", new, states)
    same("the answer", output.logits, batch.output.logits)
    for name, field in tree.leaves(report):
        require(field.device == batch.x.device, f"the report's {name} is on {field.device}")


def _learns_as_promised(case: _Case) -> None:
    """Where the adapter shall learn, both streams with data do; where it shall not, no state moves."""
    new, report = _adapt(case)
    for stream in ACTIVE:
        pairs = zip(tree.leaves(tree.row(new, stream)), tree.leaves(tree.row(case.states, stream)), strict=True)
        moved = any(a.is_floating_point() and not equal_bits(a, b) for (_, a), (_, b) in pairs)
        require(moved == case.learns, f"stream {stream} {'moved' if moved else 'did not move'}")
        applied = bool(report.applied[stream])
        require(applied == case.learns, f"the report says that stream {stream} took {'a' if applied else 'no'} step")


def _merging_takes_a_contribution_once(case: _Case) -> None:
    """A contribution that comes again changes nothing, also where the merged state was stored in between."""
    merging, (merged, contributions) = case.pipeline.merging(), _contributions(case)
    for number, each in enumerate(contributions):
        merged = contribute(merging, merged, each, window=2)
        stored = Merged.decode(*merged.encode())
        for again in contributions[: number + 1]:
            require(contribute(merging, merged, again, window=2) is merged, f"{again[:2]} was taken twice")
            require(contribute(merging, stored, again, window=2) is stored, f"{again[:2]} was taken twice once stored")


def _merging_order_does_not_matter(case: _Case) -> None:
    """Contributions of the last two intervals give the same state in any order: counts exactly, floats to 1e-6."""
    start, contributions = _contributions(case)
    expected = None
    for order in itertools.islice(itertools.permutations(contributions), 0, None, 5):
        merged = start
        for each in order:
            merged = contribute(case.pipeline.merging(), merged, each, window=2)
        state = tree.decode(case.pipeline.init(), dict(merged.state))
        expected = state if expected is None else expected
        near(f"the state after {[each[:2] for each in order]}", state, expected, MERGED)


def _learning_nothing_merges_to_nothing(case: _Case) -> None:
    """Where nothing was learned, the merged state keeps every bit; so does a state that it is put onto."""
    merging, (merged, contributions) = case.pipeline.merging(), _contributions(case)
    for each in contributions:
        nothing = each._replace(state=each.base, sequence=7)
        require(contribute(merging, merged, nothing, window=2) is merged, "nothing was learned, and something merged")
        _same_encoded("the state put onto", rebase(merging, each.state, each.base, each.base), each.state)


def _merging_alone_is_exact(case: _Case) -> None:
    """Where only one replica has learned, the merged state is that replica's, bit for bit; so is the rebased one."""
    merging, (start, contributions) = case.pipeline.merging(), _contributions(case)
    own = [each for each in contributions if each.replica == "a"]
    for window in (0, 2):
        merged = start
        for each in own:
            merged = contribute(merging, merged, each, window=window)
            _same_encoded(f"the merged state, window {window}", merged.state, each.state)
    for each in own:
        _same_encoded("the rebased state", rebase(merging, each.base, each.base, each.state), each.state)


def _merging_does_not_overshoot(case: _Case) -> None:
    """Two replicas that learn the same arrive where one does; counts add, and moments have seen twice as much."""
    merging, (merged, contributions) = case.pipeline.merging(), _contributions(case)
    one = contributions[0]
    for replica in ("a", "b"):
        merged = contribute(merging, merged, one._replace(replica=replica), window=2)
    of_evidence = {n for rule in merging.rules if isinstance(rule, Pooled | Fading) for n in rule.leaves}
    for name, leaf in merged.state.items():
        alone, base = one.state[name], one.base[name]
        require(bool(leaf.isfinite().all()), f"{name} is not finite")
        if leaf.is_floating_point() and name not in of_evidence:
            near(name, leaf, alone, MERGED)
        elif not leaf.is_floating_point():
            as_one, as_two = torch.equal(leaf, alone), torch.equal(leaf, alone + (alone - base))
            require(as_one or as_two, f"{name} was {base}, each has made {alone} of it, and it is {leaf}")


_LAWS: dict[str, Callable[[_Case], None]] = {
    law.__name__.removeprefix("_"): law
    for law in (
        _init_is_constant,
        _layout_is_kept,
        _adapt_changes_no_argument,
        _adapt_is_deterministic,
        _predict_is_pure,
        _streams_are_independent,
        _idle_streams_keep_every_bit,
        _answers_are_independent,
        _order_does_not_matter,
        _weight_zero_teaches_nothing,
        _weight_zero_is_absence,
        _one_row_is_enough,
        _nan_stays_where_it_is,
        _encoding_keeps_every_bit,
        _device_and_dtype_come_from_tensors,
        _learns_as_promised,
        _merging_takes_a_contribution_once,
        _merging_order_does_not_matter,
        _learning_nothing_merges_to_nothing,
        _merging_alone_is_exact,
        _merging_does_not_overshoot,
    )
}
LAWS: tuple[str, ...] = tuple(_LAWS)


def _contributions(case: _Case) -> tuple[Merged, list[Contribution]]:
    """A state, and what two replicas make of it in two intervals; each goes on from what it has learned itself."""
    found = []
    for replica, requests in (("a", (0, 2)), ("b", (3, 1))):
        state = tree.row(case.states, 0)
        for sequence, request in enumerate(requests, start=5):
            own = case._replace(states=tree.stack([state]))
            new = tree.row(_adapt(own, requests=[request], streams=(0, 0, 0, 0))[0], 0)
            found.append(Contribution(replica, sequence, tree.encode(state), tree.encode(new)))
            state = new
    return Merged(found[0].base), found


def _same_encoded(what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    require(found.keys() == expected.keys(), f"{what} has leaves {list(found)}, not {list(expected)}")
    for name in expected:
        same(f"{what}.{name}", found[name], expected[name])


def _finite(states: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for _, leaf in tree.leaves(states))
