"""What OpenAPI cannot read off the functions that answer."""

from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter

from tta_serve.http_streams import OFFSET_MAX, STREAMS_PAGE_MAX, RollbackRequest
from tta_serve.protocol import WireRequest
from tta_serve.receipts import Receipt
from tta_serve.views import StreamEvent, StreamHistory, StreamView

_ERRORS = {
    "400": "The request is wrong; the error says where.",
    "401": "No token, or one that is not valid here.",
    "403": "Admin routes are closed: the server was started without an admin token.",
    "404": "No such stream, or no such version of it.",
    "413": "Over a limit.",
    "429": "No room now; `Retry-After` says when to come back.",
    "503": "Not ready, or stopping.",
}


def _object(kind: type) -> dict[str, Any]:
    """The schema of a named tuple that is sent as a JSON object."""
    hints = get_type_hints(kind)
    properties = {name: TypeAdapter(hint).json_schema() for name, hint in hints.items()}
    return {"type": "object", "properties": properties, "required": list(hints)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _answers(schema: dict[str, Any] | None, *statuses: str) -> dict[str, Any]:
    error = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    answers = {each: (_ERRORS[each], error) for each in statuses}
    if schema is not None:
        answers["200"] = ("As asked.", schema)
    return {
        status: {"description": text, "content": {"application/json": {"schema": each}}}
        for status, (text, each) in sorted(answers.items())
    }


_HEADERS = [
    {"name": name, "in": "header", "schema": schema, "description": text}
    for name, schema, text in (
        ("x-session-id", {"type": "string"}, "The stream; else the parameter `stream`; else `default`."),
        ("x-adapt", {"enum": ["on", "off"]}, "Whether the request may be learned from."),
        ("x-answer", {"enum": ["adapted", "frozen", "both"]}, "Whose answer."),
    )
]
INFER = {
    "parameters": [
        *_HEADERS,
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "schema": {"type": "integer"},
            "description": "Length of the JSON, where binary tensor data follows it.",
        },
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": WireRequest.model_json_schema(ref_template="#/components/schemas/{model}")},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
    "responses": _answers(None, "400", "401", "413", "429", "503"),
}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
PREDICT = {
    "parameters": [*_HEADERS, {"name": "stream", "in": "query", "schema": {"type": "string"}}],
    "requestBody": {
        "required": True,
        "content": {
            "image/jpeg": _IMAGE,
            "image/png": _IMAGE,
            "image/webp": _IMAGE,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    },
    "responses": _answers(None, "400", "401", "413", "429", "503"),
}

_MODALITY = {
    "name": "x-modality",
    "in": "header",
    "schema": {"type": "string"},
    "description": "The images' modality; else the parameter `modality`; else it is recognised. `rgb`: no translator.",
}
_TRANSLATORS = {
    "type": "object",
    "properties": {"translators": _list({"type": "object"})},
    "required": ["translators"],
}
TRANSLATORS = {"responses": _answers(_TRANSLATORS, "401")}

PUT_TRANSLATOR = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    "responses": _answers({"type": "object"}, "400", "401", "403", "413", "503"),
}


def with_modality(doc: dict[str, Any]) -> dict[str, Any]:
    """The same route of a detector."""
    return {**doc, "parameters": [*doc["parameters"], _MODALITY]}


def feedback(body: type[BaseModel]) -> dict[str, Any]:
    """Feedback with such a body."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    results = {
        "type": "object",
        "properties": {"results": _list({"type": "object"}), "parameters": {"type": "object"}},
        "required": ["results", "parameters"],
    }
    return {
        "parameters": [_HEADERS[0], _MODALITY],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": _answers(results, "400", "401", "404", "413", "429", "503"),
    }


_QUERIES = {
    "type": "object",
    "properties": {"stream": {"type": "string"}, "queries": _list({"type": "object"})},
    "required": ["stream", "queries"],
}
QUERIES = {
    "parameters": [
        _HEADERS[0],
        {"name": "stream", "in": "query", "schema": {"type": "string"}},
        {"name": "limit", "in": "query", "schema": {"type": "integer", "default": 20, "minimum": 1, "maximum": 1000}},
    ],
    "responses": _answers(_QUERIES, "400", "401"),
}


def forget(body: type[BaseModel]) -> dict[str, Any]:
    """Forgetting with such a body."""
    return {
        "parameters": [_HEADERS[0]],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}},
        "responses": _answers(_object(Receipt), "400", "401", "403", "404", "503"),
    }


_VIEW = _object(StreamView)
_HISTORY = _object(StreamHistory)
_HISTORY["properties"]["events"] = _list(_object(StreamEvent))
_PAGE = {
    "type": "object",
    "properties": {"streams": _list(_VIEW), "total": {"type": "integer", "description": "On all pages."}},
    "required": ["streams", "total"],
}
_DELETED = {
    "type": "object",
    "properties": {"deleted": {"type": "string"}, "receipt": _object(Receipt)},
    "required": ["deleted"],
}
PAGE = {
    "parameters": [
        {
            "name": name,
            "in": "query",
            "schema": {"type": "integer", "default": default, "minimum": least, "maximum": most},
        }
        for name, default, least, most in (("limit", 100, 1, STREAMS_PAGE_MAX), ("offset", 0, 0, OFFSET_MAX))
    ],
    "responses": _answers(_PAGE, "400", "401"),
}
VIEW = {"responses": _answers(_VIEW, "400", "401", "404")}
HISTORY = {"responses": _answers(_HISTORY, "400", "401", "404")}
COMMAND = {"responses": _answers(_VIEW, "400", "401", "403", "404", "503")}
ROLLBACK = {
    **COMMAND,
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": RollbackRequest.model_json_schema()}},
    },
}
DELETE = {"responses": _answers(_DELETED, "400", "401", "403", "404", "503")}
