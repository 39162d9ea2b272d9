# SPDX-License-Identifier: Apache-2.0
"""The command line, in this process where it can be and in one of its own where it must."""

import argparse
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlmkernels as dk
from dlmkernels import cli, demo, info, terminal
from dlmkernels.cli import bench
from dlmkernels.cli.options import decoding_options, is_random
from dlmkernels.demo import tasks
from small_models import build, prompts

ROOT = Path(__file__).parent.parent
SUM, ANSWER = "A1234567890123456+8765432109876544=", "10000000000000000"


def run(capsys, *argv):
    """Exit code, standard output, standard error."""
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


def generate(capsys, *argv, prompt=SUM):
    return run(capsys, "generate", "--model", "demo", "--prompt", prompt, *argv)


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_names_what_is_in_use(capsys):
    code, out, err = run(capsys, "info")
    assert code == 0 and err == ""
    for expected in (
        dk.__version__,
        torch.__version__,
        dk._C.cpu_isa(),
        "CUDA kernels",
        "processors",
        info.processor(),
    ):
        assert expected in out


def test_info_as_json(capsys):
    code, out, _ = run(capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0 and found == json.loads(json.dumps(info.collect()))
    assert found["versions"]["torch"] == torch.__version__ and found["cpu"]["threads"] == torch.get_num_threads()


def test_info_tells_how_to_get_what_is_missing(capsys, monkeypatch):
    find = importlib.util.find_spec
    absent = ("transformers", "matplotlib", "pytest_benchmark")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a))
    code, out, _ = run(capsys, "info")
    assert code == 0
    for name in ("transformers", "matplotlib", "pytest-benchmark"):
        assert f"pip install {name}" in out
    for command in (["generate", "--model", "demo", "--prompt", SUM], ["demo"], ["bench"]):
        code, out, err = run(capsys, *command)
        assert code == 2 and err.startswith("dlmkernels: error: ") and "pip install" in err and out == ""


def test_info_needs_torch_alone():
    code = (
        "import sys; import dlmkernels.info as i; i.main([]);"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'matplotlib', 'safetensors')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_info_says_what_a_missing_device_means():
    found = info.collect()
    found["build"] |= {"cuda_architectures": ["9.0"], "cuda_state": "built with nvcc 13.0 for 9.0"}
    found["missing"] = [{"what": "CUDA device", "needed_for": "the CUDA kernels", "how": "no driver"}]
    said = info.text(found)
    assert "not available\n  CUDA device  no driver (needed for the CUDA kernels)" in said
    assert said.count("for 9.0") == 1 and "9.0 (" not in said
    found["build"] |= {"cuda_architectures": [], "cuda_state": "no nvcc"}
    assert re.search(r"^CUDA kernels +none \(no nvcc\)$", info.text(found), re.M)


# --- plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "100M"), "100M is enough for 256 tokens per request, the model's maximum"),
        (("--memory", "5M"), "5M is enough for "),
        (("--memory", "1M"), "1M is too little: the weights and logits alone need 3."),
    ],
)
def test_plan_says_what_memory_is_enough_for(capsys, options, message):
    code, out, _ = run(capsys, "plan", "--model", "demo", *options)
    assert code == 0 and message in out.splitlines()[-1]


def test_plan_checks_its_options_first(capsys):
    code, out, err = run(capsys, "plan", "--model", "demo", "--memory", "lots")
    assert code == 2 and out == "" and "--memory must be a number of bytes, such as 24G; got 'lots'" in err
    assert "--length must be at most 256" in run(capsys, "plan", "--model", "demo", "--length", "300")[2]


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_statistics(capsys):
    code, out, err = generate(capsys, "--max-new-tokens", "17", "--rule", "threshold:0.9")
    assert code == 0 and out.strip() == ANSWER
    statistics = err.strip().splitlines()[-1]
    assert statistics.startswith("17 tokens, ") and "tokens per forward" in statistics and "tokens/s" in statistics


