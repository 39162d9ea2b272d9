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
