# SPDX-License-Identifier: Apache-2.0
"""Entry point for transformers: `model.generate(…, custom_generate=dlmkernels.custom_generate)`.

transformers turns the user's arguments into a generation config, logits processors, stopping criteria and model inputs,
and passes these to a custom generation function. Here each of them is either honored, rejected with an error that names
it, or listed as one that does not affect the tokens.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig
from transformers.utils import ModelOutput

from ..models.adapt import adapt
from .config import DecodingConfig
from .generate import generate
from .output import DecodingOutput
from .processors import Bans, as_list, honour
from .resolve import ConfigLike, configuration

#: Fields of a generation config that are honored: by the code below, or (lengths, number of sequences, filters, end
#: tokens, processors) through what transformers builds from them before it calls `custom_generate`.
HONOURED = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "num_return_sequences",
    "return_dict_in_generate", "pad_token_id", "eos_token_id", "token_healing", "repetition_penalty",
})  # fmt: skip
#: Fields that do not affect the tokens: speed and memory; settings of decoding methods that are rejected (assistants);
#: what the distributions here do anyway (they are normalized, and never select a NaN); metadata.
INDIFFERENT = frozenset({
    "use_cache", "compile_config", "disable_compile", "continuous_batching_config", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    "max_matching_ngram_size", "renormalize_logits", "remove_invalid_values", "bos_token_id", "decoder_start_token_id",
    "transformers_version", "_from_model_config", "_commit_hash",
})  # fmt: skip


class Refused(NamedTuple):
    """A field of a generation config that has no counterpart in parallel decoding.

    `off`: the values, besides None, that disable it. `made`: the class of the object that transformers builds from it.
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
#: Alternatives that error messages suggest for rejected fields.
INSTEAD = {
    "guidance_scale": "cfg_scale of decoding_config", "cache_implementation": "cache of decoding_config",
    "stop_strings": "eos_token_id",
    "output_scores": "return_dict_in_generate, whose result includes the confidence of each token",
}  # fmt: skip
#: Rejected fields that only matter when sampling.
SAMPLING = frozenset({"min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"})
#: Model inputs that transformers adds and that are ignored, since dlmkernels computes positions and keeps a KV cache
#: itself.
OWN_INPUTS = frozenset({"use_cache", "logits_to_keep", "cache_position"})
CACHES = ("past_key_values", "cache", "cache_params")
#: How many tokens transformers generates if no length is given.
DEFAULT_LENGTH = 20


@dataclass
class GenerateDiffusionOutput(ModelOutput):
    """Result of `generate` of transformers with `return_dict_in_generate=True`. See `DecodingOutput` for the fields."""

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

    These arguments of transformers are honored: the lengths (`max_new_tokens`, `max_length`, `min_new_tokens`,
    `min_length`), `eos_token_id`, `pad_token_id`, `suppress_tokens`, `begin_suppress_tokens`, `bad_words_ids` of one
    token each, `forced_eos_token_id`, `repetition_penalty`, `num_return_sequences`, `return_dict_in_generate`,
    `streamer`, `attention_mask`, `inputs_embeds`, and with `do_sample=True` temperature, top_k and top_p; also the
    logits processors and stopping criteria of transformers that are equivalent to these. Anything else that would
    change the tokens (beams, other penalties, other processors and criteria, an assistant …) raises a ValueError that
    names it. If it comes from the checkpoint's generation config rather than from the call, it is ignored with a
    warning.

    Parameters
    ----------
    decoding_config : DecodingConfig, str or dict, optional
        How to decode, as `config` of `generate`. Arguments of the call of transformers take precedence.

    Returns
    -------
    Tensor or GenerateDiffusionOutput
        int64 `[B, P + max_new_tokens]`, padded after an end token; with `inputs_embeds` alone, only the generated
        tokens.
    """
    caller = _caller()
    if caller.get("assistant_model") is not None:
        raise ValueError("assistant_model cannot be used with dlmkernels, which decodes many tokens at once anyway")
    for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
        if caller.get(name) is not None:
            raise ValueError(f"{name} cannot be used here: use negative_prompt of dlmkernels.generate")
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
    """Return the arguments of the `generate` of transformers that is calling, or an empty dict for another caller.

    transformers does not pass `streamer` and `assistant_model` on to a custom function: it removes both from the
    keyword arguments before it looks at the function's signature. Without this look-up they would be silently ignored.
    """
    frame = sys._getframe(2)
    name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
    return dict(frame.f_locals) if (name, module) == ("generate", "transformers.generation.utils") else {}


class _WithoutPrompt:
    """A streamer whose first `put`, of the prompt, is skipped because transformers has already made it."""

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
    """Return the attention mask and input embeddings of the model's inputs, and reject all other inputs."""
    given = {name: value for name, value in given.items() if value is not None and name not in OWN_INPUTS}
    mask, embeds, positions = (given.pop(name, None) for name in ("attention_mask", "inputs_embeds", "position_ids"))
    for name in CACHES:
        cache = given.pop(name, None)
        if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0):
            raise ValueError(f"{name} cannot be used with dlmkernels, which has its own KV cache")
    if positions is not None:
        _check_positions(positions, input_ids if embeds is None else embeds[..., 0], mask)
    types = given.pop("token_type_ids", None)
    if types is not None and bool((types != 0).any()):
        raise ValueError("token_type_ids must all be 0: a prompt and its answer are one segment")
    if given:
        raise ValueError(f"{', '.join(sorted(given))} cannot be used with dlmkernels, which decodes only text")
    return mask, embeds


