"""Routes of one detector."""

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.detection import Detections
from tta_serve import errors, http_docs
from tta_serve.access import may_predict
from tta_serve.box_lessons import Taught
from tta_serve.box_service import LESSONS_MAX, Routing
from tta_serve.config import RGB, Tokens
from tta_serve.detection_service import DetectionService, Prediction
from tta_serve.engine import AnswerKind
from tta_serve.feedback import Feedback
from tta_serve.http_answers import Options, from_base64, header_or_parameter, problem_of, read_options
from tta_serve.http_routes import (
    INPUT_NAME,
    MODEL_VERSION,
    Endpoint,
    infer_answer,
    read_infer,
    read_pictures,
    ready_answer,
    stream_endpoints,
)
from tta_serve.http_translators import TranslatorRoutes

OUTPUTS = ("boxes", "labels", "scores", "num_detections")
NO_LABEL = -1  # fills the rows of images that have fewer detections than others
BOXES_MAX = 1000  # of one image's feedback


class FeedbackItem(BaseModel):
    """What is in one image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | None = Field(None, description="Of an earlier prediction of this stream …")
    index: int = Field(0, ge=0, description="… and which of its images.")
    image: str | None = Field(None, description="Or the picture itself: JPEG, PNG or WebP in base64.")
    boxes: list[list[float]] = Field(max_length=BOXES_MAX, description="[x1, y1, x2, y2] in pixels of the image.")
    labels: list[str | int] = Field(max_length=BOXES_MAX, description="Of each box: a class's name or its index.")


class FeedbackRequest(BaseModel):
    """The body of feedback."""

    model_config = ConfigDict(extra="forbid", strict=True)

    stream: str | None = None
    modality: str | None = Field(None, description="Of images that are sent; None: it is recognised.")
    items: list[FeedbackItem] = Field(min_length=1)


class DetectionRoutes:
    """The routes of one detector, below its prefix.

    Args:
        name: the model's name.
        service: called at each request, so that the routes can be documented without one.
        tokens: who may do what.
    """

    def __init__(self, name: str, service: Callable[[], DetectionService], tokens: Tokens) -> None:
        self.name = name
        self.service = service
        self.tokens = tokens
        self.versioned = (
            Endpoint("GET", "/", self.metadata, "model"),
            Endpoint("GET", "/ready", self.ready, "model"),
            Endpoint("POST", "/infer", self.infer, "predict", http_docs.with_modality(http_docs.INFER)),
        )
        translators = TranslatorRoutes(service, tokens)
        self.table = (
            *self.versioned,
            Endpoint("POST", "/predict", self.predict, "predict", http_docs.with_modality(http_docs.PREDICT)),
            Endpoint("POST", "/feedback", self.feedback, "feedback", http_docs.feedback(FeedbackRequest)),
            Endpoint("GET", "/translators", translators.all, "translators", http_docs.TRANSLATORS),
            Endpoint("PUT", "/translators/{modality}", translators.put, "translators", http_docs.PUT_TRANSLATOR),
            Endpoint("DELETE", "/translators/{modality}", translators.delete, "translators", http_docs.DELETE),
            *stream_endpoints(service, tokens),
        )

    async def metadata(self, _: Request) -> JSONResponse:
        """The model's metadata: inputs, outputs, labels, translators and limits."""
        service = self.service()
        shapes = {"boxes": ("FP32", [-1, -1, 4]), "labels": ("INT64", [-1, -1]), "scores": ("FP32", [-1, -1])}
        shapes["num_detections"] = ("INT64", [-1])
        outputs = [
            {"name": prefix + name, "datatype": datatype, "shape": shape}
            for prefix in ("", "frozen_")
            for name, (datatype, shape) in shapes.items()
        ]
        return JSONResponse(
            {
                "name": self.name,
                "versions": [MODEL_VERSION],
                "platform": "tta-serve_torch",
                "inputs": [{"name": INPUT_NAME, "datatype": "FP32", "shape": [-1, -1, -1, -1]}],
                "outputs": outputs,
                "parameters": {
                    "task": "detection",
                    "labels": list(service.labels),
                    "mode": service.mode,
                    "modalities": [RGB, *service.engine.modalities],
                    "input": "3 channels (RGB) or 1, any height and width; FP32 in 0 … 1, or UINT8 in 0 … 255",
                    "images_per_request": service.limits.images_per_request,
                },
            }
        )

    async def ready(self, _: Request) -> JSONResponse:
        """Whether the model answers."""
        return ready_answer(self.name, self.service())

    async def infer(self, request: Request) -> Response:
        """Open Inference Protocol v2: images in, boxes out; JSON, or with binary tensor data."""
        reach = may_predict(self.tokens, request.headers.get("authorization", ""))
        asked = await read_infer(request, self.service)
        options = read_options(request, asked.parameters.get("stream"))
        modality = header_or_parameter(request, "x-modality", "modality", asked.parameters.get("modality"))
        wanted = check_outputs(asked.outputs, options.answer)
        service = self.service()
        id = asked.id or service.new_id()
        x = service.to_images(asked.tensors[INPUT_NAME])
        prediction = await service.predict(
            x, reach.full(options.stream), id=id, modality=modality, adapt=options.adapt, answer=options.answer
        )
        service.metrics.count("tta_requests_total", outcome="ok")
        answer = infer_answer(self.name, asked, id, state_of(prediction, options), outputs_of(prediction, wanted))
        answer.headers.update(headers_of(prediction))
        return answer

    async def predict(self, request: Request) -> Response:
        """Pictures in, boxes out: a body of JPEG, PNG or WebP, or multipart with several, of any sizes."""
        reach = may_predict(self.tokens, request.headers.get("authorization", ""))
        service = self.service()
        options = read_options(request, request.query_params.get("stream"))
        modality = header_or_parameter(request, "x-modality", "modality", request.query_params.get("modality"))
        service.check_modality(modality)
        id = request.headers.get("x-request-id") or service.new_id()
        x = await service.decode(await read_pictures(request, service))
        prediction = await service.predict(
            x, reach.full(options.stream), id=id, modality=modality, adapt=options.adapt, answer=options.answer
        )
        service.metrics.count("tta_requests_total", outcome="ok")
        content: dict[str, Any] = {"model_name": self.name, "id": id}
        for name, found in (
            ("predictions", prediction.detections),
            ("frozen_predictions", prediction.frozen_detections),
        ):
            if found is not None:
                content[name] = listed(prediction, found, service.labels)
        content["parameters"] = state_of(prediction, options)
        return JSONResponse(content, headers=headers_of(prediction))

    async def feedback(self, request: Request) -> Response:
        """Boxes for earlier predictions, or for images sent with them: translators learn from these at once."""
        reach = may_predict(self.tokens, request.headers.get("authorization", ""))
        service = self.service()
        body = await request.body()
        asked = await service.off_loop(lambda: parse_feedback(body))
        stream = read_options(request, asked.stream).stream
        modality = header_or_parameter(request, "x-modality", "modality", asked.modality)
        full = reach.full(stream)
        taught = await service.teach(asked.items, full, modality)
        service.metrics.count("tta_requests_total", outcome="ok")
        version = await service.version_of(full)
        return JSONResponse(
            {
                "model_name": self.name,
                "results": [result_of(each) for each in taught],
                "parameters": {"stream": stream, "state_version": version},
            },
            headers={"x-state-version": version},
        )


