# SPDX-License-Identifier: Apache-2.0
"""Every block of code and every command of README and docs is run, every link is followed, every claim of a table held."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import dlmkernels as dk
import json_model
import pages
from dlmkernels.cli import build_parser, main
from dlmkernels.demo import MODEL_DIR, tasks
from dlmkernels.demo.tasks import TASKS
from pages import PAGES, ROOT, InPlaceOfTheLibrary, StandIns, text_of
from small_models import MASK, build, prompts

SUM = "A1234567890123456+8765432109876544="
ANSWER = "10000000000000000"


@pytest.fixture
def demo():
    """The names that pages about the demo model begin with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    return {"dk": dk, "model": dk.load(MODEL_DIR, dtype=torch.float32), "tokenizer": tokenizer}


def test_readme(tmp_path, monkeypatch, capsys, demo):
    monkeypatch.chdir(tmp_path)
    problems = TASKS["addition"].make(2, seed=3)
    changes = {
        "path/to/model": str(MODEL_DIR), '"…", "…"': ", ".join(repr(p.prompt) for p in problems),
        "max_new_tokens=256, block_length=32": "max_new_tokens=17, block_length=17",
        'generate(model, "…", tokenizer=tokenizer': f'generate(model, "{SUM}", tokenizer=tokenizer, max_new_tokens=17',
        "max_length=512": "max_length=256", "max_new_tokens=200, temperature=0.7": "max_new_tokens=17, temperature=0.01",
    }  # fmt: skip
    ids = tasks.encode(SUM).tolist()
    pages.run("README.md", {"ids": ids}, changes, before={"Engine": {"model": demo["model"]}})
    printed = capsys.readouterr().out
    for problem in problems:
        a, b = problem.prompt[1:-1].split("+")
        assert f"{int(a) + int(b):017d}" in printed
    assert printed.splitlines()[-1].endswith(ANSWER)
    assert "<title>A decoding</title>" in (tmp_path / "watch.html").read_text("utf-8")


def test_quick_start(tmp_path, monkeypatch, capsys):
    """With the results that its comments promise."""
    monkeypatch.chdir(tmp_path)
    pages.run("docs/quickstart.md", {})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*?\)  +# (.*)$", text_of("docs/quickstart.md"), re.M)
    assert printed[:2] == promised and promised[0] == f"['{ANSWER}']"
    assert printed[2] == f"['{SUM}{ANSWER}']"
    solved = [line.rsplit(" ", 1)[1] for line in printed[3:6]]
    assert solved == ["True", "False", "True"] and printed[6] == promised[0] and (tmp_path / "watch.html").is_file()


def test_decoding(capsys, demo):
    model = build()
    model.config.max_position_embeddings = 512
    changes = {"max_new_tokens=[64, 256], temp": "eos_policy='none', max_new_tokens=[64, 256], temp"}
    names = pages.run("docs/decoding.md", demo, changes, before={"[64, 256]": {"model": model, "ids": prompts(2, 5)}})
    assert names["filled"].text(demo["tokenizer"]) == [SUM + ANSWER] and names["out"].length.tolist() == [69, 261]
    printed = capsys.readouterr().out
    assert "DecodingOutput(batch=1, tokens=17, forwards=1," in printed and f"['{ANSWER}'] ['{SUM}{ANSWER}']" in printed


def test_rules_and_presets():
    names = pages.run("docs/decoders.md", {"dk": dk, "model": build(), "ids": prompts(2, 5)})
    numbers = [tuple(out.commit_step[0, 5:].bincount(minlength=8).tolist()) for out in names["outs"]]
    assert all(sum(n) == 128 for n in numbers) and len(set(numbers)) == 4
    assert numbers[0][0] < numbers[3][0] == 16 < numbers[2][0] == 32


def test_constraints():
    model, ids = build(), prompts(2, 5)
    free = dk.generate(model, ids, rule=dk.Threshold(0.9))
    opening, closing = free.generated[0].bincount().topk(2).indices.tolist()  # brackets that the model likes to write
    names = {"dk": dk, "torch": torch, "model": model, "ids": ids, "OPEN": opening, "CLOSE": closing, "MASK": MASK}
    pytest.importorskip("interegular", reason="needs the extra 'grammar'")
    names = pages.run("docs/constraints.md", names | {"tokenizer": json_model.tokenizer()})
    assert all(person.keys() == {"name", "age"} and person["age"] >= 0 for person in names["people"])
    assert names["guided"].complete.all()
    assert names["out"].complete.all() and (names["out"].generated == opening).any()
    for text in names["out"].generated.tolist():
        depth = 0
        for token in text:
            depth += (token == opening) - (token == closing)
            assert depth >= 0
        assert depth == 0
    assert any(text.count(opening) != text.count(closing) for text in free.generated.tolist())


