# SPDX-License-Identifier: Apache-2.0
"""Every command of the documentation is understood, and makes a configuration that can be decoded with."""

import re
import shlex
from pathlib import Path

import pytest

import dlmkernels as dk

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from dlmkernels.evaluation import TASKS_DIR  # noqa: E402
from dlmkernels.evaluation.__main__ import parse  # noqa: E402
from dlmkernels.evaluation.arguments import read_settings  # noqa: E402
from dlmkernels.evaluation.generation import read_generation  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
FILES = {
    "gsm8k": "gsm8k/gsm8k.yaml", "gsm8k_cot": "gsm8k/gsm8k-cot.yaml", "minerva_math": "minerva_math/minerva_math_algebra.yaml"
}  # fmt: skip
LIKELIHOODS = {"arc_challenge", "hellaswag", "piqa", "mmlu", "gpqa_main_n_shot"}


def commands(page):
    text = "\n".join(re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text("utf-8"), re.S)).replace("\\\n", " ")
    return [line for line in text.splitlines() if "dlmkernels.evaluation" in line]


COMMANDS = [*commands("reproduce.md"), *commands("evaluation.md")]


def kwargs_of(task):
    """The generation_kwargs of a task, from its own file; None where it only asks for likelihoods."""
    if task in LIKELIHOODS:
        return None
    if task == "bbh":
        folder = Path(lm_eval.__file__).parent / "tasks/bbh"
        path = next(p for p in sorted(folder.rglob("*template*")) if "cot_fewshot" in str(p))
    else:
        path = Path(lm_eval.__file__).parent / "tasks" / FILES[task] if task in FILES else TASKS_DIR / f"{task}.yaml"
    return load_yaml(path, resolve_func=False).get("generation_kwargs", {})


def test_there_are_commands_for_every_family():
    text = " ".join(COMMANDS)
    wanted = ["LLaDA-8B-Base", "LLaDA-8B-Instruct", "LLaDA-1.5", "Dream-v0-Base-7B", "Dream-v0-Instruct-7B", "LLaDA2.0-mini",
              "SDAR-1.7B-Chat", "SDAR-30B-A3B-Chat", "LLaDA2.0-flash", "LLaDA2.1-mini", "LLaDA2.1-flash", "fast-dllm"]  # fmt: skip
    assert len(COMMANDS) > 25 and not [name for name in wanted if name not in text]


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_is_understood(command):
    words = shlex.split(command)
    _, args = parse(words[words.index("dlmkernels.evaluation") + 1 :])
    assert args.model == "dlmkernels" and args.include_path == [str(TASKS_DIR)]
    settings = read_settings(batch_size=getattr(args, "batch_size", None), device=args.device, **args.model_args)
    config = settings.config()
    plain = dk.DecodingConfig()
    stated = frozenset(n for n in plain.__dataclass_fields__ if getattr(config, n) != getattr(plain, n))
    for task in args.tasks:
        kwargs = kwargs_of(task)
        if kwargs is None:
            continue
        how = read_generation(kwargs, config, stated, settings.prefer)
        final = config.replace(**how.options)
        if "max_new_tokens" in settings.options:
            assert how.max_new_tokens == settings.options["max_new_tokens"]
        if "temperature" in settings.options:
            assert final.temperature == settings.options["temperature"]
        assert settings.pretrained == "demo" or how.max_new_tokens < (settings.max_length or 2048)
        if "confirm_run_unsafe_code" not in args:
            assert not task.startswith("human_eval")
