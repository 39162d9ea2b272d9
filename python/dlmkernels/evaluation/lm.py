# SPDX-License-Identifier: Apache-2.0
"""A model of lm-eval whose requests are decoded by the engine."""

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
    """A request on its way through the engine.

    Attributes
    ----------
    request : Instance
        lm-eval's.
    repeat : int
        Which answer to the same prompt this is, from 0.
    seed : int
    prompt : list of int
    how : Generation
    given : list of int, optional
        Tokens that stand in the answer from the start, -1 where one is to be decoded.
    ends : tuple of int
        Tokens that end the answer.
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

    Answers are decoded by an `Engine`, all requests of an evaluation at once. A request's random draws depend on the
    evaluation's seed, its prompt, its `generation_kwargs` and on which answer to this prompt it is: not on the order,
    the number of slots, `--limit`, or how many processes share the work.

    Parameters
    ----------
    pretrained : str or model
        Local folder, hub id or "demo"; or a loaded model, with its `tokenizer`.
    tokenizer : PreTrainedTokenizer, optional
        Of a loaded model.
    batch_size, device, max_batch_size
        As lm-eval passes them on; a `batch_size` above 1 is the number of slots.
    **arguments
        Attributes of `Settings` and fields of `DecodingConfig`.

    Raises
    ------
    ValueError, TypeError
        When an argument is unknown or impossible; the message names it.
    """

    def __init__(
        self, pretrained=None, tokenizer=None, batch_size=None, device=None, max_batch_size=None, **arguments: Any
    ):
        super().__init__()
        if max_batch_size is not None:
            arguments["max_batch_size"] = max_batch_size
        is_loaded = pretrained is not None and not isinstance(pretrained, str)
        if is_loaded and tokenizer is None:
            raise ValueError("tokenizer is needed with a model that is loaded already")
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
        """What stands before a text that has no prompt: the tokenizer's first token, else the one that ends texts."""
        first = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer together."""
        if self.settings.max_length is not None:
            return self.settings.max_length
        return min(self.model.max_length or 2048, 2048)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches of requests are called by."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids of a text. A first token that a chat template has written is not put before it again."""
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
        """A chat as text, by the tokenizer's template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("--apply_chat_template: the tokenizer has no chat template")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    # --- generation ---------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine that generates, made when it is first needed."""
        if self._engine is None:
            self._engine = Engine(
                self.model, slots=self.settings.slots, max_length=self.max_length, config=self.config,
                tokenizer=self.tokenizer, deterministic=self.settings.deterministic,
            )  # fmt: skip
        return self._engine

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answers as text, in the order of the requests."""
        seen: Counter = Counter()
        jobs = []
        for request in requests:
            jobs.append(self._job(request, seen[id(request)]))
            seen[id(request)] += 1
        if self.cache_hook.dbdict is not None and max(seen.values(), default=0) > 1:
            raise ValueError("--use_cache keeps one answer for each prompt; the task asks for several: leave it out")
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
                raise ValueError(f"generation_kwargs: infill=true, and no mask token is in the prompt {context[:60]!r}")
            first = ids.index(self.special.mask)
            given = [-1 if token == self.special.mask else token for token in ids[first:]]
            ids = ids[:first]
            how = Generation(len(given), how.until, True, how.options)
        elif self.special.mask in ids:
            raise ValueError("a prompt holds mask tokens: generation_kwargs with infill=true decode them")
        special = self._special_texts()
        ends = tuple(special[text] for text in how.until if text in special)
        how = Generation(how.max_new_tokens, tuple(t for t in how.until if t not in special), how.infill, how.options)
        ids = self._fitting(ids, how.max_new_tokens, may_cut=not how.infill)
        said = {name: value for name, value in kwargs.items() if name != "until"}
        return Job(request, repeat, seed_of(self.settings.seed, context, said, repeat), ids, how, given, ends)

    def _special_texts(self) -> dict[str, int]:
        """Special tokens by their texts, which are left out of decoded text: as stop strings they are end tokens."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {str(token): i for i, token in added.items() if getattr(token, "special", False)}

    def _fitting(self, ids: list[int], length: int, may_cut: bool = True) -> list[int]:
        room = self.max_length - length
        if len(ids) <= room:
            return ids
        text = f"a prompt of {len(ids)} tokens and an answer of {length} are longer than max_length={self.max_length}"
        if room < 1 or not may_cut or self.settings.too_long == "error":
            raise ValueError(text)
        if not self.tally.truncated:
            log.warning("%s: the prompt's beginning is cut off (further ones are counted as truncated_prompts)", text)
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
            raise RuntimeError(f"an answer could not be decoded: {output.error}")
        ends = {*self.special.eos, *job.ends}
        tokens = output.generated_tokens
        length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = before_stop(self.tokenizer.decode(tokens[:length], skip_special_tokens=True), job.how.until)
        tally, decoded = self.tally, sum(step >= 0 for step in output.commit_step)
        tally.answers += 1
        tally.new_tokens += length
        tally.forwards += output.num_forwards
        tally.decoded_tokens += decoded
        self.records.add(
            **_name(job.request), repeat=job.repeat, seed=job.seed, prompt_tokens=len(job.prompt), new_tokens=length,
            decoded_tokens=decoded, forwards=output.num_forwards,
            tokens_per_forward=decoded / max(output.num_forwards, 1), finish_reason=output.finish_reason, text=text,
        )  # fmt: skip
        self.cache_hook.add_partial("generate_until", job.request.args, text)
        return text

    # --- likelihoods --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether greedy decoding gives them; see `Scorer`."""
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
        """Log-likelihoods of whole texts: the sum over blocks of tokens, each given all that stands before it.

        Each block's term is a bound (see `log_likelihood`), and so is their sum. How far it is from the likelihood
        depends on the length of the blocks, `rolling_block`.
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
        """Likelihoods of answers; an answer without tokens is certain."""
        self._scorer = self._scorer or Scorer(self.model, self.special, self.settings, self._resolved)
        whole = [
            (tuple(self._fitting(list(prompt), len(answer))), tuple(answer)) if answer else None
            for prompt, answer in pairs
        ]
        for pair in whole:
            if pair and self.special.mask in pair[0] + pair[1]:
                raise ValueError("a text whose likelihood is asked for holds mask tokens")
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

    # --- what lm-eval asks for beside ---------------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """What stands beside the scores in the results: how it was decoded, and what it has cost."""
        named = ("preset", "slots", "deterministic", "seed", "prefer", "mc_num")
        settings = {n: getattr(self.settings, n) for n in named}
        config = {n: str(getattr(self.config, n)) for n in sorted(self.stated | {"rule"})}
        total = self._all if self._world_size > 1 else self.tally
        return {"dlmkernels": settings | {"family": self.model.family.name, "config": config, **total.summary()}}

    def _report(self, what: str, requests: Sequence[Any]) -> None:
        if requests:
            log.info("%s of %d requests: %s", what, len(requests), self.tally.summary())

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A number of each process, `[world_size]`."""
        return self._ranks.all_gather(tensor)

    def gather_object(self, obj, dst: int = 0):
        """An object of each process, for one of them."""
        return self._ranks.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for all processes; they then know what the evaluation has cost all of them."""
        self._all = sum(self._ranks.all_objects(self.tally), Tally())


def _name(request) -> dict[str, Any]:
    """Which request a record is about."""
    return {n: getattr(request, n, None) for n in ("task_name", "doc_id", "idx")}
