# SPDX-License-Identifier: Apache-2.0
"""What a newcomer does: README's commands in a fresh virtual environment, then the quick start, then a look at its page.

Only the compiler is left out: a stand-in for cmake hands over what has been compiled already. pip, the build
backend, the wheel and the console script are the real ones. Torch, transformers and the build tools are those of the
environment that runs the tests, so pip finds them and downloads nothing.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import dlmkernels
import pages
from pages import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CMAKE = """#!/bin/sh
# A stand-in for cmake: configures and builds nothing, and installs what has been built.
case "$1" in
  --install) mkdir -p "$4"; while [ $# -gt 1 ]; do [ "$1" = --prefix ] && exec cp {modules} "$2"; shift; done; exit 1;;
esac
"""


def shell(command, place):
    """Run a command as typed, and return what it prints."""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, **place)
    assert done.returncode == 0, f"$ {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the checkout and a fresh virtual environment: where and with which variables commands are run."""
    folder = tmp_path_factory.mktemp("newcomer")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "checkout" / name)
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    # Python 3.11's own setuptools is too old; with it gone, the one that is there for the build is found.
    subprocess.run([folder / "env/bin/python", "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "torch_and_tools.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    (folder / "bin").mkdir()
    cmake = folder / "bin" / "cmake"
    modules = Path(dlmkernels._C.__file__).parent.glob("*.so")
    cmake.write_text(CMAKE.format(modules=shlex.join(map(str, modules))))
    cmake.chmod(0o755)
    hidden = ("PYTHON", "PYTEST", "VIRTUAL_ENV", "CMAKE_ARGS", "DLMKERNELS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"PATH": f"{folder}/env/bin:{folder}/bin:/usr/bin:/bin", "PIP_NO_COMPILE": "1"}
    return {"cwd": folder / "checkout", "env": environment}


@pytest.mark.slow
def test_readme_then_quick_start(place, tmp_path):
    first = pages.blocks("README.md", "console")[0]
    commands = [line[2:] for line in first.splitlines()]
    assert len(commands) == 4 and commands[1].startswith("pip install --no-build-isolation")
    said = [shell(command, place) for command in commands]
    assert re.search(r"^dlmkernels\s+0\.", said[2], re.M) and said[3].strip().isdigit()

    elsewhere = place | {"cwd": tmp_path}
    at = shell("python -c 'import dlmkernels, dlmkernels._C; print(dlmkernels._C.__file__)'", elsewhere)
    assert Path(at.strip()).is_relative_to(place["cwd"].parent / "env")
    bare = elsewhere | {"env": place["env"] | {"PATH": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""}}
    python = place["cwd"].parent / "env" / "bin" / "python"
    code = "import torch, dlmkernels; print(dlmkernels.ops.token_confidence(torch.eye(3)).token.tolist())"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, **bare)
    assert done.stdout == "[0, 1, 2]\n", f"without compiler, GPU and driver: {done.stderr}"

    (tmp_path / "quickstart.py").write_text("\n".join(pages.blocks("docs/quickstart.md")))
    assert "['10000000000000000']" in shell("python quickstart.py", elsewhere)
    look_at(tmp_path / "watch.html")
    (tmp_path / "watch.html").unlink()
    for arguments in pages.commands("docs/quickstart.md"):
        assert shell(shlex.join(["dlmkernels", *arguments]), elsewhere).strip()
    assert "<title>" in (tmp_path / "watch.html").read_text("utf-8")


def look_at(page):
    """Open the page of a decoding in a browser, if there is one, and find the canvas that its script draws."""
    assert "<title>" in page.read_text("utf-8")
    if CHROMIUM is None:
        return
    profile = page.parent / "profile"
    run = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
           "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    assert not re.search(r"CONSOLE.*|Uncaught|Content Security Policy", done.stderr), done.stderr
    assert len(set(re.findall(r'<span data-position="(\d+)"', done.stdout))) > 17
