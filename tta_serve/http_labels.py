"""Routes of what a classifier is told: labels, and what to forget of them."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tta_serve import errors
from tta_serve.access import may_administer, may_predict
from tta_serve.config import Tokens
from tta_serve.http_answers import from_base64, problem_of, reached, read_count, read_options
from tta_serve.label_service import Label, LabelService, Taken

ITEMS_MAX = 4096  # of a list in a body; a request may hold fewer images
ID_LENGTH_MAX = 512
QUERIES_MAX = 1000  # of one answer

Body = TypeVar("Body", bound=BaseModel)


class LabelItem(BaseModel):
    """What is in one image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    label: str | int = Field(description="A class's name, or the index of one that there is. A new name adds a class.")
    id: str | None = Field(
        None,
        min_length=1,
        max_length=ID_LENGTH_MAX,
        description="Of an earlier prediction of this stream; beside an `image`, what you want to call it.",
    )
    index: int = Field(0, ge=0, lt=2**31, description="Which image of that prediction.")
    image: str | None = Field(None, description="The picture: JPEG, PNG or WebP in base64.")


class LabelsRequest(BaseModel):
    """The body of feedback."""

    model_config = ConfigDict(extra="forbid", strict=True)

    stream: str | None = None
    scope: Literal["stream", "shared"] = Field(
        "stream", description="In effect for this stream alone, or for all of the tenant's (without tenants: all)."
    )
    items: list[LabelItem] = Field(min_length=1, max_length=ITEMS_MAX)


class ForgetRequest(BaseModel):
    """The body of forgetting: `ids`, or `label`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    stream: str | None = None
    ids: list[str] | None = Field(
        None, min_length=1, max_length=ITEMS_MAX, description="Of predictions that this stream gave labels for …"
    )
    label: str | None = Field(None, description="… or all labels of this class that it gave.")
    everywhere: bool = Field(
        False, description="Of the class, the labels of all the tenant's streams (without tenants: all). Admin token."
    )


class LabelRoutes:
    """The routes that labels come by.

    Args:
        name: the model's.
        service: called at each request.
        tokens: who may do what.
    """

    def __init__(self, name: str, service: Callable[[], LabelService], tokens: Tokens) -> None:
        self.name = name
        self.service = service
        self.tokens = tokens

    async def feedback(self, request: Request) -> Response:
        """Labels for earlier predictions, or for images sent with them: learned at once, and kept."""
        reach = may_predict(self.tokens, request.headers.get("authorization", ""))
        service = self.service()
        body = await request.body()
        asked, items = await service.off_loop(lambda: parse_labels(body))
        stream = read_options(request, asked.stream).stream
        full = reach.full(stream)
        taken = await service.teach(items, full, asked.scope)
        service.metrics.count("tta_requests_total", outcome="ok")
        read_with = await service.off_loop(lambda: service.read_with(full))
        versions = {"state_version": await service.version_of(full), "head_version": str(read_with.version)}
        labels = [*service.labels, *read_with.added]
        return JSONResponse(
            {
                "model_name": self.name,
                "results": [_result(each) for each in taken],
                "parameters": {"stream": stream, **versions, "labels": labels},
            },
            headers={"x-" + name.replace("_", "-"): version for name, version in versions.items()},
        )

    async def queries(self, request: Request) -> Response:
        """Images that look like nothing known and have no label yet, the strangest first: answer with feedback."""
        reach = may_predict(self.tokens, request.headers.get("authorization", ""))
        stream = read_options(request, request.query_params.get("stream")).stream
        limit = read_count(request, "limit", default=20, least=1, most=QUERIES_MAX)
        asking = self.service().queries(reach.full(stream), limit)
        queries = [
            {
                "id": each.id,
                "index": each.place,
                "unknown": round(each.unknown, 6),
                "predicted": each.predicted,
                "age_s": round(each.age_s, 3),
            }
            for each in asking
        ]
        return JSONResponse({"stream": stream, "queries": queries})

    async def forget(self, request: Request) -> Response:
        """Take exactly the effect of some labels out, with a receipt."""
        authorization = request.headers.get("authorization", "")
        reach = may_predict(self.tokens, authorization)
        service = self.service()
        body = await request.body()
        asked = await service.off_loop(lambda: parse_body(ForgetRequest, body, "request to forget"))
        if (asked.ids is None) == (asked.label is None):
            raise errors.InvalidInput("give either `ids` of predictions or a `label`")
        if asked.everywhere:
            if asked.label is None:
                raise errors.InvalidInput("`everywhere` goes with a `label`; ids are of one stream's predictions")
            if not reach.prefix:  # a tenant's token reaches the tenant's streams anyway
                may_administer(self.tokens, authorization)
        stream = reach.full(read_options(request, asked.stream).stream)
        done = await service.forget(stream, ids=asked.ids or (), label=asked.label, everywhere=asked.everywhere)
        service.metrics.count("tta_requests_total", outcome="ok")
        return reached(done.receipt._asdict(), done.number, done.waiting)


def parse_labels(body: bytes) -> tuple[LabelsRequest, Sequence[Label]]:
    """The body of feedback, and its items.

    Raises:
        InvalidInput: it is none; says where and what.
    """
    asked = parse_body(LabelsRequest, body, "feedback")
    return asked, [_label(item) for item in asked.items]


def parse_body(kind: type[Body], body: bytes, what: str) -> Body:
    """A body as it should be.

    Args:
        kind: what it should be.
        body: JSON.
        what: the same in words, for the message.

    Raises:
        InvalidInput: it is not; says where and what.
    """
    try:
        return kind.model_validate(json.loads(body))
    except ValidationError as error:
        raise errors.InvalidInput(f"the body is no {what}: {problem_of(error)}") from None
    except (ValueError, RecursionError) as error:
        raise errors.InvalidInput(f"the body is not JSON: {error}") from None


def _label(item: LabelItem) -> Label:
    if item.image is None:
        if item.id is None:
            raise errors.InvalidInput("each item needs the `id` of a prediction, or an `image` in base64")
        return Label(item.label, item.id, item.index)
    if item.index:
        raise errors.InvalidInput(f"`index` {item.index} is of an earlier prediction's images; an `image` is one")
    return Label(item.label, item.id, 0, from_base64(item.image))


def _result(taken: Taken) -> dict[str, Any]:
    return {
        "result": taken.outcome,
        "id": taken.id,
        "index": taken.place,
        "label": taken.label,
        "predicted": taken.predicted,
        "right": taken.right,
    }
