# SPDX-License-Identifier: Apache-2.0
"""Settings in `--model_args`, which are read and checked before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..cli.options import DTYPES, parse_rule
from ..decoding.checks import flag, integer
from ..decoding.config import DecodingConfig
from ..decoding.likelihood import METHODS
from ..decoding.presets import preset
from ..decoding.rules import Rule

#: Fields of `DecodingConfig` that cannot be given as text.
NOT_TEXT = ("constraint", "logit_bias")
#: Fields of `DecodingConfig` that may be given as text, in `--model_args` and in `--gen_kwargs`.
FIELDS = tuple(n for n in DecodingConfig.__dataclass_fields__ if n not in (*NOT_TEXT, "seed", "max_new_tokens"))
LISTS = ("suppress_token_ids", "defer_token_ids", "eos_token_id", "vicinity")
LEFT_TO_RIGHT = "left-to-right"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of an evaluation. Except for `options`, each is an entry of `--model_args` with the same name.

    Attributes
    ----------
    pretrained : str
        Local folder or Hub id; "demo" is the small model in the package.
    preset : str, optional
        Name of a published decoder. If None, the default decoder of the model's family.
    options : dict
        Fields of `DecodingConfig` that override it; `rule` has the form used on the command line (`threshold:0.9`).
    slots : int
        Number of requests decoded at once.
    max_length : int, optional
        Maximum combined length of prompt and answer in tokens. If None, 2048, or the model's limit if lower.
    deterministic : bool
        Whether answers are bit-for-bit independent of the load (see `Engine`), which is slower.
    seed : int
        Seed of the evaluation. Each request derives its own seed from it and from its content.
    dtype, device : str
        Dtype of the weights, and device of the model.
    prefer : {"task", "model"}, optional
        Which values to use if a task's `generation_kwargs` contradict these arguments. If None, a contradiction is an
        error.
    too_long : {"truncate", "error"}
        What to do with a prompt that leaves no room for the answer: cut off its beginning, with a warning, or stop the
        evaluation.
    add_bos_token : bool, optional
        Whether prompts start with the tokenizer's BOS token. If None, the tokenizer decides. A text that already starts
        with the BOS token does not get another.
    likelihood : str, optional
        Method of `log_likelihood`, or "left-to-right": the exact sum of the tokens' conditional log probabilities, with
        one forward per token. If None, causal models and block models with shifted logits, for which no bound is known,
        use "left-to-right"; other models use the method of their family.
    mc_num : int, optional
        Number of Monte Carlo samples for the bound on a likelihood. If None, the default of `log_likelihood`.
    likelihood_batch : int
        Number of sequences per forward pass when estimating the bound.
    check_greedy : bool
        Whether to find out by greedy decoding, at one forward per token, if it gives the answers whose likelihood is
        estimated. If False, these count as not greedy.
    rolling_block : int
        Number of tokens that a perplexity task scores at once, given all tokens before them.
    records : str, optional
        Path of a JSON Lines file with one record per request: seed, tokens, forwards, standard error and so on.
    """

    pretrained: str
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    slots: int = 16
    max_length: int | None = None
    deterministic: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    prefer: str | None = None
    too_long: str = "truncate"
    add_bos_token: bool | None = None
    likelihood: str | None = None
    mc_num: int | None = None
    likelihood_batch: int = 32
    check_greedy: bool = True
    rolling_block: int = 64
    records: str | None = None

    def __post_init__(self):
        integer(1)("slots", self.slots)
        integer(2, optional=True)("max_length", self.max_length)
        integer(1, optional=True)("mc_num", self.mc_num)
        integer(1)("likelihood_batch", self.likelihood_batch)
        integer(1)("rolling_block", self.rolling_block)
        for name in ("deterministic", "check_greedy"):
            flag(name, getattr(self, name))
        if self.add_bos_token is not None:
            flag("add_bos_token", self.add_bos_token)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer; got {self.seed!r}")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("prefer", self.prefer, (None, "task", "model"))
        _one_of("too_long", self.too_long, ("truncate", "error"))
        _one_of("likelihood", self.likelihood, (None, *METHODS, LEFT_TO_RIGHT))
        self.config()

    def config(self) -> DecodingConfig:
        """Return the configuration without the family's defaults. Raises ValueError or TypeError if it is invalid."""
        base = DecodingConfig() if self.preset is None else preset(self.preset)
        return base.replace(**self.options)


def read_settings(pretrained: Any = None, *, batch_size: Any = None, device: Any = None, **given: Any) -> Settings:
    """Read the settings from `--model_args`, `--batch_size` and `--device`.

    Raises
    ------
    ValueError, TypeError
        If a name is unknown or a value is invalid. The message names it.
    """
    if not isinstance(pretrained, str) or not pretrained:
        raise ValueError(
            "pretrained must name the model, as in --model_args pretrained=FOLDER or pretrained=demo; "
            f"got {pretrained!r}"
        )  # fmt: skip
    own = {f.name for f in fields(Settings)} - {"options", "pretrained", "device"}
    settings = {name: value for name, value in given.items() if name in own}
    options = {name: value for name, value in given.items() if name in (*FIELDS, "max_new_tokens")}
    if unknown := sorted(given.keys() - settings.keys() - options.keys()):
        raise ValueError(_unknown(unknown, own))
    if batch_size not in (None, 1, "1"):  # 1 is lm-eval's default
        if "slots" in settings:
            raise ValueError(f"slots={settings['slots']!r} and --batch_size {batch_size} set the same value: omit one")
        settings["slots"] = _batch_size(batch_size)
    if device is not None:
        settings["device"] = str(device)
    return Settings(pretrained=pretrained, options=read_fields(options), **settings)


def read_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert fields of `DecodingConfig` from the form in which lm-eval's command line passes them."""
    read = dict(options)
    if isinstance(read.get("rule"), str):
        read["rule"] = parse_rule(read["rule"])
    elif "rule" in read and not isinstance(read["rule"], Rule):
        raise TypeError(f"rule must be a string such as threshold:0.9, or a Rule; got {read['rule']!r}")
    for name in LISTS:
        if isinstance(read.get(name), str):
            read[name] = _integers(name, read[name])
        elif name in ("suppress_token_ids", "defer_token_ids") and isinstance(read.get(name), int):
            read[name] = (read[name],)
    return read


def _integers(name: str, text: str) -> tuple[int, ...]:
    """Parse several integers: `1+2` or `[1, 2]`."""
    if not re.fullmatch(r"\[?\s*-?\d+(\s*[+,;]\s*-?\d+)*\s*\]?", text):
        raise ValueError(f"{name} must be integers joined by '+', as in 126081+126348; got {text!r}")
    return tuple(int(number) for number in re.findall(r"-?\d+", text))


def _batch_size(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"--batch_size must be a number, the number of slots; got {value!r}. There is no automatic batch size, "
            "because answers do not depend on it"
        ) from None


def _unknown(names: list[str], own: set[str]) -> str:
    hints = {
        "trust_remote_code": "code of a repository is never run; models are loaded into built-in classes",
        "constraint": "a constraint cannot be given as text", "logit_bias": "a bias cannot be given as text",
        "gen_length": "use max_new_tokens for the length of an answer",
        "max_batch_size": "there is no automatic batch size",
    }  # fmt: skip
    hint = "".join(f"; {text}" for name, text in hints.items() if name in names)
    known = ", ".join(sorted({*own, *FIELDS, "max_new_tokens", "pretrained"}))
    return f"--model_args: unknown {', '.join(names)}{hint}; known: {known}"


def _one_of(name: str, value: Any, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")
