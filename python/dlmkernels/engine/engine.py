# SPDX-License-Identifier: Apache-2.0
"""The engine: requests join and leave at any time, and share the forward passes of one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from .delivery import check_id, deadline
from .intake import Intake, check_flags, check_handler, naming
from .life import Life
from .memory import EngineMemory
from .metrics import EngineMetrics
from .pool import Pool, Size
from .request import Request, RequestOutput
from .rounds import Rounds

#: default of `max_length`, unless the model supports less
DEFAULT_LENGTH = 2048


class Engine(Life):
    """Continuous-batching engine: requests join as they arrive, and leave as soon as they are done.

    A request gets the same answer as from `generate` alone: the answer depends on the model, the prompt, the
    configuration and the seed, never on the requests decoded alongside it.

    >>> with dlmkernels.Engine(model, slots=16, max_length=512, rule=dlmkernels.Threshold(0.9)) as engine:
    ...     first = engine.add_request(ids, max_new_tokens=64)
    ...     print(engine.get_result(first).generated_tokens)

    Used as a context manager, the engine decodes in a background thread, and only that thread uses the model. Leaving
    the block waits until all requests are finished; after an exception, unfinished requests fail instead. Without a
    thread, `step` runs one step at a time, and `get_result` and iteration run as many steps as they need.

    Parameters
    ----------
    model : PreTrainedModel or DiffusionModel
        As in `generate`.
    slots : int
        Number of requests decoded at once.
    max_length : int, optional
        Maximum combined length, in tokens, of prompt, answer and suffix. If None, what the model can encode, but at
        most 2048.
    config : DecodingConfig, str or dict, optional
        Default decoding configuration, as in `generate`. If None, the decoder of the model's family.
    tokenizer : PreTrainedTokenizer, optional
        Encodes text prompts, is used to find stop strings, and produces `RequestOutput.text`.
    prefill_budget : int
        Maximum number of prompt tokens admitted between two decoding steps. A longer prompt is admitted alone.
    max_lanes : int
        Maximum number of configurations decoded at the same time. Requests with compatible configurations form a
        *lane* and share forward passes; lanes take turns. A request that finds no free lane waits.
    deterministic : bool
        Whether every forward pass has the same shapes, whatever the other slots hold. Answers are then bitwise
        identical under any load. Otherwise they agree up to the rounding of matrix products of different sizes.
    graphs : {"auto", True, False}
        Whether to capture steps as CUDA graphs and replay them. "auto" captures steps where possible, and warns if a
        capture fails. Requests decoded in batches (see Notes) are captured only with True.
    steps_per_poll : int
        How many steps run before the host checks their results, while no request waits for a slot or is observed (for
        example, streamed). Does not change the answers. Values above 1 reduce host work, at the cost of steps in which
        finished rows do nothing. Useful for small models, whose captured steps take the GPU less time than the host.
    reserve : bool
        Whether to allocate the memory for requests with the engine's own configuration now (see `memory`), so that
        running out of memory shows before the first request. If False, it is allocated for the first such request.
    **overrides
        Fields of `DecodingConfig`, which take precedence over `config`.

    Raises
    ------
    ValueError, TypeError
        If an argument or the configuration is invalid. The message names it.

    Notes
    -----
    Decoding is continuous for rules that go block by block, with any cache except d2Cache. Requests for other programs,
    for models with their own encoder and for models whose rotary frequencies depend on the length are decoded in
    batches: each batch begins when the previous one has ended.
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
                "model is sharded across ranks, which must all run the same forward passes, but those of an engine "
                "depend on when requests arrive: call generate on all ranks instead"
            )
        check_graphs(graphs)
        limit = self.model.max_length
        columns = integer(2, optional=True)("max_length", max_length)
        if columns is None:
            columns = DEFAULT_LENGTH if limit is None else min(limit, DEFAULT_LENGTH)
        if limit is not None and columns > limit:
            raise ValueError(f"max_length must be at most the model's max_position_embeddings, {limit}; got {columns}")
        size = Size(
            integer(1)("slots", slots), columns, integer(1)("prefill_budget", prefill_budget),
            integer(1)("max_lanes", max_lanes), not flag("deterministic", deterministic), check_polls(steps_per_poll),
        )  # fmt: skip
        wanted = configuration(self.model, config).replace(**overrides)
        self._intake = Intake(self.model, wanted, tokenizer, size)
        # each batch has a program of its own, which ends before capturing its steps could pay off
        of_gangs = graphs if graphs is True else False
        pool = Pool(
            self.model, size, lambda program: steps_of(program, graphs, deterministic),
            lambda program: steps_of(program, of_gangs, deterministic),
        )  # fmt: skip
        super().__init__(Rounds(pool, tokenizer))
        self._count = 0
        like = self._intake.blank()  # raises now if the configuration cannot be decoded with
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
        """Add a request to the end of the queue. May be called from any thread.

        Parameters
        ----------
        input_ids : list of int, Tensor or str
            The prompt: token ids (a list, or int64 `[P]` or `[1, P]`) or, with a tokenizer, a text or a chat.
        request_id : str, optional
            Name of the request, unique among unfinished requests. If None, a name is generated.
        max_new_tokens : int, optional
            Length of the answer, in tokens. If None, the length of `given`, or else the configured length, or else 128
            or as many as fit, whichever is less.
        streaming : bool
            Whether to deliver outputs during decoding as well, whenever more tokens have become final, that is, can no
            longer change.
        record_timestamps : bool
            Whether to record when each token was known to be final.
        eos_token_id : int or sequence of int, optional
            Tokens that end the answer. Requests with different end tokens share forward passes.
        seed : int, optional
            Seed of the request's random draws. If None, the engine's seed, or else a random one.
        given : sequence of int, optional
            Tokens fixed in the answer from the start: `max_new_tokens` ids, -1 at each position to decode.
        suffix : sequence of int, optional
            Fixed tokens that follow the answer and are not part of it.
        stop_strings : str or sequence of str, optional
            Texts that end the answer. Requires a tokenizer. They are searched for, from the left, in the tokens that
            are final. The answer ends with the token that completes a stop string; `text` ends before the string.
        num_return_sequences : int
            Number of answers, each with its own seed. Answers after the first have ids `<id>__child#<n>`.
        repetition_penalty : float
            Divides positive and multiplies negative logits of tokens that the request already contains.
        logits_processor : callable or sequence of callables, optional
            Functions in the style of transformers. Each takes the decoded ids, int64 `[n, t]`, and the scores of n open
            positions, float32 `[n, V]`, and returns scores. They run on the host: every step waits for the device and
            is not captured.
        top_logprobs : int
            Number of most likely tokens whose log-probabilities are recorded at each position.
        drafts : bool
            Whether to deliver an output after every step, with the current state of the whole answer.
        on_step : callable, optional
            Called with such an output after every step, in the engine's thread. If it raises, the request fails.
        result_handler : callable, optional
            Receives all outputs of the request (see `register_result_handler`).
        **options
            Fields of `DecodingConfig` for this request: `temperature`, `top_k`, `top_p`, `rule` … Requests that differ
            only in sampling options or thresholds share forward passes; those that differ in other fields do not.

        Returns
        -------
        str
            The id of the request.

        Raises
        ------
        ValueError, TypeError
            If the request could never be decoded or never fit into a slot, or its id is in use. The message says why.
        RuntimeError
            If the engine has been stopped.
        """
        with self._rounds.lock:
            if request_id is None:
                request_id = f"req_{self._count}"
                self._count += 1
        if not isinstance(request_id, str):
            hint = f": pass max_new_tokens={request_id} by keyword" if isinstance(request_id, int) else ""
            raise TypeError(f"request_id must be a string; got {type(request_id).__name__}{hint}")
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
                raise RuntimeError("the engine has been stopped and no longer accepts requests")
            for request in requests:
                if request.request_id in self._rounds.live:
                    raise ValueError(f"request_id '{request.request_id}' is already in use by an unfinished request")
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
        """Add several requests that differ only in their prompts, and return their ids."""
        if not isinstance(inputs, Iterable) or isinstance(inputs, str | bytes | Mapping):
            raise TypeError(f"inputs must be a list of prompts; got {type(inputs).__name__}")
        ids = []
        for number, prompt in enumerate(inputs):
            with naming(number):
                ids.append(self.add_request(
                    prompt, max_new_tokens=max_new_tokens, streaming=streaming, record_timestamps=record_timestamps,
                    **options,
                ))  # fmt: skip
        return ids

    def cancel_request(self, request_id: str) -> None:
        """End a request now, and deliver it as cancelled, with the tokens that are final so far. Ignore unknown ids."""
        check_id(request_id)
        with self._rounds.lock:
            if request_id in self._rounds.live:
                self._rounds.inbox.append(request_id)
        self._wake.set()

    def register_result_handler(self, request_id: str, callback: Callable[[RequestOutput], Any]) -> None:
        """Call a function with each output of a request, including those that are already waiting to be taken.

        If an event loop is running in the calling thread, the function is called in that loop. Otherwise it is called
        in the engine's thread, or in the calling thread for outputs that are already waiting.
        """
        check_id(request_id)
        check_handler("callback", callback)
        self._rounds.deliveries.register(request_id, callback)

    # --- results ------------------------------------------------------------------------------------------------------

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> RequestOutput | None:
        """Return the next output, of any request or of `request_id`.

        Returns None after `timeout` seconds, or once no further output can arrive. Each output is returned once. If the
        engine has no thread, this method runs steps until there is an output.
        """
        if request_id is not None:
            check_id(request_id)
        if not self.is_running():
            until = deadline(timeout)
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
        """Yield outputs as they arrive, until no request is left."""
        while (output := self.get_result()) is not None:
            yield output

    def request_id_iter(self, request_id: str) -> Iterator[RequestOutput]:
        """Yield the outputs of one request, up to and including the last one."""
        while (output := self.get_result(request_id)) is not None:
            yield output
            if output.is_finished():
                return

    # --- properties and counters --------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Number of requests decoded at once."""
        return self._rounds.pool.size.slots

    @property
    def max_length(self) -> int:
        """Maximum combined length, in tokens, of prompt, answer and suffix."""
        return self._rounds.pool.size.columns

    @property
    def special_tokens(self) -> SpecialTokens:
        """Mask, padding and end tokens of the engine's own configuration."""
        return self._intake.blank().special

    def memory(self) -> EngineMemory:
        """Return the number of bytes allocated for requests in all current lanes.

        This memory stays allocated while requests come and go. Before the first request, it belongs to the lane of the
        engine's own configuration, if `reserve` made one. A lane for another configuration takes as much again; there
        are at most `max_lanes` lanes.
        """
        with self._stepping:
            return EngineMemory.of(self._rounds.pool.lanes.values())

    def metrics(self) -> EngineMetrics:
        """Return counts and timings since the engine was created."""
        return self._rounds.meter.metrics(self._rounds.waiting, self._rounds.pool.busy)
