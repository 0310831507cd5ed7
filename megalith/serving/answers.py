"""Errors as JSON answers: {"error": {...}} as OpenAI's clients read it, and `message` as Megatron's do."""

from __future__ import annotations

import http
import re
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from megalith.common.errors import MegalithError, problem
from megalith.config.flags.text import Words
from megalith.generation.model import TooLong
from megalith.serving.disconnects import ClientLeft
from megalith.serving.errors import BadRequest, NotFound, ServingError

SHOWN = 60  # characters of a wrong value that an error repeats
RULES = {"missing": "must be given", "extra_forbidden": "must be left out: there is no such field"}
CLIENT_CLOSED = 499  # nginx's status for a client that left; nobody reads the answer


class ErrorDetail(BaseModel):
    """What is wrong. param: the field that is, where it is one. code: OpenAI's word for it, where there is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error in both forms: `error` is OpenAI's, `message` is what Megatron's clients read."""

    message: str
    error: ErrorDetail


# The `responses` of a route. FastAPI documents its own 422, which this server does not use, where 4XX is missing.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be done as it is"},
    "5XX": {"model": ErrorAnswer, "description": "The model failed, is lost, or took too long"},
}


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of the application's routes an answer."""
    app.add_exception_handler(MegalithError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(UnicodeEncodeError, _on_half_characters)
    app.add_exception_handler(ClientLeft, _on_client_left)
    app.add_exception_handler(Exception, _on_bug)


def status_of(error: Exception) -> int:
    """The status of an error's answer."""
    return error.status if isinstance(error, ServingError) else 400 if isinstance(error, MegalithError) else 500


def error_body(error: Exception) -> dict[str, Any]:
    """The body of an error's answer."""
    if isinstance(error, ServingError):
        return _body(str(error), error.status, error.param, error.code)
    if isinstance(error, MegalithError):
        return _body(str(error), 400, None, "context_length_exceeded" if isinstance(error, TooLong) else None)
    return _body("the server has failed at this request; its log says why.", 500, None, None)


def shown(value: object) -> Words:
    """A value of a request as an error repeats it, cut where it is long."""
    try:
        text = repr(value)
    except RecursionError:
        return Words("lists in lists in lists")
    return Words(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def invalid(error: RequestValidationError) -> MegalithError:
    """The error of a body that its schema refuses: of the first of its problems."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    where = [each if isinstance(each, int) else each[:SHOWN] for each in first["loc"] if each != "body"]
    name = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in where).removeprefix(".")
    if isinstance(cause, ServingError):  # a validator's own text
        cause.param = f"{name}.{cause.param}" if name and cause.param else cause.param or name or None
        return cause
    if first["type"] == "json_invalid":
        return BadRequest(f"the body must be JSON; {first['ctx']['error']} at character {where[0]}.")
    if not where:
        found = "nothing" if first["type"] == "missing" else type(first["input"]).__name__
        rule, cure = "must be a JSON object", "Send one, with the header Content-Type: application/json"
        return BadRequest(problem("the body", Words(found), rule, cure))
    found = Words("nothing") if first["type"] == "missing" else shown(first["input"])
    rule = RULES.get(first["type"]) or re.sub(r"^\w+ should", "must", first["msg"])
    cure = first.get("ctx", {}).get("cure", "/openapi.json describes every field")
    return BadRequest(problem(name, found, rule, cure), param=name)


def _body(text: str, status: int, param: str | None, code: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"message": text, "error": {"message": text, "type": kind, "param": param, "code": code}}


async def _on_error(request: Request, error: Exception) -> Response:
    retry_after = getattr(error, "retry_after", None)
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    if status_of(error) == 503:  # the server is about to end
        headers["Connection"] = "close"
    return JSONResponse(error_body(error), status_of(error), headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _on_error(request, invalid(error))


async def _on_http(request: Request, error: Exception) -> Response:
    """What Starlette and FastAPI refuse by themselves: unknown paths and methods, bodies that cannot be read."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404 and error.detail == http.HTTPStatus.NOT_FOUND.phrase:
        text = f"there is no {request.url.path}; /openapi.json lists what there is."
    elif error.status_code == 405:
        text = f"{request.url.path} does not know {request.method}; /openapi.json lists what there is."
    else:
        text = str(error.detail)
    return JSONResponse(_body(text, error.status_code, None, None), error.status_code, error.headers)


async def _on_half_characters(request: Request, error: Exception) -> Response:
    """JSON can hold halves of surrogate pairs, wherever it has texts; no other text has them."""
    return await _on_error(
        request, BadRequest("the body must be Unicode text; found a \\u escape of half a character.")
    )


async def _on_client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _on_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this answer, so that the log has it."""
    return JSONResponse(error_body(error), 500)


def check_model(name: str | None, served: str) -> None:
    """Raise NotFound where a request names another model than the one served; it may name none."""
    if name is not None and name != served:
        rule = f"must be {served!r}, the one this server has, or be left out"
        raise NotFound(problem("model", shown(name), rule, "Correct it"), param="model", code="model_not_found")