def test_a_new_rule():
    names = pages.run("docs/new_rule.md", {"torch": torch, "model": build(), "ids": prompts(2, 5)})
    names["test_half_of_the_rest"]()
    assert names["out"].complete.all() and names["out"].commit_step[0, 5:].bincount().tolist()[:2] == [64, 32]
    confident = dk.generate(names["model"], names["ids"], rule=dk.Quota(), max_new_tokens=16)
    orders = [out.commit_step[:, 5:].float() for out in (names["left"], confident)]
    place = torch.arange(16.0)
    left, free = (sum((order * place).sum(1)).item() for order in orders)
    assert left > free  # what stands further right is committed later


def test_a_program_of_your_own():
    names = pages.run("docs/programs.md", {"model": build(), "ids": prompts(2, 5)})
    want = dk.generate(
        names["model"], names["ids"], rule=dk.Quota(), score="position", max_new_tokens=16, eos_policy="fill"
    )
    out = names["out"]
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.num_forwards, want.num_forwards)
    assert out.complete.all()


def test_a_drafter():
    ids = torch.from_numpy(tasks.encode(SUM)).expand(2, -1)
    names = pages.run("docs/drafters.md", {"dk": dk, "ids": ids})
    assert tasks.decode(names["out"].generated[1].tolist()) == ANSWER
    assert names["out"].num_forwards.max() <= 5


def test_the_engine(capsys):
    names = pages.run("docs/engine.md", {"model": build()})
    for name, prompt, options in (
        ("first", [5, 6, 7], {"max_new_tokens": 24}), ("second", [8, 9], {"max_new_tokens": 10, "temperature": 0.7, "seed": 1}),
    ):  # fmt: skip
        want = dk.generate(names["model"], [prompt], rule=dk.Threshold(0.9), block_length=8, **options)
        output = names["outputs"][names[name]]
        assert output.generated_tokens == want.generated[0, : int(want.length[0]) - want.prompt_length].tolist()
    assert capsys.readouterr().out.startswith("[")


def test_the_ops(tmp_path):
    """Shards with one rank; tests/ops/test_shard_confidence.py has two."""
    position, step, seed = torch.arange(4, dtype=torch.int32), 3, 9
    shards = {"rank": 0, "ranks": 1, "share": 600, "seed": seed, "step": step, "position": position,
              "hidden": torch.randn(4, 16), "weight": torch.randn(600, 16)}  # fmt: skip
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        before = {"slots = torch": {}, "all_gather": shards}
        names = pages.run("docs/ops.md", {}, before=before)
    finally:
        torch.distributed.destroy_process_group()
    assert names["out"].shape == (2, 8, 4, 16) and names["info"].shape[0] == 2
    assert torch.equal((names["tokens"] != names["mask"]).sum(1), names["commit"].sum(1))
    expected = dk.ops.lm_head_confidence(
        shards["hidden"], shards["weight"], temperature=0.7, seed=seed, step=step, position=position
    )
    assert torch.equal(names["stats"].token, expected.token)


def test_memory(capsys):
    names = pages.run("docs/memory.md", {"dk": dk})
    assert str(names["plan"].total) in capsys.readouterr().out


class Net(torch.nn.Module):
    """Some model that is told the noise level."""

    def __init__(self):
        super().__init__()
        self.bias, self.times = torch.nn.Parameter(torch.randn(97)), []

    def forward(self, tokens, sigma):
        self.times.append(sigma[0].item())
        return self.bias.expand(*tokens.shape, 97)


def test_a_model_of_your_own(tmp_path, capsys):
    stand_ins, net = StandIns(tmp_path), Net().eval()
    names = {"dk": InPlaceOfTheLibrary(stand_ins), "loaded": build(), "ids": pages.ids(), "answer": pages.ids(2, 6),
             "tokenizer": pages.letters(), "net": net}  # fmt: skip
    pages.run("docs/your_model.md", names)
    assert names["out"].complete.all() and names["timed"].complete.all()
    assert len(net.times) == 8 and net.times == sorted(net.times, reverse=True)
    assert re.search(r"^masked llama$", capsys.readouterr().out, re.M)