class Asked(NamedTuple):
    """What a body of feedback asks for."""

    stream: str | None
    modality: str | None
    items: tuple[Feedback, ...]


def parse_feedback(body: bytes) -> Asked:
    """The body of feedback.

    Raises:
        InvalidInput: it is none; says where and what.
        TooLarge: it is about more images than one request may be.
    """
    try:
        content = json.loads(body)  # and not pydantic, so that NaN among the boxes reaches the check that names it
        items = content.get("items") if isinstance(content, dict) else None
        if isinstance(items, list) and len(items) > LESSONS_MAX:
            raise errors.TooLarge(f"feedback for {len(items)} images in one request; the limit is {LESSONS_MAX}")
        asked = FeedbackRequest.model_validate(content)
        return Asked(asked.stream, asked.modality, tuple(_feedback(item) for item in asked.items))
    except ValidationError as error:
        raise errors.InvalidInput(f"the body is no feedback: {problem_of(error)}") from None
    except (ValueError, RecursionError) as error:
        raise errors.InvalidInput(f"the body is not JSON: {error}") from None


def _feedback(item: FeedbackItem) -> Feedback:
    if (item.id is None) == (item.image is None):
        raise errors.InvalidInput("each item needs either the `id` of a prediction or an `image` in base64")
    if item.image is not None and item.index:
        raise errors.InvalidInput(f"`index` {item.index} is of an earlier prediction's images; an `image` is one")
    if bad := [box for box in item.boxes if len(box) != 4]:
        raise errors.InvalidInput(f"a box is {reprlib.repr(bad[0])}; it must be [x1, y1, x2, y2]")
    image = None if item.image is None else from_base64(item.image)
    boxes = np.array(item.boxes, dtype=np.float64).reshape(-1, 4)
    return Feedback(boxes, tuple(item.labels), item.id, item.index, image)


