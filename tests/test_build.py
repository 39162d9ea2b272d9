# SPDX-License-Identifier: Apache-2.0
"""What an installation must be: light to import, free of torch's C++ ABI, buildable from its source archive."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import dlmkernels
from dlmkernels import installation

ROOT = Path(__file__).parent.parent


def run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, check=True, **kwargs).stdout


def test_import_is_light():
    """Under 0.3 s of processor time beyond torch, and without transformers."""
    code = (
        "import time, torch, numpy; t = time.process_time(); import dlmkernels; t = time.process_time() - t;"
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
        'dlmkernels cannot be built yet: first run pip install "setuptools>=77" "pybind11>=2.13" "cmake>=3.22"'
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
        code, expected = f"{code.replace(NO_TORCH, '')}{hide}\n", 'first run pip install "setuptools>=77"'
    else:
        expected = "install torch >= 2.11"
    assert expected in stopped(
        f"{code}import backend; backend.{hook}({'None' if hook.startswith('get') else repr('x')})"
    )


def checked(env=None, change=""):
    """What the check before a build says, in an environment."""
    code = f"import sys; sys.path.insert(0, 'cmake')\nimport backend, find_torch\n{change}\nbackend.check()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert "Traceback" not in done.stderr and not done.stdout
    return done.stderr.strip()


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_old_torch_is_named(tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cu128'\ncuda: Optional[str] = '12.8'\n")
    change = "find_torch.candidates = lambda: iter([__import__('pathlib').Path({!r})])"
    said = checked(change=change.format(str(tmp_path)))
    assert f"{tmp_path} is torch 2.9.1+cu128" in said and 'pip install -U "torch>=2.11"' in said


def test_the_compiler_is_tried(tmp_path):
    without = {"PATH": str(tmp_path)}
    said = checked(without, "backend.missing = list")
    assert "no C++ compiler (c++, g++, clang++) is on PATH" in said and "apt-get install g++" in said
    assert "CXX=/no/c++ is not a program" in checked(os.environ | {"CXX": "/no/c++"})
    old = program(tmp_path / "old", "echo 'error: unrecognized option -std=c++17' >&2; exit 1")
    said = checked(os.environ | {"CXX": f"{old} -O1"})
    assert f"{old} -O1 does not compile C++17 (error: unrecognized option -std=c++17); GCC 9 or Clang 9" in said
    assert checked() == ""


def configured(tmp_path, cuda, **env):
    """What CMake says of CUDA: its code, and the lines of one paragraph joined."""
    build = tmp_path / f"build{len(list(tmp_path.iterdir()))}"
    done = subprocess.run(
        [shutil.which("cmake", path=TOOLS), "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}",
         f"-DDLMKERNELS_CUDA={cuda}", "-DCMAKE_CXX_COMPILER_WORKS=1"], capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name not in ("CUDACXX", "CUDA_HOME")} | env,
    )  # fmt: skip
    return done.returncode, " ".join((done.stdout + done.stderr).split())


TOOLS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
needs_cmake = pytest.mark.skipif(not shutil.which("cmake", path=TOOLS), reason="no cmake")


@needs_cmake
def test_an_old_nvcc_is_named_and_left_out(tmp_path):
    nvcc = program(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    code, said = configured(tmp_path, "auto", CUDACXX=nvcc)
    assert code == 0 and f"CUDA kernels: nvcc 11.8 ({nvcc}) is too old: 12.0 or newer is needed" in said
    code, said = configured(tmp_path, "1", CUDACXX=nvcc)
    assert code != 0 and f"DLMKERNELS_CUDA=1, but nvcc 11.8 ({nvcc}) is too old: 12.0 or newer is needed" in said


@needs_cmake
def test_without_nvcc(tmp_path):
    code, said = configured(tmp_path, "1", CUDACXX="/no/nvcc")
    assert code != 0 and "DLMKERNELS_CUDA=1, but /no/nvcc is not an nvcc that runs here" in said
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("c++", "make", "ninja", "ar", "ranlib", "ld", "as", "uname"):
        if found := shutil.which(name, path=TOOLS):
            (path / name).symlink_to(found)
    code, said = configured(tmp_path, "1", PATH=str(path))
    assert code != 0 and "DLMKERNELS_CUDA=1, but no nvcc found. Put nvcc (12.0 or newer) on PATH" in said
    assert "set CUDACXX to it or CUDA_HOME to its toolkit; DLMKERNELS_CUDA=0 builds without" in said


@needs_cmake
def test_bindings_of_several_pythons(tmp_path):
    """A Python is its headers and its suffix: one that lacks its headers is named."""
    include = sysconfig.get_path("include")
    other = program(tmp_path / "python3.99", f"printf 'cp399;.cpython-399-x86_64-linux-gnu.so;{include}'")
    poor = program(tmp_path / "poor", "echo 'Python.h is missing in /x' >&2; exit 1")
    build = tmp_path / "build"
    command = [shutil.which("cmake", path=TOOLS), "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}",
               "-DDLMKERNELS_CUDA=0"]  # fmt: skip
    run(*command, f"-DDLMKERNELS_PYTHONS={sys.executable};{other}")
    compiled = json.loads((build / "compile_commands.json").read_text())
    assert len([entry for entry in compiled if entry["file"].endswith("csrc/torch/module.cpp")]) == 2
    done = subprocess.run([*command, f"-DDLMKERNELS_PYTHONS={poor}"], capture_output=True, text=True)
    assert done.returncode and f"DLMKERNELS_PYTHONS: {poor}: Python.h is missing in /x" in " ".join(done.stderr.split())
    said = run(sys.executable, "-c", SETUP.format(change=f"import os; os.environ['DLMKERNELS_PYTHONS'] = '{sys.executable}:{other}'",
                                                  arguments=["--version"]) + TAG, cwd=ROOT)  # fmt: skip
    tag = f"cp3{sys.version_info[1]}"
    assert f"{tag}.cp399 none" in said


TAG = """
import setuptools, setup
command = setup.Wheel(setuptools.Distribution({"name": "x", "ext_modules": [setuptools.Extension("x", [])]}))
command.ensure_finalized()
print(*command.get_tag())
"""


def why(error, folder):
    return installation.why_not_loaded(error, folder)


def test_an_import_that_fails_says_what_helps(tmp_path):
    assert "needs torch >= 2.11, which" in why(ImportError("No module named 'torch'", name="torch"), tmp_path)
    assert "never built: run pip install --no-build-isolation -e ." in why(
        ImportError("cannot import name '_C'"), tmp_path
    )
    (tmp_path / "_C.cpython-305-x86_64-linux-gnu.so").touch()
    said = why(ImportError("cannot import name '_C'"), tmp_path)
    assert "is for cpython-305-x86_64-linux-gnu, but this is CPython 3." in said and "--no-binary dlmkernels" in said
    said = why(ImportError("x.so: undefined symbol: aoti_torch_y"), Path(dlmkernels.__file__).parent)
    assert f"does not work with torch {importlib.metadata.version('torch')}" in said and "pip install -U torch" in said


def test_the_import_of_another_python(tmp_path):
    """As the package says it: its files without the _C of this Python."""
    shutil.copytree(Path(dlmkernels.__file__).parent, tmp_path / "dlmkernels",
                    ignore=shutil.ignore_patterns("*.so", "__pycache__", "demo"))  # fmt: skip
    (tmp_path / "dlmkernels/_C.cpython-305-x86_64-linux-gnu.so").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import dlmkernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith("ImportError: this build of dlmkernels is for cpython-305")


def test_oldest_torch_is_one_number():
    (claimed,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    (target,) = re.findall(r"TORCH_TARGET_VERSION=0x(\w{4})0{12}", (ROOT / "CMakeLists.txt").read_text())
    assert claimed == f"{int(target[:2], 16)}.{int(target[2:], 16)}" == installation.OLDEST_TORCH
    sys.path.insert(0, str(ROOT / "cmake"))
    import find_torch

    assert claimed == ".".join(map(str, find_torch.LEAST)) and f"torch >= {claimed}" in find_torch.MESSAGE


def torch_alone(folder):
    """A folder with torch and what it needs, linked from this environment, and nothing else."""
    wanted, seen = ["torch", "numpy"], set()
    while wanted:
        name = re.split(r"[^\w.-]", wanted.pop())[0].lower().replace("-", "_")
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        wanted += [text for text in distribution.requires or () if "extra ==" not in text]
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


@pytest.mark.slow
def test_wheel_needs_no_compiler(tmp_path):
    """The wheel of the build folder, in a new environment with torch alone and nothing on PATH."""
    cache = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "CMakeCache.txt"
    if not cache.exists():
        pytest.skip("no build folder")
    built = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(), re.M))
    python = Path(built["Python_EXECUTABLE"])  # under this name, or all kernels would be compiled again
    if python.parent != Path(sys.executable).parent:
        pytest.skip("the build folder is another environment's")
    env = os.environ | {"PATH": TOOLS, "DLMKERNELS_CUDA": built["DLMKERNELS_CUDA"], "DLMKERNELS_PYTHONS": ""}
    run(python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT, env=env)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"dlmkernels-[\d.]+-cp3\d+-none-linux_\w+\.whl", wheel.name)
    (tmp_path / "site").mkdir()
    site = torch_alone(tmp_path / "site")
    said = run(sys.executable, ROOT / "scripts/try_wheel.py", wheel, "--site", site)
    assert re.search(r"^transformers +not installed$", said, re.M) and re.search(r"^CUDA devices +none", said, re.M)


@pytest.mark.slow
def test_sdist_builds_and_runs(tmp_path):
    """The source archive holds all that a build needs; the wheel built from it works from another folder."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env["DLMKERNELS_CUDA"] = "0"  # whose sources are seen to be there, which is minutes shorter
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path), str(ROOT), env=env)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = (p for p in tmp_path.iterdir() if p.is_dir())
    wanted = {p.relative_to(ROOT) for folder in ("csrc", "cmake") for p in (ROOT / folder).rglob("*.*")}
    wanted = {path for path in wanted if "__pycache__" not in path.parts}
    assert len(wanted) > 150 and wanted <= {p.relative_to(source) for p in source.rglob("*.*")}
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
