# SPDX-License-Identifier: Apache-2.0
"""Explain unknown names: a close match, or what to pass instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

#: names of the presets, filled in by `presets`, which rules cannot import
PRESET_NAMES: list[str] = []
#: keyword arguments of `generate`, `Engine` and `Engine.add_request` that are not fields of a configuration
OF_GENERATE = (
    "attention_mask", "config", "streamer", "drafter", "tokenizer", "negative_prompt", "inputs_embeds", "given",
    "suffix", "num_return_sequences", "stop_strings", "repetition_penalty", "logits_processor", "top_logprobs",
    "on_step", "graphs", "steps_per_poll", "trace",
)  # fmt: skip
OF_ENGINE = (
    "slots", "max_length", "config", "tokenizer", "prefill_budget", "max_lanes", "deterministic", "graphs",
    "steps_per_poll", "reserve",
)  # fmt: skip

OF_REQUESTS = (
    "given", "suffix", "num_return_sequences", "stop_strings", "repetition_penalty", "logits_processor", "top_logprobs",
    "on_step",
)  # fmt: skip
OWNERS = {"generate": OF_GENERATE, "Engine": OF_ENGINE, "Engine.add_request": OF_REQUESTS}

_LENGTH = "pass max_new_tokens=…, the length of the answer without the prompt"
_STOP = "pass stop_strings=… with the tokenizer, or eos_token_id=… for end tokens"
_STEPS = "pass steps=…, the number of forward passes"
_NO_BEAMS = "beam search is not available"
#: names used by other libraries and by published decoders, and what to pass instead
HINTS = {
    "drafter": "it is an argument of generate; elsewhere, pass rule=dlmkernels.Drafted(drafter)",
    "do_sample": "pass temperature=…; any value above 0 samples",
    **dict.fromkeys(("max_length", "max_tokens", "max_completion_tokens", "gen_length", "gen_len"), _LENGTH),
    **dict.fromkeys(("min_length", "min_new_tokens"), "pass eos_policy='none' to decode the full length"),
    **dict.fromkeys(("num_beams", "num_beam_groups", "length_penalty", "early_stopping"), _NO_BEAMS),
    **dict.fromkeys(("threshold", "confidence_threshold"), "pass rule=dlmkernels.Threshold(…)"),
    "factor": "pass rule=dlmkernels.Factor(…)",
    **dict.fromkeys(("stop", "stop_words", "stopping_criteria"), _STOP),
    **dict.fromkeys(("num_steps", "diffusion_steps", "denoising_steps", "num_inference_steps", "timesteps"), _STEPS),
    **dict.fromkeys(("block_size", "bd_size"), "pass block_length=…"),
    **dict.fromkeys(("remasking", "alg"), "pass score=… to rank positions, or rule=… to choose how many to commit"),
    "alg_temp": "pass order_temperature=…",
    "mask_id": "pass mask_token_id=…",
    "guidance_scale": "pass cfg_scale=…, which is guidance_scale - 1",
    "use_cache": "pass cache=…, or cache='none'",
    "generation_config": "pass its values as options, such as max_new_tokens and temperature",
    "bad_words_ids": "pass suppress_token_ids=…, ids that are never generated",
    "n": "pass num_return_sequences=…",
    "logprobs": "pass top_logprobs=…",
    "preset": "pass config=…, the name of the preset",
    "device": "call model.to(…): decoding runs on the model's device",
    **dict.fromkeys(("stream", "streaming"), "pass streamer=… to generate, or streaming=True to Engine.add_request"),
}  # fmt: skip


def close_match(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to `name`, without regard to case and separators; None if none is."""
    plain = {_plain(one): one for one in known}
    found = difflib.get_close_matches(_plain(name), plain, 1, 0.7)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def explain_unknown(names: Collection[str], fields: Collection[str]) -> str:
    """Return an error message for options that are not among the `fields` of a configuration."""
    told = [(name, _explain(name, fields)) for name in sorted(names, key=str)]
    rest = ""
    if any(text is None for _, text in told):
        rest = f". Known options: {', '.join(fields)}. Further arguments of generate: {', '.join(OF_GENERATE)}"
    shown = "; ".join(f"{name}: {text}" if text else name for name, text in told)
    return f"unknown decoding option {shown}{rest}"


def _explain(name: str, fields: Collection[str]) -> str | None:
    if name in HINTS:
        return HINTS[name]
    owners = [owner for owner, own in OWNERS.items() if name in own]
    if owners:
        return f"it is an argument of {' and '.join(owners)}, and is not accepted here"
    near = close_match(name, fields) or close_match(name, (*OF_GENERATE, *OF_ENGINE))
    if near is None:
        return None
    found = " and ".join(owner for owner, own in OWNERS.items() if near in own)
    return f"did you mean {near}{'' if near in fields else f', an argument of {found}'}?"
