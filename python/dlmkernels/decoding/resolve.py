# SPDX-License-Identifier: Apache-2.0
"""Resolve a configuration: fill in what the caller leaves open from the model, and check that everything fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..models.adapt import DiffusionModel, EncoderDecoderModel, LogitsModel, adapt
from .config import APPROXIMATE, DecodingConfig, SpecialTokens, check_names
from .effects import check_effects
from .ends import end_ids
from .features import FEATURE_CACHES, D2Cache, FeatureCache, FocusCache, LayerwiseCache, features_of
from .presets import default_config, preset
from .rules import Reordered, Rule, VariableLength

#: types that a caller may pass as `config`
ConfigLike = DecodingConfig | str | Mapping[str, Any] | None


def prepare(
    model, config: ConfigLike, overrides: dict[str, Any], task: str | None = None
) -> tuple[DiffusionModel, DecodingConfig, SpecialTokens]:
    """Return the adapted model, the complete configuration, and the special token ids for decoding.

    `task` is "continuations" or "infillings" (see `Rule.decodes`), or None if nothing is to be decoded.
    """
    model = adapt(model)
    return model, *resolve(model, config, overrides, task)


def resolve(
    model: DiffusionModel, config: ConfigLike, overrides: Mapping[str, Any], task: str | None = None
) -> tuple[DecodingConfig, SpecialTokens]:
    """Return the complete configuration and the special token ids for an adapted model; see `prepare`."""
    _check_model(model)
    wanted = configuration(model, config).replace(**overrides)
    resolved = wanted
    if task:
        if wanted.rule.decodes not in ("anything", task):
            other = "fills in the mask tokens of a given sequence: use infill"
            if task == "infillings":
                other = "continues a prompt: use generate"
            raise ValueError(f"rule {type(wanted.rule).__name__} {other}")
        resolved = _with_token_ids(model, wanted)
    resolved = _of_the_family(model, resolved)
    _check_combination(model, resolved)
    if task:
        check_effects(wanted, resolved, infills=task == "infillings")
    return resolved, special_tokens(model, resolved)


def _check_model(model: DiffusionModel) -> None:
    if getattr(model.model, "training", False):
        raise ValueError("model is in training mode (dropout would be active): call model.eval() first")
    parameter = None if isinstance(model, LogitsModel) else next(iter(model.model.parameters()), None)
    if parameter is not None and parameter.dtype == torch.float64:
        raise ValueError(
            "model must have parameters of float32, bfloat16 or float16, the dtypes of the kernels; got float64: call "
            "model.float()"
        )


def configuration(model: DiffusionModel, config: ConfigLike) -> DecodingConfig:
    """Return the configuration for `config`: an object, the name of a preset, fields, or None for the family's."""
    if isinstance(config, DecodingConfig):
        return config
    if isinstance(config, str):
        return preset(config)
    if isinstance(config, Mapping):
        if others := [name for name in config if not isinstance(name, str)]:
            raise TypeError(f"config must be a dict of fields of DecodingConfig; got the key {others[0]!r}")
        check_names(config)
        return DecodingConfig(**config)
    if config is not None:
        raise TypeError(
            "config must be a DecodingConfig, the name of a preset, or a dict of fields of DecodingConfig; got "
            f"{type(config).__name__}"
        )
    found = default_config(model.family.preset)
    if model.rule_options:
        found = found.replace(rule=dataclasses.replace(found.rule, **model.rule_options))  # type: ignore[type-var]
    return found


def _with_token_ids(model: DiffusionModel, config: DecodingConfig) -> DecodingConfig:
    """Fill in the rule's token ids that are None from the model's configuration."""
    rule = config.rule
    found = {name: getattr(rule, name) for name in rule.token_ids}
    for name, is_needed in rule.token_ids.items():
        if found[name] is None:
            found[name] = _from_model(model, name)
        if found[name] is None and is_needed:
            raise ValueError(
                f"{name} is not in the model's configuration: pass rule=dlmkernels.{type(rule).__name__}({name}=…)"
            )
    return config.replace(rule=dataclasses.replace(rule, **found)) if found else config  # type: ignore[type-var]


def _of_the_family(model: DiffusionModel, config: DecodingConfig) -> DecodingConfig:
    """Fill in what the configuration leaves open from the model's family."""
    if config.rule.noise == "none":
        return config.replace(
            attention="causal", logit_alignment="shift", cache="block", seeded=False, block_grid="prompt",
            block_length=None, sub_block_length=None,
        )  # fmt: skip
    family = model.family
    attention = config.attention or family.attention
    block_length = config.block_length
    if block_length is None and attention in ("block", "causal-context"):
        block_length = model.block_length
        if block_length is None:
            raise ValueError(
                f"block_length is needed: attention='{attention}' works in blocks, and the model's configuration "
                "does not contain their length"
            )
    return config.replace(
        attention=attention, block_length=block_length,
        seeded=family.seeded if config.seeded is None else config.seeded,
        block_grid=(config.block_grid or family.block_grid) if attention == "block" else "prompt",
        logit_alignment=config.logit_alignment or family.logit_alignment,
    )  # fmt: skip


