# SPDX-License-Identifier: Apache-2.0
"""Threads that wait sleep in processes of our own, and nobody else's process is changed."""

import os
import subprocess
import sys

import pytest

from dlmkernels.wait_policy import VARIABLE, is_command_line

ASK = f"import os; print(os.environ.get('{VARIABLE}'))"


def output(*command, **environment):
    env = {name: value for name, value in os.environ.items() if name != VARIABLE} | environment
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["/venv/bin/python", "/venv/bin/dlmkernels", "demo"], True),
        (["python", "-m", "dlmkernels", "demo"], True),
        (["python", "-X", "importtime", "-m", "dlmkernels"], True),
        (["python", "-m", "pytest", "dlmkernels"], False),
        (["python", "serve.py", "dlmkernels"], False),
        (["python"], False),
    ],
)
def test_only_our_own_command_counts(words, expected):
    assert is_command_line(words) == expected


def test_library_leaves_the_environment_alone():
    assert output("-c", f"import dlmkernels; {ASK}") == ["None"]


def test_command_line_chooses_before_torch_and_the_user_has_the_last_word(tmp_path):
    """The program `dlmkernels` is a script of that name that imports the package first."""
    script = tmp_path / "dlmkernels"
    script.write_text(f"import sys; from dlmkernels import cli; import torch; {ASK}\n")
    assert output(str(script)) == ["PASSIVE"]
    assert output(str(script), **{VARIABLE: "ACTIVE"}) == ["ACTIVE"]
