# SPDX-License-Identifier: Apache-2.0
"""The code that README and docs show must run as it stands."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import dlmkernels as dk
from dlmkernels.demo import MODEL_DIR, tasks
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


def test_quick_start(tmp_path, monkeypatch, capsys):
    """Every block as it stands, one after another, with the results that its comments promise."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks("docs/quickstart.md"):
        exec(compile(code, "docs/quickstart.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*?\)  +# (.*)$", (ROOT / "docs/quickstart.md").read_text(), re.M)
    assert printed[:2] == promised and promised[0] == "['10000000000000000']"
    assert printed[2] == "['A1234567890123456+8765432109876544=10000000000000000']"
    solved = [line.rsplit(" ", 1)[1] for line in printed[3:6]]
    assert solved == ["True", "False", "True"] and printed[6] == promised[0] and (tmp_path / "watch.html").is_file()


def test_ops_in_another_framework(capsys):
    names = {}
    for code in blocks("docs/ops.md"):
        exec(compile(code, "docs/ops.md", "exec"), names)
    assert names["out"].shape == (2, 8, 4, 16) and names["info"].shape[0] == 2
    assert torch.equal((names["tokens"] != names["mask"]).sum(1), names["commit"].sum(1))


def test_a_vocabulary_in_shards(tmp_path):
    """With one rank; tests/ops/test_shard_confidence.py has two."""
    code = block_with("docs/decoding.md", "all_gather")
    position, step, seed = torch.arange(4, dtype=torch.int32), 3, 9
    names = {"torch": torch, "ops": dk.ops, "rank": 0, "ranks": 1, "share": 600, "seed": seed, "step": step,
             "position": position, "hidden": torch.randn(4, 16), "weight": torch.randn(600, 16)}  # fmt: skip
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        exec(code, names)
    finally:
        torch.distributed.destroy_process_group()
    expected = dk.ops.lm_head_confidence(
        names["hidden"], names["weight"], temperature=0.7, seed=seed, step=step, position=position
    )
    assert torch.equal(names["stats"].token, expected.token)


def test_a_drafter():
    ids = torch.from_numpy(tasks.encode("A1234567890123456+8765432109876544=")).expand(2, -1)
    names = {"dk": dk, "ids": ids}
    exec(compile(block_text("docs/decoding.md", "load_drafter("), "docs/decoding.md", "exec"), names)
    assert tasks.decode(names["out"].generated[1].tolist()) == "10000000000000000"
    assert names["out"].num_forwards.max() < 6


def test_values_for_each_request():
    model = build()
    model.config.max_position_embeddings = 512
    code = block_text("docs/decoding.md", "max_new_tokens=[64, 256]").replace("rule=", "eos_policy='none', rule=")
    names = {"dk": dk, "model": model, "ids": prompts(2, 5)}
    exec(compile(code, "docs/decoding.md", "exec"), names)
    assert names["out"].length.tolist() == [69, 261]


@pytest.mark.parametrize("code", blocks("docs/families.md"), ids=lambda code: code.splitlines()[0][:40])
def test_examples_of_large_models(code):
    """They need weights that are not here: what they call exists, and takes the options they give it."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert calls
    for call in calls:
        name = ast.unparse(call.func).removesuffix(".total")
        if not name.startswith("dk."):
            continue
        parameters = inspect.signature(getattr(dk, name.removeprefix("dk."))).parameters
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in ("dk.generate", "dk.infill"):
            assert given.keys() <= parameters.keys() | dk.DecodingConfig.__dataclass_fields__.keys()
            if isinstance(config := given.get("config"), ast.Constant):
                assert config.value in dk.PRESETS
        elif not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            inspect.signature(getattr(dk, name.removeprefix("dk."))).bind(*call.args, **given)
            if name != "dk.log_likelihood":
                names = {"dk": dk, "model_loaded_by_its_own_code": build()}
                eval(compile(ast.Expression(call), "docs/families.md", "eval"), names)


def test_evaluation_in_python(capsys):
    pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
    code = block_text("docs/evaluation.md", "EngineLM").replace(
        "str(TASKS_DIR)", "str(TASKS_DIR), include_defaults=False"
    )
    exec(compile(code.replace("limit=4", "limit=2"), "docs/evaluation.md", "exec"), {})
    assert "'solved,none': 1.0" in capsys.readouterr().out


def test_every_block_of_the_docs_is_run_by_a_test():
    """A block that no test names would go stale."""
    tested = Path(__file__).read_text("utf-8")
    whole = ("docs/quickstart.md", "docs/ops.md", "docs/families.md")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        name = path.relative_to(ROOT).as_posix()
        marks = re.findall(rf'block_(?:with|text)\("{name}", "(.*?)"\)', tested)
        untested = [code for code in blocks(name) if not any(mark in code for mark in marks)]
        assert name in whole or not untested, f"{name}: no test runs\n" + "\n".join(untested)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="needs the extra 'docs'")
    run = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("index.html")}
    assert {"quickstart", "troubleshooting", "api/ops", "decoding"} <= pages
    text = (tmp_path / "api/ops/index.html").read_text("utf-8")
    ops = re.findall(r"`(\w+)`\]\(api/ops.md\)", (ROOT / "docs/ops.md").read_text())
    assert len(ops) >= 9 and all(f"ops.{name.rstrip('_')}.{name}" in text for name in ops)