def test_the_first_model_to_try(tmp_path, capsys):
    stand_ins, tokenizer = StandIns(tmp_path), pages.letters()
    hub = type("AutoTokenizer", (), {"from_pretrained": staticmethod(lambda name: tokenizer)})
    names = pages.run("docs/models.md", {"dk": InPlaceOfTheLibrary(stand_ins), "AutoTokenizer": hub})
    assert names["out"].complete.all() and names["model"].config.dlm_family == "a2d-bd3lm"
    assert stand_ins.loaded == [names["model_id"]] and capsys.readouterr().out.strip()


def test_model_families(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "models")
    import test_diffusion_gemma
    import test_gemma_images

    gemma = test_diffusion_gemma.build(use_bidirectional_attention="vision")
    gemma.generation_config = test_diffusion_gemma.published(bound=6.0, steps=2)
    library = InPlaceOfTheLibrary(StandIns(tmp_path))
    load = library.load
    library.load = lambda name, **options: gemma if name.startswith("google/") else load(name, **options)

    class Processor:
        image_token = "<image>"

        def __call__(self, text, images, return_tensors):
            return test_gemma_images.processed(seed=3)

    hub = type("transformers", (), {"AutoProcessor": type("", (), {"from_pretrained": lambda name: Processor()})})
    mask = torch.ones(2, 5, dtype=torch.int64)
    names = {"dk": library, "transformers": hub, "ids": pages.ids(), "attention_mask": mask, "image": None,
             "model_loaded_by_its_own_code": build()}  # fmt: skip
    names = pages.run("docs/families.md", names)
    assert names["out"].complete.all()


def test_research_models(tmp_path):
    canvas = pages.ids(2, 12)
    canvas[:, 6:] = -1
    given = torch.full((2, 8), -1)
    given[:, 3] = 5
    names = {"torch": torch, "dk": InPlaceOfTheLibrary(StandIns(tmp_path)), "ids": pages.ids(vocab=30),
             "answer": pages.ids(2, 6, vocab=30), "canvas": canvas, "given": given}  # fmt: skip
    names = pages.run(
        "docs/research_models.md", names, {"max_new_tokens=64, steps=64)   ": "max_new_tokens=8, steps=64)"}
    )
    assert names["out"].complete.all() and torch.isfinite(names["nats"]).all()


#: Pages that need names which a reader has, and that the tests above give them.
RUN_ABOVE = {
    "README.md", "docs/quickstart.md", "docs/decoding.md", "docs/decoders.md", "docs/constraints.md", "docs/new_rule.md",
    "docs/programs.md", "docs/drafters.md", "docs/engine.md", "docs/ops.md", "docs/memory.md", "docs/your_model.md",
    "docs/models.md", "docs/families.md", "docs/research_models.md",
}  # fmt: skip


#: Pages whose code is run elsewhere, with more than one process.
RUN_ELSEWHERE = {"docs/parallel.md": "tests/parallel/test_tensor_parallel.py"}


