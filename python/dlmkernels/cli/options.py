# SPDX-License-Identifier: Apache-2.0
"""Command-line options shared by several commands, and helpers that load what they name."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ..decoding.config import CACHES, SCORES, DecodingConfig
from ..decoding.features import FEATURE_CACHES
from ..decoding.presets import PRESETS
from ..decoding.rules.named import RULES, parse_rule
from ..decoding.scores import score_named

#: fields of `DecodingConfig` that are options of the same name
FIELDS = (
    "max_new_tokens", "block_length", "steps", "score", "cache", "temperature", "top_k", "top_p", "cfg_scale", "seed",
    "mask_token_id",
)  # fmt: skip
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the model, its dtype and its device."""
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder or Hub id; 'demo' is the small model in the package")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: as stored)")
    add("--device", default="cpu", help="where the model runs: cpu or cuda (default cpu)")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Add the options for fields of `DecodingConfig`, and for the preset that they override."""
    add = parser.add_argument
    add("--preset", metavar="NAME", help=f"settings of a published decoder: {', '.join(PRESETS)}")
    add("--rule", metavar="RULE",
        help="which tokens each forward pass commits, with an optional number, as in threshold:0.9; one of "
        f"{', '.join(RULES)}")  # fmt: skip
    add("--max-new-tokens", type=int, metavar="N", help="length of the answer in tokens (default 128)")
    add("--block-length", type=int, metavar="N",
        help="decode blocks of N tokens from left to right (default: one block)")  # fmt: skip
    add("--steps", type=int, metavar="N",
        help="number of forward passes, for rules with a fixed schedule; without --rule, selects quota")  # fmt: skip
    add("--score", choices=SCORES, help="score by which masked positions are ranked; the highest are committed first")
    add("--cache", choices=(*CACHES, *FEATURE_CACHES),
        help="how keys and values are reused between forward passes (default: depends on the model)")  # fmt: skip
    add("--temperature", type=float, metavar="T",
        help="sampling temperature; 0 takes the most likely token (default 0, or the preset's)")  # fmt: skip
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    add("--top-p", type=float, metavar="P",
        help="sample from the most likely tokens whose probabilities add up to P")  # fmt: skip
    add("--cfg-scale", type=float, metavar="S",
        help="strength of classifier-free guidance (default 0: off); negative prompts need Python")  # fmt: skip
    add("--seed", type=seed_value, help="random seed (default: a fresh one, printed by generate; 0 with --input)")
    add("--mask-token-id", type=int, metavar="ID", help="id of the mask token, if the model's configuration lacks it")


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `DecodingConfig` that were given on the command line."""
    options: dict[str, Any] = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    if args.rule:
        options["rule"] = parse_rule(args.rule)
    return options


def is_random(config: DecodingConfig) -> bool:
    """Return whether the result of a decoding depends on the seed."""
    drawn_order = max(config.order_temperature, score_named(config.score).order_temperature)
    return config.samples or drawn_order > 0 or config.rule.draws


def load(path: str, dtype: str, device):
    """Load a model and its tokenizer. Returns the model, moved to `device`, and the tokenizer."""
    import transformers

    from ..models.checkpoint import locate
    from ..models.load import load

    path, _ = locate(path, {})
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    model = load(path, dtype=dtype).to(device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model: no readable tokenizer at '{path}': {error}") from error
    return model, tokenizer


def device_named(name: str):
    """Return the device that --device names. Raises ValueError if this build has no kernels for it."""
    import torch

    from .. import _C

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda; got '{name}'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda; got '{name}'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    if device.type == "cuda" and not _C.build_info()["cuda_architectures"]:
        raise ValueError(f"--device cuda: this build has no CUDA kernels ({_C.build_info()['cuda_state']})")
    return device


def as_typed(message: str) -> str:
    """Return an error message with the options of the command line in place of the Python arguments that it names."""
    if message.startswith(("path_or_id: ", "path_or_id must")):
        return "--model" + message.removeprefix("path_or_id")
    if message.startswith("input_ids ("):
        return message.replace("input_ids (", "--prompt (", 1).replace("max_new_tokens (", "--max-new-tokens (", 1)
    name, _, rest = message.partition(" must ")
    is_option = rest and name in (*FIELDS, "batch", "length", "max_length", "slots")
    return f"--{name.replace('_', '-')} must {rest}" if is_option else message


def writable(option: str, path: str) -> None:
    """Raise ValueError if no file can be written to `path`, the value of an option."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise ValueError(f"{option}: {path} is a folder; expected a file name")
    if not os.path.isdir(folder):
        raise ValueError(f"{option}: folder {folder} does not exist")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"{option}: no permission to write {path}")


def count(n: int, noun: str) -> str:
    """Format a count with its noun: `1 token`, `2 tokens`."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def positive(text: str) -> int:
    """Parse an argument that must be an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def seed_value(text: str) -> int:
    """Parse an argument that must be a signed 64-bit integer."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a signed 64-bit integer; got {value}")
    return value


def require(*packages: str, wanted_for: str) -> None:
    """Raise ImportError with a pip command if any of the packages is not installed."""
    from importlib.util import find_spec

    if absent := [name for name in packages if find_spec(name) is None]:
        names = " ".join(name.replace("_", "-") for name in absent)
        raise ImportError(f"{wanted_for} needs {names}: pip install {names}")
