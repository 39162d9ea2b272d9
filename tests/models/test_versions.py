# SPDX-License-Identifier: Apache-2.0
"""Models on the oldest transformers that pyproject.toml claims; the newest is the one in constraints.txt, on which all
other tests run."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dlmkernels

ROOT = Path(__file__).parents[2]
FILES = [f"tests/{name}.py" for name in
         ("models/test_load", "models/test_models", "models/test_families", "models/test_other_forms", "models/test_untrusted",
          "models/test_diffusion_gemma", "decoding/test_causal_families", "decoding/test_front_door")]  # fmt: skip


def oldest():
    (version,) = re.findall(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return version


def pip(folder, *requirements):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", "--retries=1"]
    done = subprocess.run([*command, "--target", str(folder), *requirements], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(requirements)} cannot be installed from here: {done.stderr.strip().splitlines()[-1]}")


def unmet(folder):
    """What the packages in a folder ask for and neither they nor this environment are."""
    from packaging.requirements import Requirement

    inside = {
        d.metadata["Name"].lower().replace("_", "-"): d for d in importlib.metadata.distributions(path=[str(folder)])
    }
    wanted = [Requirement(line) for d in inside.values() for line in d.requires or ()]
    found = set()
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name.lower().replace("_", "-")
        try:
            version = inside[name].version if name in inside else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or version not in requirement.specifier:
            found.add(f"{requirement.name}{requirement.specifier}")
    return sorted(found)


@pytest.mark.slow
@pytest.mark.on_cpu
def test_oldest_transformers():
    """Installed beside this environment, in build/, and put before it."""
    version = oldest()
    folder = ROOT / "build" / f"transformers-{version}"
    if not (folder / f"transformers-{version}.dist-info").exists():
        pip(folder, f"transformers=={version}")
    for _ in range(3):  # what is needed may need something itself
        if missing := unmet(folder):
            pip(folder, *missing)
    path = os.pathsep.join((str(folder), str(Path(dlmkernels.__file__).parents[1])))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_XDIST_WORKER", None)
    code = "import transformers; print(transformers.__version__, transformers.__file__)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert said.startswith(f"{version} {folder}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *FILES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout[-4000:]


def test_what_is_claimed_is_what_is_tested():
    """The pinned version is among those claimed, and no other place names one."""
    (pinned,) = re.findall(r"^transformers==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert [int(n) for n in oldest().split(".")] < [int(n) for n in pinned.split(".")]
    for name in ("README.md", "docs/families.md"):
        claims = re.findall(r"transformers (?:≥|>=|from) ?([\d.]*\d)", (ROOT / name).read_text())
        assert all(claim == oldest() for claim in claims), f"{name} claims transformers {claims}"
