# SPDX-License-Identifier: Apache-2.0
"""Refusals in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """A request that is refused, or has failed.

    Attributes
    ----------
    status : int
        HTTP status.
    message : str
        What is wrong, and what would be right.
    param : str, optional
        Which parameter of the request it is about.
    code : str, optional
        A word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The same as a response; busy servers say when to come again."""
        headers = {"retry-after": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413):  # the rest of the body is not read
            headers["connection"] = "close"
        return JSONResponse(self.body, self.status, headers)


def stopped() -> APIError:
    """What requests get that come, or are in flight for too long, when the server ends."""
    return APIError(503, "the server is shutting down", code="shutting_down")


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, APIError)
    return error.response


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Unknown paths, wrong methods."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    response = APIError(error.status_code, message).response
    response.headers.update(error.headers or {})
    return response


async def on_fault(request: Request, error: Exception) -> JSONResponse:
    """A fault of the server's own; its log has the traceback."""
    return APIError(500, "the server has made a mistake; its log says which").response


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not what the endpoint takes: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response


def from_validation(errors: Any) -> APIError:
    """The first of pydantic's errors in words."""
    first = errors[0]
    path = [part for part in first["loc"] if part != "body"]
    branch = next((k for k, part in enumerate(path) if _is_branch(part)), len(path))
    param = ".".join(map(str, path[:branch])) or None
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        param = ".".join(map(str, path))
        return APIError(400, f"{param} is not a parameter that this server knows", param, "unknown_parameter")
    if first["type"] == "missing" and branch == len(path):
        return APIError(400, f"{param or 'the body'} is missing", param, "missing_parameter")
    if branch < len(path):  # one of several forms, and it is none of them
        whats = dict.fromkeys(_plain(error["msg"]) for error in errors if list(error["loc"])[: branch + 1][1:] ==
                              path[:branch])  # fmt: skip
        return APIError(400, f"{param} is in none of the forms it may have: {'; or '.join(whats)}", param)
    got = f"; got {_short(first['input'])}" if first["type"] != "value_error" else ""
    return APIError(400, f"{param or 'the body'}: {_plain(first['msg'])}{got}", param)


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _is_branch(part: Any) -> bool:
    """Whether a part of a location is pydantic's name of an alternative, not a field of the request."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool") or part[:1].isupper() or any(sign in part for sign in "[-(")
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
