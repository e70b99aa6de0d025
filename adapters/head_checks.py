"""The laws of every head (`heads.py`, in prose), as a suite to run on your own.

`check_head` takes a way to build a head and features whose classes are known, and raises an `AssertionError` that names
the first law broken. One function a law; its docstring is the law.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters import tree
from adapters.claims import equal_bits, near, reachable, require, same, unchanged
from adapters.heads import AnyHead, Items, NeverLearned

MIN_ITEMS = 12
MIN_CLASSES = 3
CODE_TOLERANCE = 1e-2  # of scores, where a code may have been rounded to the next number


def check_head(
    make: Callable[[], AnyHead],
    features: Tensor,
    classes: Tensor,
    *,
    tolerance: float = 1e-5,
    laws: Sequence[str] | None = None,
) -> None:
    """Prove the laws of heads.

    Args:
        make: builds the head; called once for each law.
        features: at least 12, in any order, different enough that classes can be told apart, [N, F].
        classes: of these, at least 3 different ones, int64 [N].
        tolerance: largest difference, absolute or relative, where laws allow one.
        laws: names out of `LAWS`; None: all.

    Raises:
        AssertionError: a law is broken; says which, and by what.
        ValueError: too few features or classes, or a law that does not exist.

    >>> from adapters.class_means import ClassMeans, ClassMeansPrior
    >>> check_head(lambda: ClassMeans(ClassMeansPrior(torch.zeros(3))), torch.eye(3).repeat(4, 1), torch.arange(12) % 3)
    """
    if len(features) < MIN_ITEMS or len(torch.unique(classes)) < MIN_CLASSES:
        raise ValueError(f"the laws need at least {MIN_ITEMS} features of {MIN_CLASSES} classes")
    for name in LAWS if laws is None else laws:
        if name not in _LAWS:
            raise ValueError(f"no law is called {name!r}; there are: {', '.join(LAWS)}")
        law = _LAWS[name]
        try:
            law(_case(make, features, classes, tolerance))
        except Exception as error:
            found = str(error) if isinstance(error, AssertionError) else repr(error)
            raise AssertionError(
                f"law {name!r} is broken: {' '.join((law.__doc__ or '').split())} Found: {found}"
            ) from error


class _Case(NamedTuple):
    """A head, what it shall learn, and the state after that."""

    head: AnyHead
    features: Tensor
    items: Items
    state: Any
    tolerance: float


def _case(make: Callable[[], AnyHead], features: Tensor, classes: Tensor, tolerance: float) -> _Case:
    head = make()
    items = Items(head.encode(features), classes)
    return _Case(head, features, items, head.learn(head.init(), items), tolerance)


def _at(items: Items, place: Tensor) -> Items:
    return Items(items.codes[place], items.classes[place])


def _parts(case: _Case) -> tuple[Items, Items]:
    """Two parts of the items, in their order: the second lacks one class altogether, so that the first alone has it."""
    first = torch.arange(case.items.rows, device=case.items.classes.device) % 3 == 0
    first |= case.items.classes == case.items.classes[0]
    return _at(case.items, first), _at(case.items, ~first)


def _none_of(items: Items) -> Items:
    return Items(items.codes[:0], items.classes[:0])


def _learned(case: _Case, items: Items) -> Any:
    return case.head.learn(case.head.init(), items)


def _scores(case: _Case, state: Any) -> Tensor:
    return case.head.score(case.head.read(state), case.items.codes)


def _everything(case: _Case) -> dict[str, Any]:
    """What each method gives."""
    head, (first, second) = case.head, _parts(case)
    base, own = _learned(case, first), _learned(case, second)
    table = head.read(case.state)
    return {
        "init": head.init(),
        "encode": head.encode(case.features),
        "learn": head.learn(base, second),
        "unlearn": head.unlearn(case.state, first, second),
        "merge": head.merge(base, own),
        "score": head.score(table, case.items.codes),
    }


def _init_is_constant(case: _Case) -> None:
    """`init()` gives the same value bit for bit, before and after learning."""
    first = case.head.init()
    _everything(case)
    same("init()", case.head.init(), first)


def _init_scores_no_class(case: _Case) -> None:
    """`init()` scores no class at all."""
    table = case.head.read(case.head.init())
    require(table.classes == (), f"it has the classes {table.classes}")
    shape = tuple(case.head.score(table, case.items.codes).shape)
    require(shape == (case.items.rows, 0), f"its scores have the shape {shape}")


def _codes_are_integers(case: _Case) -> None:
    """A code is a row of integers for each image: what is stored beside a label is never rounded."""
    codes = case.items.codes
    require(len(codes) == len(case.features), f"{len(case.features)} images have {len(codes)} codes")
    require(not codes.is_floating_point(), f"codes are {codes.dtype}")


def _arguments_stay(case: _Case) -> None:
    """No method changes its arguments, nor anything reachable from the head."""
    first, second = _parts(case)
    base, own = _learned(case, first), _learned(case, second)
    table = case.head.read(case.state)
    codes = case.items.codes
    calls: dict[str, tuple[Any, ...]] = {
        "encode": (case.features,),
        "learn": (base, second),
        "unlearn": (case.state, first, second),
        "merge": (base, own),
        "read": (case.state,),
        "score": (table, codes),
    }
    for name, arguments in calls.items():
        everything = {"head": case.head, name: arguments}
        before = dict(reachable(everything))
        getattr(case.head, name)(*arguments)
        unchanged(before, dict(reachable(everything)))


def _results_are_deterministic(case: _Case) -> None:
    """The same arguments give the same bits, and nothing is drawn from the global random generator."""
    generator = torch.get_rng_state()
    first, second = _everything(case), _everything(case)
    for name, result in first.items():
        same(name, second[name], result)
    require(torch.equal(torch.get_rng_state(), generator), "the global random generator was drawn from")


def _columns_are_the_classes_told(case: _Case) -> None:
    """Scores have a column for each class that has a label, ascending, and for no other; finite and without a graph."""
    first, second = _parts(case)
    for items in (first, second, case.items):
        table = case.head.read(_learned(case, items))
        told = tuple(torch.unique(items.classes).tolist())
        require(table.classes == told, f"columns are {table.classes}, told were {told}")
        images = tuple(torch.unique(items.classes, return_counts=True)[1].tolist())
        require(table.images == images, f"they are said to have {table.images} images, not {images}")
        scores = case.head.score(table, case.items.codes)
        require(tuple(scores.shape) == (case.items.rows, len(told)), f"scores have the shape {tuple(scores.shape)}")
        require(bool(scores.isfinite().all()), f"scores are {scores}")
        require(not scores.requires_grad, "scores carry a graph")


def _reading_again_changes_nothing(case: _Case) -> None:
    """`read` gives a table that scores the same, bit for bit, whatever table it may take parts of."""
    expected = _scores(case, case.state)
    backwards = _at(case.items, torch.arange(case.items.rows, device=case.items.classes.device).flip(0))
    others = (case.head.init(), *(_learned(case, part) for part in _parts(case)), case.state, _learned(case, backwards))
    for state in others:
        table = case.head.read(case.state, case.head.read(state))
        same("the scores", case.head.score(table, case.items.codes), expected)
        require(table.classes == case.head.read(case.state).classes, f"columns are {table.classes}")


def _images_are_independent(case: _Case) -> None:
    """An image's scores depend on its own code and the table alone, and its code on its own features."""
    table = case.head.read(case.state)
    together = case.head.score(table, case.items.codes)
    for i in range(case.items.rows):
        alone = case.head.score(table, case.items.codes[i : i + 1])
        near(f"image {i}", alone[0], together[i], case.tolerance)
        encoded = case.head.score(table, case.head.encode(case.features[i : i + 1]))
        near(f"image {i}, encoded alone,", encoded[0], together[i], CODE_TOLERANCE)


