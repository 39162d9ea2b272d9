# SPDX-License-Identifier: Apache-2.0
"""Request schemas: the supported parameters of OpenAI's completions and chat completions.

Unknown parameters are rejected by name. Known but unsupported parameters are accepted only with their neutral value,
which many clients send by default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Text = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
#: Unsupported parameters, and the neutral values with which they are accepted.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1), "echo": (None, False), "frequency_penalty": (None, 0), "presence_penalty": (None, 0),
    "logit_bias": (None, {}), "store": (None, False), "audio": (None,), "prediction": (None,),
    "modalities": (None, ["text"]), "reasoning_effort": (None, "none"), "service_tier": (None, "auto", "default"),
    "verbosity": (None,), "web_search_options": (None,), "function_call": (None, "none"), "functions": (None, []),
}  # fmt: skip


class ParameterError(ValueError):
    """An error about one parameter, raised by a check of the whole request."""

    def __init__(self, param: str, message: str):
        super().__init__(f"{param} {message}")
        self.param = param


class Strict(BaseModel):
    """Base class that rejects unknown fields."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    """Options of a streamed response."""

    include_usage: bool = False
    #: whether to send an event after every step, with the answer decoded so far
    drafts: bool = False
    include_obfuscation: Literal[False] = False


class GenerationParameters(Strict):
    """Parameters of both endpoints."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    #: identifier of the end user; ignored
    user: str | None = None
    # not in OpenAI's API
    top_k: Annotated[int, Field(ge=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    rule: str | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    block_length: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("the body must be a JSON object")
        data = dict(data)
        for name, values in WITHOUT_EFFECT.items():
            if name in data and name not in cls.model_fields:
                value = data.pop(name)
                if value not in values:
                    raise ParameterError(name, "is not supported: leave it out")
        return data

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationParameters:
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", "has no effect without stream=true")
        return self


class CompletionRequest(GenerationParameters):
    """Body of `/v1/completions`."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        is_one = bool(self.prompt) and isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else list(self.prompt)  # type: ignore[arg-type, list-item]

    @model_validator(mode="after")
    def _check_prompt(self) -> CompletionRequest:
        if not self.prompt or not all(self.prompts):
            raise ParameterError("prompt", "must contain at least one token")
        return self


class TextPart(Strict):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """The function and arguments of a tool call."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A tool call in an earlier answer of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @property
    def for_template(self) -> dict[str, Any]:
        """The message as a dict for chat templates."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls is not None:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(Strict):
    """A function that the model may call."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call; always a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """A reference to a function by name."""

    name: str


class ToolChoice(Strict):
    """The function that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A JSON schema that the answer must satisfy."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The format of the answer: plain text, any JSON object, or JSON that satisfies a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError(
                f"json_schema must be given if and only if type is 'json_schema'; got type '{self.type}' "
                f"{'without' if self.json_schema is None else 'with'} json_schema"
            )
        return self


class ChatRequest(GenerationParameters):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    #: arguments of the model's chat template, such as `{"enable_thinking": false}`
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ParameterError("top_logprobs", "has no effect without logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError(
                f"max_tokens and max_completion_tokens must be equal, or one left out; got {self.max_tokens} and "
                f"{self.max_completion_tokens}"
            )
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ParameterError("tool_choice", "has no effect without tools")
        if isinstance(self.tool_choice, ToolChoice):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                name = self.tool_choice.function.name
                raise ParameterError("tool_choice", f"must name a function in tools; got '{name}'")
        return self
