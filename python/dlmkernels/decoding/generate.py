# SPDX-License-Identifier: Apache-2.0
"""The front doors: `generate` after a prompt, `infill` wherever the masks are."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..models.adapt import DiffusionModel, EncoderDecoderModel, LogitsModel, adapt
from .canvas import Canvas
from .config import APPROXIMATE, DecodingConfig, SpecialTokens
from .guidance import pair_prompts
from .inputs import filler, read_canvases, read_options, read_prompts
from .loop import decode
from .output import DecodingOutput
from .pipelined import decode_pipelined
from .presets import default_config
from .reordered import decode_reordered
from .rules import Rule
from .schedule import Grid
from .speculative import decode_speculative
from .streams import Pipeline, Reordered, SelfSpeculative, Strided, VariableLength
from .strided import decode_strided
from .variable import decode_variable


def generate(
    model,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    config: DecodingConfig | None = None,
    streamer=None,
    *,
    tokenizer=None,
    negative_prompt=None,
    inputs_embeds: Tensor | None = None,
    given: Tensor | None = None,
    **overrides,
) -> DecodingOutput:
    """Decode `max_new_tokens` tokens after each prompt, in parallel.

    Parameters
    ----------
    model : PreTrainedModel or DiffusionModel
        A diffusion language model loaded by transformers, or what `adapt` made of it. It must be in evaluation mode.
    input_ids : Tensor or str or list or mapping
        int64 `[B, P]` prompts, shorter ones padded on the left; `[P]` is one prompt. On the model's device. Or text, a
        list of texts, a chat (a list of messages with "role" and "content") or a list of chats, which need the
        `tokenizer`; a list of ids, or of lists of ids of any lengths; or what a tokenizer returns (`input_ids` with
        `attention_mask`, padded on either side). All of these are padded here, on the left.
    attention_mask : Tensor, optional
        `[B, P]`, 0 for padding. Needed when prompts have different lengths.
    config : DecodingConfig, optional
        How to decode; defaults where None.
    streamer : transformers streamer, optional
        Receives the prompt, each finished block, and (if it has `put_draft`) the canvas after each step. One request
        only. Reading the canvas for it costs a device synchronisation a step.
    tokenizer : PreTrainedTokenizer, optional
        Reads text; names the mask token where the model does not; and is what `DecodingOutput.text` uses.
    negative_prompt : optional
        With `cfg_scale`: what the unconditional half of the guidance sees in place of the prompt, in any of the forms
        of `input_ids`, and of any length. One for all requests, or one each. None: masks in place of all that is given.
    inputs_embeds : Tensor, optional
        `[B, P, hidden]`: input embeddings of the prompts, in place of `input_ids`. The result then holds padding where
        the prompts were.
    given : Tensor, optional
        int64 `[B, max_new_tokens]` or `[max_new_tokens]`: tokens that stand in the answer from the start and stay, -1
        where one is to be decoded. Block by block only.
    **overrides
        Fields of `DecodingConfig`.

    Returns
    -------
    DecodingOutput

    Raises
    ------
    ValueError
        When an argument has the wrong shape, dtype, device or range, the canvas is longer than the model can encode,
        or an id the decoding needs is unknown. The message names it.

    Examples
    --------
    >>> out = dlmkernels.generate(model, ids, max_new_tokens=128, block_length=32, rule=dlmkernels.Threshold(0.9))
    >>> out.generated, out.tokens_per_forward
    """
    overrides = read_options(model, config, overrides, tokenizer)
    model, config, special = _prepare(model, config, overrides, "continuations")
    input_ids, attention_mask = read_prompts(
        "input_ids", input_ids, attention_mask, tokenizer, model.device, filler(special)
    )  # fmt: skip
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids or inputs_embeds must be given, and not both")
    if inputs_embeds is not None:
        input_ids = _check_embeds(model, inputs_embeds, special.pad)
    tokens, origin = _check_tokens("input_ids", model, input_ids, attention_mask)
    if inputs_embeds is None and bool((tokens == special.mask).any()):
        raise ValueError(
            f"input_ids holds the mask token ({special.mask}): generate decodes what comes after a prompt; "
            "dlmkernels.infill decodes masks wherever they are"
        )
    pair = pair_prompts(tokens, origin, negative_prompt, tokenizer, config, special, model.vocab_size)
    prompt, tokens, origin = tokens, pair.tokens, pair.origin
    batch, prompt_length = tokens.shape
    end = prompt_length + config.max_new_tokens
    grows = config.block_grid == "absolute" or model.family.whole_blocks
    grid = Grid.of(config, origin, prompt_length, end, grows)
    length = grid.width
    if model.max_length is not None and length > model.max_length:
        raise ValueError(
            f"input_ids ({prompt_length} tokens) and max_new_tokens ({config.max_new_tokens}) make a canvas of {length}"
            f", longer than the model's max_position_embeddings of {model.max_length}"
        )
    masks = tokens.new_full((batch, length - prompt_length), max(special.mask, 0))
    columns = torch.arange(length, device=tokens.device)
    is_open = (columns >= prompt_length) & (columns < grid.ends[:, None])
    if given is not None:
        given = _check_given(model, given, batch, config)
        masks[:, : config.max_new_tokens] = torch.where(given >= 0, given, masks[:, : config.max_new_tokens])
        is_open[:, prompt_length:end] &= given < 0
    canvas = Canvas.of(torch.cat((tokens, masks), 1), is_open, origin, pair.negative)
    _check_streamer(streamer, batch)
    if streamer is not None:
        streamer.put(prompt[0].cpu())
    loop = decode
    if isinstance(config.rule, Strided):
        loop = decode_strided
    elif isinstance(config.rule, SelfSpeculative):
        loop = decode_speculative
    elif isinstance(config.rule, Reordered):
        loop = decode_reordered
    elif isinstance(config.rule, Pipeline):
        loop = decode_pipelined
    elif isinstance(config.rule, VariableLength):
        loop = decode_variable
    out = loop(model, canvas, config, special, grid, prompt_length, end, streamer, pair.widened(inputs_embeds))
    return out.without_columns(pair.added).known_by(tokenizer)


def infill(
    model,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    config: DecodingConfig | None = None,
    streamer=None,
    *,
    tokenizer=None,
    **overrides,
) -> DecodingOutput:
    """Decode the mask tokens of a canvas wherever they stand; every other token is kept.

    Parameters
    ----------
    tokens : Tensor or str or list or mapping
        int64 `[B, T]` or `[T]`, holding `mask_token_id` where a token is wanted. Or one of the other forms in which
        `generate` takes prompts; in text, `tokenizer.mask_token` stands where a token is wanted.

    The other parameters, the result and the errors are those of `generate`; `block_length` divides the whole canvas.
    `max_new_tokens` has a meaning for rules that change the length alone (`Expanding`): it is what the masks of a row
    may become, and no less than there are.
    """
    overrides = read_options(model, config, overrides, tokenizer)
    model, config, special = _prepare(model, config, overrides, "infillings")
    if special.mask < 0:
        raise ValueError("mask_token_id is not in the model's configuration: pass the id that stands where to decode")
    canvases = read_canvases("tokens", tokens, attention_mask, tokenizer, model.device, special)
    tokens, origin = _check_tokens("tokens", model, canvases.tokens, canvases.attention_mask)
    batch, length = tokens.shape
    is_open = (tokens == special.mask) & (torch.arange(length, device=tokens.device) >= origin[:, None])
    varies, width, grown = isinstance(config.rule, VariableLength), length, ""
    if varies:
        least, most = is_open.sum(1).aminmax()
        if most > config.max_new_tokens:
            raise ValueError(
                f"max_new_tokens must be at least the number of masks of any row, {int(most)}; "
                f"got {config.max_new_tokens}"
            )
        width += config.max_new_tokens - int(least)
        grown = f" and may become {width} long"
    if model.max_length is not None and width > model.max_length:
        raise ValueError(
            f"tokens is {length} long{grown}, longer than the model's max_position_embeddings of {model.max_length}"
        )
    more = (0, width - length)
    canvas = Canvas.of(pad(tokens, more, value=special.pad), pad(is_open, more), origin)
    _check_streamer(streamer, batch)
    grid = Grid.of(config, canvas.origin, 0, width, grows=False)
    loop = decode_variable if varies else decode
    return loop(model, canvas, config, special, grid, 0, length, streamer).known_by(tokenizer)


def custom_generate(
    model,
    input_ids: Tensor,
    generation_config=None,
    attention_mask: Tensor | None = None,
    streamer=None,
    decoding_config: DecodingConfig | None = None,
    **unused,
) -> Tensor:
    """For transformers: `model.generate(ids, custom_generate=dlmkernels.custom_generate, max_new_tokens=…)`.

    Takes the length, and with `do_sample=True` temperature, top_k and top_p, from the generation config; the rest from
    `decoding_config`. Returns the token ids alone, as transformers' own decoders do.
    """
    overrides = {}
    if generation_config is not None:
        overrides["max_new_tokens"] = generation_config.max_length - input_ids.shape[1]
        if generation_config.do_sample:
            sampling = {name: getattr(generation_config, name) for name in ("temperature", "top_k", "top_p")}
            overrides |= {name: value for name, value in sampling.items() if value is not None}
    return generate(model, input_ids, attention_mask, decoding_config, streamer, **overrides).sequences


def _prepare(model, config: DecodingConfig | None, overrides: dict, task: str | None = None):
    """Adapt the model; fill what the configuration leaves to it. `task` is one of `Rule.decodes`, None: no decoding."""
    model = adapt(model)
    if getattr(model.model, "training", False):
        raise ValueError("model is in training mode (dropout would be active): call model.eval() first")
    if config is None:
        config = default_config(model.family)
        if model.rule_options:
            config = config.replace(rule=dataclasses.replace(config.rule, **model.rule_options))  # type: ignore
    config = config.replace(**overrides)
    if task and config.rule.decodes not in ("anything", task):
        other = "fills in masks that stand in a canvas: use infill"
        if task == "infillings":
            other = "decodes what comes after a prompt: use generate"
        raise ValueError(f"rule {type(config.rule).__name__} {other}")
    if task:
        config = _with_token_ids(model, config)
    if config.cache != "none" and not model.reuses_kv:
        raise ValueError(
            f"cache='{config.cache}' needs a model of a known type whose rows can be forwarded in parts; "
            f"{type(model.model).__name__} (of unknown type, or with token_dropout) decodes with cache='none'"
        )
    if config.constraint is not None:
        _check_block_by_block("constraint", config.rule)
    config = _of_the_family(model, config)
    return model, config, _special_tokens(model, config)


def _with_token_ids(model: DiffusionModel, config: DecodingConfig) -> DecodingConfig:
    """The token ids that the rule leaves to the model."""
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
    """What the configuration leaves open, from the model's family; what does not go together is refused."""
    family = model.family
    attention = config.attention or family.attention
    has_blocks = attention in ("block", "causal-context")
    block_length = config.block_length
    if block_length is None and has_blocks:
        block_length = model.block_length
        if block_length is None:
            raise ValueError(
                f"block_length is needed: the model's attention has blocks (attention='{attention}') and its "
                "configuration does not say how long they are"
            )
    if attention != "full" and isinstance(model, LogitsModel):
        raise ValueError(
            f"attention='{attention}' needs a model of a known type; {type(model.model).__name__} attends by itself"
        )
    allowed = ("none", *APPROXIMATE) if attention == "full" else ("none", "block")
    if config.cache not in allowed:
        raise ValueError(f"cache must be one of {allowed} with attention='{attention}'; got '{config.cache}'")
    if attention == "reordered" and config.cache == "block" and not isinstance(config.rule, Reordered):
        raise ValueError("cache='block' with attention='reordered' needs the rule Reordered; use cache='none'")
    if isinstance(model, EncoderDecoderModel) and (attention != family.attention or config.cache != "block"):
        raise ValueError(
            f"attention='{family.attention}' and cache='block' are needed, since an encoder of its own reads what is "
            f"decided; got '{attention}' and '{config.cache}'"
        )
    alignment = config.logit_alignment or family.logit_alignment
    if config.cache == "delayed" and config.rule.slots != "open":
        raise ValueError(f"cache='delayed' needs a rule that takes nothing back; got {type(config.rule).__name__}")
    if config.rule.shadow and (
        attention != "full" or config.cache != "none" or alignment != "same" or not model.reuses_kv
    ):
        raise ValueError(
            f"rule {type(config.rule).__name__} needs a model of a known type with attention='full', cache='none' and "
            f"logit_alignment='same'; got {type(model.model).__name__}, '{attention}', '{config.cache}' and "
            f"'{alignment}'"
        )
    if config.rule.slots == "canvas" and config.cache != "none":
        raise ValueError(f"rule {type(config.rule).__name__} reads all of the canvas: it needs cache='none'")
    seeded = family.seeded if config.seeded is None else config.seeded
    if seeded and attention == "full":
        raise ValueError("seeded needs a context that later tokens do not change; attention is 'full'")
    return config.replace(
        attention=attention, block_length=block_length, seeded=seeded,
        block_grid=(config.block_grid or family.block_grid) if attention == "block" else "prompt",
        logit_alignment=alignment,
    )  # fmt: skip


