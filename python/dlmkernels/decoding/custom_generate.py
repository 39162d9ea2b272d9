# SPDX-License-Identifier: Apache-2.0
"""The front door of transformers: `model.generate(…, custom_generate=dlmkernels.custom_generate)`.

transformers turns what its user passes into a generation config, logits processors, stopping criteria and inputs of
the model, and calls a custom function with these. Each of them is honoured here, or refused by name, or listed as what
makes no difference to the tokens.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..models.adapt import adapt
from .config import DecodingConfig
from .generate import generate
from .output import DecodingOutput
from .processors import Bans, as_list, honour
from .resolve import ConfigLike, configuration

#: Fields of a generation config that are honoured: by what is below, or (lengths, number of sequences, filters, end
#: tokens, processors) by what transformers has made of them before it calls us.
HONOURED = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "num_return_sequences",
    "return_dict_in_generate", "pad_token_id", "eos_token_id", "token_healing", "repetition_penalty",
})  # fmt: skip
#: Those that make no difference to the tokens: speed and memory; what belongs to methods of decoding that are refused
#: (assistants); what our distributions do by themselves (they are normalised, and never choose a NaN); records.
INDIFFERENT = frozenset({
    "use_cache", "compile_config", "disable_compile", "continuous_batching_config", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    "max_matching_ngram_size", "renormalize_logits", "remove_invalid_values", "bos_token_id", "decoder_start_token_id",
    "transformers_version", "_from_model_config", "_commit_hash",
})  # fmt: skip


class Refused(NamedTuple):
    """A field that has no counterpart in parallel decoding.

    `off`: the values that switch it off, beside None; `made`: the class of what transformers makes of it.
    """

    off: tuple[Any, ...] = ()
    made: str = ""


REFUSED: dict[str, Refused] = {
    "num_beams": Refused((1,)), "num_beam_groups": Refused((1,)), "constraints": Refused(),
    "force_words_ids": Refused(), "penalty_alpha": Refused((0,)), "dola_layers": Refused(),
    "prompt_lookup_num_tokens": Refused(), "use_mtp": Refused((False,)), "length_penalty": Refused((1,)),
    "early_stopping": Refused((False,)), "diversity_penalty": Refused((0,)), "low_memory": Refused((False,)),
    "cache_implementation": Refused(), "cache_config": Refused(), "max_cache_len": Refused(),
    "prefill_chunk_size": Refused(),
    "max_time": Refused((), "MaxTimeCriteria"), "stop_strings": Refused((), "StopStringCriteria"),
    "min_p": Refused((), "MinPLogitsWarper"), "top_h": Refused((), "TopHLogitsWarper"),
    "typical_p": Refused((1,), "TypicalLogitsWarper"), "epsilon_cutoff": Refused((0,), "EpsilonLogitsWarper"),
    "eta_cutoff": Refused((0,), "EtaLogitsWarper"),
    "encoder_repetition_penalty": Refused((1,), "EncoderRepetitionPenaltyLogitsProcessor"),
    "no_repeat_ngram_size": Refused((0,), "NoRepeatNGramLogitsProcessor"),
    "encoder_no_repeat_ngram_size": Refused((0,), "EncoderNoRepeatNGramLogitsProcessor"),
    "forced_bos_token_id": Refused((), "ForcedBOSTokenLogitsProcessor"),
    "exponential_decay_length_penalty": Refused((), "ExponentialDecayLengthPenalty"),
    "sequence_bias": Refused((), "SequenceBiasLogitsProcessor"),
    "guidance_scale": Refused((1,), "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    "watermarking_config": Refused((), "WatermarkLogitsProcessor"), "output_attentions": Refused((False,)),
    "output_hidden_states": Refused((False,)), "output_scores": Refused((False,)), "output_logits": Refused((False,)),
}  # fmt: skip
#: What to use instead of some of them.
INSTEAD = {
    "guidance_scale": "cfg_scale of decoding_config", "cache_implementation": "cache of decoding_config",
    "stop_strings": "eos_token_id",
    "output_scores": "return_dict_in_generate, whose result has the tokens' confidence",
}  # fmt: skip
#: Those that matter to sampling alone.
SAMPLING = frozenset({"min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"})
#: Inputs of the model that transformers adds and that make no difference here: positions are counted and keys kept by
#: ourselves.
OWN_INPUTS = frozenset({"use_cache", "logits_to_keep", "cache_position"})
CACHES = ("past_key_values", "cache", "cache_params")
#: How many tokens transformers generates where nobody says.
DEFAULT_LENGTH = 20


@dataclass
class GenerateDiffusionOutput(ModelOutput):
    """What `generate` of transformers returns with `return_dict_in_generate`: see `DecodingOutput`."""

    sequences: Tensor | None = None
    commit_step: Tensor | None = None
    confidence: Tensor | None = None
    num_forwards: Tensor | None = None
    complete: Tensor | None = None


def custom_generate(
    model, input_ids: Tensor, logits_processor=None, stopping_criteria=None, generation_config=None, streamer=None,
    decoding_config: ConfigLike = None, **model_kwargs,
):  # fmt: skip
    """Decode in parallel when called by transformers.

    >>> model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=128,
    ...                custom_generate=dlmkernels.custom_generate, decoding_config="fast-dllm")

    Honoured are the lengths (`max_new_tokens`, `max_length`, `min_new_tokens`, `min_length`), `eos_token_id`,
    `pad_token_id`, `suppress_tokens`, `begin_suppress_tokens`, `bad_words_ids` of one token each,
    `forced_eos_token_id`, `repetition_penalty`, `num_return_sequences`, `return_dict_in_generate`, `streamer`,
    `attention_mask`, `inputs_embeds`, and with `do_sample=True` temperature, top_k and top_p; logits processors and
    stopping criteria of transformers' own classes that say the same. Everything else that would change the tokens
    (beams, other penalties, other processors and criteria, an assistant …) is refused by name; where it comes from the
    checkpoint's generation config, and not from the call, a warning says that it is left out.

    Parameters
    ----------
    decoding_config : DecodingConfig, str or dict, optional
        How to decode, as `config` of `generate`; what the call of transformers says takes precedence.

    Returns
    -------
    Tensor or GenerateDiffusionOutput
        int64 `[B, P + max_new_tokens]`, padded behind an end token; with `inputs_embeds` alone, what was generated.
    """
    caller = _caller()
    if caller.get("assistant_model") is not None:
        raise ValueError("assistant_model cannot be used with dlmkernels: many tokens are decoded at once without one")
    for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
        if caller.get(name) is not None:
            raise ValueError(f"{name} cannot be used with dlmkernels here: negative_prompt of dlmkernels.generate can")
    if caller.get("synced_gpus"):
        raise ValueError("synced_gpus cannot be used with dlmkernels: each process takes as many forwards as it needs")
    if caller.get("streamer") is not None:
        streamer = _WithoutPrompt(caller["streamer"])
    adapted = adapt(model)
    ours = configuration(adapted, decoding_config)
    attention_mask, inputs_embeds = _inputs(input_ids, model_kwargs)
    left_out = _check_generation_config(model, generation_config)
    criteria = [one for one in stopping_criteria or () if type(one).__name__ not in left_out]
    options = _ids_of(model, generation_config, criteria)
    options["max_new_tokens"] = _length(generation_config, criteria, input_ids.shape[1], ours)
    samples = bool(generation_config is not None and generation_config.do_sample)
    if samples:
        options["temperature"] = 1.0
    bans = Bans(input_ids.shape[1], options["max_new_tokens"])
    for processor in logits_processor or ():
        if type(processor).__name__ not in left_out:
            honour(processor, options, bans, samples)
    out = generate(
        adapted, None if inputs_embeds is not None else input_ids, attention_mask, ours, streamer,
        inputs_embeds=inputs_embeds, **options, **bans.options(adapted, ours),
    )  # fmt: skip
    sequences = out.sequences if inputs_embeds is None else torch.cat((input_ids, out.generated), 1)
    if generation_config is not None and generation_config.return_dict_in_generate:
        return _as_model_output(out, sequences)
    return sequences


def _as_model_output(out: DecodingOutput, sequences: Tensor) -> GenerateDiffusionOutput:
    width = sequences.shape[1]
    return GenerateDiffusionOutput(
        sequences, out.commit_step[:, -width:], out.confidence[:, -width:], out.num_forwards, out.complete
    )


# --- what transformers does not pass on -------------------------------------------------------------------------------


def _caller() -> dict[str, Any]:
    """Arguments of the `generate` of transformers that has called us; nothing if something else has.

    It keeps `streamer` and `assistant_model` from a custom function (it hands on what is in the function's own
    signature, and these it has taken out before), so that they would be lost without a word.
    """
    frame = sys._getframe(2)
    name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
    return dict(frame.f_locals) if (name, module) == ("generate", "transformers.generation.utils") else {}


class _WithoutPrompt:
    """A streamer that has been given the prompt already."""

    def __init__(self, streamer):
        self._streamer, self._has_prompt = streamer, False
        if hasattr(streamer, "put_draft"):
            self.put_draft = streamer.put_draft

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self._streamer.put(value)
        self._has_prompt = True

    def end(self) -> None:
        self._streamer.end()


# --- inputs -----------------------------------------------------------------------------------------------------------


def _inputs(input_ids: Tensor, given: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """The attention mask and the input embeddings among the model's inputs; others are refused."""
    given = {name: value for name, value in given.items() if value is not None and name not in OWN_INPUTS}
    mask, embeds, positions = (given.pop(name, None) for name in ("attention_mask", "inputs_embeds", "position_ids"))
    for name in CACHES:
        cache = given.pop(name, None)
        if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0):
            raise ValueError(f"{name} cannot be used with dlmkernels, which keeps keys and values of its own")
    if positions is not None:
        _check_positions(positions, input_ids if embeds is None else embeds[..., 0], mask)
    types = given.pop("token_type_ids", None)
    if types is not None and bool((types != 0).any()):
        raise ValueError("token_type_ids must be 0: dlmkernels decodes texts of one type")
    if given:
        raise ValueError(f"{', '.join(sorted(given))} cannot be used with dlmkernels, which decodes texts alone")
    return mask, embeds