@pytest.mark.parametrize(
    "options",
    [
        ("--rule", "quota", "--steps", "4"),
        ("--rule", "time-quota", "--steps", "8"),
        ("--rule", "factor:0.5", "--score", "margin"),
        ("--rule", "entropy-bound:0.1", "--cache", "prefix", "--block-length", "9"),
        ("--preset", "fast-dllm", "--block-length", "17", "--dtype", "float32"),
        ("--preset", "llada", "--cfg-scale", "0.5"),
    ],
)
def test_options(capsys, options):
    code, out, _ = generate(capsys, "--max-new-tokens", "17", *options)
    assert code == 0 and out.strip().isdigit() and len(out.strip()) == 17


def test_seed_makes_samples_repeatable(capsys):
    """Without a seed a fresh one is drawn, and told."""
    options = ("--max-new-tokens", "17", "--temperature", "100")
    code, out, err = generate(capsys, *options)
    seed = err.strip().rsplit(" ", 1)[1]
    assert code == 0 and err.strip().endswith(f"seed {seed}")
    assert generate(capsys, *options, "--seed", seed)[1] == out
    assert generate(capsys, *options, "--seed", str(int(seed) + 1))[1] != out


def test_infill_and_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{SUM}1________0000_000\n"))
    code, out, err = generate(capsys, "--infill", prompt="-")
    assert code == 0 and out.strip() == SUM + ANSWER
    assert err.startswith("9 tokens, ")


def test_draft_needs_a_terminal(capsys, monkeypatch):
    options = ("--max-new-tokens", "17", "--draft")
    code, out, err = generate(capsys, *options)
    assert code == 0 and "not a terminal" in err and "\033" not in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, err = generate(capsys, *options)
    assert code == 0 and "\0338" in out and "not a terminal" not in err
    assert out.rsplit("\033[J", 1)[1].strip() == ANSWER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rule", "greedy"), "unknown rule 'greedy'; known: quota"),
        (("--rule", "treshold:0.5"), "did you mean 'threshold:0.5'?"),
        (("--rule", "klass"), "that is a preset; pass config='klass', or --preset klass"),
        (("--preset", "klas"), "did you mean 'klass'?"),
        (("--steps", "4", "--rule", "threshold:0.9"), "Leave out steps, or choose another rule"),
        (("--trace", "/nonexistent/page.html"), "--trace: folder /nonexistent does not exist"),
        (("--trace", "."), "--trace: . is a folder"),
        (("--rule", "threshold:high"), "takes a number"),
        (("--rule", "quota:3"), "--steps"),
        (("--preset", "gpt"), "unknown preset 'gpt'"),
        (("--max-new-tokens", "0"), "--max-new-tokens must be an integer of at least 1; got 0"),
        (("--max-new-tokens", "300"), "--prompt (35 tokens) and --max-new-tokens (300) make a canvas of 335"),
        (("--block-length", "10", "--steps", "2", "--max-new-tokens", "30"), "at least the number of blocks"),
        (("--top-p", "2"), "--top-p must be a number from 0 to 1"),
        (("--mask-token-id", "99"), "--mask-token-id must be in the model's vocabulary of 32 tokens; got 99"),
        (("--device", "tpu"), "--device"),
        (("--infill",), "no mask token"),
        (("--chat",), "no chat template"),
    ],
)
def test_user_errors_are_one_line(capsys, options, message):
    code, out, err = generate(capsys, *options)
    assert code == 2 and out == ""
    assert err.startswith("dlmkernels: error: ") and err.count("\n") == 1 and message in err


def test_masks_in_a_prompt(capsys):
    code, _, err = generate(capsys, prompt=SUM + "_1")
    assert code == 2 and "--infill" in err


def test_a_model_that_is_not_there(capsys, tmp_path):
    code, out, err = run(capsys, "generate", "--model", str(tmp_path), "--prompt", "A")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"error: --model: no readable model configuration at '{tmp_path}'" in err


def test_unknown_arguments(capsys):
    assert run(capsys, "generate", "--model", "demo", "--prompt", "A", "--speed", "9")[0] == 2
    assert run(capsys)[0] == 2
    assert run(capsys, "demo", "--problems", "0")[0] == 2