def _special_tokens(model: DiffusionModel, config: DecodingConfig) -> SpecialTokens:
    mask, pad = (
        _from_model(model, name) if getattr(config, name) is None else getattr(config, name)
        for name in ("mask_token_id", "pad_token_id")
    )
    eos = config.eos_token_id
    if mask is None and config.rule.noise == "uniform":
        if config.cfg_scale > 0:
            raise ValueError("cfg_scale needs a mask token to hide the prompt behind: pass mask_token_id=…")
        mask = -1  # such models have none
    elif mask is None:
        raise ValueError(
            "mask_token_id is not in the model's configuration: pass mask_token_id=… (tokenizer.mask_token_id)"
        )
    eos = _stop_ids(model) if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if pad is None:
        pad = eos[0] if eos else max(mask, 0)
    vocab = model.vocab_size
    known = model.family.num_tokens if model.family.knows_ids_of(model.config) else None
    for name, ids in (
        ("mask_token_id", [mask] if mask != -1 else []), ("eos_token_id", eos), ("pad_token_id", [pad]),
        ("suppress_token_ids", config.suppress_token_ids), ("defer_token_ids", config.defer_token_ids),
        *((name, [i]) for name in config.rule.token_ids if (i := getattr(config.rule, name)) is not None),
    ):  # fmt: skip
        for i in ids:
            if not isinstance(i, int) or i < 0 or (vocab is not None and i >= vocab):
                limit = "" if vocab is None else f" of {vocab} tokens"
                raise ValueError(f"{name} must be in the model's vocabulary{limit}; got {i!r}")
    # Logits beyond the tokenizer's last id stand for nothing, unless the rule says what.
    unknown = set(range(known, vocab)) if known is not None and vocab is not None else set()
    unknown -= {getattr(config.rule, name) for name in config.rule.token_ids}
    masks = [mask] if mask != -1 else []
    return SpecialTokens(mask, eos, pad, [*masks, *config.suppress_token_ids, *sorted(unknown)])


