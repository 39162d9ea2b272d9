# SPDX-License-Identifier: Apache-2.0
"""Convert API parameters to engine parameters, and the engine's outputs to responses and event streams."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread

from ..decoding.rules.named import parse_rule
from ..engine.request import RequestOutput
from .answers import REASONS, Answers, TextSoFar, check
from .bridge import Bridge, Group
from .errors import APIError
from .limits import gone
from .live import Viewers
from .protocol import ChatRequest, CompletionRequest, GenerationParameters
from .settings import Settings
from .structured import Structure

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """Response format of an endpoint.

    Attributes
    ----------
    prefix, kind, chunk_kind : str
        Prefix of response ids, and the `object` fields of whole responses and of streamed chunks.
    whole : callable
        Maps the text of an answer to its choice, without `index`, `logprobs` and `finish_reason`.
    part : callable
        Maps a piece of text, and whether it is the first of its answer, to a streamed choice.
    logprobs : callable
        Maps an output and a start index to the log probabilities of its tokens from there on, or to None if the
        request did not ask for them.
    is_whole : bool
        Whether a stream sends an answer only once it is complete.
    """

    prefix: str
    kind: str
    chunk_kind: str
    whole: Callable[[str], dict[str, Any]]
    part: Callable[[str, bool], dict[str, Any]]
    logprobs: Callable[[Any, int], dict[str, Any] | None]
    is_whole: bool = False


def completion_form(request: CompletionRequest, answers: Answers) -> Form:
    """Return the response format of `/v1/completions`."""
    k = request.logprobs
    return Form(
        "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text, _: {"text": text},
        lambda output, start: None if k is None else answers.completion_logprobs(output, start, k),
    )  # fmt: skip


def chat_form(request: ChatRequest, answers: Answers, structure: Structure) -> Form:
    """Return the response format of `/v1/chat/completions`."""

    def whole(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "refusal": None} | structure.message(text)}

    def part(text: str, is_first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = structure.message(text) if structure.is_whole else {"content": text}
        if "tool_calls" in delta:
            delta["tool_calls"] = [call | {"index": k} for k, call in enumerate(delta["tool_calls"])]
        return {"delta": ({"role": "assistant"} if is_first else {}) | delta}

    k = request.top_logprobs or 0
    return Form(
        "chatcmpl", "chat.completion", "chat.completion.chunk", whole, part,
        lambda output, start: answers.chat_logprobs(output, start, k) if request.logprobs else None,
        structure.is_whole,
    )  # fmt: skip


def finish_reason(output: RequestOutput, choice: dict[str, Any]) -> str:
    """Return the API's `finish_reason` of an answer."""
    message = choice.get("message") or choice.get("delta") or {}
    return "tool_calls" if "tool_calls" in message else REASONS[output.finish_reason or ""]


