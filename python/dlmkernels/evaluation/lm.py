# SPDX-License-Identifier: Apache-2.0
"""A model for lm-eval that decodes requests with the engine."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from ..cli.options import device_named, load
from ..decoding.config import DecodingConfig
from ..decoding.presets import preset
from ..decoding.resolve import configuration, prepare
from ..decoding.stops import before_stop
from ..engine import Engine, RequestOutput
from ..models.adapt import adapt
from .arguments import read_settings
from .generation import Generation, read_generation, seed_of
from .likelihood import Likelihood, Scorer
from .ranks import Ranks
from .tally import Records, Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A request to be decoded by the engine.

    Attributes
    ----------
    request : Instance
        lm-eval's request.
    repeat : int
        Number of this answer among those to the same request, from 0.
    seed : int
    prompt : list of int
        Token ids.
    how : Generation
    given : list of int, optional
        Tokens of the answer that are already known; -1 marks positions to be decoded.
    ends : tuple of int
        Additional tokens that end the answer.
    """

    request: Any
    repeat: int
    seed: int
    prompt: list[int]
    how: Generation
    given: list[int] | None
    ends: tuple[int, ...]


class EngineLM(TemplateLM):
    """A diffusion language model for lm-eval.

    An `Engine` decodes the answers; it gets all requests of an evaluation at once. A request's random numbers depend
    only on the evaluation's seed, its prompt, its `generation_kwargs`, and the number of the answer if a prompt has
    several. They do not depend on the order of requests, the number of slots, `--limit`, or the number of processes.

    Parameters
    ----------
    pretrained : str or model
        Local folder, Hub id or "demo"; or a loaded model, which also needs `tokenizer`.
    tokenizer : PreTrainedTokenizer, optional
        Tokenizer of a loaded model.
    batch_size, device, max_batch_size
        As lm-eval passes them. A `batch_size` above 1 sets the number of slots.
    **arguments
        Attributes of `Settings` and fields of `DecodingConfig`.

    Raises
    ------
    ValueError, TypeError
        If an argument is unknown or invalid. The message names it.
    """

    def __init__(
        self, pretrained=None, tokenizer=None, batch_size=None, device=None, max_batch_size=None, **arguments: Any
    ):
        super().__init__()
        if max_batch_size is not None:
            arguments["max_batch_size"] = max_batch_size
        is_loaded = pretrained is not None and not isinstance(pretrained, str)
        if is_loaded and tokenizer is None:
            raise ValueError("tokenizer must be given with a model that is already loaded; got None")
        name = type(pretrained).__name__ if is_loaded else pretrained
        self.settings = settings = read_settings(name, batch_size=batch_size, device=device, **arguments)
        self._ranks = Ranks()
        self._rank, self._world_size = self._ranks.rank, self._ranks.world_size
        if is_loaded:
            model = pretrained
        else:
            model, tokenizer = load(name, settings.dtype, device_named(self._ranks.device(settings.device)))
        self.tokenizer = tokenizer
        self.model = adapt(model)
        self._device = self.model.device
        base = None if settings.preset is None else preset(settings.preset)
        self.config = configuration(self.model, base).replace(**settings.options)
        self.stated = frozenset(
            n for n in DecodingConfig.__dataclass_fields__
            if n in settings.options or getattr(self.config, n) != getattr(DecodingConfig(), n)
        )  # fmt: skip
        _, self._resolved, self.special = prepare(self.model, self.config, {})
        self._is_demo = name == "demo"
        self._engine: Engine | None = None
        self._scorer: Scorer | None = None
        self.tally, self._all = Tally(), Tally()
        self.records = Records(settings.records, self._rank, self._world_size)

    # --- text and tokens ----------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = [*self.special.eos, getattr(self.tokenizer, "eos_token_id", None), self.special.pad]
        return next(token for token in ends if token is not None)

    @property
    def prefix_token_id(self) -> int:
        """The token put before a text without a prompt: the BOS token or, without one, the token that ends a text."""
        first = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int:
        """Maximum combined length of prompt and answer in tokens."""
        if self.settings.max_length is not None:
            return self.settings.max_length
        return min(self.model.max_length or 2048, 2048)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, which lm-eval uses in the keys of its request caches."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Return the token ids of a text. A BOS token that a chat template has already written is not added again."""
        if self._is_demo:
            from ..demo.tasks import check_text

            check_text("the task's text", string)
        first = str(getattr(self.tokenizer, "bos_token", None) or "")
        has_first = first != "" and string.startswith(first)
        wanted = self.settings.add_bos_token
        if add_special_tokens is None:
            add_special_tokens = wanted is not False and not has_first
        ids = list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))
        if wanted and add_special_tokens and first and ids[:1] != [self.tokenizer.bos_token_id]:
            ids.insert(0, self.tokenizer.bos_token_id)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a chat as text with the tokenizer's chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("--apply_chat_template: the tokenizer has no chat template")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    # --- generation ---------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine for generation, created on first use."""
        if self._engine is None:
            self._engine = Engine(
                self.model, slots=self.settings.slots, max_length=self.max_length, config=self.config,
                tokenizer=self.tokenizer, deterministic=self.settings.deterministic,
            )  # fmt: skip
        return self._engine

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Generate the answers to requests, as text and in the same order."""
        seen: Counter = Counter()
        jobs = []
        for request in requests:
            jobs.append(self._job(request, seen[id(request)]))
            seen[id(request)] += 1
        if self.cache_hook.dbdict is not None and max(seen.values(), default=0) > 1:
            raise ValueError("--use_cache keeps one answer per prompt, but the task asks for several: leave it out")
        started = time.perf_counter()
        waiting = {self._submit(job): i for i, job in enumerate(jobs)}
        texts = [""] * len(jobs)
        with tqdm(total=len(jobs), disable=disable_tqdm or self._rank > 0, desc="generate") as bar:
            for output in self.engine if jobs else ():
                i = waiting[output.request_id]
                texts[i] = self._answer(jobs[i], output)
                bar.update()
        self.tally.seconds += time.perf_counter() - started
        self._report("generation", jobs)
        return texts

    def _job(self, request, repeat: int) -> Job:
        context, kwargs = request.args[:2]
        how = read_generation(kwargs, self.config, self.stated, self.settings.prefer)
        ids, given = self.tok_encode(context), None
        if how.infill:
            if self.special.mask not in ids:
                raise ValueError(f"generation_kwargs: infill=true needs a mask token in the prompt {context[:60]!r}")
            first = ids.index(self.special.mask)
            given = [-1 if token == self.special.mask else token for token in ids[first:]]
            ids = ids[:first]
            how = Generation(len(given), how.until, True, how.options)
        elif self.special.mask in ids:
            raise ValueError("the prompt contains mask tokens: set infill=true in generation_kwargs to fill them in")
        special = self._special_texts()
        ends = tuple(special[text] for text in how.until if text in special)
        how = Generation(how.max_new_tokens, tuple(t for t in how.until if t not in special), how.infill, how.options)
        ids = self._fitting(ids, how.max_new_tokens, may_cut=not how.infill)
        said = {name: value for name, value in kwargs.items() if name != "until"}
        return Job(request, repeat, seed_of(self.settings.seed, context, said, repeat), ids, how, given, ends)

    def _special_texts(self) -> dict[str, int]:
        """Return special tokens by text. Decoded text lacks them, so as stop strings they are treated as end tokens."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {str(token): i for i, token in added.items() if getattr(token, "special", False)}

    def _fitting(self, ids: list[int], length: int, may_cut: bool = True) -> list[int]:
        room = self.max_length - length
        if len(ids) <= room:
            return ids
        text = f"a prompt of {len(ids)} tokens plus an answer of {length} exceeds max_length={self.max_length}"
        if room < 1 or not may_cut or self.settings.too_long == "error":
            raise ValueError(text)
        if not self.tally.truncated:
            log.warning("%s: cutting off the prompt's beginning (truncated_prompts in the results counts all)", text)
        self.tally.truncated += 1
        return ids[-room:]

    def _submit(self, job: Job) -> str:
        options = dict(job.how.options)
        if job.ends and self.config.eos_policy != "none":
            options["eos_token_id"] = [*self.special.eos, *job.ends]
        return self.engine.add_request(
            job.prompt, max_new_tokens=job.how.max_new_tokens, seed=job.seed, given=job.given,
            stop_strings=job.how.until or None, **options,
        )  # fmt: skip

    def _answer(self, job: Job, output: RequestOutput) -> str:
        if output.error is not None:
            raise RuntimeError(f"could not decode an answer: {output.error}")
        tokens = output.tokens_before({*self.special.eos, *job.ends})
        text = before_stop(self.tokenizer.decode(tokens, skip_special_tokens=True), job.how.until)
        tally, decoded = self.tally, sum(step >= 0 for step in output.commit_step)
        tally.answers += 1
        tally.new_tokens += len(tokens)
        tally.forwards += output.num_forwards
        tally.decoded_tokens += decoded
        self.records.add(
            **_name(job.request), repeat=job.repeat, seed=job.seed, prompt_tokens=len(job.prompt),
            new_tokens=len(tokens), decoded_tokens=decoded, forwards=output.num_forwards,
            tokens_per_forward=decoded / max(output.num_forwards, 1), finish_reason=output.finish_reason, text=text,
        )  # fmt: skip
        self.cache_hook.add_partial("generate_until", job.request.args, text)
        return text

    # --- likelihoods --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihoods of continuations, and whether greedy decoding gives them; see `Scorer`."""
        self._asked = list(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        scored = self._scored([(context, answer) for _, context, answer in requests], disable_tqdm)
        asked = getattr(self, "_asked", [None] * len(requests))
        out = []
        for (text, prompt, answer), one, request in zip(requests, scored, asked):
            self._note(one, request, prompt, answer)
            out.append((one.total, one.is_greedy))
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, out[-1])
        self._report("likelihoods", requests)
        return out

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, summed over blocks of tokens, each given the text before it.

        Unless it is exact, the term of each block is a bound (see `log_likelihood`), and so is the sum. How tight it is
        depends on the block length, `rolling_block`.
        """
        pairs: list[tuple[Sequence[int], Sequence[int]]] = []
        owner = []
        size = min(self.settings.rolling_block, self.max_length - 1)
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for start in range(0, len(ids), size):
                block = ids[start : start + size]
                before = [self.prefix_token_id, *ids[:start]]
                pairs.append((before[-(self.max_length - len(block)) :], block))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (prompt, answer), one in zip(owner, pairs, self._scored(pairs, disable_tqdm)):
            totals[i] += one.total
            self._note(one, requests[i], prompt, answer)
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        self._report("likelihoods", requests)
        return totals

    def _scored(self, pairs, disable_tqdm: bool) -> list[Likelihood]:
        """Score answers given their prompts. An empty answer has probability 1."""
        self._scorer = self._scorer or Scorer(self.model, self.special, self.settings, self._resolved)
        whole = [
            (tuple(self._fitting(list(prompt), len(answer))), tuple(answer)) if answer else None
            for prompt, answer in pairs
        ]
        for pair in whole:
            if pair and self.special.mask in pair[0] + pair[1]:
                raise ValueError("a text to be scored must not contain mask tokens")
        several = [pair for pair in whole if pair]
        found = iter(self._scorer.score(several, disable_tqdm or self._rank > 0))
        return [next(found) if pair else Likelihood(0.0, 0.0, True, True, 0) for pair in whole]

    def _note(self, one: Likelihood, request, prompt, answer) -> None:
        if one.is_exact:
            self.tally.exact += 1
        else:
            self.tally.estimate(one.standard_error)
        self.records.add(
            **_name(request), prompt_tokens=len(prompt), answer_tokens=len(answer), total=one.total,
            standard_error=one.standard_error, is_exact=one.is_exact, is_greedy=one.is_greedy, forwards=one.forwards,
        )  # fmt: skip

    # --- other methods that lm-eval calls -----------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results contain besides the scores: how answers were decoded, and what that took."""
        named = ("preset", "slots", "deterministic", "seed", "prefer", "mc_num")
        settings = {n: getattr(self.settings, n) for n in named}
        config = {n: str(getattr(self.config, n)) for n in sorted(self.stated | {"rule"})}
        total = self._all if self._world_size > 1 else self.tally
        return {"dlmkernels": settings | {"family": self.model.family.name, "config": config, **total.summary()}}

    def _report(self, what: str, requests: Sequence[Any]) -> None:
        if requests:
            log.info("%s of %d requests: %s", what, len(requests), self.tally.summary())

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather a number from each process, `[world_size]`."""
        return self._ranks.all_gather(tensor)

    def gather_object(self, obj, dst: int = 0):
        """Gather an object from each process on process `dst`."""
        return self._ranks.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for all processes, and add up their tallies for the results."""
        self._all = sum(self._ranks.all_objects(self.tally), Tally())


def _name(request) -> dict[str, Any]:
    """Return the fields that identify a request in the records."""
    return {n: getattr(request, n, None) for n in ("task_name", "doc_id", "idx")}
