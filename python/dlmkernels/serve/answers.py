# SPDX-License-Identifier: Apache-2.0
"""Convert the engine's outputs to the objects of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine.life import STOPPED
from ..engine.request import RequestOutput, RequestStatus
from .errors import APIError

#: The engine's `finish_reason` -> the API's `finish_reason`.
REASONS = {"length": "length", "eos": "stop", "stop": "stop"}


class Answers:
    """Reads text, log probabilities and token counts from outputs.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
    ends : sequence of int
        End tokens of the model, which do not count as part of an answer.
    """

    def __init__(self, tokenizer, ends: Sequence[int]):
        self.tokenizer, self.ends = tokenizer, frozenset(ends)

    def text(self, output: RequestOutput) -> str:
        """Return the answer's text, without special tokens and up to a stop string."""
        if output.text is not None:
            return output.text
        return self.tokenizer.decode(output.generated_tokens, skip_special_tokens=True)

    def count(self, outputs: Sequence[RequestOutput]) -> int:
        """Count the tokens of several answers, excluding end tokens and everything after them."""
        return sum(len(self.tokens(output)) for output in outputs)

    def tokens(self, output: RequestOutput) -> list[int]:
        """Return the answer's tokens before its end token."""
        return output.tokens_before(self.ends)

    def usage(self, outputs: Sequence[RequestOutput], n: int) -> dict[str, Any]:
        """Return the `usage` object of a request with `n` answers per prompt: token counts and number of forwards."""
        prompt = sum(len(output.prompt_ids) for output in outputs[::n])
        answer = self.count(outputs)
        return {
            "prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer,
            "num_forwards": sum(output.num_forwards for output in outputs),
        }  # fmt: skip

    def piece(self, token: int) -> str:
        """Decode one token to text."""
        return self.tokenizer.decode([token])

    def _bytes(self, text: str) -> list[int] | None:
        return None if "\ufffd" in text else list(text.encode())

    def chat_logprobs(self, output: RequestOutput, start: int, k: int) -> dict[str, Any]:
        """Return log probabilities of the tokens from `start` on, in the format of chat completions."""
        content = []
        for place in range(start, len(self.tokens(output))):
            best = (output.top_logprobs[place] if output.top_logprobs else None) or []
            content.append(self._entry(output.generated_tokens[place], output.logprobs[place])
                           | {"top_logprobs": [self._entry(token, value) for token, value in best[:k]]})  # fmt: skip
        return {"content": content, "refusal": None}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text = self.piece(token)
        return {"token": text, "logprob": value, "bytes": self._bytes(text)}

    def completion_logprobs(self, output: RequestOutput, start: int, k: int) -> dict[str, Any]:
        """Return log probabilities of the tokens from `start` on, in the format of completions."""
        tokens = self.tokens(output)
        pieces = [self.piece(token) for token in tokens]
        offsets = [sum(map(len, pieces[:place])) for place in range(len(pieces))]
        best = output.top_logprobs or [None] * len(tokens)
        return {
            "tokens": pieces[start:], "token_logprobs": output.logprobs[start : len(tokens)],
            "top_logprobs": [
                {self.piece(token): value for token, value in (best[place] or [])[:k]} or None
                for place in range(start, len(tokens))
            ] if k else None,
            "text_offset": offsets[start:],
        }  # fmt: skip

    def draft(self, output: RequestOutput, mask: int) -> list[str | None] | None:
        """Return the answer decoded so far: one text per position, None for positions that are still masked."""
        if output.draft is None:
            return None
        return [None if token == mask else self.piece(token) for token in output.draft]


def check(output: RequestOutput) -> RequestOutput:
    """Return the output if it has been decoded. Raises APIError if decoding failed or the server is stopping."""
    if output.status is RequestStatus.FINISHED:
        return output
    if output.error == STOPPED:
        raise APIError(503, "the server is shutting down", code="shutting_down")
    raise APIError(500, f"the answer could not be decoded: {output.error}")


class TextSoFar:
    """Tracks how much of an answer's text has been streamed, and what can be sent next.

    The last characters may be the beginning of a stop string, and a character may be spread over several tokens. Such
    characters are held back until later tokens settle them.
    """

    def __init__(self, answers: Answers, stop: Sequence[str]):
        self._answers, self._stop = answers, tuple(stop)
        self._sent = ""
        #: number of tokens sent so far
        self.tokens = 0

    def advance(self, output: RequestOutput) -> str:
        """Return the text that can be sent now and has not been sent before."""
        text = self._answers.text(output)
        if not output.is_finished():
            text = text[: len(text) - self._held(text)]
        self.tokens = len(self._answers.tokens(output))
        if not text.startswith(self._sent):  # some tokenizers decode earlier tokens differently once more follow
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new

    def _held(self, text: str) -> int:
        """Return how many characters at the end of the text may still change or be removed."""
        broken = len(text) - len(text.rstrip("\ufffd"))
        longest = max((self._overlap(text, stop) for stop in self._stop), default=0)
        return max(broken, longest)

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return how many characters at the end of the text are the beginning of a stop string."""
        return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k])), 0)