class Decoder:
    """The decoding logic shared by the two endpoints."""

    def __init__(self, bridge: Bridge, answers: Answers, settings: Settings, mask: int, viewers: Viewers):
        self.bridge, self.answers, self.settings, self.mask, self.viewers = bridge, answers, settings, mask, viewers

    # --- requests -----------------------------------------------------------------------------------------------------

    async def completion_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Return the token ids of each prompt."""
        return [
            prompt if isinstance(prompt, list) else await self._tokenized(prompt, "prompt")
            for prompt in request.prompts
        ]

    async def _tokenized(self, text: str, param: str, special: bool = True) -> list[int]:
        read = lambda: self.answers.tokenizer(text, add_special_tokens=special)["input_ids"]  # noqa: E731
        ids = await anyio.to_thread.run_sync(read)
        if not ids:
            raise APIError(400, f"{param} must contain at least one token; this model's tokenizer returns none", param)
        return ids

    async def chat_prompt(self, request: ChatRequest) -> list[int]:
        """Return the token ids of a chat, formatted with the model's chat template."""
        messages = [message.for_template for message in request.messages]
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()] or None
        tokenizer, more = self.answers.tokenizer, request.chat_template_kwargs or {}
        if tokenizer.chat_template is None:
            raise APIError(
                400, "this model's tokenizer has no chat template: use /v1/completions", "messages", "no_chat_template"
            )

        def read() -> list[int]:
            return tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True, **more
            )["input_ids"]  # fmt: skip

        try:
            ids = await anyio.to_thread.run_sync(read)
        except Exception as error:  # templates are programs, which may raise anything for input they reject
            raise APIError(400, f"the model's chat template rejects these messages: {error}", "messages") from error
        if not ids:
            raise APIError(400, "messages must contain at least one token; the tokenizer returns none", "messages")
        return ids

    async def options(self, request: GenerationParameters) -> dict[str, Any]:
        """Return the options of `Engine.add_request` that both endpoints share."""
        wants_drafts = request.stream_options is not None and request.stream_options.drafts
        found: dict[str, Any] = {
            "max_new_tokens": request.max_tokens, "seed": request.seed, "stop_strings": request.stop or None,
            "streaming": request.stream, "drafts": wants_drafts or self.viewers.count > 0,
        }  # fmt: skip
        for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
            if getattr(request, name) is not None:
                found[name] = getattr(request, name)
        chosen = {name: getattr(request, name) for name in ("rule", "steps", "block_length")}
        for name, value in chosen.items():
            if value is None:
                continue
            if not self.settings.decoding_options:
                raise APIError(400, f"{name} is not allowed: the server was started without --decoding-options", name)
            try:
                found[name] = parse_rule(value) if name == "rule" else value
            except (ValueError, TypeError) as error:
                raise APIError(400, str(error), name) from error
        return found

    async def suffix(self, request: CompletionRequest) -> list[int] | None:
        """Return the token ids of the text that follows the answer, or None."""
        return await self._tokenized(request.suffix, "suffix", special=False) if request.suffix else None

    # --- answers ------------------------------------------------------------------------------------------------------

    async def whole(self, group: Group, form: Form, n: int, receive: Callable) -> dict[str, Any]:
        """Return the response with all answers. They are cancelled if the client disconnects."""
        try:
            with anyio.move_on_after(self.settings.request_timeout) as patience:
                async with anyio.create_task_group() as tasks:

                    async def watch() -> None:
                        await gone(receive)
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(watch)
                    async for _ in group.news():
                        pass
                    tasks.cancel_scope.cancel()
            if patience.cancelled_caught:
                raise self._too_late()
            if not all(answer.is_done for answer in group.answers.values()):
                raise APIError(499, "the client closed the connection")
            outputs = [check(output) for output in group.outputs]
        finally:
            self.bridge.leave(group)
        choices = []
        for index, output in enumerate(outputs):
            choice = form.whole(self.answers.text(output))
            more = {"logprobs": form.logprobs(output, 0), "finish_reason": finish_reason(output, choice)}
            choices.append(choice | {"index": index} | more)
        return self._frame(form, form.kind, group) | {"choices": choices, "usage": self.answers.usage(outputs, n)}

    def _too_late(self) -> APIError:
        return APIError(504, f"the answer was not finished within {self.settings.request_timeout:g} s", code="timeout")

    def _frame(self, form: Form, kind: str, group: Group) -> dict[str, Any]:
        return {
            "id": f"{form.prefix}-{group.id}", "object": kind, "created": int(time.time()),
            "model": self.settings.model_name, "system_fingerprint": None,
        }  # fmt: skip

    async def stream(
        self, group: Group, form: Form, request: CompletionRequest | ChatRequest
    ) -> AsyncIterator[str]:  # fmt: skip
        """Stream the answers as server-sent events, sending text as soon as it is final."""
        frame = self._frame(form, form.chunk_kind, group)
        options = request.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        so_far = [TextSoFar(self.answers, stop) for _ in group.answers]
        begun: set[int] = set()
        deadline = anyio.current_time() + self.settings.request_timeout

        def event(choice: dict[str, Any] | None, **more: Any) -> str:
            choices = [] if choice is None else [choice]
            return f"data: {json.dumps(frame | {'choices': choices} | usage | more, ensure_ascii=False)}\n\n"

        try:
            news = group.news()
            while True:
                with anyio.move_on_after(deadline - anyio.current_time()) as patience:
                    answer = await anext(news, None)
                if patience.cancelled_caught:
                    raise self._too_late()
                if answer is None:
                    break
                output, index, start = answer.latest, answer.index, so_far[answer.index].tokens
                assert output is not None
                if output.is_finished():
                    check(output)
                is_told = output.is_finished() or not form.is_whole
                text = so_far[index].advance(output) if is_told else ""
                choice: dict[str, Any] = form.part(text, index not in begun) if is_told else {"delta": {}}
                choice |= {
                    "index": index, "logprobs": form.logprobs(output, start) if is_told else None,
                    "finish_reason": finish_reason(output, choice) if output.is_finished() else None,
                }  # fmt: skip
                wants_draft = options is not None and options.drafts and output.draft is not None
                if wants_draft:
                    choice["draft"] = self.answers.draft(output, self.mask)
                    choice["num_forwards"] = output.num_forwards
                if text or output.is_finished() or wants_draft:
                    begun |= {index} if is_told else set()
                    yield event(choice)
            if usage:
                usage.clear()
                yield event(None, usage=self.answers.usage(group.outputs, request.n))
        except APIError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
        finally:
            self.bridge.leave(group)
        yield DONE