def _check_positions(positions: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    counted = valid.long().cumsum(1) - 1
    if positions.shape[-1] != tokens.shape[1] or bool(((positions != counted) & valid).any()):
        raise ValueError("position_ids must count each prompt's tokens from 0: dlmkernels counts them so by itself")


# --- the generation config -----------------------------------------------------------------------------------------


def _check_generation_config(model, config) -> set[str]:
    """Refuse what cannot be honoured, and warn where it is the checkpoint that asks for it.

    Returns the classes of what transformers has made of the latter.
    """
    left_out: set[str] = set()
    inherited = getattr(model, "generation_config", None)
    for name, value in vars(config).items() if config is not None else ():
        if name in HONOURED or name in INDIFFERENT or name.startswith("_") or not _is_on(name, value, config):
            continue
        instead = f"; use {INSTEAD[name]}" if name in INSTEAD else ""
        if inherited is None or value != getattr(inherited, name, None):
            raise ValueError(f"{name}={value!r} cannot be used with dlmkernels{instead}")
        if name in REFUSED:  # what is not transformers' own is the checkpoint's business
            left_out.add(REFUSED[name].made)
            warnings.warn(
                f"{name}={value!r} of the model's generation config is left out: parallel decoding has no counterpart "
                f"of it{instead}", UserWarning, stacklevel=5,
            )  # fmt: skip
    return left_out


def refuse_others(model, config) -> None:
    """Refuse fields of a generation config that would change the tokens and have no counterpart here."""
    _check_generation_config(model, config)


def _is_on(name: str, value: Any, config) -> bool:
    if value is None or (name in REFUSED and value in REFUSED[name].off):
        return False
    return name not in SAMPLING or bool(config.do_sample)


def _ids_of(model, config, criteria) -> dict[str, Any]:
    """End and padding tokens, where the call says something else than the model's generation config."""
    ends: list[int] = []
    for one in criteria:
        if type(one).__name__ == "EosTokenCriteria":
            ends += one.eos_token_id.flatten().tolist()
        elif type(one).__name__ != "MaxLengthCriteria":
            raise ValueError(
                f"stopping_criteria: {type(one).__name__} cannot be used with dlmkernels, which decodes many positions "
                "at once; end tokens (eos_token_id) and a length can"
            )
    if config is None:
        return {"eos_token_id": ends} if ends else {}
    inherited = getattr(model, "generation_config", None)
    options: dict[str, Any] = {}
    if set(ends) != set(as_list(getattr(inherited, "eos_token_id", None))):
        options["eos_token_id"] = ends
    if config.pad_token_id is not None and config.pad_token_id != getattr(inherited, "pad_token_id", None):
        options["pad_token_id"] = config.pad_token_id
    return options


def _length(config, criteria, prompt_length: int, ours: DecodingConfig) -> int:
    """How many tokens are to be generated."""
    lengths = [one.max_length for one in criteria if type(one).__name__ == "MaxLengthCriteria"]
    if config is not None and config.max_length is not None:
        lengths.append(config.max_length)
    if not lengths:
        return ours.longest
    length = min(lengths) - prompt_length
    is_default = config is not None and config.max_new_tokens is None and length == DEFAULT_LENGTH
    if is_default and "max_new_tokens" in ours.asked and ours.max_new_tokens != length:
        raise ValueError(
            f"max_new_tokens={ours.max_new_tokens} of decoding_config has no effect, since generate of transformers "
            f"has a length of its own: pass max_new_tokens={ours.max_new_tokens} to it"
        )
    return length
