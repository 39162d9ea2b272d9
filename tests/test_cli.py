# SPDX-License-Identifier: Apache-2.0
"""The command line, in this process where it can be and in one of its own where it must."""

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlmkernels as dk
from dlmkernels import cli, info

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
        (("--rule", "threshold:high"), "takes a number"),
        (("--rule", "quota:3"), "--steps"),
        (("--preset", "gpt"), "unknown preset 'gpt'"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--max-new-tokens", "300"), "max_position_embeddings"),
        (("--block-length", "10", "--steps", "5", "--max-new-tokens", "30"), "multiple of the number of blocks"),
        (("--top-p", "2"), "top_p"),
        (("--mask-token-id", "99"), "mask_token_id"),
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
    assert code == 2 and out == "" and str(tmp_path) in err and err.count("\n") == 1


def test_unknown_arguments(capsys):
    assert run(capsys, "generate", "--model", "demo", "--prompt", "A", "--speed", "9")[0] == 2
    assert run(capsys)[0] == 2
    assert run(capsys, "demo", "--problems", "0")[0] == 2


def test_every_option_of_generate_reaches_the_configuration():
    options = (
        "--model m --prompt p --max-new-tokens 8 --block-length 4 --steps 2 --score margin --cache dual "
        "--temperature 0.5 --top-k 3 --top-p 0.9 --cfg-scale 1 --seed 7 --mask-token-id 5 --rule factor:2"
    )
    args = cli._parser().parse_args(["generate", *options.split()])
    assert cli.decoding_config(args) == dk.DecodingConfig(
        max_new_tokens=8, block_length=4, steps=2, score="margin", cache="dual", temperature=0.5, top_k=3, top_p=0.9,
        cfg_scale=1.0, seed=7, mask_token_id=5, rule=dk.Factor(2.0),
    )  # fmt: skip
    bare = argparse.Namespace(**{name: None for name in vars(args)})
    bare.preset = "fast-dllm"
    assert cli.decoding_config(bare) == dk.preset("fast-dllm")


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
    monkeypatch.setattr(cli.subprocess, "run", lambda *a, **k: calls.append((a, k)) or argparse.Namespace(returncode=3))
    assert cli.main(["bench", "--full", "-k", "remask"]) == 3
    (command,), options = calls[0]
    assert command[1:] == ["-m", "pytest", "benchmarks", "--benchmark-only", "--full", "-k", "remask"]
    assert options["cwd"] == ROOT
    monkeypatch.setattr(cli, "__file__", "/somewhere/else/dlmkernels/cli.py")
    code, _, err = run(capsys, "bench")
    assert code == 2 and "source tree" in err


@pytest.mark.slow
def test_demo_quick(tmp_path):
    out = program("demo", "--quick", "--problems", "2", "--out", str(tmp_path / "a" / "b"),
                  "--json", str(tmp_path / "data.json"))  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "start: 49 open" in out.stdout and "one a forward, random order" in out.stdout
    data = json.loads((tmp_path / "data.json").read_text())
    assert len(data["results"]) == 4 * 5 and data["environment"]["versions"]["dlmkernels"] == dk.__version__
    for name in ("dlmkernels-demo.png", "dlmkernels-sudoku.png"):
        assert (tmp_path / "a" / "b" / name).stat().st_size > 5000
        assert name in out.stdout
