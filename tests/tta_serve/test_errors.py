import pickle

import pytest

from tta_serve import errors
from tta_serve.errors import Overloaded, TTAError


def tree(root: type[TTAError]) -> list[type[TTAError]]:
    return [root, *(each for child in root.__subclasses__() for each in tree(child))]


ALL = [each for each in tree(TTAError) if each.__module__ == errors.__name__]


def make(kind: type[TTAError]) -> TTAError:
    return kind("the queue is full", 2.5) if kind is Overloaded else kind("40 pixels, the limit is 30")


def test_every_error_is_here() -> None:
    assert [each.__name__ for each in ALL] == [
        "TTAError",
        "ConfigError",
        "InvalidInput",
        "TooLarge",
        "Unauthorized",
        "Forbidden",
        "NotFound",
        "Overloaded",
        "Unavailable",
    ]


@pytest.mark.parametrize("kind", ALL)
def test_survives_pickling_with_all_that_it_holds(kind: type[TTAError]) -> None:
    error = make(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.args == error.args
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("kind", ALL)
def test_every_error_is_drawn_in_the_docstring(kind: type[TTAError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")


def test_overloaded_reads_as_its_message_and_keeps_the_time() -> None:
    error = Overloaded("the queue is full", 2.5)
    assert str(error) == "the queue is full"
    assert error.retry_after_s == 2.5
    assert error.args == ("the queue is full", 2.5)


def test_too_large_is_an_invalid_input() -> None:
    assert issubclass(errors.TooLarge, errors.InvalidInput)
