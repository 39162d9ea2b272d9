# SPDX-License-Identifier: Apache-2.0
"""Options that several commands take, and what is loaded by them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..decoding.config import CACHES, SCORES, DecodingConfig
from ..decoding.features import FEATURE_CACHES
from ..decoding.presets import PRESETS
from ..decoding.rules.named import parse_rule
from ..decoding.scores import score_named

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that say which model, and where it is computed."""
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder or hub id; 'demo' is the model in the package")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: as stored)")
    add("--device", default="cpu", help="where the model runs: cpu or cuda (default cpu)")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Options that are fields of `DecodingConfig`, and the preset that they change."""
    add = parser.add_argument
    add("--preset", metavar="NAME", help=f"published decoder: {', '.join(PRESETS)}")
    add("--rule", metavar="RULE", help="what a forward commits: threshold:0.9, quota, factor:1.0, …")
    add("--max-new-tokens", type=int, metavar="N", help="length of the answer (default 128)")
    add("--block-length", type=int, metavar="N", help="decode in blocks of N, left to right (default: one block)")
    add("--steps", type=int, metavar="N",
        help="number of forwards, for rules with a fixed schedule such as quota")  # fmt: skip
    add("--score", choices=SCORES, help="what decides which positions come first")
    add("--cache", choices=(*CACHES, *FEATURE_CACHES), help="which keys and values are reused (default: the model's)")
    add("--temperature", type=float, metavar="T", help="0 takes the likeliest token (default 0, or the preset's)")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of total probability P")
    add("--cfg-scale", type=float, metavar="S", help="strength of classifier-free guidance (default 0: none)")
    add("--seed", type=seed_value, help="seed of the random draws (default: a new one, shown with the statistics)")
    add("--mask-token-id", type=int, metavar="ID", help="of the mask token, if the configuration does not name it")


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `DecodingConfig` that options were given for."""
    names = (
        "max_new_tokens", "block_length", "steps", "score", "cache", "temperature", "top_k", "top_p", "cfg_scale",
        "seed", "mask_token_id",
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.rule:
        options["rule"] = parse_rule(args.rule)
    return options


def is_random(config: DecodingConfig) -> bool:
    """Whether the result depends on the seed."""
    drawn_order = max(config.order_temperature, score_named(config.score).order_temperature)
    return config.samples or drawn_order > 0 or config.rule.draws


def load(path: str, dtype: str, device):
    """Model on its device, and tokenizer."""
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
    """The device that --device names, if kernels of this build run there."""
    import torch

    from .. import _C

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda; got '{name}'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda; got '{name}'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if device.type == "cuda" and not _C.build_info()["cuda_architectures"]:
        raise ValueError(f"--device cuda: this build has no CUDA kernels ({_C.build_info()['cuda_state']})")
    return device


def count(n: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def positive(text: str) -> int:
    """An argument that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def seed_value(text: str) -> int:
    """An argument of 64 bits."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer of 64 bits; got {value}")
    return value


def require(*packages: str, wanted_for: str) -> None:
    """Refuse what needs packages that are not installed, naming them."""
    from importlib.util import find_spec

    if absent := [name for name in packages if find_spec(name) is None]:
        names = " ".join(name.replace("_", "-") for name in absent)
        raise ImportError(f"{wanted_for} needs {names}: pip install {names}")
