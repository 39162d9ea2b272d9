# SPDX-License-Identifier: Apache-2.0
"""Public entry points: `generate` continues a prompt; `infill` fills in mask tokens anywhere in a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .agreement import agree
from .arguments import check_embeds, check_prompt, check_tokens, seeds_of
from .config import DecodingConfig
from .copies import seeds_of_copies
from .extras import check_copies, check_given_tokens, completed, drafting, equip, listeners_of, put_prompts
from .guidance import pair_prompts
from .images import embed_images, take_images
from .inputs import filler, read_canvases, read_options, read_prompts
from .output import DecodingOutput
from .parameters import lengths_of, parameters_of
from .poll import check_polls
from .processing import Wishes
from .programs import Task, program_of, run
from .resolve import ConfigLike, prepare
from .rules import NextToken, SelfSpeculative, Strided, VariableLength
from .schedule import Grid
from .state import State
from .streaming import StepReport


def generate(
    model,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    config: ConfigLike = None,
    streamer=None,
    *,
    drafter=None,
    tokenizer=None,
    negative_prompt=None,
    inputs_embeds: Tensor | None = None,
    given: Tensor | Sequence | None = None,
    suffix: Tensor | Sequence | None = None,
    num_return_sequences: int = 1,
    stop_strings: str | Sequence[str] | None = None,
    repetition_penalty: float = 1.0,
    logits_processor=None,
    top_logprobs: int = 0,
    on_step: Callable[[StepReport], Any] | None = None,
    graphs: bool | str = "auto",
    steps_per_poll: int = 1,
    trace: bool = False,
    **overrides,
) -> DecodingOutput:
    """Decode `max_new_tokens` tokens after each prompt, in parallel.

    Parameters
    ----------
    model : PreTrainedModel or DiffusionModel
        A diffusion language model loaded by transformers, or the result of `adapt`. It must be in evaluation mode.
    input_ids : Tensor or str or list or mapping
        The prompts, in one of these forms. Those that are not tensors are padded here, on the left.

        - int64 `[B, P]` on the model's device, shorter prompts padded on the left; `[P]` is one prompt. `[B, 0]` is B
          empty prompts, which draws B unconditional samples from the model.
        - Text, a list of texts, a chat (a list of messages with "role" and "content") or a list of chats. These need
          the `tokenizer`.
        - A list of token ids, or a list of such lists, of any lengths.
        - The result of a tokenizer (`input_ids` with `attention_mask`, padded on either side), or of DiffusionGemma's
          processor, with images.
    attention_mask : Tensor, optional
        `[B, P]`, 0 for padding; for `input_ids` in a tensor. If None, padding tokens (`pad_token_id`) on the left of a
        row are treated as padding. Exception: a padding token that also has another meaning (an end token, say) is
        treated as part of the prompt, with a warning if rows begin with different numbers of it.
    config : DecodingConfig, str or dict, optional
        How to decode: a configuration, the name of a preset, or a dict of configuration fields. If None, the adaptive
        decoder that the model's family was published with, or `DecodingConfig()` if it has none.
    streamer : transformers streamer, or list of them, optional
        Receives the prompt, each finished block, and (if it has a method `put_draft`) the canvas after each step, that
        is, prompt and answer with mask tokens at open positions. For several requests, a list with a streamer or None
        for each. Reading the canvas costs a device synchronization per step.
    drafter : Drafter, optional
        A drafter for this model, which must be causal, from `load_drafter`. Tokens are decoded from left to right, as
        many per forward pass as the drafter guessed correctly. Equivalent to `rule=Drafted(drafter)`.
    tokenizer : PreTrainedTokenizer, optional
        Tokenizes text, supplies the mask token if the model names none, and is the default of `DecodingOutput.text`.
    negative_prompt : optional
        With `cfg_scale`: the prompt for the unconditional half of classifier-free guidance, in any form of `input_ids`
        and of any length. One for all requests, or one each. If None, that half sees mask tokens in place of the
        prompt and the given tokens.
    inputs_embeds : Tensor, optional
        `[B, P, hidden]`: input embeddings of the prompts, in place of `input_ids`. The result then holds padding tokens
        in the columns of the prompts.
    given : Tensor or list, optional
        int64 `[B, max_new_tokens]` or `[max_new_tokens]`, or ids in lists of that form: tokens of the answer that are
        fixed from the start, -1 where one is to be decoded. Needs a rule that decodes block by block, as does `suffix`.
    suffix : Tensor or list, optional
        int64 `[K]` or `[B, K]`, or ids in lists of that form: fixed tokens that follow each answer. They do not count
        toward `max_new_tokens`.
    num_return_sequences : int
        Number of answers to each prompt, in adjacent rows of the result. Above 1, decoding must involve randomness.
    stop_strings : str or sequence of str, optional
        Texts that end an answer; need the `tokenizer`. The answer ends with the token that completes one of them.
    repetition_penalty : float
        Divides positive and multiplies negative logits of tokens that the request already holds, as in transformers; 1
        disables it.
    logits_processor : callable or sequence of callables, optional
        Each is called in every step with a request's decided tokens, int64 `[n, t]`, and the logits of its open
        positions, float32 `[n, V]`, and returns logits. Runs on the host.
    top_logprobs : int
        Number of most likely tokens to record for each position, in `top_ids` and `top_log_probability` of the result.
        0 records none.
    on_step : callable, optional
        Called with a `StepReport` after each step. Costs a device synchronization per step, as does `stop_strings`.
    graphs : {"auto", True, False}
        Whether to capture steps as CUDA graphs and replay them. "auto" does so where possible; True raises a
        ValueError where it is not.
    steps_per_poll : int
        Number of steps that run before the host checks their results. Does not change the tokens. Values above 1 reduce
        host work between steps, at the cost of a few wasted steps at the end of each block. Useful for models whose
        steps take less time on the GPU than on the host.
    trace : bool
        Record every change of the canvas in `out.trace`: tokens committed, edited, remasked, inserted and removed by
        each forward pass. Costs a device synchronization per step and disables `graphs`.
    **overrides
        Fields of `DecodingConfig`, which take precedence over `config`. An option without effect is an error.

    Returns
    -------
    DecodingOutput

    Raises
    ------
    ValueError
        If an argument has the wrong shape, dtype, device or range, an option has no effect, the canvas is longer than
        the model can encode, or a token id that the decoding needs is unknown. The message names the argument.
    TypeError
        If an option is unknown or of the wrong type.

    Examples
    --------
    >>> out = dlmkernels.generate(model, ids, max_new_tokens=128, block_length=32, rule=dlmkernels.Threshold(0.9))
    >>> out.generated, out.tokens_per_forward
    """
    overrides = read_options(model, config, drafting(drafter, overrides), tokenizer)
    polls = check_polls(steps_per_poll)
    model, config, special = prepare(model, config, overrides, "continuations")
    input_ids, images = take_images(input_ids)
    input_ids, attention_mask = read_prompts(
        "input_ids", input_ids, attention_mask, tokenizer, model.device, filler(special)
    )  # fmt: skip
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "exactly one of input_ids and inputs_embeds must be given; got "
            + ("None for both" if input_ids is None else "both")
        )
    if inputs_embeds is not None:
        input_ids = check_embeds(model, inputs_embeds, special.pad)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    tokens, origin = check_tokens("input_ids", model, input_ids, attention_mask, special)
    if inputs_embeds is None:
        check_prompt(tokens, attention_mask, special)
    if tokens.shape[1] == 0:
        _check_without_prompt(config, given, negative_prompt)
    limit = None
    if images is not None:
        inputs_embeds, limit = embed_images(model, config, tokens, origin, images)
    wishes = Wishes.of(repetition_penalty, logits_processor, top_logprobs)
    wishes.check(config, model.vocab_size)
    copies, requests = check_copies(num_return_sequences, config), len(tokens)
    lengths = lengths_of(config, requests, tokens.device)
    given, lengths = check_given_tokens(model, given, suffix, lengths, config, special)
    tokens, origin, lengths = (x.repeat_interleave(copies, 0) for x in (tokens, origin, lengths))
    given, inputs_embeds, limit = (
        None if x is None else x.repeat_interleave(copies, 0) for x in (given, inputs_embeds, limit)
    )
    pair = pair_prompts(tokens, origin, negative_prompt, tokenizer, config, special, model.vocab_size)
    prompt, starts, tokens, origin = tokens, origin, pair.tokens, pair.origin
    batch, prompt_length = tokens.shape
    ends = prompt_length + lengths
    end = int(ends.max())
    grows = config.block_grid == "absolute" or model.family.whole_blocks
    grid = Grid.of(config, origin, prompt_length, ends, grows)
    length = grid.width
    _check_length(model, config, length, prompt_length, end)
    masks = tokens.new_full((batch, length - prompt_length), max(special.mask, 0))
    columns = torch.arange(length, device=tokens.device)
    is_open = (columns >= prompt_length) & (columns < grid.ends[:, None])
    if given is not None:
        masks[:, : end - prompt_length] = torch.where(given >= 0, given, masks[:, : end - prompt_length])
        is_open[:, prompt_length:end] &= given < 0
    masks.masked_fill_(columns[prompt_length:] >= grid.ends[:, None], special.pad)
    listeners = listeners_of(streamer, batch, on_step, stop_strings, tokenizer, trace)
    seeds = seeds_of_copies(seeds_of(config.seed, requests, tokens.device), copies)
    parameters = {
        name: values.repeat_interleave(copies, 0)
        for name, values in parameters_of(config, requests, tokens.device).items()
    }
    state = State.of(torch.cat((tokens, masks), 1), is_open, origin, grid.ends, pair.negative, seeds, parameters)
    put_prompts(listeners, prompt, starts)
    agree(model, {"input_ids": state.tokens, "attention_mask": origin, "given": is_open}, config, state.seed, polls)
    task = Task(model, state, config, special, grid, prompt_length, end, pair.widened(inputs_embeds), limit)
    program = program_of(config.rule)(task)
    proposer = equip(program, listeners, wishes, graphs)
    out = completed(run(program, listeners, polls), listeners, proposer, special.pad)
    return out.without_columns(pair.added).known_by(tokenizer)


def infill(
    model,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    config: ConfigLike = None,
    streamer=None,
    *,
    tokenizer=None,
    trace: bool = False,
    **overrides,
) -> DecodingOutput:
    """Decode the mask tokens of a canvas, wherever they are, and keep every other token.

    Parameters
    ----------
    tokens : Tensor or str or list or mapping
        The canvases: int64 `[B, T]` or `[T]`, with -1 or `mask_token_id` at each position to decode. For models without
        a mask token, whose noise is other tokens (Duo), use -1. Also accepts the other forms of `input_ids` of
        `generate`; in text, write `tokenizer.mask_token` for each token to decode.

    The other parameters, the result and the errors are those of `generate`. Blocks of `block_length` are counted from
    the first token of each canvas. `max_new_tokens` is only used by rules that change the length (`Expanding`): it is
    the largest number of tokens that the masks of a row may become, and at least the number of masks in any row.
    """
    overrides = read_options(model, config, overrides, tokenizer)
    model, config, special = prepare(model, config, overrides, "infillings")
    canvases = read_canvases("tokens", tokens, attention_mask, tokenizer, model.device, special)
    tokens, origin = check_tokens("tokens", model, canvases.tokens, canvases.attention_mask, special, lowest=-1)
    batch, length = tokens.shape
    if length == 0:
        raise ValueError(f"tokens must hold at least one position; got shape {list(tokens.shape)}")
    is_open = (tokens < 0) | (tokens == special.mask)
    is_open &= torch.arange(length, device=tokens.device) >= origin[:, None]
    tokens = tokens.masked_fill(tokens < 0, max(special.mask, 0))
    varies, width, grown = isinstance(config.rule, VariableLength), length, ""
    if varies:
        least, most = is_open.sum(1).aminmax()
        if most > config.longest:
            raise ValueError(
                f"max_new_tokens must be at least the number of masks in any row, {int(most)}; got {config.longest}"
            )
        width += config.longest - int(least)
        grown = f" and may grow to {width}"
    if model.max_length is not None and width > model.max_length:
        raise ValueError(
            f"tokens has length {length}{grown}, more than the model's max_position_embeddings of {model.max_length}"
        )
    more = (0, width - length)
    listeners = listeners_of(streamer, batch, tokenizer=tokenizer, trace=trace)
    seeds = seeds_of(config.seed, batch, tokens.device)
    parameters = parameters_of(config, batch, tokens.device)
    canvas = pad(tokens, more, value=special.pad)
    state = State.of(canvas, pad(is_open, more), origin, length, seed=seeds, parameters=parameters)
    agree(model, {"tokens": canvas, "attention_mask": origin}, config, state.seed)
    grid = Grid.of(config, state.origin, 0 if varies else state.origin, width, grows=False)
    program = program_of(config.rule)(Task(model, state, config, special, grid, 0, length))
    equip(program, listeners, Wishes(), False)
    return completed(run(program, listeners), listeners, None, special.pad).known_by(tokenizer)


def _check_length(model, config: DecodingConfig, length: int, prompt_length: int, end: int) -> None:
    """Raise a ValueError if a canvas of `length` columns is longer than the model can encode."""
    longest = model.max_length
    if longest is None or length <= longest:
        return
    slides = model.reach is not None and config.cache == "block"
    if slides and prompt_length <= longest and not config.sub_block_cache and config.cfg_scale == 0:
        return
    raise ValueError(
        f"input_ids ({prompt_length} tokens) and max_new_tokens ({end - prompt_length}) make a canvas of {length}"
        f", longer than the model's max_position_embeddings of {longest}"
        + (
            "; only answers can go beyond it, with cache='block' and without cfg_scale and sub_block_cache"
            if model.reach is not None
            else ""
        )
    )


def _check_without_prompt(config: DecodingConfig, given: Any, negative_prompt) -> None:
    """Raise a ValueError if the rule or guidance needs a prompt; called for empty prompts."""
    if isinstance(config.rule, (Strided, SelfSpeculative, NextToken)):
        raise ValueError(
            f"input_ids must hold at least one token with rule {type(config.rule).__name__}, which predicts the first "
            "token of the answer from the last token of the prompt"
        )
    if config.cfg_scale > 0 and given is None and negative_prompt is None:
        raise ValueError("cfg_scale has no effect without a prompt: guidance masks given tokens, and there are none")
