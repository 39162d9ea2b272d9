# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint onto its stock transformers class, without running any code that comes with it."""

from __future__ import annotations

from os import PathLike
from typing import Any

import transformers

from .families import FAMILIES


def load(path_or_id: str | PathLike, **kwargs: Any):
    """Load a diffusion language model.

    Parameters
    ----------
    path_or_id : str or path
        A local folder or a hub id, in Hugging Face format with safetensors weights.
    **kwargs
        Passed to `from_pretrained` (`dtype`, `device_map`, `quantization_config`, `revision`, …).

    Returns
    -------
    PreTrainedModel
        In evaluation mode, ready for `generate`.

    Raises
    ------
    ValueError
        When the model type is not known, weights are missing, unexpected or of another shape, or the files cannot be
        read. No remote code and no pickle is ever loaded.
    """
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code is not supported: load runs no code from a checkpoint. Load the model yourself and "
            "pass it to dlmkernels.generate"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"path_or_id: no readable model configuration at '{path_or_id}': {error}") from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"path_or_id: '{path_or_id}' has model type '{config.model_type}'; known types: {', '.join(FAMILIES)}. "
            "Other models can be loaded by their own class and passed to dlmkernels.generate"
        )
    auto_class = getattr(transformers, family.auto_class)
    kwargs |= {"config": config, "trust_remote_code": False, "use_safetensors": True}
    try:
        model, report = auto_class.from_pretrained(path_or_id, output_loading_info=True, **kwargs)
    except Exception as error:  # safetensors, OS, shape and JSON errors share no base class
        raise ValueError(f"path_or_id: the checkpoint at '{path_or_id}' cannot be loaded: {error}") from error
    problems = [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(report[kind])))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report.get(kind)
    ]
    if problems:
        raise ValueError(f"path_or_id: the checkpoint at '{path_or_id}' does not fit its configuration; "
                         + "; ".join(problems))  # fmt: skip
    return model.eval()
