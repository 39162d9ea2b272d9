# SPDX-License-Identifier: Apache-2.0
"""Evaluate models with lm-eval: `python -m dlmkernels.evaluation` (docs/evaluation.md). Needs the extra `eval`."""

from __future__ import annotations

from pathlib import Path

#: Folder of the tasks in the package.
TASKS_DIR = Path(__file__).parent / "tasks"

__all__ = ["TASKS_DIR", "EngineLM", "register"]


def register() -> None:
    """Register the model "dlmkernels" with lm-eval.

    Raises
    ------
    ImportError
        If lm-eval is not installed. The message says what to install.
    """
    _require()
    import lm_eval.models  # noqa: F401  # first, because lm-eval registers its own models only if its registry is empty
    from lm_eval.api.registry import model_registry

    if "dlmkernels" not in model_registry:
        model_registry.register("dlmkernels", target="dlmkernels.evaluation.lm:EngineLM")


def _require() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise ImportError("dlmkernels.evaluation needs lm-eval: pip install 'dlmkernels[eval]'")


def __getattr__(name: str):
    """Import `EngineLM` on first access, because importing lm-eval takes seconds."""
    if name == "EngineLM":
        _require()
        from .lm import EngineLM

        return EngineLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
