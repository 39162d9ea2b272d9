# SPDX-License-Identifier: Apache-2.0
"""The front doors: `generate` after a prompt, `infill` wherever the masks are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .agreement import agree
from .arguments import check_embeds, check_prompt, check_streamer, check_tokens, seeds_of
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
    given: Tensor | None = None,
    suffix: Tensor | None = None,
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
        A diffusion language model loaded by transformers, or what `adapt` made of it. It must be in evaluation mode.
    input_ids : Tensor or str or list or mapping
        int64 `[B, P]` prompts, shorter ones padded on the left; `[P]` is one prompt. On the model's device. An empty
        prompt `[B, 0]` is decoded after nothing: B samples of the model's own. Or text, a list of texts, a chat (a list
        of messages with "role" and "content") or a list of chats, which need the `tokenizer`; a list of ids, or of
        lists of ids of any lengths; or what a tokenizer returns (`input_ids` with `attention_mask`, padded on either
        side), or DiffusionGemma's processor, with images. All of these are padded here, on the left.
    attention_mask : Tensor, optional
        `[B, P]`, 0 for padding. Without it, the model's padding token (`pad_token_id`) on the left of a row is taken
        for padding where it is nothing else; a warning says so where it may be something else (an end token, say).
    config : DecodingConfig, str or dict, optional
        How to decode: a configuration, the name of a preset, or fields of a configuration. None: the decoder that the
        model's family was published with.
    streamer : transformers streamer, or list of them, optional
        Receives the prompt, each finished block, and (if it has `put_draft`) the canvas after each step. For several
        requests a list with one for each, or None. Reading the canvas for it costs a device synchronisation a step.
    drafter : Drafter, optional
        What `load_drafter` has loaded for this model, a causal one: its tokens are decoded from left to right, as many
        a forward as the drafter has guessed right. The same as `rule=Drafted(drafter)`.
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
    steps_per_poll : int
        After how many steps the host looks at what they report. The tokens are the same whatever it is. More than 1
        spares the host work between steps, and makes steps in vain at the end of a block: for models whose steps take
        a GPU less time than the host.
    trace : bool
        Record everything that happens, for `out.trace`: what was committed, edited, taken back, inserted and removed in
        each forward. Costs a device synchronisation a step; steps are not captured then.
    **overrides
        Fields of `DecodingConfig`, which take precedence. One that makes no difference is an error.

    Returns
    -------
    DecodingOutput

    Raises
    ------
    ValueError
        When an argument has the wrong shape, dtype, device or range, an option has no effect, the canvas is longer
        than the model can encode, or an id the decoding needs is unknown. The message names it.
    TypeError
        When an option is unknown or of the wrong kind.

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
        raise ValueError("input_ids or inputs_embeds must be given, and not both")
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
    """Decode the mask tokens of a canvas wherever they stand; every other token is kept.

    Parameters
    ----------
    tokens : Tensor or str or list or mapping
        int64 `[B, T]` or `[T]`, holding -1 or `mask_token_id` where a token is wanted. Models whose noise is other
        tokens (Duo) have no mask token: for them it is -1. Or one of the other forms in which `generate` takes prompts;
        in text, `tokenizer.mask_token` stands where a token is wanted.

    The other parameters, the result and the errors are those of `generate`; `block_length` divides each canvas from its
    first token on.
    `max_new_tokens` has a meaning for rules that change the length alone (`Expanding`): it is what the masks of a row
    may become, and no less than there are.
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
                f"max_new_tokens must be at least the number of masks of any row, {int(most)}; got {config.longest}"
            )
        width += config.longest - int(least)
        grown = f" and may become {width} long"
    if model.max_length is not None and width > model.max_length:
        raise ValueError(
            f"tokens is {length} long{grown}, longer than the model's max_position_embeddings of {model.max_length}"
        )
    more = (0, width - length)
    check_streamer(streamer, batch)
    seeds = seeds_of(config.seed, batch, tokens.device)
    parameters = parameters_of(config, batch, tokens.device)
    canvas = pad(tokens, more, value=special.pad)
    state = State.of(canvas, pad(is_open, more), origin, length, seed=seeds, parameters=parameters)
    agree(model, {"tokens": canvas, "attention_mask": origin}, config, state.seed)
    grid = Grid.of(config, state.origin, 0 if varies else state.origin, width, grows=False)
    program = program_of(config.rule)(Task(model, state, config, special, grid, 0, length))
    listeners = listeners_of(streamer, batch, tokenizer=tokenizer, trace=trace)
    equip(program, listeners, Wishes(), False)
    return completed(run(program, listeners), listeners, None, special.pad).known_by(tokenizer)


def _check_length(model, config: DecodingConfig, length: int, prompt_length: int, end: int) -> None:
    """Refuse canvases of `length` columns that are longer than what the model has positions for."""
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
            "; beyond that only answers can go, with cache='block' and without guidance and sub_block_cache"
            if model.reach is not None
            else ""
        )
    )


def _check_without_prompt(config: DecodingConfig, given: Tensor | None, negative_prompt) -> None:
    """Refuse what needs a prompt."""
    if isinstance(config.rule, (Strided, SelfSpeculative, NextToken)):
        raise ValueError(
            f"input_ids must hold at least one token with rule {type(config.rule).__name__}, which reads the first "
            "token of the answer off the last one of the prompt"
        )
    if config.cfg_scale > 0 and given is None and negative_prompt is None:
        raise ValueError("cfg_scale has no effect without a prompt: guidance hides what is given, and nothing is")
