# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels generate`."""

from __future__ import annotations

import argparse
import sys
import time

from ..decoding.config import DecodingConfig
from ..decoding.presets import default_config, preset
from ..demo import PROMPT
from . import batch
from .options import add_decoding, add_model, count, decoding_options, device_named, is_random, load, require, writable


def add(commands) -> None:
    generate = commands.add_parser(
        "generate", help="decode the answer to one prompt, or to a file of prompts",
        description="Decode the answer to a prompt with a model in Hugging Face format. The text is printed to stdout, "
        "statistics to stderr. Options that you leave out come from --preset, or else from the model family's default "
        "decoder. An option that would have no effect is an error (except --seed).",
        epilog="To try it out, run `dlmkernels generate --model demo`, which is short for "
        f"`dlmkernels generate --model demo --prompt '{PROMPT}'`. With --model demo, --max-new-tokens defaults to the "
        "length of the solution.",
    )  # fmt: skip
    add_model(generate)
    add = generate.add_argument
    add("--prompt", metavar="TEXT",
        help="the prompt; '-' reads it from standard input; optional with --model demo")  # fmt: skip
    add("--chat", action="store_true", help="format the prompt with the tokenizer's chat template")
    add("--infill", action="store_true", help="fill in the mask tokens of the prompt instead of continuing it")
    add_decoding(generate)
    add("--draft", action="store_true", help="show the partly decoded text after each forward pass (terminal only)")
    add("--trace", metavar="FILE", help="write an HTML page that replays the decoding")
    batch.add_options(generate)
    generate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    batch.check(args)
    if args.trace:
        writable("--trace", args.trace)
    if args.input is not None:
        return batch.run(args)
    require("transformers", "safetensors", wanted_for="generate")
    import torch

    changes = decoding_options(args)
    named = preset(args.preset) if args.preset else None
    (named or DecodingConfig()).replace(**changes)  # validate before loading the model, so that mistakes show at once
    device = device_named(args.device)
    prompt = _prompt(args)
    model, tokenizer = load(args.model, args.dtype, device)

    from ..decoding.generate import generate, infill
    from ..decoding.inputs import read_prompts
    from ..models.adapt import adapt

    model = adapt(model)
    ids = read_prompts("--prompt", prompt, None, tokenizer, device, 0).tokens
    mask = changes.get("mask_token_id", getattr(model.config, "mask_token_id", None))
    mask = getattr(tokenizer, "mask_token_id", None) if mask is None else mask
    if mask is not None and bool((ids == mask).any()) != args.infill:
        raise ValueError("--infill: the prompt contains no mask token" if args.infill else
                         "--prompt contains mask tokens: pass --infill to fill them in")  # fmt: skip
    if not args.infill and args.model == "demo" and "max_new_tokens" not in changes:
        changes["max_new_tokens"] = _demo_answer_length(prompt)
    draws = is_random((named or default_config(model.family.preset)).replace(**changes))
    if draws and "seed" not in changes:
        import secrets

        changes["seed"] = secrets.randbits(31)
    streamer = None
    if args.draft and sys.stdout.isatty():
        from transformers import TextDiffusionStreamer

        streamer = TextDiffusionStreamer(tokenizer, skip_prompt=not args.infill)
    elif args.draft:
        print("dlmkernels: --draft has no effect because standard output is not a terminal", file=sys.stderr)
    start = time.perf_counter()
    with torch.inference_mode():
        decode = infill if args.infill else generate
        out = decode(
            model, ids, config=named, streamer=streamer, tokenizer=tokenizer, trace=bool(args.trace), **changes
        )
        forwards, decoded = int(out.num_forwards[0]), int((out.commit_step[0] >= 0).sum())
    seconds = time.perf_counter() - start
    if streamer is None:
        print(out.text()[0], flush=True)
    statistics = (
        f"{count(decoded, 'token')}, {count(forwards, 'forward')}, {decoded / max(forwards, 1):.2f} tokens per "
        f"forward, {decoded / seconds:.1f} tokens/s ({seconds:.2f} s)"
    )
    if draws:
        statistics += f", seed {changes['seed']}"
    elif "seed" in changes:
        statistics += " (nothing was sampled: --seed had no effect)"
    print(statistics, file=sys.stderr)
    if args.trace:
        out.trace.html(args.trace, title=f"{args.model}: {decoded} tokens in {count(forwards, 'forward')}")
        print(f"open {args.trace} in a browser to watch the decoding", file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str | list[dict[str, str]]:
    """Return the text of the prompt or, with --chat, a chat with one message."""
    if args.prompt is None and (args.model != "demo" or args.infill):
        raise ValueError("--prompt is needed" + (", with mask tokens ('_') in it" if args.model == "demo" else ""))
    prompt = PROMPT if args.prompt is None else args.prompt
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    if not prompt:
        raise ValueError("--prompt is empty")
    if args.model == "demo":
        from ..demo.tasks import check_text

        check_text("--prompt", prompt)
    return [{"role": "user", "content": prompt}] if args.chat else prompt


def _demo_answer_length(prompt) -> int:
    """Return the number of tokens in the demo model's answer to a prompt."""
    from ..demo.tasks import answer_length

    return answer_length(prompt) if isinstance(prompt, str) else 1
