"""Request bodies: JSON with images in base64, or the same fields as a form with files."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from ...errors import BadInput, Unsupported
from ..session.answers import MAX_IMAGES

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
TRUTHS = ("true", "false")


def body_of(model: type[M], files: dict[str, str], instead: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the OpenAPI description of a body: JSON, or the same fields as a form with files.

    Args:
        model: model of the JSON body.
        files: description by field, for fields that a form sends as files.
        instead: fields that a form may replace by a file.
    """
    schema = _inlined(model.model_json_schema())
    form: dict[str, Any] = {**schema, "properties": dict(schema["properties"])}
    form["required"] = [
        name for name in schema.get("required", []) if name not in files and name not in instead
    ]
    for name in instead:
        form["properties"][name] = {"type": "string"}
    for name, kind in files.items():
        one = {"type": "string", "format": "binary", "description": kind}
        many = schema["properties"].get(name, {}).get("type") == "array"
        form["properties"][name] = {"type": "array", "items": one} if many else one
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schema},
                "multipart/form-data": {"schema": form},
            },
        }
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema with the models that it refers to in their places."""
    models = schema.get("$defs", {})

    def whole(part: Any) -> Any:
        if isinstance(part, list):
            return [whole(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return whole(models[part["$ref"].rpartition("/")[2]])
        return {key: whole(value) for key, value in part.items() if key != "$defs"}

    inlined: dict[str, Any] = whole(schema)
    return inlined


@dataclass(frozen=True)
class Body:
    """A request's body: its fields, and a form's files with their names, by field."""

    fields: Any
    files: dict[str, list[tuple[str, UploadFile]]]


async def with_body(
    request: Request, model: type[BaseModel], files: tuple[str, ...], work: Callable[[Body], T]
) -> T:
    """Read JSON or a form into a model, and return the result of ``work`` in a thread.

    Args:
        request: the request.
        model: model of the fields.
        files: fields of a form that may be files; they stay open during ``work``.
        work: gets the body.

    Raises:
        Unsupported: the body is neither JSON nor a form.
        BadInput: the body does not match the model.
    """
    async with _read_body(request, model, files) as body:
        return await run_in_threadpool(work, body)


def content_type(request: Request) -> str:
    """Return a request's content type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@asynccontextmanager
async def _read_body(
    request: Request, model: type[M], files: tuple[str, ...]
) -> AsyncIterator[Body]:
    kind = content_type(request)
    if kind == "application/json":
        raw = await request.body()
        try:
            fields = await run_in_threadpool(model.model_validate_json, raw)
        except ValidationError as error:
            raise BadInput(validation_text(error.errors())) from error
        yield Body(fields, {})
        return
    if kind != "multipart/form-data":
        raise Unsupported(
            f"content type {kind[:100] or 'none'!r}; expected application/json or multipart/form-data"
        )
    try:
        form = await request.form(max_files=MAX_IMAGES, max_fields=300)
    except Exception as error:  # also errors of python-multipart, and unknown encodings
        reason = error.detail if isinstance(error, HTTPException) else error
        raise BadInput(f"the form cannot be read: {reason}") from error
    try:
        yield _body_of_form(form, model, files)
    finally:
        await form.close()


def _body_of_form(form: FormData, model: type[M], files: tuple[str, ...]) -> Body:
    uploads: dict[str, list[tuple[str, UploadFile]]] = {}
    fields: dict[str, Any] = {}
    properties = model.model_json_schema()["properties"]
    for name, value in form.multi_items():
        schema = properties.get(name, {})
        if isinstance(value, UploadFile) and name in files:
            uploads.setdefault(name, []).append((_plain_name(value.filename), value))
        elif isinstance(value, UploadFile):
            raise BadInput(f"field {name[:100]!r} is a file; expected files in: {', '.join(files)}")
        elif schema.get("type") == "boolean" and value not in TRUTHS:
            raise BadInput(f"{name} is {value[:100]!r}; expected true or false")
        elif _is_list(schema):
            fields.setdefault(name, []).append(value)
        else:
            fields[name] = value
    # Fields of the model that a form sends as files only: a placeholder passes the validation.
    only_files = [name for name in uploads if name in properties and name not in fields]
    try:
        parsed = model.model_validate({**fields, **{name: ["-"] for name in only_files}})
    except ValidationError as error:
        raise BadInput(validation_text(error.errors())) from error
    for name in only_files:
        setattr(parsed, name, [])
    return Body(parsed, uploads)


def _is_list(schema: dict[str, Any]) -> bool:
    kinds = [schema, *schema.get("anyOf", [])]
    return any(kind.get("type") == "array" for kind in kinds)


def _plain_name(name: str | None) -> str:
    """Return the last part of a file name, safe to display."""
    last = (name or "image").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c if c.isprintable() else "?" for c in last)[-200:] or "image"


def pixels_of(text: str) -> bytes:
    """Decode an image from base64, with or without line breaks, or from a data URL.

    Raises:
        BadInput: the text is not valid base64.
    """
    text = text.strip()
    if text[:5].lower() == "data:":
        kind, comma, text = text.partition(",")
        if not comma or not kind.lower().endswith(";base64"):
            raise BadInput(
                f"an image is a data URL that begins with {kind[:40]!r}; expected ';base64,' in it"
            )
        text = unquote(text)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(
            f"an image is not valid base64 ({error}); encode its file in base64"
        ) from error


def images_of(body: Body, name: str) -> list[tuple[str, bytes]]:
    """Return the images of a field with their names, files first."""
    files = [(label, file.file.read()) for label, file in body.files.get(name, [])]
    texts = getattr(body.fields, name)
    return files + [(f"{name}[{n}]", pixels_of(text)) for n, text in enumerate(texts)]


def validation_text(errors: Any) -> str:
    """Return pydantic's error messages without the values that were sent."""
    parts = [
        ": ".join(filter(None, (".".join(map(str, error["loc"])), error["msg"])))
        for error in errors[:5]
    ]
    return "; ".join(parts)[:1000]