def _check_combination(model: DiffusionModel, config: DecodingConfig) -> None:
    """Raise if the options of a complete configuration do not fit together, or do not fit the model."""
    family, attention, cache = model.family, config.attention, config.cache
    rule = type(config.rule).__name__
    if cache != "none" and not model.reuses_kv:
        raise ValueError(
            f"cache='{cache}' needs a model of a known type that can forward part of the canvas; "
            f"{type(model.model).__name__} (of unknown type, or with token_dropout) needs cache='none'"
        )
    noise = config.rule.noise
    is_other = noise != family.noise and "continuous" in (noise, family.noise)
    if is_other or (noise, family.noise) == ("mask", "uniform"):
        what = {
            "mask": "decodes mask tokens", "uniform": "decodes uniformly drawn tokens",
            "continuous": "decodes noisy vectors", "none": "predicts each token from those before it",
        }[noise]  # fmt: skip
        raise ValueError(
            f"rule {rule} {what}, which models of family '{family.name}' were not trained on"
            + (f": use the rule of the preset '{family.preset}'" if family.preset else "")
        )
    if config.constraint is not None and (isinstance(config.rule, VariableLength) or config.rule.token_ids):
        raise ValueError(f"constraint cannot be used with rule {rule}, which moves tokens to other positions")
    if noise == "continuous":
        if config.constraint is not None:
            raise ValueError(f"constraint cannot be used with rule {rule}, which decides no token before its last step")
        if isinstance(config.max_new_tokens, tuple):
            raise ValueError(f"max_new_tokens must be one number with rule {rule}; got {config.max_new_tokens}")
    if attention != "full" and isinstance(model, LogitsModel):
        raise ValueError(
            f"attention='{attention}' needs a model of a known type; the attention of {type(model.model).__name__} "
            "cannot be changed"
        )
    if (features := features_of(cache)) is not None:
        _check_features(model, config, features)
    elif cache != "none" and (cache == "block") == (attention == "full"):
        is_full = attention == "full"
        of_layers = [name for name, cache in FEATURE_CACHES.items() if isinstance(cache, FocusCache) != is_full]
        allowed = ["none", *(APPROXIMATE if is_full else ["block"]), *of_layers]
        raise ValueError(
            f"cache must be one of {', '.join(allowed)} with attention='{attention}'; got '{cache}'"
            + ("" if "cache" in config.asked else "; the preset is for models with other attention: pass cache='none'")
        )
    if attention == "reordered" and cache == "block" and not isinstance(config.rule, Reordered):
        raise ValueError(
            f"cache='block' with attention='reordered' needs the rule Reordered; got {rule}: use cache='none'"
        )
    if isinstance(model, EncoderDecoderModel) and (attention != family.attention or cache != "block"):
        raise ValueError(
            f"attention='{family.attention}' and cache='block' are needed, since the model's own encoder reads the "
            f"decided tokens; got attention='{attention}' and cache='{cache}'"
        )
    if cache == "delayed" and config.rule.slots != "open":
        raise ValueError(f"cache='delayed' needs a rule that never changes decided tokens; got {rule}")
    alignment = config.logit_alignment
    if config.rule.shadow and (
        attention != "full" or cache != "none" or alignment != "same" or not model.reuses_kv
    ):  # fmt: skip
        raise ValueError(
            f"rule {rule} needs a model of a known type with attention='full', cache='none' and "
            f"logit_alignment='same'; got {type(model.model).__name__} with '{attention}', '{cache}' and '{alignment}'"
        )
    if config.rule.slots == "canvas" and cache != "none":
        raise ValueError(f"rule {rule} reads the whole canvas, which needs cache='none'; got cache='{cache}'")
    if config.seeded and attention == "full":
        raise ValueError("seeded needs a context that does not see later tokens; got attention='full'")


def _check_features(model: DiffusionModel, config: DecodingConfig, features: FeatureCache) -> None:
    """Raise if the configuration or the model does not fit a cache that works inside the layers."""
    name, rule = features.name, config.rule
    needed = "block" if isinstance(features, FocusCache) else "full"
    if config.attention != needed:
        raise ValueError(f"cache='{name}' needs attention='{needed}'; got attention='{config.attention}'")
    if not rule.by_block or rule.token_ids or rule.shadow or isinstance(rule, VariableLength):
        raise ValueError(
            f"cache='{name}' needs a rule that decodes block by block and does not move tokens; got "
            f"{type(rule).__name__}"
        )
    if isinstance(features, (D2Cache, FocusCache)) and rule.slots != "open":
        raise ValueError(f"cache='{name}' needs a rule that never changes decided tokens; got {type(rule).__name__}")
    if isinstance(features, (LayerwiseCache, D2Cache)):
        model.by_layers(name)
    if isinstance(features, FocusCache):
        _check_focus(model, config, name)


