# SPDX-License-Identifier: Apache-2.0
"""The code that README and docs show must run as it stands."""

import re
from pathlib import Path

import pytest
import torch

import dlmkernels as dk
from dlmkernels.demo import MODEL_DIR
from dlmkernels.demo.tasks import TASKS
from small_models import MASK, build, prompts

ROOT = Path(__file__).parent.parent


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)


def test_readme_example(capsys):
    (code,) = blocks("README.md")
    problems = TASKS["addition"].make(2, seed=3)
    code = code.replace("path/to/model", str(MODEL_DIR)).replace(
        '"…", "…"', ", ".join(repr(p.prompt) for p in problems)
    )
    code = code.replace("max_new_tokens=256, block_length=32", "max_new_tokens=17, block_length=17")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for problem in problems:
        a, b = problem.prompt[1:-1].split("+")
        assert f"{int(a) + int(b):017d}" in printed


def test_rule_of_your_own():
    code, _ = blocks("docs/decoding.md")
    names = {"model": build(), "ids": prompts(2, 5)}
    exec(compile(code, "docs/decoding.md", "exec"), names)
    assert names["out"].complete.all() and names["out"].commit_step[0, 5:].bincount().tolist()[:2] == [64, 32]


def test_constraint_of_your_own():
    _, code = blocks("docs/decoding.md")
    model, ids = build(), prompts(2, 5)
    free = dk.generate(model, ids, rule=dk.Threshold(0.9))
    opening, closing = free.generated[0].bincount().topk(2).indices.tolist()  # brackets that the model likes to write
    names = {"dk": dk, "torch": torch, "model": model, "ids": ids, "OPEN": opening, "CLOSE": closing, "MASK": MASK}
    exec(compile(code, "docs/decoding.md", "exec"), names)
    assert names["out"].complete.all() and (names["out"].generated == opening).any()
    for text in names["out"].generated.tolist():
        depth = 0
        for token in text:
            depth += (token == opening) - (token == closing)
            assert depth >= 0
        assert depth == 0
    assert any(text.count(opening) != text.count(closing) for text in free.generated.tolist())


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "docs/decoding.md", "docs/families.md", "docs/rules.md", "csrc/README.md"],
)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'<img src="([^":]+)"', text):
        assert (folder / target).exists(), f"{name} links to {target}"


def test_quoted_files_exist():
    """Paths in backticks that look like files of this project are there."""
    for name in ("README.md", "CONTRIBUTING.md", "docs/decoding.md", "docs/families.md"):
        text = (ROOT / name).read_text()
        for path in re.findall(r"`((?:tests|csrc|python|docs|benchmarks|examples)/[\w./]+\.\w+)`", text):
            assert (ROOT / path).exists(), f"{name} speaks of {path}"


def test_every_preset_is_explained():
    text = (ROOT / "docs/decoding.md").read_text()
    assert [name for name in dk.PRESETS if f"`{name}`" not in text] == []


def test_table_of_rules_names_presets():
    rows = re.findall(r"^[|-] `([^`]+)`", (ROOT / "docs/rules.md").read_text(), re.M)
    assert len(rows) > 50 and len(set(rows)) == len(rows) and set(rows) <= dk.PRESETS.keys()