def test_every_option_of_generate_reaches_the_configuration():
    options = (
        "--model m --prompt p --max-new-tokens 8 --block-length 4 --steps 2 --score margin --cache dual "
        "--temperature 0.5 --top-k 3 --top-p 0.9 --cfg-scale 1 --seed 7 --mask-token-id 5 --rule factor:2"
    )
    args = cli.build_parser().parse_args(["generate", *options.split()])
    assert dk.DecodingConfig(**decoding_options(args)) == dk.DecodingConfig(
        max_new_tokens=8, block_length=4, steps=2, score="margin", cache="dual", temperature=0.5, top_k=3, top_p=0.9,
        cfg_scale=1.0, seed=7, mask_token_id=5, rule=dk.Factor(2.0),
    )  # fmt: skip
    bare = cli.build_parser().parse_args(["generate", "--model", "m", "--preset", "fast-dllm"])
    assert decoding_options(bare) == {}


def test_the_family_decides_what_options_leave_open(capsys, monkeypatch):
    """As `generate` does: without --preset nothing of another family's decoder is used."""
    seen = {}

    def decode(model, ids, config=None, **options):
        seen.update(config=config, options=options)
        return real(model, ids, config=config, **options)

    import dlmkernels.decoding.generate as module

    real = module.generate
    monkeypatch.setattr(module, "generate", decode)
    code, out, err = generate(capsys, "--max-new-tokens", "17")
    assert (
        code == 0
        and seen["config"] is None
        and seen["options"].keys() == {"streamer", "tokenizer", "trace", "max_new_tokens"}
    )
    assert out.strip() == ANSWER and err.startswith("17 tokens, 1 forward, 17.00 tokens per forward")
    generate(capsys, "--max-new-tokens", "17", "--preset", "fast-dllm", "--cache", "none")
    assert seen["config"] == dk.preset("fast-dllm") and seen["options"]["cache"] == "none"


def test_random_is_what_depends_on_the_seed():
    """Every preset at temperature 0, and above, on a small model; a preset that draws has to get a seed."""
    model, ids, drawn = build(), prompts(1, 6), set()
    for name in dk.PRESETS:
        config = dk.preset(name, temperature=0.0)
        if (
            config.cache == "block" or config.rule.token_ids or config.rule.decodes != "anything"
            or config.logit_alignment == "shift" or config.rule.noise == "continuous"
        ):  # fmt: skip
            continue
        short = config.replace(max_new_tokens=8, block_length=8, cache="none")
        results = [dk.generate(model, ids, config=short, seed=seed).sequences for seed in range(3)]
        differ = any(not torch.equal(results[0], other) for other in results[1:])
        assert not differ or is_random(config), name
        assert is_random(config.replace(temperature=0.5)), name
        drawn |= {name} if differ else set()
    assert {"remdm", "mdlm", "llada-random", "duo"} <= drawn and not is_random(dk.preset("llada"))


def test_a_preset_that_draws_gets_a_seed_at_temperature_0(capsys):
    options = ("--preset", "remdm", "--temperature", "0", "--max-new-tokens", "17", "--steps", "5")
    code, out, err = generate(capsys, *options)
    assert code == 0 and ", seed " in err
    code, _, err = generate(capsys, "--max-new-tokens", "17", "--seed", "3")
    assert code == 0 and "--seed had no effect" in err and "seed 3" not in err


def test_the_demo_model_has_a_prompt(capsys):
    code, out, err = run(capsys, "generate", "--model", "demo")
    assert code == 0 and out.strip() == ANSWER and err.startswith("17 tokens, 1 forward")
    help_text = " ".join(run(capsys, "generate", "--help")[1].split())
    assert demo.PROMPT in help_text and demo.PROMPT == SUM
    code, out, err = run(capsys, "generate", "--model", "demo", "--prompt", "R" + "1" * 32 + "=")
    assert code == 0 and out.strip() == "".join(str(i % 10) for i in range(1, 33))
    assert [tasks.answer_length(text) for text in (SUM, "R", "S12", "7")] == [17, 65, 79, 1]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Hello", "'Helo': the demo model knows only the characters _0123456789SAR+="),
        ("A1 + 1=", "' '"),
        ("", "--prompt is empty"),
        ("A1\udce2=", "udce2"),
    ],
)
def test_prompts_that_the_demo_model_cannot_read(capsys, prompt, message):
    code, out, err = generate(capsys, prompt=prompt)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_prompt_is_needed(capsys, tmp_path):
    assert "--prompt is needed" in run(capsys, "generate", "--model", str(tmp_path))[2]
    assert "with mask tokens" in run(capsys, "generate", "--model", "demo", "--infill")[2]


