# SPDX-License-Identifier: Apache-2.0
"""Errors in the format of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """A request that was rejected or has failed.

    Attributes
    ----------
    status : int
        HTTP status.
    message : str
        What is wrong, and what was expected.
    param : str, optional
        The request parameter at fault.
    code : str, optional
        Machine-readable error code.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The HTTP response, with a Retry-After header if the server is busy or shutting down."""
        headers = {"retry-after": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413):  # the rest of the request body is left unread
            headers["connection"] = "close"
        return JSONResponse(self.body, self.status, headers)


def stopped() -> APIError:
    """Return the error for requests that arrive, or do not finish in time, while the server shuts down."""
    return APIError(503, "the server is shutting down", code="shutting_down")


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, APIError)
    return error.response


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer unknown paths and unsupported methods."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.url.path}",
        405: f"{request.url.path} does not support the method {request.method}",
    }.get(error.status_code, str(error.detail))
    response = APIError(error.status_code, message).response
    response.headers.update(error.headers or {})
    return response


async def on_fault(request: Request, error: Exception) -> JSONResponse:
    """Answer an unexpected exception, whose traceback goes to the server's log."""
    return APIError(500, "internal server error; the server's log has the traceback").response


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Answer a request whose body is invalid, with the first validation error."""
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response


def from_validation(errors: Any) -> APIError:
    """Convert the first of pydantic's validation errors to an APIError."""
    first = errors[0]
    path = [part for part in first["loc"] if part != "body"]
    branch = next((k for k, part in enumerate(path) if _is_branch(part)), len(path))
    param = ".".join(map(str, path[:branch])) or None
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        param = ".".join(map(str, path))
        return APIError(400, f"{param} is not a parameter of this server", param, "unknown_parameter")
    if first["type"] == "missing" and branch == len(path):
        return APIError(400, f"{param or 'the body'} is missing", param, "missing_parameter")
    if branch < len(path):  # a union of types, none of which matches
        whats = dict.fromkeys(_plain(error["msg"]) for error in errors if list(error["loc"])[: branch + 1][1:] ==
                              path[:branch])  # fmt: skip
        return APIError(400, f"{param} matches none of its allowed types: {'; or '.join(whats)}", param)
    named = getattr(first.get("ctx", {}).get("error"), "param", None)
    if named is not None:
        return APIError(400, _plain(first["msg"]), ".".join([*map(str, path), named]))
    got = f"; got {_short(first['input'])}" if first["type"] != "value_error" else ""
    return APIError(400, f"{param or 'the body'}: {_plain(first['msg'])}{got}", param)


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _is_branch(part: Any) -> bool:
    """Return whether a part of an error's location is pydantic's name for a union member, not a request field."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool") or part[:1].isupper() or any(sign in part for sign in "[-(")
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