def _no_images_have_no_scores(case: _Case) -> None:
    """No images at all are encoded, and scored, as none."""
    codes = case.head.encode(case.features[:0])
    require(codes.shape == case.items.codes[:0].shape, f"their codes have the shape {tuple(codes.shape)}")
    table = case.head.read(case.state)
    shape = tuple(case.head.score(table, codes).shape)
    require(shape == (0, len(table.classes)), f"their scores have the shape {shape}")


def _what_is_not_finite_does_not_spread(case: _Case) -> None:
    """An image of NaN or infinity has a code like any other, with finite scores, and other images keep theirs."""
    features = case.features.clone()
    features[0], features[1] = float("nan"), float("inf")
    codes = case.head.encode(features)
    table = case.head.read(case.state)
    scores = case.head.score(table, codes)
    require(bool(scores.isfinite().all()), f"scores are {scores[:2]}")
    near("the scores of the others", scores[2:], case.head.score(table, case.items.codes)[2:], CODE_TOLERANCE)
    taught = case.head.learn(case.state, Items(codes[:2], case.items.classes[:2]))
    require(bool(_scores(case, taught).isfinite().all()), "what learned them scores with numbers that are not finite")


def _nothing_told_changes_nothing(case: _Case) -> None:
    """No items at all teach, and take away, nothing."""
    nothing = _none_of(case.items)
    same("the state", case.head.learn(case.state, nothing), case.state)
    same("the state", case.head.unlearn(case.state, nothing, case.items), case.state)


def _parts_do_not_matter(case: _Case) -> None:
    """Items told one by one teach, bit for bit, what they teach together."""
    state = case.head.init()
    for i in range(case.items.rows):
        state = case.head.learn(state, _at(case.items, slice(i, i + 1)))  # type: ignore[arg-type]
    same("the state", state, case.state)


