# SPDX-License-Identifier: Apache-2.0
"""Evaluation with lm-eval: `python -m dlmkernels.evaluation` (docs/evaluation.md). Needs the extra `eval`."""

from __future__ import annotations

from pathlib import Path

#: Where the tasks are that come with the package; they need no network.
TASKS_DIR = Path(__file__).parent / "tasks"

__all__ = ["TASKS_DIR", "EngineLM", "register"]


def register() -> None:
    """Let lm-eval know the model "dlmkernels", beside its own.

    Raises
    ------
    ImportError
        When lm-eval is not installed; the message says what to install.
    """
    _require()
    import lm_eval.models  # noqa: F401  # lm-eval fills its registry only while it is empty: its own models come first
    from lm_eval.api.registry import model_registry

    if "dlmkernels" not in model_registry:
        model_registry.register("dlmkernels", target="dlmkernels.evaluation.lm:EngineLM")


def _require() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise ImportError("dlmkernels.evaluation needs lm-eval: pip install 'dlmkernels[eval]'")


def __getattr__(name: str):
    """`EngineLM` is imported when it is asked for, since lm-eval takes seconds to import."""
    if name == "EngineLM":
        _require()
        from .lm import EngineLM

        return EngineLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