def _check_focus(model: DiffusionModel, config: DecodingConfig, name: str) -> None:
    """Raise if the configuration or the model does not fit a cache that selects the positions to get logits for."""
    rule = type(config.rule).__name__
    if config.logit_alignment != "same" or config.seeded:
        raise ValueError(
            f"cache='{name}' needs a model whose logits predict the token at their own position; got logit_alignment="
            f"'{config.logit_alignment}' and seeded={config.seeded}"
        )
    if config.sub_block_length is not None:
        raise ValueError(
            f"cache='{name}' decodes blocks as a whole: omit sub_block_length; got {config.sub_block_length}"
        )
    if config.steps is not None and config.rule.uses_steps:
        raise ValueError(
            f"cache='{name}' limits how many positions a forward pass can decide, which may be fewer than the schedule "
            f"needs: omit steps; got steps={config.steps} with rule {rule}"
        )
    if config.constraint is not None and config.rule.uses_steps:
        raise ValueError(f"cache='{name}' with a constraint needs a rule without a schedule; got {rule}")
    model.by_layers(name, experts=True)


def check_block_by_block(name: str, rule: Rule) -> None:
    """Raise if argument `name` is used with a rule that has its own program (one `decodes`) or moves tokens."""
    if rule.decodes != "anything" or rule.token_ids:
        raise ValueError(f"{name} cannot be used with rule {type(rule).__name__}")


def special_tokens(model: DiffusionModel, config: DecodingConfig) -> SpecialTokens:
    """Return the special token ids for decoding, from the configuration or else from the model."""
    eos = config.eos_token_id
    stop = _stop_ids(model) if eos is None else end_ids(eos)
    padding = config.pad_token_id
    if padding is None:
        padding = _from_model(model, "pad_token_id")
    mask = _mask_token(model, config)
    masks = [] if mask is None else [mask]
    pad = padding if padding is not None else stop[0] if stop else mask if mask is not None else 0
    vocab = model.vocab_size
    _check_ids(config, vocab, {"mask_token_id": masks, "eos_token_id": stop, "pad_token_id": [pad]})
    if eos is not None and mask in stop:
        raise ValueError(f"eos_token_id holds the mask token ({mask}), which is never generated")
    # Logits beyond the tokenizer's last id mean nothing, except for the ids that the rule uses.
    known = model.family.num_tokens if model.family.knows_ids_of(model.config) else None
    unknown = set(range(known, vocab)) if known is not None and vocab is not None else set()
    unknown -= {getattr(config.rule, name) for name in config.rule.token_ids}
    others = {*stop, *masks, *(_from_model(model, name) for name in ("bos_token_id", "cls_token_id", "sep_token_id"))}
    return SpecialTokens(
        mask=-1 if mask is None else mask, eos=stop, pad=pad,
        banned=[*masks, *config.suppress_token_ids, *sorted(unknown)],
        padding=padding, padding_is_content=padding in others,
    )  # fmt: skip


def _mask_token(model: DiffusionModel, config: DecodingConfig) -> int | None:
    """Return the id of the mask token; None if the model has none and its rule needs none."""
    if config.rule.noise == "none":
        return None
    mask = config.mask_token_id
    if mask is None:
        mask = _from_model(model, "mask_token_id")
    if mask is not None:
        return mask
    if config.rule.noise == "mask":
        raise ValueError(
            "mask_token_id is not in the model's configuration: pass mask_token_id=… (tokenizer.mask_token_id)"
        )
    if config.cfg_scale > 0:
        raise ValueError("cfg_scale needs a mask token to replace the prompt with: pass mask_token_id=…")
    return None


def _check_ids(config: DecodingConfig, vocab: int | None, special: dict[str, list[int]]) -> None:
    """Raise if one of the `special` ids, or an id in the configuration, is not in a vocabulary of `vocab` tokens."""
    of_rule = {name: getattr(config.rule, name) for name in config.rule.token_ids}
    for name, ids in (
        *special.items(), ("suppress_token_ids", config.suppress_token_ids),
        ("defer_token_ids", config.defer_token_ids),
        *((name, [i]) for name, i in of_rule.items() if i is not None),
    ):  # fmt: skip
        for i in ids:
            if not isinstance(i, int) or i < 0 or (vocab is not None and i >= vocab):
                limit = "" if vocab is None else f" of {vocab} tokens"
                raise ValueError(f"{name} must be in the model's vocabulary{limit}; got {i!r}")


def _stop_ids(model: DiffusionModel) -> list[int]:
    """Return the end tokens in the model's configurations and in its family."""
    ids: list[int] = []
    for source in _sources(model):
        value = getattr(source, "eos_token_id", None)
        ids += [] if value is None else [value] if isinstance(value, int) else value
    if model.family.knows_ids_of(model.config):
        ids += model.family.eos_token_ids
    return list(dict.fromkeys(ids))


def _sources(model: DiffusionModel) -> tuple:
    """Return the places to look for token ids: the model's configuration, its text part, the generation config."""
    config = model.config
    return config, getattr(config, "text_config", None), getattr(model.model, "generation_config", None)


def _from_model(model: DiffusionModel, name: str):
    """Return a token id from the first of the model's configurations that has it, or None."""
    for source in _sources(model):
        value = getattr(source, name, None)
        if value is not None:
            return value
    return None