@pytest.mark.parametrize("error", [RuntimeError, OverflowError, KeyError, MemoryError, OSError, ZeroDivisionError])
def test_what_a_decoding_raises_is_one_line(capsys, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("the reason\nin two lines")

    monkeypatch.setattr("dlmkernels.decoding.generate.generate", fail)
    code, out, err = generate(capsys)
    assert code == 2 and out == "" and err.count("\n") == 1 and "the reason" in err


@pytest.mark.parametrize("seed", ["9223372036854775808", "-9223372036854775809", "x", "1.5"])
def test_seeds_that_are_none(capsys, seed):
    code, out, err = generate(capsys, f"--seed={seed}")
    assert code == 2 and "--seed" in err and "Traceback" not in err


# --- the program -----------------------------------------------------------------------------------------------------


def program(*argv, **env):
    return subprocess.run(
        [sys.executable, "-m", "dlmkernels", *argv], capture_output=True, text=True, env=os.environ | env, timeout=300
    )


def test_help_and_version():
    out = program("--help")
    assert out.returncode == 0 and all(word in out.stdout for word in ("demo", "generate", "bench", "info"))
    assert program("--version").stdout.strip() == f"dlmkernels {dk.__version__}"


def test_exit_code_of_the_program(tmp_path):
    out = program("generate", "--model", str(tmp_path), "--prompt", "A")
    assert out.returncode == 2 and "Traceback" not in out.stderr


def test_bench_runs_pytest_in_the_source_tree(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(
        bench.subprocess, "run", lambda *a, **k: calls.append((a, k)) or argparse.Namespace(returncode=3)
    )
    assert cli.main(["bench", "--full", "-k", "remask"]) == 3
    (command,), options = calls[0]
    assert command[1:] == ["-m", "pytest", "benchmarks", "--benchmark-only", "--full", "-k", "remask"]
    assert options["cwd"] == ROOT
    monkeypatch.setattr(bench, "__file__", "/somewhere/else/dlmkernels/cli/bench.py")
    code, _, err = run(capsys, "bench")
    assert code == 2 and "source tree" in err


@pytest.mark.slow
def test_demo_quick(tmp_path):
    out = program("demo", "--quick", "--problems", "2", "--out", str(tmp_path / "a" / "b"),
                  "--json", str(tmp_path / "data.json"))  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "start: 49 open" in out.stdout and "one per forward, random order" in out.stdout
    data = json.loads((tmp_path / "data.json").read_text())
    assert len(data["results"]) == 4 * 5 and data["environment"]["versions"]["dlmkernels"] == dk.__version__
    for name in ("dlmkernels-demo.png", "dlmkernels-sudoku.png"):
        assert (tmp_path / "a" / "b" / name).stat().st_size > 5000
        assert name in out.stdout


# --- terminals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_can_show_the_help(encoding):
    for command in ([], ["generate"], ["demo"], ["bench"], ["info"]):
        out = program(*command, "--help", PYTHONIOENCODING=encoding)
        assert out.returncode == 0 and "usage: dlmkernels" in out.stdout and out.stderr == ""


def test_what_an_encoding_lacks_is_written_plainly():
    for encoding, expected in (("ascii", "a...b | - \\u4e16\\xe9\n"), ("latin-1", "a...b | - \\u4e16é\n")):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding)
        terminal.make_printable(stream)
        print("a…b │ – 世é", file=stream, flush=True)
        assert raw.getvalue().decode(encoding) == expected
    kept = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    terminal.make_printable(kept)  # who has chosen keeps their choice
    assert kept.errors == "replace"
    terminal.make_printable(io.StringIO())


def test_a_reader_that_has_seen_enough_is_no_error():
    code = (
        "import sys; from dlmkernels import cli\n"
        "def flood(args):\n    while True: print('x' * 4096)\n"
        "cli.generate.run = flood; sys.exit(cli.main(['generate', '--model', 'demo']))"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None and run.stderr is not None
    run.stdout.read(10)
    run.stdout.close()
    assert run.wait(timeout=120) == 141 and run.stderr.read() == b""
