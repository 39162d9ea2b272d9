# SPDX-License-Identifier: Apache-2.0
"""Turn the content of a slot into outputs for the request's owner."""

from __future__ import annotations

import math
import time
from typing import Any

from ..decoding.stops import stop_at, text_of
from .request import Answer, Request, RequestOutput, RequestStatus


def seen_stop(request: Request, answer: Answer, tokenizer) -> int | None:
    """Return how many of the tokens that are final it takes to complete a stop string; None if they contain none."""
    final = answer.tokens[: answer.length(answer.final)]
    return stop_at(final, request.stop_strings, tokenizer, request.shown)


def final_output(request: Request, answer: Answer, tokenizer, **fields: Any) -> RequestOutput:
    """Build the last output of a request. If it was cancelled, `fields` holds `error` and `finish_reason`."""
    is_cancelled = "error" in fields
    whole = len(answer.tokens) if not is_cancelled else answer.final
    length = answer.length(whole)
    stop = stop_at(answer.tokens[: answer.length(answer.final)], request.stop_strings, tokenizer)
    reason = "length"
    if stop is not None:
        length, reason = stop, "stop"
    elif any(token in request.special.eos for token in answer.tokens[:length]):
        reason = "eos"
    _note_times(request, length)
    status = RequestStatus.CANCELLED if is_cancelled else RequestStatus.FINISHED
    found: dict[str, Any] = {"finish_reason": reason} | _tokens(answer, length) | fields
    found["complete"] = not is_cancelled and not any(answer.is_open[:length])
    if tokenizer is not None:
        found["text"] = text_of(found["generated_tokens"], tokenizer, request.stop_strings)
    return request.output(status, **found)


def interim_output(request: Request, answer: Answer, tokenizer) -> RequestOutput:
    """Build an output of an unfinished request: the tokens that are final so far and, if requested, the draft."""
    length = answer.length(answer.final)
    _note_times(request, length)
    has_draft = request.drafts or request.on_step is not None
    draft, confidence = (list(answer.tokens), list(answer.confidence)) if has_draft else (None, None)
    fields = _tokens(answer, length)
    if tokenizer is not None:
        fields["text"] = text_of(fields["generated_tokens"], tokenizer, request.stop_strings)
    return request.output(RequestStatus.DECODING, draft=draft, draft_confidence=confidence, **fields)


def _note_times(request: Request, length: int) -> None:
    if request.record_timestamps:
        now = time.perf_counter()
        request.timestamps += [now] * (length - len(request.timestamps))
        del request.timestamps[length:]


def _tokens(answer: Answer, length: int) -> dict[str, Any]:
    """Return the first `length` tokens of an answer and their records, as fields of `RequestOutput`."""
    confidence, steps = list(answer.confidence[:length]), list(answer.commit_step[:length])
    found: dict[str, Any] = {
        "generated_tokens": list(answer.tokens[:length]), "commit_step": steps, "confidence": confidence,
        "logprobs": [math.log(p) if step >= 0 and p > 0 else 0.0 for p, step in zip(confidence, steps)],
        "num_forwards": answer.num_forwards,
    }  # fmt: skip
    if answer.top_logprobs is not None:
        found["top_logprobs"] = [
            list(best) if step >= 0 else None for best, step in zip(answer.top_logprobs[:length], steps)
        ]
    return found