def _order_does_not_matter(case: _Case) -> None:
    """Where `order_free`, items in any order teach the same bit for bit."""
    if not case.head.order_free:
        return
    by_class = case.items.classes.argsort(stable=True)
    for order in (by_class, by_class.flip(0), torch.arange(case.items.rows, device=by_class.device).flip(0)):
        same("the state", _learned(case, _at(case.items, order)), case.state)


def _unlearning_is_exact(case: _Case) -> None:
    """`unlearn` gives, bit for bit, the state that never saw the items: a few, a whole class, or all of them."""
    place = torch.arange(case.items.rows, device=case.items.classes.device)
    for gone in (place == 1, place % 3 == 0, case.items.classes == case.items.classes[0], place >= 0):
        items, rest = _at(case.items, gone), _at(case.items, ~gone)
        found = case.head.unlearn(case.state, items, rest)
        same("the state", found, _learned(case, rest))
        require(
            case.head.read(found).classes == tuple(torch.unique(rest.classes).tolist()), "a class without items is left"
        )


def _strangers_are_refused(case: _Case) -> None:
    """Unlearning items of a class that was never told, or more of them than were told, raises `NeverLearned`."""
    one = _at(case.items, torch.tensor([0], device=case.items.classes.device))
    unknown = Items(one.codes, case.items.classes.max().reshape(1) + 1)
    twice = Items(torch.cat([case.items.codes] * 2), torch.cat([case.items.classes] * 2))
    for what, items in (("a class never told", unknown), ("everything twice", twice)):
        try:
            case.head.unlearn(case.state, items, _none_of(case.items))
        except NeverLearned:
            continue
        require(False, f"{what} was unlearned")


def _merging_is_learning_both(case: _Case) -> None:
    """Two states merged, in either order, have all classes; where `order_free`, they are what learned it all."""
    first, second = _parts(case)
    base, own = _learned(case, first), _learned(case, second)
    merged = case.head.merge(base, own)
    told = tuple(torch.unique(case.items.classes).tolist())
    require(case.head.read(merged).classes == told, f"merged, they have the classes {case.head.read(merged).classes}")
    same("own merged with base", case.head.merge(own, base), merged)
    if case.head.order_free:
        same("the merged state", merged, case.state)
    for name, state in (("base", base), ("own", own)):
        require(not _equal_states(merged, state), f"merged, they are {name} alone")


def _merging_with_nothing_is_nothing(case: _Case) -> None:
    """A state merged with `init()`, on either side, keeps every bit."""
    same("init() and the state", case.head.merge(case.head.init(), case.state), case.state)
    same("the state and init()", case.head.merge(case.state, case.head.init()), case.state)


def _encoding_keeps_every_bit(case: _Case) -> None:
    """States and codes survive `tree.encode` and `tree.decode` bit for bit, as tensors that share no memory."""
    for thing in (case.head.init(), case.state, case.items):
        tensors = tree.encode(thing)
        require(len(tensors) == len(list(tree.leaves(thing))), "two leaves have one name")
        places = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
        require(len(set(places)) == len(places), "two leaves share their memory")
        same("what was decoded", tree.decode(tree.apply(torch.zeros_like, thing), tensors), thing)


def _device_and_dtype_come_from_tensors(case: _Case) -> None:
    """Neither the default device nor the default dtype has a say in states and scores."""
    expected, default = _everything(case), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if default != torch.float64 else torch.float32)
    try:
        with torch.device("meta"):
            found = _everything(case)
    finally:
        torch.set_default_dtype(default)
    for name, result in expected.items():
        same(name, found[name], result)


def _labels_teach(case: _Case) -> None:
    """Of the images told, at least two in three get their highest score from their own class."""
    table = case.head.read(case.state)
    best = torch.tensor(table.classes)[case.head.score(table, case.items.codes).argmax(dim=1).cpu()]
    right = int((best == case.items.classes.cpu()).sum())
    require(3 * right >= 2 * case.items.rows, f"{right} of {case.items.rows} do")


_LAWS: dict[str, Callable[[_Case], None]] = {
    law.__name__.removeprefix("_"): law
    for law in (
        _init_is_constant,
        _init_scores_no_class,
        _codes_are_integers,
        _arguments_stay,
        _results_are_deterministic,
        _columns_are_the_classes_told,
        _reading_again_changes_nothing,
        _images_are_independent,
        _no_images_have_no_scores,
        _what_is_not_finite_does_not_spread,
        _nothing_told_changes_nothing,
        _parts_do_not_matter,
        _order_does_not_matter,
        _unlearning_is_exact,
        _strangers_are_refused,
        _merging_is_learning_both,
        _merging_with_nothing_is_nothing,
        _encoding_keeps_every_bit,
        _device_and_dtype_come_from_tensors,
        _labels_teach,
    )
}
LAWS: tuple[str, ...] = tuple(_LAWS)


def _equal_states(a: Any, b: Any) -> bool:
    left, right = dict(tree.leaves(a)), dict(tree.leaves(b))
    return left.keys() == right.keys() and all(equal_bits(left[name], right[name]) for name in left)
