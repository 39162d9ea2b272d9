# SPDX-License-Identifier: Apache-2.0
"""The Hub kernel is made of the same sources, with the same flags, and lives beside the package in one process."""

import json
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("tomllib is part of Python 3.11", allow_module_level=True)
import tomllib

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "cmake")]
import find_torch  # noqa: E402

import hub  # noqa: E402

TEXT = (ROOT / "hub/build.toml").read_text(encoding="utf-8")
LAYOUT = tomllib.loads(TEXT)
BUILD = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def listed(backend):
    """File -> its flags of C++, in a build for a backend."""
    found = {}
    for name, kernel in LAYOUT["kernel"].items():
        if kernel["backend"] == backend:
            for file in kernel["src"]:
                assert file not in found, f"{file} is in [kernel.{name}] and in another"
                found[file] = kernel.get("cxx-flags", [])
    return found


def commands():
    """Source -> command, of the build of this environment; none of kernels of CUDA."""
    if not (BUILD / "compile_commands.json").exists():
        pytest.skip("no build folder")
    entries = json.loads((BUILD / "compile_commands.json").read_text(encoding="utf-8"))
    texts = {Path(entry["file"]).relative_to(ROOT).as_posix(): entry for entry in entries}
    return {file: entry for file, entry in texts.items() if file.endswith(".cpp")}


def test_the_list_is_that_of_the_sources():
    assert hub.build_toml() == TEXT, "python scripts/hub.py --write-list"


def test_every_file_is_listed():
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".cuh", ".cpp", ".cu")
    } - hub.NOT_IN_IT
    headers = set(LAYOUT["torch"]["src"]) - {"torch-ext/torch_binding.cpp"}
    cpu, cuda = set(listed("cpu")), set(listed("cuda"))
    assert headers | cuda == on_disk and not headers & cuda
    assert cpu == {file for file in cuda if file.endswith(".cpp")} and len(cpu) > 40


def test_flags_are_those_of_the_build():
    """Flags that change results or the instructions used; warnings and paths are a build's own business."""
    ours = re.compile(r"-m\S+|-ffp-contract=\S+|-fno-trapping-math|-DDLM_(X86|AMX)")
    known = commands()
    files = listed("cpu")
    assert set(files) == set(known) - hub.NOT_IN_IT
    for file, flags in files.items():
        # -O3 stands in every command of a release build, too
        want = {flag for flag in shlex.split(known[file]["command"]) if ours.fullmatch(flag)}
        assert {flag for flag in flags if flag != "-O3"} == want, file


def test_capabilities_are_those_of_the_build():
    (ours,) = re.findall(r"set\(wanted ([\d. ]+12\.0)\+PTX\)", (ROOT / "cmake/cuda.cmake").read_text())
    assert LAYOUT["kernel"]["kernels_cuda"]["cuda-capabilities"] == ours.split()


def test_keys_are_those_of_edition_5():
    """As its documentation lists them; kernel-builder refuses a key that it does not know."""
    assert set(LAYOUT) == {"general", "torch", "kernel"} and LAYOUT["general"]["edition"] == 5
    assert set(LAYOUT["general"]) == {"name", "version", "edition", "license", "backends"}
    assert set(LAYOUT["torch"]) == {"src", "include", "stable-abi"}
    least = ".".join(map(str, find_torch.LEAST))
    assert LAYOUT["torch"]["stable-abi"] == dict.fromkeys(LAYOUT["general"]["backends"], least)
    for name, kernel in LAYOUT["kernel"].items():
        allowed = {"backend", "depends", "include", "src", "cxx-flags"}
        assert set(kernel) <= allowed | ({"cuda-capabilities"} if kernel["backend"] == "cuda" else set()), name


# What kernel-builder generates, as far as the sources here use it (its templates, edition 5).
REGISTRATION = """#pragma once
#include <Python.h>
#define REGISTER_EXTENSION(name) REGISTER(name)
#define REGISTER(name) \\
  PyMODINIT_FUNC PyInit_##name() { \\
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, #name, nullptr, 0, nullptr}; \\
    return PyModule_Create(&module); }
"""
OPS = """import torch
from . import {name}
ops = torch.ops.{name}
def add_op_namespace_prefix(op_name):
    return f"{name}::{{op_name}}"
"""
BESIDE = """
import sys, torch, dlmkernels
sys.path.insert(0, {folder!r})
import kernel
from kernel._ops import ops
score, eligible = torch.tensor([[1.0, 3.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
want = dlmkernels.ops.select_tokens(score, eligible, "threshold", parameter=1.5)
got = kernel.select_tokens(score, eligible, "threshold", parameter=1.5)
assert torch.equal(got.selected, want.selected) and torch.equal(got.count, want.count)
assert ops is not torch.ops.dlmkernels and len(kernel.__all__) == 12
compiled = torch.compile(lambda s, e: kernel.select_tokens(s, e, "all").count, fullgraph=True, backend="eager")
print(got.selected.tolist(), compiled(score, eligible).tolist(), ops.select_tokens.default.name())
"""


def test_it_lives_beside_the_package(tmp_path):
    """Two of its sources are compiled as kernel-builder does, under another name of the ops; the rest is the build's."""
    known = commands()
    name = "_dlmkernels_cpu_0123abc"
    hub.lay_out(tmp_path / "layout")
    package = tmp_path / "kernel"
    (tmp_path / "layout/torch-ext/dlmkernels").rename(package)
    (package / "_ops.py").write_text(OPS.format(name=name))
    (tmp_path / "registration.h").write_text(REGISTRATION)
    objects = [tmp_path / "ops.o", tmp_path / "binding.o"]
    compiler, _, flags = known["csrc/torch/ops.cpp"]["command"].partition(" ")
    flags = re.sub(r" -o \S+ -c \S+", "", flags).split()
    include = [f"-I{tmp_path}", f"-I{sysconfig.get_path('include')}", "-DPy_LIMITED_API=0x03090000"]
    binding = tmp_path / "layout/torch-ext/torch_binding.cpp"
    for source, out, more in ((ROOT / "csrc/torch/ops.cpp", objects[0], []), (binding, objects[1], include)):
        flags_of_it = [*flags, *more, f"-DTORCH_EXTENSION_NAME={name}", "-c", str(source), "-o", str(out)]
        subprocess.run([compiler, *flags_of_it], check=True, cwd=BUILD)
    folder = BUILD / "CMakeFiles"
    left_out = {f"{Path(file).name}.o" for file in hub.NOT_IN_IT} | {"ops.cpp.o"}
    rest = [str(path) for path in folder.rglob("*.o") if "CMakeScratch" not in path.parts and path.name not in left_out]
    rest = [path for path in rest if "CompilerIdC" not in path]
    (library,) = re.findall(r"-isystem (\S+)/include", " ".join(known["csrc/torch/ops.cpp"]["command"].split("=")))[:1]
    cudart = re.findall(r"(\S+libcudart_static\.a)", (BUILD / "build.ninja").read_text())[:1]
    out = package / f"{name}.abi3.so"
    subprocess.run(
        [compiler, "-shared", "-o", str(out), *map(str, objects), *rest, f"-L{library}/lib", "-ltorch_cpu", *cudart,
         "-ldl", "-lrt", "-lpthread"], check=True,
    )  # fmt: skip
    code = BESIDE.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"[[False, True, True]] [3] {name}::select_tokens", done.stderr
