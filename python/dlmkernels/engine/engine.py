# SPDX-License-Identifier: Apache-2.0
"""The engine: requests come and go, and share the forwards of one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..decoding.capture import check_graphs, steps_of
from ..decoding.checks import flag, integer
from ..decoding.config import SpecialTokens
from ..decoding.inputs import read_options
from ..decoding.poll import check_polls
from ..decoding.processing import Wishes
from ..decoding.resolve import ConfigLike, configuration
from ..models.adapt import adapt
from .intake import Intake, check_flags, check_handler
from .life import Life
from .memory import EngineMemory
from .metrics import EngineMetrics
from .pool import Pool, Size
from .request import Request, RequestOutput
from .rounds import Rounds

#: columns of a slot where neither the caller nor the model says how many
DEFAULT_LENGTH = 2048


class Engine(Life):
    """Decodes requests as they come, many at a time; the first that is done is the first to leave.

    A request's answer is what `generate` makes of it alone: it depends on the model, the prompt, the configuration and
    the seed, never on what is decoded beside it.

    >>> with dlmkernels.Engine(model, slots=16, max_length=512, rule=dlmkernels.Threshold(0.9)) as engine:
    ...     first = engine.add_request(ids, max_new_tokens=64)
    ...     print(engine.get_result(first).generated_tokens)

    As a context manager it decodes in a thread of its own, which alone uses the model, until the block is left; then
    all requests that have come are finished first (after an exception they fail). Without that, `step` makes one step
    at a time, and `get_result` and iteration make as many as they need.

    Parameters
    ----------
    model : PreTrainedModel or DiffusionModel
        As in `generate`.
    slots : int
        How many requests are decoded at once.
    max_length : int, optional
        How many tokens a prompt, its answer and a suffix may have together. None: what the model can encode, at most
        2048.
    config : DecodingConfig, str or dict, optional
        How to decode what says nothing else, as in `generate`; None: the decoder of the model's family.
    tokenizer : PreTrainedTokenizer, optional
        Reads prompts that are text, looks for stop strings, and makes `RequestOutput.text`.
    prefill_budget : int
        How many tokens of prompts are admitted between two steps of those that are being decoded; one request in any
        case.
    max_lanes : int
        How many configurations are decoded at the same time: requests that are decoded alike share forwards, others
        take turns. A request whose configuration finds no place waits.
    deterministic : bool
        Whether every forward has the same shapes, whatever is in the other slots: answers are then the same bit for
        bit under any load. Otherwise they are the same up to what matrix products of another size round differently.
    graphs : {"auto", True, False}
        Whether steps are captured as CUDA graphs and replayed. "auto": where that is possible; a warning says where it
        turns out not to be.
    steps_per_poll : int
        How many steps are made before the host looks at their reports, while no request waits or is followed. Answers
        do not depend on it. More than 1 spares the host work, and costs steps in which rows that are done do nothing:
        for small models, whose captured steps take a GPU less time than the host.
    reserve : bool
        Whether the memory for requests of the engine's own configuration is allocated now (see `memory`), so that what
        does not fit is known before the first request; False: when one of them comes.
    **overrides
        Fields of `DecodingConfig`.

    Raises
    ------
    ValueError, TypeError
        When an argument or the configuration is not possible. The message names it.

    Notes
    -----
    Continuous: block after block, with any cache. Other programs, models with an encoder of their own and those whose
    rotary frequencies depend on the length are decoded in batches, each of which begins when the one before has ended.
    """

    def __init__(
        self, model, *, slots: int = 16, max_length: int | None = None, config: ConfigLike = None, tokenizer=None,
        prefill_budget: int = 8192, max_lanes: int = 8, deterministic: bool = False, graphs: bool | str = "auto",
        steps_per_poll: int = 1, reserve: bool = True, **overrides: Any,
    ):  # fmt: skip
        overrides = read_options(model, config, overrides, tokenizer)
        self.model = adapt(model)
        if self.model.group is not None:
            raise ValueError(
                "model is divided among ranks, which must make the same forwards, and an engine's depend on when "
                "requests come: decode it with generate, on all ranks"
            )
        check_graphs(graphs)
        limit = self.model.max_length
        columns = integer(2, optional=True)("max_length", max_length)
        if columns is None:
            columns = DEFAULT_LENGTH if limit is None else min(limit, DEFAULT_LENGTH)
        if limit is not None and columns > limit:
            raise ValueError(f"max_length is {columns}, longer than the model's max_position_embeddings of {limit}")
        size = Size(
            integer(1)("slots", slots), columns, integer(1)("prefill_budget", prefill_budget),
            integer(1)("max_lanes", max_lanes), not flag("deterministic", deterministic), check_polls(steps_per_poll),
        )  # fmt: skip
        wanted = configuration(self.model, config).replace(**overrides)
        self._intake = Intake(self.model, wanted, tokenizer, size)
        # what is decoded in batches is a program each, which is gone before recordings of it could be worth their while
        of_gangs = graphs if graphs is True else False
        pool = Pool(
            self.model, size, lambda program: steps_of(program, graphs, deterministic),
            lambda program: steps_of(program, of_gangs, deterministic),
        )  # fmt: skip
        super().__init__(Rounds(pool, tokenizer))
        self._count = 0
        like = self._intake.blank()  # what cannot be decoded with is refused now
        if flag("reserve", reserve):
            with torch.inference_mode(False), torch.no_grad():
                self._rounds.pool.open(like)

    # --- requests -----------------------------------------------------------------------------------------------------

    def add_request(
        self, input_ids, request_id: str | None = None, max_new_tokens: int | None = None, streaming: bool = False,
        record_timestamps: bool = False, eos_token_id: int | Sequence[int] | None = None, *, seed: int | None = None,
        given: Sequence[int] | None = None, suffix: Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None, num_return_sequences: int = 1,
        repetition_penalty: float = 1.0, logits_processor=None, top_logprobs: int = 0, drafts: bool = False,
        on_step: Callable[[RequestOutput], Any] | None = None,
        result_handler: Callable[[RequestOutput], Any] | None = None, **options: Any,
    ) -> str:  # fmt: skip
        """Put a request at the end of the queue. Any thread may.

        Parameters
        ----------
        input_ids : list of int, Tensor or str
            The prompt: ids, int64 `[P]` or `[1, P]`, or with a tokenizer a text or a chat.
        request_id : str, optional
            What it is called; None: a name is made. Of requests that are being decoded no two may have the same.
        max_new_tokens : int, optional
            How long the answer is; None: as the engine's configuration says, or else 128, or what there is room for.
        streaming : bool
            Whether outputs come also while it is decoded, whenever more of the answer is final.
        record_timestamps : bool
            Whether it is noted when each token was known to be final.
        eos_token_id : int or sequence of int, optional
            Tokens that end the answer; requests that end at different ones share forwards.
        seed : int, optional
            What its random draws depend on; None: the engine's, or else one that is drawn.
        given : sequence of int, optional
            Tokens that stand in the answer from the start, `max_new_tokens` of them, -1 where one is to be decoded.
        suffix : sequence of int, optional
            Tokens that stand behind the answer, and are not part of it.
        stop_strings : str or sequence of str, optional
            Texts that end the answer; needs a tokenizer. They are looked for in what is final, from the left. The
            answer ends with the token that completes one; `text` ends before it.
        num_return_sequences : int
            How many answers there are to be, each with a seed of its own; the others are called `<id>__child#<n>`.
        repetition_penalty : float
            Divides positive and multiplies negative logits of tokens that the request holds already.
        logits_processor : callable or sequence of callables, optional
            Functions of decoded ids `[n, t]` and scores float32 `[n, V]` of n open positions, in the manner of
            transformers. They run on the host: every step waits for the device, and is not captured.
        top_logprobs : int
            For how many of the likeliest tokens the log-probability is noted at every position.
        drafts : bool
            Whether outputs come after every step, with the answer as it stands.
        on_step : callable, optional
            Is called with such an output after every step, in the engine's thread; what it raises fails the request.
        result_handler : callable, optional
            Gets the request's outputs (see `register_result_handler`), from the first on.
        **options
            Fields of `DecodingConfig` for this request: `temperature`, `top_k`, `top_p`, `rule` … Requests that differ
            in sampling or thresholds share forwards; those that differ in other fields do not.

        Returns
        -------
        str
            The request's id.

        Raises
        ------
        ValueError, TypeError
            When it could never be decoded, or never be given a slot. The message says why.
        RuntimeError
            When the engine has been stopped.
        """
        with self._rounds.lock:
            if request_id is None:
                request_id = f"req_{self._count}"
                self._count += 1
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string; got {type(request_id).__name__}")
        if eos_token_id is not None:
            options["eos_token_id"] = eos_token_id
        requests = self._intake.requests(
            request_id, input_ids, max_new_tokens=max_new_tokens, given=given, suffix=suffix, seed=seed,
            num_return_sequences=num_return_sequences, stop_strings=stop_strings,
            wishes=Wishes.of(repetition_penalty, logits_processor, top_logprobs),
            flags=check_flags(
                streaming=streaming, record_timestamps=record_timestamps, drafts=drafts, on_step=on_step
            ),
            options=options,
        )  # fmt: skip
        self._accept(requests, result_handler)
        return request_id

    def _accept(self, requests: Sequence[Request], handler: Callable[[RequestOutput], Any] | None) -> None:
        if handler is not None:
            check_handler("result_handler", handler)
        with self._rounds.lock:
            if self._is_closed or self._is_stopping or self._must_stop:
                raise RuntimeError("the engine has been stopped, and takes no requests any more")
            for request in requests:
                if request.request_id in self._rounds.live:
                    raise ValueError(f"request_id '{request.request_id}' is in use by a request that is not done yet")
            if handler is not None:
                for request in requests:
                    self._rounds.deliveries.register(request.request_id, handler)
            for request in requests:
                self._rounds.live[request.request_id] = request
                self._rounds.inbox.append(request)
        self._wake.set()

    def add_requests(
        self, inputs: Iterable[Any], max_new_tokens: int | None = None, streaming: bool = False,
        record_timestamps: bool = False, **options: Any,
    ) -> list[str]:  # fmt: skip
        """Several requests that are alike but for their prompts; their ids."""
        return [
            self.add_request(
                prompt, max_new_tokens=max_new_tokens, streaming=streaming, record_timestamps=record_timestamps,
                **options,
            )
            for prompt in inputs
        ]  # fmt: skip

    def cancel_request(self, request_id: str) -> None:
        """Let a request end now: it is delivered as cancelled, with what is final of it. Nothing if it is unknown."""
        with self._rounds.lock:
            if request_id in self._rounds.live:
                self._rounds.inbox.append(request_id)
        self._wake.set()

    def register_result_handler(self, request_id: str, callback: Callable[[RequestOutput], Any]) -> None:
        """Let a function have all outputs of a request that nobody has taken yet.

        It is called in the event loop that is running here, if there is one, else in the engine's thread.
        """
        check_handler("callback", callback)
        self._rounds.deliveries.register(request_id, callback)

    # --- results ------------------------------------------------------------------------------------------------------

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> RequestOutput | None:
        """The next output (of a request); None after `timeout` seconds, or when none can come any more.

        Each output is given once. Where the engine has no thread, steps are made until there is one.
        """
        if not self.is_running():
            until = None if timeout is None else time.monotonic() + timeout
            while (found := self._rounds.deliveries.take(request_id)) is None and self._may_come(request_id):
                if until is not None and time.monotonic() >= until:
                    return None
                self.step()
            return found if found is not None else self._rounds.deliveries.take(request_id)
        return self._rounds.deliveries.wait(request_id, timeout, lambda: self._may_come(request_id))

    def _may_come(self, request_id: str | None) -> bool:
        with self._rounds.lock:
            return bool(self._rounds.live) if request_id is None else request_id in self._rounds.live

    def __iter__(self) -> Iterator[RequestOutput]:
        """Outputs as they come, until no request is left."""
        while (output := self.get_result()) is not None:
            yield output

    def request_id_iter(self, request_id: str) -> Iterator[RequestOutput]:
        """Outputs of one request, the last of them included."""
        while (output := self.get_result(request_id)) is not None:
            yield output
            if output.is_finished():
                return

    # --- what is known of it ------------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """How many requests are decoded at once."""
        return self._rounds.pool.size.slots

    @property
    def max_length(self) -> int:
        """How many tokens a prompt, its answer and a suffix may have together."""
        return self._rounds.pool.size.columns

    @property
    def special_tokens(self) -> SpecialTokens:
        """Mask, padding and end tokens of the engine's own configuration."""
        return self._intake.blank().special

    def memory(self) -> EngineMemory:
        """Bytes that are allocated for requests and stay so while they come and go, of all lanes that there are.

        Before the first request: those of the engine's own configuration. A lane of another one takes as much again;
        there are `max_lanes` at most.
        """
        with self._stepping:
            return EngineMemory.of(self._rounds.pool.lanes.values())

    def metrics(self) -> EngineMetrics:
        """What has been done so far."""
        return self._rounds.meter.metrics(self._rounds.waiting, self._rounds.pool.busy)
