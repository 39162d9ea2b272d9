# SPDX-License-Identifier: Apache-2.0
"""The code that README and docs show must run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import dlmkernels as dk
from dlmkernels.demo import MODEL_DIR
from dlmkernels.demo.tasks import TASKS
from small_models import MASK, build, prompts

ROOT = Path(__file__).parent.parent


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)


def block_with(name, text):
    """The one example that holds a text."""
    return compile(block_text(name, text), name, "exec")


def block_text(name, text):
    (code,) = [code for code in blocks(name) if text in code]
    return code


def test_readme_example(capsys):
    code = block_text("README.md", "AutoTokenizer")
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
    names = {"model": build(), "ids": prompts(2, 5)}
    exec(block_with("docs/decoding.md", "HalfOfTheRest"), names)
    assert names["out"].complete.all() and names["out"].commit_step[0, 5:].bincount().tolist()[:2] == [64, 32]


def test_program_of_your_own():
    names = {"model": build(), "ids": prompts(2, 5)}
    exec(block_with("docs/programs.md", "class LeftToRight"), names)
    want = dk.generate(
        names["model"], names["ids"], rule=dk.Quota(), score="position", max_new_tokens=16, eos_policy="fill"
    )
    out = names["out"]
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.num_forwards, want.num_forwards)
    assert out.complete.all()


def test_text_in_text_out(capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    names = {"dk": dk, "model": dk.load(MODEL_DIR, dtype=torch.float32), "tokenizer": tokenizer}
    exec(block_with("docs/decoding.md", "filled = dk.infill"), names)
    answer = "A1234567890123456+8765432109876544=10000000000000000"
    assert names["filled"].text() == names["out"].text(full=True) == [answer]
    assert "DecodingOutput(batch=1, tokens=17, forwards=1," in capsys.readouterr().out


def test_schedules():
    names = {"dk": dk, "model": build(), "ids": prompts(2, 5)}
    exec(block_with("docs/decoding.md", "few_first"), names)
    numbers = [tuple(out.commit_step[0, 5:].bincount(minlength=8).tolist()) for out in names["outs"]]
    assert all(sum(n) == 128 for n in numbers) and len(set(numbers)) == 4
    assert numbers[0][0] < numbers[3][0] == 16 < numbers[2][0] == 32


def test_negative_prompt():
    names = {"dk": dk, "model": build(), "ids": prompts(2, 5)}
    exec(block_with("docs/decoding.md", "negative_prompt=[7"), names)
    assert names["guided"].complete.all()


def test_backbone():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.times = torch.nn.Parameter(torch.randn(97)), []

        def forward(self, tokens, sigma):
            self.times.append(sigma[0].item())
            return self.bias.expand(*tokens.shape, 97)

    net = Net().eval()
    exec(block_with("docs/decoding.md", "dk.Backbone(net"), names := {"dk": dk, "net": net, "ids": prompts(2, 5)})
    assert names["timed"].complete.all() and len(net.times) == 16 and net.times == sorted(net.times, reverse=True)


def test_constraint_of_your_own():
    code = block_with("docs/decoding.md", "Balanced")
    model, ids = build(), prompts(2, 5)
    free = dk.generate(model, ids, rule=dk.Threshold(0.9))
    opening, closing = free.generated[0].bincount().topk(2).indices.tolist()  # brackets that the model likes to write
    names = {"dk": dk, "torch": torch, "model": model, "ids": ids, "OPEN": opening, "CLOSE": closing, "MASK": MASK}
    exec(code, names)
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


def test_the_engine(capsys):
    names = {"model": build()}
    exec(block_with("docs/engine.md", "dk.Engine(model, slots=4"), names)
    for name, prompt, options in (
        ("first", [5, 6, 7], {"max_new_tokens": 24}), ("second", [8, 9], {"max_new_tokens": 10, "temperature": 0.7, "seed": 1}),
    ):  # fmt: skip
        want = dk.generate(names["model"], [prompt], rule=dk.Threshold(0.9), block_length=8, **options)
        output = names["outputs"][names[name]]
        assert output.generated_tokens == want.generated[0, : int(want.length[0]) - want.prompt_length].tolist()
    assert capsys.readouterr().out.startswith("[")


def test_watching_a_decoding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    names = {"dk": dk, "model": dk.load(MODEL_DIR, dtype=torch.float32), "tokenizer": tokenizer}
    code = (
        block_text("README.md", "watch.html")
        .replace('"…"', '"A1234567890123456+8765432109876544="')
        .replace("trace=", "max_new_tokens=17, trace=")
    )
    exec(compile(code, "README.md", "exec"), names)
    assert "<title>A decoding</title>" in (tmp_path / "watch.html").read_text("utf-8")


def test_the_pictures_example_runs(tmp_path):
    run = [sys.executable, ROOT / "examples" / "watch.py", tmp_path / "watch.html"]
    assert "in a browser" in subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert "One Sudoku" in (tmp_path / "watch.html").read_text("utf-8")