def _check_positions(positions: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    counted = valid.long().cumsum(1) - 1
    if positions.shape[-1] != tokens.shape[1] or bool(((positions != counted) & valid).any()):
        raise ValueError("position_ids must count each prompt's tokens from 0, as dlmkernels does by itself")


# --- the generation config -----------------------------------------------------------------------------------------


def _check_generation_config(model, config) -> set[str]:
    """Reject fields that cannot be honored; those that come from the checkpoint only cause a warning.

    Returns the class names of the processors and criteria that transformers built from the latter.
    """
    left_out: set[str] = set()
    inherited = getattr(model, "generation_config", None)
    for name, value in vars(config).items() if config is not None else ():
        if name in HONOURED or name in INDIFFERENT or name.startswith("_") or not _is_on(name, value, config):
            continue
        instead = f"; use {INSTEAD[name]}" if name in INSTEAD else ""
        if inherited is None or value != getattr(inherited, name, None):
            raise ValueError(f"{name}={value!r} cannot be used with dlmkernels{instead}")
        if name in REFUSED:  # other fields are not transformers' own; they are left to the checkpoint
            left_out.add(REFUSED[name].made)
            warnings.warn(
                f"{name}={value!r} of the model's generation config is ignored: parallel decoding has no counterpart "
                f"to it{instead}", UserWarning, stacklevel=5,
            )  # fmt: skip
    return left_out


def refuse_others(model, config) -> None:
    """Reject fields of a generation config that would change the tokens but have no counterpart here."""
    if not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config must be a transformers GenerationConfig; got {type(config).__name__}")
    _check_generation_config(model, config)


def _is_on(name: str, value: Any, config) -> bool:
    if value is None or (name in REFUSED and value in REFUSED[name].off):
        return False
    return name not in SAMPLING or bool(config.do_sample)


def _ids_of(model, config, criteria) -> dict[str, Any]:
    """Return end and padding tokens, as options, where the call differs from the model's generation config."""
    ends: list[int] = []
    for one in criteria:
        if type(one).__name__ == "EosTokenCriteria":
            ends += one.eos_token_id.flatten().tolist()
        elif type(one).__name__ != "MaxLengthCriteria":
            raise ValueError(
                f"stopping_criteria: {type(one).__name__} cannot be used with dlmkernels, which decodes many positions "
                "at once; use end tokens (eos_token_id) or a length"
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
    """Return the number of tokens to generate."""
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
            f"sets its own length: pass max_new_tokens={ours.max_new_tokens} to generate instead"
        )
    return length