def check_outputs(asked: tuple[str, ...] | None, answer: AnswerKind) -> tuple[str, ...]:
    """The outputs to give: those asked for, or all of this `x-answer`.

    Raises:
        InvalidInput: there is no such output with this `x-answer`.
    """
    prefixes = {"adapted": ("",), "frozen": ("frozen_",), "both": ("", "frozen_")}[answer]
    known = tuple(prefix + name for prefix in prefixes for name in OUTPUTS)
    for name in asked or ():
        if name not in known:
            raise errors.InvalidInput(
                f"there is no output named {name!r} with x-answer {answer}; there are {', '.join(known)}"
            )
    return known if asked is None else asked


def outputs_of(prediction: Prediction, wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The outputs as rectangular tensors: images with fewer detections are filled up with rows of label −1."""
    outputs: dict[str, NDArray[Any]] = {}
    for prefix, found in (("", prediction.detections), ("frozen_", prediction.frozen_detections)):
        if found is not None:
            outputs.update({prefix + name: array for name, array in _tensors(found).items()})
    return {name: outputs[name] for name in wanted}


def _tensors(found: Sequence[Detections]) -> dict[str, NDArray[Any]]:
    counts = [len(each.scores) for each in found]
    most = max(counts)
    boxes = np.zeros((len(found), most, 4), np.float32)
    labels = np.full((len(found), most), NO_LABEL, np.int64)
    scores = np.zeros((len(found), most), np.float32)
    for row, (each, count) in enumerate(zip(found, counts, strict=True)):
        boxes[row, :count] = each.boxes.cpu().numpy()
        labels[row, :count] = each.labels.cpu().numpy()
        scores[row, :count] = each.scores.cpu().numpy()
    return {"boxes": boxes, "labels": labels, "scores": scores, "num_detections": np.array(counts, np.int64)}


def listed(prediction: Prediction, found: Sequence[Detections], labels: Sequence[str]) -> list[dict[str, Any]]:
    """For each image its size, its modality and its detections, the surest first."""
    images = []
    for each, routing, (height, width) in zip(found, prediction.routing, prediction.sizes, strict=True):
        detections = [
            {
                "box": [round(side, 2) for side in box],
                "label": labels[index] if index < len(labels) else str(index),
                "index": index,
                "score": round(score, 6),
            }
            for box, index, score in zip(each.boxes.tolist(), each.labels.tolist(), each.scores.tolist(), strict=True)
        ]
        images.append({"width": width, "height": height, "modality": _routing(routing), "detections": detections})
    return images


def _routing(routing: Routing) -> dict[str, Any]:
    return {
        "name": routing.modality,
        "decided": routing.decided,
        "confidence": round(routing.confidence, 6),
        "translator_version": str(routing.translator_version),
    }


def state_of(prediction: Prediction, options: Options) -> dict[str, Any]:
    return {
        "stream": options.stream,
        "state_version": prediction.version,
        "adapted": prediction.adapted,
        "modalities": [each.modality for each in prediction.routing],
        "modality_confidences": [round(each.confidence, 6) for each in prediction.routing],
        "translator_versions": [str(each.translator_version) for each in prediction.routing],
    }


def headers_of(prediction: Prediction) -> dict[str, str]:
    used = sorted({each.modality for each in prediction.routing})
    return {
        "x-state-version": prediction.version,
        "x-state-incarnation": str(prediction.incarnation),
        "x-adapted": "true" if prediction.adapted else "false",
        "x-modality": used[0] if len(used) == 1 else "mixed",
    }


def result_of(taught: Taught) -> Mapping[str, Any]:
    """What came of one item of feedback."""
    if taught.stream is None and taught.modality is None:
        return {"result": "repeated"}
    answer: dict[str, Any] = {}
    if taught.modality is not None:
        answer["result"] = "applied" if taught.modality.applied else "refused"
        answer["modality"] = {
            "applied": taught.modality.applied,
            "loss": taught.modality.loss if np.isfinite(taught.modality.loss) else None,
            "trips": list(taught.modality.trips),
        }
    if taught.stream is not None:
        answer["result"] = "applied" if answer.get("result") == "applied" else taught.stream.result
        answer["stream"] = {"result": taught.stream.result, "trips": list(taught.stream.trips)}
    return answer