def _stop_ids(model: DiffusionModel) -> list[int]:
    """End tokens of the model's configurations and of its family."""
    ids: list[int] = []
    for source in _sources(model):
        value = getattr(source, "eos_token_id", None)
        ids += [] if value is None else [value] if isinstance(value, int) else value
    if model.family.knows_ids_of(model.config):
        ids += model.family.eos_token_ids
    return list(dict.fromkeys(ids))


def _sources(model: DiffusionModel) -> tuple:
    """Where a model's token ids are found: its configuration, that of its text part, its generation configuration."""
    config = model.config
    return config, getattr(config, "text_config", None), getattr(model.model, "generation_config", None)


def _from_model(model: DiffusionModel, name: str):
    """A token id from the first of the model's configurations that has it."""
    for source in _sources(model):
        value = getattr(source, name, None)
        if value is not None:
            return value
    return None


def _check_tokens(
    name: str, model: DiffusionModel, tokens: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Validated tokens `[B, T]` and the column at which each row starts, int32 `[B]`."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        got = f"a tensor of {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{name} must be an int64 tensor of token ids; got {got}")
    if tokens.dim() == 1:
        tokens = tokens[None]
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"{name} must have shape [batch, length], neither of them 0; got {list(tokens.shape)}")
    if tokens.device != model.device:
        raise ValueError(f"{name} must be on the model's device {model.device}; got {tokens.device}")
    low, high = tokens.min().item(), tokens.max().item()
    if low < 0 or (model.vocab_size is not None and high >= model.vocab_size):
        raise ValueError(f"{name} must hold ids from 0 to {model.vocab_size} - 1; got ids from {low} to {high}")
    if attention_mask is None:
        return tokens, torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device)
    if attention_mask.dim() == 1:
        attention_mask = attention_mask[None]
    if attention_mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask must have the shape of {name}, {list(tokens.shape)}; got {list(attention_mask.shape)}"
        )
    valid = attention_mask.to(tokens.device) != 0
    origin = (~valid).sum(1, dtype=torch.int32)
    if not torch.equal(valid, torch.arange(tokens.shape[1], device=tokens.device) >= origin[:, None]):
        raise ValueError("attention_mask must be 0 for padding on the left and 1 after it: pad prompts on the left")
    if (origin == tokens.shape[1]).any():
        raise ValueError(f"attention_mask leaves row {int((origin == tokens.shape[1]).nonzero()[0])} of {name} empty")
    return tokens, origin


