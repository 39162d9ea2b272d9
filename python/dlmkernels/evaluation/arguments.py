# SPDX-License-Identifier: Apache-2.0
"""What can be said in `--model_args`: read and checked before a model is loaded."""

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

#: Fields that no text can say; those who need them pass a model to `EngineLM` and tensors to `generate`.
NOT_TEXT = ("constraint", "logit_bias")
#: Fields of `DecodingConfig` that may be given as text, in `--model_args` and in `--gen_kwargs`.
FIELDS = tuple(n for n in DecodingConfig.__dataclass_fields__ if n not in (*NOT_TEXT, "seed", "max_new_tokens"))
LISTS = ("suppress_token_ids", "defer_token_ids", "eos_token_id", "vicinity")
LEFT_TO_RIGHT = "left-to-right"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """An evaluation's settings. Each is an argument of the same name.

    Attributes
    ----------
    pretrained : str
        Local folder or hub id; "demo" is the model that comes with the package.
    preset : str, optional
        A published decoder; None: what suits the model's family.
    options : dict
        Fields of `DecodingConfig` that change it; `rule` as on the command line (`threshold:0.9`).
    slots : int
        Requests that are decoded at once.
    max_length : int, optional
        Tokens of a prompt and its answer together; None: what the model can encode, at most 2048.
    deterministic : bool
        Whether answers are to be the same bit for bit under any load (see `Engine`); slower.
    seed : int
        What all random draws depend on, with the request's own text.
    dtype, device : str
        Of the weights; where they are computed.
    prefer : {"task", "model"}, optional
        Which holds where a task's `generation_kwargs` and these arguments contradict each other; None: an error.
    too_long : {"truncate", "error"}
        What happens to a prompt that leaves no room for the answer: its beginning is cut off, with a warning, or the
        evaluation stops.
    add_bos_token : bool, optional
        Whether prompts begin with the tokenizer's first token; None: as the tokenizer does it, but never twice.
    likelihood : str, optional
        Method of `log_likelihood`, or "left-to-right": the sum of exact conditionals of one token after another, a
        forward each. None: the latter for causal models and for blocks with shifted logits, which have no bound; else
        that of the model's family.
    mc_num : int, optional
        Samples of the bound on a likelihood; None: 128, or what `log_likelihood` says.
    likelihood_batch : int
        Sequences in a forward of the bound.
    check_greedy : bool
        Whether it is found out for longer answers, too, if greedy decoding gives them: a forward a token. Without it
        they count as not greedy.
    rolling_block : int
        Tokens that a perplexity task scores at once, in view of all before them.
    records : str, optional
        A file that gets a line of JSON for each request: seed, tokens, forwards, standard error …
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
        """The configuration without what a model's family adds to it; what is impossible in it is an error."""
        base = DecodingConfig() if self.preset is None else preset(self.preset)
        return base.replace(**self.options)


def read_settings(pretrained: Any = None, *, batch_size: Any = None, device: Any = None, **given: Any) -> Settings:
    """Settings from `--model_args`, `--batch_size` and `--device`.

    Raises
    ------
    ValueError, TypeError
        When a name is unknown, or a value impossible; the message names it.
    """
    if not isinstance(pretrained, str) or not pretrained:
        raise ValueError(
            "pretrained must say which model: --model_args pretrained=FOLDER or pretrained=demo; "
            f"got {pretrained!r}"
        )  # fmt: skip
    own = {f.name for f in fields(Settings)} - {"options", "pretrained", "device"}
    settings = {name: value for name, value in given.items() if name in own}
    options = {name: value for name, value in given.items() if name in (*FIELDS, "max_new_tokens")}
    if unknown := sorted(given.keys() - settings.keys() - options.keys()):
        raise ValueError(_unknown(unknown, own))
    if batch_size not in (None, 1, "1"):  # lm-eval says 1 where nobody says anything
        if "slots" in settings:
            raise ValueError(f"slots={settings['slots']!r} and --batch_size {batch_size} say the same: leave out one")
        settings["slots"] = _batch_size(batch_size)
    if device is not None:
        settings["device"] = str(device)
    return Settings(pretrained=pretrained, options=read_fields(options), **settings)


def read_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `DecodingConfig` from what the command line makes of them."""
    read = dict(options)
    if isinstance(read.get("rule"), str):
        read["rule"] = parse_rule(read["rule"])
    elif "rule" in read and not isinstance(read["rule"], Rule):
        raise TypeError(f"rule must be a text such as threshold:0.9, or a Rule; got {read['rule']!r}")
    for name in LISTS:
        if isinstance(read.get(name), str):
            read[name] = _integers(name, read[name])
        elif name in ("suppress_token_ids", "defer_token_ids") and isinstance(read.get(name), int):
            read[name] = (read[name],)
    return read


def _integers(name: str, text: str) -> tuple[int, ...]:
    """Several numbers: `1+2`, or `[1, 2]`."""
    if not re.fullmatch(r"\[?\s*-?\d+(\s*[+,;]\s*-?\d+)*\s*\]?", text):
        raise ValueError(f"{name} must be integers with '+' between them, as in 126081+126348; got {text!r}")
    return tuple(int(number) for number in re.findall(r"-?\d+", text))


def _batch_size(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"--batch_size must be a number, which is that of the slots; got {value!r}. An engine needs no automatic "
            "one: answers do not depend on it"
        ) from None


def _unknown(names: list[str], own: set[str]) -> str:
    hints = {
        "trust_remote_code": "code of a repository is never run: models load onto stock classes",
        "constraint": "a constraint cannot be said as text", "logit_bias": "a bias cannot be said as text",
        "gen_length": "the length of an answer is max_new_tokens", "max_batch_size": "there is no automatic batch size",
    }  # fmt: skip
    hint = "".join(f"; {text}" for name, text in hints.items() if name in names)
    known = ", ".join(sorted({*own, *FIELDS, "max_new_tokens", "pretrained"}))
    return f"--model_args: unknown {', '.join(names)}{hint}; known: {known}"


def _one_of(name: str, value: Any, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")
