# SPDX-License-Identifier: Apache-2.0
"""The server's endpoints as an ASGI application."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ..engine.engine import Engine
from ..page.live import Live
from .answers import Answers
from .bridge import Bridge, Group
from .decode import Decoder, Form, chat_form, completion_form
from .errors import APIError, on_api_error, on_fault, on_http_error, on_invalid
from .limits import Gate
from .live import Viewers, add_page
from .metrics import ServerMetrics
from .protocol import ChatRequest, CompletionRequest
from .settings import Settings
from .structured import structure_of

STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Service:
    """The parts of a server that do not depend on HTTP.

    Attributes
    ----------
    engine : Engine
    settings : Settings
    bridge : Bridge
        Passes requests to the engine and outputs back.
    """

    def __init__(self, engine: Engine, tokenizer: Any, settings: Settings):
        special = engine.special_tokens
        self.engine, self.settings = engine, settings
        self.answers = Answers(tokenizer, special.eos)
        self.viewers = Viewers(Live(tokenizer, special.mask, special.eos), lambda: self.bridge.is_open)
        observe = self.viewers.live.put if settings.live else None
        self.bridge = Bridge(engine, engine.slots + settings.max_waiting, observe)
        self.decoder = Decoder(self.bridge, self.answers, settings, special.mask, self.viewers)
        self.metrics = ServerMetrics(engine)
        self.started = int(time.time())

    def check_model(self, name: str) -> None:
        """Raise APIError 404 if `name` is not the served model."""
        if name != self.settings.model_name:
            raise APIError(
                404, f"there is no model '{name}'; this server serves '{self.settings.model_name}'", "model",
                "model_not_found",
            )  # fmt: skip

    @property
    def model_card(self) -> dict[str, Any]:
        """The model's entry in `/v1/models`."""
        return {
            "id": self.settings.model_name, "object": "model", "created": self.started, "owned_by": "dlmkernels",
            "max_model_len": self.engine.max_length,
        }  # fmt: skip


def create_app(engine: Engine, tokenizer: Any, settings: Settings) -> FastAPI:
    """Create the ASGI application that serves one engine.

    Parameters
    ----------
    engine : Engine
        An engine created with the same tokenizer. It is started with the application and stopped when that ends.
    tokenizer : PreTrainedTokenizer
    settings : Settings

    Returns
    -------
    FastAPI
        `app.state.service` is its `Service`.
    """
    service = Service(engine, tokenizer, settings)

    @asynccontextmanager
    async def life(app: FastAPI):
        engine.start()
        yield
        await service.bridge.drain(0.0)

    app = FastAPI(title="dlmkernels", lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, settings=settings, observe=service.metrics.observe)
    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_fault)
    _add_endpoints(app, service)
    if settings.live:
        add_page(app, service.viewers, settings.model_name)
    return app


def _add_endpoints(app: FastAPI, service: Service) -> None:
    decoder = service.decoder

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        options = await decoder.options(body)
        if body.logprobs:
            options["top_logprobs"] = body.logprobs
        suffix = await decoder.suffix(body)
        if suffix:
            options["suffix"] = suffix
        _check_count(len(body.prompts) * body.n, service.settings)
        group = await service.bridge.submit(await decoder.completion_prompts(body), body.n, options)
        return await _respond(group, completion_form(body, service.answers), body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        options = await decoder.options(body)
        if body.max_completion_tokens is not None:
            options["max_new_tokens"] = body.max_completion_tokens
        if body.logprobs and body.top_logprobs:
            options["top_logprobs"] = body.top_logprobs
        _check_count(body.n, service.settings)
        structure = await structure_of(body, service.answers.tokenizer)
        if structure.constraint is not None:
            options["constraint"] = structure.constraint
        group = await service.bridge.submit([await decoder.chat_prompt(body)], body.n, options)
        return await _respond(group, chat_form(body, service.answers, structure), body, request)

    async def _respond(
        group: Group, form: Form, body: CompletionRequest | ChatRequest, request: Request
    ) -> Response:  # fmt: skip
        if body.stream:
            events = decoder.stream(group, form, body)
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        return JSONResponse(await decoder.whole(group, form, body.n, request.receive))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model_card

    @app.get("/health")
    async def health() -> Response:
        error = service.engine.background_thread_status.fatal_error
        if error is not None or not service.bridge.is_open:
            status = "failed" if error is not None else "shutting down"
            return JSONResponse({"status": status}, 503)
        return JSONResponse({"status": "ok", "answers_in_flight": service.bridge.live})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")


def _check_count(count: int, settings: Settings) -> None:
    if count > settings.max_choices:
        raise APIError(400, f"number of prompts times n must be at most {settings.max_choices}; got {count}", "n")
