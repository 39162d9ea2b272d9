# SPDX-License-Identifier: Apache-2.0
"""What an installation must be: light to import, free of torch's C++ ABI, buildable from its source archive."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import dlmkernels

ROOT = Path(__file__).parent.parent


def run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, check=True, **kwargs).stdout


def test_import_is_light():
    """Under 0.3 s beyond torch, and without transformers."""
    code = (
        "import time, torch, numpy; t = time.perf_counter(); import dlmkernels; t = time.perf_counter() - t;"
        "import sys; print(t, 'transformers' in sys.modules, 'matplotlib' in sys.modules)"
    )
    best = min((run(sys.executable, "-c", code).split() for _ in range(3)), key=lambda out: float(out[0]))
    assert float(best[0]) < 0.3 and best[1:] == ["False", "False"]


def test_schema_mismatch_would_be_caught(tmp_path):
    """DLM_DEF compares the schema text with the C++ signature: a program that differs in one type must throw."""
    import torch

    include = Path(torch.__file__).parent / "include"
    source = tmp_path / "schema.cpp"
    source.write_text(
        '#include "torch/schema.h"\n#include <cstdio>\n'
        "using torch::stable::Tensor;\n"
        "std::tuple<Tensor, Tensor> f(const Tensor&, std::optional<double>, int64_t, const std::vector<int64_t>&,"
        " const std::string&, bool);\n"
        "int main() {\n"
        '  dlm::schema::checked<decltype(&f)>("f(Tensor(a!) x, float? y=None, *, int n=1, int[] ids=[], '
        'str s=\\"a, b\\", bool b=False) -> (Tensor u, Tensor v)");\n'
        "  try {\n"
        '    dlm::schema::checked<decltype(&f)>("f(Tensor(a!) x, int? y=None, *, int n=1, int[] ids=[], '
        'str s=\\"a, b\\", bool b=False) -> (Tensor u, Tensor v)");\n'
        "  } catch (const std::logic_error& e) { std::puts(e.what()); return 0; }\n"
        "  return 1;\n}\n"
    )
    lib = Path(torch.__file__).parent / "lib"
    run("c++", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT}/csrc", f"-isystem{include}",
        str(source), "-o", str(tmp_path / "schema"), f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}")  # fmt: skip
    assert "reads as (Tensor, int?, int, int[], str, bool)" in run(str(tmp_path / "schema"))


SETUP = """
import runpy, sys
sys.path.insert(0, "cmake")
import find_torch
{change}
sys.argv = ["setup.py", *{arguments}]
runpy.run_path("setup.py", run_name="__main__")
"""
NO_TORCH = "find_torch.candidates = lambda: iter(())"
NO_TOOLS = "import backend; backend.version_of, backend.tool = lambda name: (1,), lambda name: None"


def stopped(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not done.stdout
    return done.stderr.strip()


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "editable_wheel", "build_ext"])
def test_what_is_missing_is_said_first(command):
    """`dist_info` is what pip calls first: after it, it downloads what torch>=2.11 means to it."""
    without_torch = stopped(SETUP.format(change=NO_TORCH, arguments=[command]))
    assert "install torch >= 2.11" in without_torch and "pip install --no-build-isolation ." in without_torch
    said = stopped(SETUP.format(change=NO_TOOLS, arguments=[command]))
    assert said == (
        'dlmkernels cannot be built yet: run first pip install "setuptools>=77" "pybind11>=2.13" "cmake>=3.22"'
    )


@pytest.mark.parametrize("hook", [
    "get_requires_for_build_wheel", "get_requires_for_build_editable", "build_wheel", "build_editable",
    "prepare_metadata_for_build_wheel",
])  # fmt: skip
def test_hooks_of_the_backend(hook):
    """The first ones where a build is isolated; the others where not even setuptools is there."""
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda name: None if name == 'setuptools' else find(name)"
    code = f"import sys; sys.path.insert(0, 'cmake')\nimport find_torch\n{NO_TORCH}\n"
    if not hook.startswith("get"):
        code, expected = f"{code.replace(NO_TORCH, '')}{hide}\n", 'run first pip install "setuptools>=77"'
    else:
        expected = "install torch >= 2.11"
    assert expected in stopped(
        f"{code}import backend; backend.{hook}({'None' if hook.startswith('get') else repr('x')})"
    )


@pytest.mark.slow
def test_sdist_builds_and_runs(tmp_path):
    """The source archive holds all that a build needs; the wheel built from it works from another folder."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env["TORCH_CUDA_ARCH_LIST"] = "8.0"  # where there is nvcc, one architecture shows it
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path), str(ROOT), env=env)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = (p for p in tmp_path.iterdir() if p.is_dir())
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", str(site),
        str(source), env=env)  # fmt: skip
    code = (
        "import torch, dlmkernels; assert dlmkernels.__file__.startswith(%r), dlmkernels.__file__;"
        "print(dlmkernels.ops.select_tokens(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), 'all').count.item())"
    )
    out = run(sys.executable, "-c", code % str(site), cwd=tmp_path, env=env | {"PYTHONPATH": str(site)})
    assert out.strip() == "3"


def test_version_is_the_projects():
    assert f'version = "{dlmkernels.__version__}"' in (ROOT / "pyproject.toml").read_text()
