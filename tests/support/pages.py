# SPDX-License-Identifier: Apache-2.0
"""Pages of the documentation: their code, their commands, their links; and small models in place of published ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import torch
import transformers

import checkpoints
import dlmkernels as dk
import research
import small_models

ROOT = Path(__file__).parents[2]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
#: All pages a reader may come to.
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "csrc/README.md", "tests/cpp/README.md", *DOCS]


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def fences(name: str) -> list[tuple[str, str]]:
    """Language and text of each block of a page, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(name), re.S | re.M)


def blocks(name: str, language: str = "python") -> list[str]:
    """The blocks of one language, in order."""
    return [text for found, text in fences(name) if found == language]


def commands(name: str) -> list[list[str]]:
    """The `dlmkernels` commands of a page's console blocks, without comments, as arguments."""
    lines = "\n".join(blocks(name, "console")).replace("\\\n", "").splitlines()
    given = [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]
    return [arguments[1:] for arguments in given if arguments and arguments[0] == "dlmkernels"]


def run(name: str, names: dict, changes: dict[str, str] | None = None, before: dict[str, dict] | None = None) -> dict:
    """Execute the Python blocks of a page, one after another in one namespace, which is returned.

    `changes` says what is replaced in the code; all of it must be there. `before` gives names that exist before the
    first block that holds a text.
    """
    code = blocks(name)
    assert code, f"{name} has no Python blocks"
    for old in changes or {}:
        assert any(old in block for block in code), f"{name}: no block holds {old!r}"
    for mark in before or {}:
        assert any(mark in block for block in code), f"{name}: no block holds {mark!r}"
    for block in code:
        for mark, more in (before or {}).items():
            if mark in block:
                names |= more
        for old, new in (changes or {}).items():
            block = block.replace(old, new)
        exec(compile(block, name, "exec"), names)
    return names


def anchors(name: str) -> set[str]:
    """What a link to this page may name after `#`."""
    found = re.sub(r"^```.*?^```", "", text_of(name), flags=re.S | re.M)
    heads = re.findall(r"^#+ (.*)$", found, re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


def links(name: str) -> list[tuple[str, str]]:
    """File and anchor of each relative link of a page; the file is relative to the project."""
    text = re.sub(r"^```.*?^```", "", text_of(name), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    out = []
    for target in targets:
        if not re.match(r"https?:", target):
            file, _, anchor = target.partition("#")
            path = (ROOT / name).parent / file if file else ROOT / name
            out.append((path.resolve().relative_to(ROOT).as_posix(), anchor))
    return out


def letters() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the small models' 97 ids, a character each, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    characters = {chr(32 + i) if i < 95 else f"[{i}]": i for i in range(small_models.VOCAB)}
    made = Tokenizer(models.WordLevel(characters, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


class StandIns:
    """`dlmkernels.load` and `generate` for pages about published models: small ones of the same form, short answers.

    Everything else that a page gives is passed on, and is checked by the real functions.
    """

    FORMS = {
        "path/to/model": checkpoints.diffullama,
        "GSAI-ML/LLaDA-8B-Instruct": checkpoints.llada,
        "nvidia/Nemotron-Labs-Diffusion-8B": checkpoints.nemotron,
        "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": checkpoints.a2d_qwen3,
    }
    RESEARCH = {
        "kuleshov-group/mdlm-owt": "mdlm", "louaaron/sedd-small": "sedd", "last.ckpt": "bd3-lm",
        "Continuous-Rivals-Discrete/langflow-lm1b": "langflow",
    }  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder, self.loaded, self.vocab = folder, [], small_models.VOCAB

    def load(self, name: str, **options):
        self.loaded.append(name)
        folder = self.folder / str(len(self.loaded))
        folder.mkdir()
        options.pop("dtype", None)  # random models are sharp, and see much rounding in bfloat16
        if name in self.FORMS:
            checkpoints.write(folder, self.FORMS[name])
        elif name in self.RESEARCH:
            research.write(self.RESEARCH[name], folder)
            options = {key: value for key, value in options.items() if key not in ("family", "block_size")}
        elif name == "plaid1b_weights":
            research.write_plaid(folder)
        elif name == "path/to/ssdlm":
            research.write_ssd_lm(folder)
        elif name.startswith("ema_"):
            research.write_diffusion_lm(folder / name)
            folder, options["num_attention_heads"] = folder / name, 4
        else:
            return dk.load(name, **options)
        model = dk.load(folder, **options)
        self.vocab = model.config.vocab_size
        return model

    @staticmethod
    def _short(options: dict) -> dict:
        """At most 8 tokens, and few steps."""
        limits = {"max_new_tokens": 8, "steps": 12}
        return options | {name: min(options[name], most) for name, most in limits.items() if name in options}

    def generate(self, model, *args, **options):
        return dk.generate(model, *args, **self._short({"max_new_tokens": 8} | options))

    def infill(self, model, *args, **options):
        return dk.infill(model, *args, **self._short(options))


class InPlaceOfTheLibrary:
    """What `dlmkernels` has, with the functions of stand-ins."""

    def __init__(self, stand_ins: StandIns) -> None:
        self.load, self.generate, self.infill = stand_ins.load, stand_ins.generate, stand_ins.infill

    def __getattr__(self, name: str):
        return getattr(dk, name)


def configuration(folder: Path, fields: dict) -> Path:
    """A folder with a `config.json` and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def ids(batch: int = 2, length: int = 5, vocab: int = 40) -> torch.Tensor:
    """Random prompts that any of the small models can read."""
    return torch.randint(4, vocab - 4, (batch, length), generator=torch.Generator().manual_seed(1))