def _check_block_by_block(name: str, rule: Rule) -> None:
    """Refuse the argument `name` with a rule that has a loop of its own, or moves tokens about."""
    if rule.decodes != "anything" or rule.token_ids:
        raise ValueError(f"{name} cannot be used with rule {type(rule).__name__}")


def _check_given(model: DiffusionModel, given: Tensor, batch: int, config: DecodingConfig) -> Tensor:
    """Tokens of the answers that are given, int64 `[B, max_new_tokens]`."""
    shapes = ((config.max_new_tokens,), (batch, config.max_new_tokens))
    if not isinstance(given, Tensor) or given.dtype != torch.int64 or given.shape not in shapes:
        got = f"{given.dtype} of shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"given must be int64 of shape {list(shapes[1])} (max_new_tokens); got {got}")
    if given.device != model.device:
        raise ValueError(f"given must be on the model's device {model.device}; got {given.device}")
    low, high = given.min().item(), given.max().item()
    if low < -1 or (model.vocab_size is not None and high >= model.vocab_size):
        raise ValueError(f"given must hold ids from 0 to {model.vocab_size} - 1, or -1; got ids from {low} to {high}")
    _check_block_by_block("given", config.rule)
    return given.expand(batch, -1)


def _check_embeds(model: DiffusionModel, embeds: Tensor, pad: int) -> Tensor:
    """Tokens that stand for the embedded prompts, int64 `[B, P]`."""
    if not hasattr(model.model, "get_input_embeddings"):
        raise ValueError(f"inputs_embeds needs a model of transformers; got {type(model.model).__name__}")
    table = model.model.get_input_embeddings()
    hidden = table.embedding_dim
    if not isinstance(embeds, Tensor) or embeds.dim() != 3 or embeds.shape[2] != hidden or embeds.numel() == 0:
        got = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(f"inputs_embeds must have shape [batch, length, {hidden}]; got {got}")
    if embeds.dtype != table.weight.dtype or embeds.device != model.device:
        raise ValueError(
            f"inputs_embeds must be {table.weight.dtype} on {model.device}; got {embeds.dtype} on {embeds.device}"
        )
    if not model.embeds_by_token:
        raise ValueError(
            "inputs_embeds cannot be used with this model: what it embeds a token as depends on the whole row"
        )
    return torch.full(embeds.shape[:2], pad, dtype=torch.int64, device=embeds.device)


def _check_streamer(streamer, batch: int) -> None:
    if streamer is not None and batch != 1:
        raise ValueError(f"streamer takes one request; got a batch of {batch}")
