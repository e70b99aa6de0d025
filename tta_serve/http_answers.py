"""What the headers of a prediction ask for, and its answer in the words of the wire."""

import base64
import binascii
import reprlib
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from tta_serve import errors
from tta_serve.engine import AnswerKind
from tta_serve.service import Prediction, probabilities
from tta_serve.views import DEFAULT_STREAM

TOP = 5  # classes listed for each image by `predict`


class Options(NamedTuple):
    """What the headers of a prediction say."""

    stream: str
    adapt: bool
    answer: AnswerKind


def read_options(request: Request, parameter_stream: object = None) -> Options:
    """Read `x-session-id`, `x-adapt` and `x-answer`.

    Args:
        request: the request.
        parameter_stream: the parameter `stream`, of the JSON or the query.

    Raises:
        InvalidInput: an unknown value, or a stream named twice and differently.
    """
    named = header_or_parameter(request, "x-session-id", "stream", parameter_stream)
    adapt = request.headers.get("x-adapt", "on")
    answer = request.headers.get("x-answer", "adapted")
    if adapt not in ("on", "off"):
        raise errors.InvalidInput(f"x-adapt is {adapt!r}; it can be on or off")
    if answer not in ("adapted", "frozen", "both"):
        raise errors.InvalidInput(f"x-answer is {answer!r}; it can be adapted, frozen or both")
    return Options(DEFAULT_STREAM if named is None else named, adapt == "on", cast(AnswerKind, answer))


def header_or_parameter(request: Request, header: str, name: str, parameter: object) -> str | None:
    """What a header says, or else a parameter.

    Args:
        request: the request.
        header: its name.
        name: of the parameter, which says the same.
        parameter: its value, of the JSON or the query; None: not given.

    Raises:
        InvalidInput: both are given and differ, or the parameter is no text.
    """
    if parameter is not None and not isinstance(parameter, str):
        raise errors.InvalidInput(f"the parameter {name} is {reprlib.repr(parameter)}, not text")
    said = request.headers.get(header)
    if said is not None and parameter is not None and said != parameter:
        raise errors.InvalidInput(
            f"the header {header} names the {name} {said!r}, the parameter {name} {parameter!r}; give one"
        )
    return parameter if said is None else said


def problem_of(error: ValidationError) -> str:
    """The first thing that is wrong with a body: where, what, and what is there."""
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where + ': ' if where else ''}{problem['msg']}, not {reprlib.repr(problem['input'])}"


def from_base64(text: str) -> bytes:
    """A picture in a body of JSON.

    Raises:
        InvalidInput: it is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise errors.InvalidInput(f"image is not base64: {error}") from None


def read_count(request: Request, name: str, *, default: int, least: int, most: int) -> int:
    """A whole number among the query's parameters.

    Raises:
        InvalidInput: it is none, or out of range.
    """
    given = request.query_params.get(name, str(default))
    digits = given.isascii() and given.isdigit() and len(given) < 20
    if not (digits and least <= int(given) <= most):
        raise errors.InvalidInput(f"the parameter {name} is {given[:100]!r}; it can be {least} … {most}")
    return int(given)


def check_outputs(asked: tuple[str, ...] | None, answer: AnswerKind, open_set: bool = False) -> tuple[str, ...]:
    """The outputs to give: those asked for, or labels and probabilities.

    Args:
        asked: for.
        answer: whose.
        open_set: whether there is an output `unknown` of the adapted answer.

    Raises:
        InvalidInput: there is no such output with this `x-answer`.
    """
    prefixes = {"adapted": ("",), "frozen": ("frozen_",), "both": ("", "frozen_")}[answer]
    if asked is None:
        return tuple(prefix + name for prefix in prefixes for name in ("labels", "probabilities"))
    known = [prefix + name for prefix in prefixes for name in ("labels", "probabilities", "logits")]
    if open_set and answer != "frozen":
        known.append("unknown")
    for name in asked:
        if name not in known:
            raise errors.InvalidInput(
                f"there is no output named {name!r} with x-answer {answer}; there are {', '.join(known)}"
            )
    return asked


def outputs_of(prediction: Prediction, wanted: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    outputs: dict[str, NDArray[Any]] = {}
    for full_name in wanted:
        if full_name == "unknown":
            assert prediction.unknown is not None  # check_outputs
            outputs[full_name] = prediction.unknown
            continue
        name = full_name.removeprefix("frozen_")
        logits = prediction.frozen_logits if full_name.startswith("frozen_") else prediction.logits
        assert logits is not None  # check_outputs
        if name == "labels":
            outputs[full_name] = logits.argmax(axis=1).astype(np.int64)
        else:
            outputs[full_name] = probabilities(logits) if name == "probabilities" else logits
    return outputs


def ranked(
    logits: NDArray[np.float32], labels: tuple[str, ...], unknown: NDArray[np.float32] | None = None
) -> list[dict[str, Any]]:
    """For each image the best label with its score, the best few, and how unknown it is where that is looked for."""
    images: list[dict[str, Any]] = []
    for probs in probabilities(logits):
        best = np.argsort(-probs, kind="stable")[:TOP]
        scores = [{"label": labels[i], "index": int(i), "score": round(float(probs[i]), 6)} for i in best]
        images.append({**scores[0], "scores": scores})
    for image, strange in zip(images, [] if unknown is None else unknown.tolist(), strict=False):
        image["unknown"] = round(strange, 6)
    return images


def state_of(prediction: Prediction, options: Options) -> dict[str, Any]:
    state = {"stream": options.stream, "state_version": prediction.version, "adapted": prediction.adapted}
    if prediction.head_version:
        state |= {"head_version": str(prediction.head_version), "added_labels": list(prediction.added)}
    return state


def headers_of(prediction: Prediction) -> dict[str, str]:
    headers = {
        "x-state-version": prediction.version,
        "x-state-incarnation": str(prediction.incarnation),
        "x-adapted": "true" if prediction.adapted else "false",
    }
    if prediction.head_version:
        headers["x-head-version"] = str(prediction.head_version)
    return headers


def reached(content: dict[str, Any], number: int, waiting: tuple[str, ...]) -> JSONResponse:
    """200 where a command has reached all live replicas; else 202, with its number and who has yet to follow."""
    if not waiting:
        return JSONResponse(content)
    return JSONResponse({**content, "sequence": number, "waiting": list(waiting)}, 202)