@pytest.mark.parametrize("name", [p for p in PAGES if pages.blocks(p) and p not in RUN_ABOVE | RUN_ELSEWHERE.keys()])
def test_pages_that_run_as_they_stand(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(name, {})


def test_no_code_hides():
    """In a block of another language, or of none, there are diagrams and what commands print."""
    assert {name for name in PAGES if pages.blocks(name)} >= RUN_ABOVE
    assert all(Path(name).name in text_of(test) for name, test in RUN_ELSEWHERE.items())
    for name in PAGES:
        for language, block in pages.fences(name):
            if language in ("python", "console"):
                continue
            assert not re.search(r"^(import|from|with|for|def|class) |dk\.\w+\(", block, re.M), f"{name}:\n{block}"


@pytest.mark.parametrize("name", [name for name in PAGES if pages.commands(name)])
def test_commands(name, tmp_path, monkeypatch, capsys):
    """Each exits without an error. Of those that run for long, or for ever, the options are read: they have own tests."""
    sys.path.insert(0, str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import model_memory

    monkeypatch.chdir(tmp_path)
    configs = {model.name: model.config for model in model_memory.MODELS}
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": SUM, "max_new_tokens": 17}) + "\n")
    for arguments in pages.commands(name):
        if arguments[0] not in ("generate", "plan", "info") or "--input" in arguments:
            build_parser().parse_known_args(arguments)
            continue
        local = ["demo" if a == "path/to/model" else a for a in arguments]
        local = [str(pages.configuration(tmp_path / "m", configs[a])) if a in configs else a for a in local]
        assert main(local) == 0, " ".join(arguments)
        if arguments[0] == "plan":
            shown = [line for block in pages.blocks(name, "console") for line in block.splitlines()]
            at = next(i for i, line in enumerate(shown) if line[2:].split()[1:] == arguments)
            lines = []
            for line in shown[at + 1 :]:
                if line.startswith("$ "):
                    break
                lines.append(line)
            assert not lines or capsys.readouterr().out.splitlines() == lines
    assert not list(tmp_path.glob("*.html")) or (tmp_path / "watch.html").stat().st_size > 10_000


def test_the_table_of_memory():
    """Some of its rows as `dlmkernels.plan` computes them, all of them there; the script writes the others, too."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import model_memory

    text = text_of("docs/models.md")
    rows = text.split(model_memory.BEGIN)[1].split(model_memory.END)[0].strip().splitlines()[2:]
    assert [re.match(r"\| `(.*?)`", row)[1] for row in rows] == [model.name for model in model_memory.MODELS]
    for model, row in zip(model_memory.MODELS, rows):
        if model.name in ("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", "inclusionAI/LLaDA-MoE-7B-A1B-Instruct"):
            assert model_memory.row(model) == row
    named = set(re.findall(r'config="([\w.+-]+)"', text)) | set(re.findall(r"preset `([\w.-]+)`", text))
    assert len(named) > 10 and named <= dk.PRESETS.keys()
    for family, promised in re.findall(r"\| [^|]*\| [^|]*\| preset `([\w.-]+)`: threshold ([\d.]+)", text):
        assert dk.PRESETS[family].rule.threshold == float(promised)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for file, anchor in pages.links(name):
        assert (ROOT / file).exists(), f"{name} links to {file}"
        if anchor and file.endswith(".md"):
            assert anchor in pages.anchors(file), f"{name} links to {file}#{anchor}"


def test_quoted_files_exist():
    """Paths in backticks that look like files of this project are there."""
    for name in PAGES:
        for path in re.findall(r"`((?:tests|csrc|python|docs|benchmarks|examples)/[\w./]+\.\w+)`", text_of(name)):
            assert (ROOT / path).exists(), f"{name} speaks of {path}"


def test_messages_of_the_troubleshooting_page():
    """What it quotes is said by the package, word for word but for the parts that differ."""
    sources = [*ROOT.glob("python/dlmkernels/**/*.py"), *ROOT.glob("cmake/*.py")]
    said = "\n".join(path.read_text("utf-8") for path in sources)
    said = re.sub(r'"\s*\n?\s*f?"', "", said)  # texts that a line break divides
    text = text_of("docs/troubleshooting.md")
    tables = re.findall(r"^\| `(.+?)`.*?\| ", text, re.M)
    assert len(tables) > 20
    for message in tables:
        parts = [part.strip(" :;,=") for part in message.split("…")]
        for part in parts:
            part = re.sub(r"^(dlmkernels\.generate|demo|--device cuda:|--model:) ?", "", part)
            part = re.sub(r": pip install matplotlib$|^needs matplotlib.*", "needs ", part)
            if len(part) > 8 and "undefined symbol" not in part and not part.startswith("dlmkernels info"):
                assert part in said, f"no message says {part!r}"


def test_every_preset_is_explained():
    text = text_of("docs/decoders.md") + text_of("docs/decoding.md")
    assert [name for name in dk.PRESETS if f"`{name}`" not in text] == []


def test_table_of_rules_names_presets():
    rows = re.findall(r"^[|-] `([^`(]+)`(?: \||:)", text_of("docs/rules.md"), re.M)
    rows = [row for row in rows if row in dk.PRESETS]
    assert len(rows) > 50 and len(set(rows)) == len(rows)


def test_the_pictures_example_runs(tmp_path):
    run = [sys.executable, ROOT / "examples" / "watch.py", tmp_path / "watch.html"]
    assert "in a browser" in subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert "One Sudoku" in (tmp_path / "watch.html").read_text("utf-8")
    told = subprocess.run([*run[:2], "--help"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert told.stdout.startswith("usage: watch.py") and not (tmp_path / "--help").exists()


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="needs the extra 'docs'")
    run = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    found = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("index.html")}
    assert {"quickstart", "troubleshooting", "api/ops", "decoding", "models"} <= found
    text = (tmp_path / "api/ops/index.html").read_text("utf-8")
    ops = re.findall(r"`(\w+)`\]\(api/ops.md\)", text_of("docs/ops.md"))
    assert len(ops) >= 9 and all(f"ops.{name.rstrip('_')}.{name}" in text for name in ops)
