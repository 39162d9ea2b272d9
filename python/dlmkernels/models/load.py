# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint onto its stock transformers class, without running any code that comes with it."""

from __future__ import annotations

import json
import traceback
from os import PathLike
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from . import adapters
from .families import FAMILIES
from .published import Plan, Question, plan

#: Arguments of `from_pretrained` that say where a file is found.
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
OF_ONE_REPOSITORY = ("revision", "subfolder")


def load(
    path_or_id: str | PathLike, *, family: str | None = None, base: str | PathLike | None = None,
    allow_pickle: bool = False, **kwargs: Any,
):  # fmt: skip
    """Load a diffusion language model.

    Parameters
    ----------
    path_or_id : str or path
        A local folder or a hub id, in Hugging Face format: the published form of any known family, a stock
        transformers model, or a LoRA adapter in PEFT's format, which is merged into its base (PEFT is not needed).
    family : str, optional
        How it is decoded (a key of `FAMILIES`), where its configuration does not tell: a `LlamaForCausalLM` may have
        been trained as anything.
    base : str or path, optional
        The model an adapter is for, where it is not where `adapter_config.json` says.
    allow_pickle : bool
        Also read `pytorch_model.bin`, with `torch.load(weights_only=True)`. Off: safetensors alone.
    **kwargs
        Passed to `from_pretrained` (`dtype`, `device_map`, `quantization_config`, `revision`, …).

    Returns
    -------
    PreTrainedModel
        In evaluation mode, ready for `generate`. Its class is the stock one of the architecture, and it can be saved
        and loaded again by transformers alone; `config.dlm_family` keeps the family.

    Raises
    ------
    ValueError
        When the model type is not known or fits several families, weights are missing, unexpected or of another
        shape, or the files cannot be read. No remote code is ever run.
    """
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code is not supported: load runs no code from a checkpoint. Load the model yourself and "
            "pass it to dlmkernels.generate"
        )
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path_or_id, **where)
        adapter = adapters.adapter_config(path_or_id, where)
    except TypeError as error:
        raise ValueError(
            f"path_or_id: no readable model configuration at '{path_or_id}': it holds no object"
        ) from error
    except Exception as error:  # a file may hold anything
        raise ValueError(f"path_or_id: no readable model configuration at '{path_or_id}': {_say(error)}") from error
    if adapter is not None:
        return _load_adapted(path_or_id, adapter, base, family, where, allow_pickle, kwargs)
    if not raw:
        raise ValueError(f"path_or_id: no readable model configuration at '{path_or_id}': there is no config.json")
    try:
        how = plan(raw, family)
    except Exception as error:  # what the stock configurations raise has no common base
        raise ValueError(f"path_or_id: '{path_or_id}' cannot be loaded: {_say(error)}") from error
    return from_pretrained(how, path_or_id, use_safetensors=None if allow_pickle else True, **kwargs)


def _load_adapted(path_or_id, adapter: dict, base, family: str | None, where: dict, allow_pickle: bool, kwargs: dict):
    """The base of an adapter, and the adapter merged into it."""
    base = base or adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"path_or_id: the adapter at '{path_or_id}' does not name its base model: pass base=…")
    # the base has its own revision and folder
    base_where = {name: value for name, value in where.items() if name not in OF_ONE_REPOSITORY}
    kwargs = {name: value for name, value in kwargs.items() if name not in OF_ONE_REPOSITORY}
    try:
        raw, _ = PreTrainedConfig.get_config_dict(base, **base_where)
        how = plan(raw, family)
        if family is None and f"d2f-{how.family.name}" in FAMILIES:
            raise Question(
                f"nothing says how it was trained: pass family='{how.family.name}' or family='d2f-{how.family.name}'"
            )
        model = from_pretrained(how, base, use_safetensors=None if allow_pickle else True, **kwargs)
        adapters.merge(model, path_or_id, adapter, how.key_mapping, where, allow_pickle)
    except Exception as error:
        raise ValueError(f"path_or_id: the adapter at '{path_or_id}' cannot be loaded: {_say(error)}") from error
    return model


def from_pretrained(how: Plan, path_or_id: str | PathLike | None, **kwargs: Any):
    """The model of a plan, its weights checked: nothing may be missing, left over or of another shape."""
    kwargs |= {"config": how.config, "key_mapping": how.key_mapping or None, "output_loading_info": True}
    what = f"path_or_id: the checkpoint at '{path_or_id}'" if path_or_id else "model: its checkpoint"
    try:
        # Shapes that differ are collected rather than raised, so that all of them can be named.
        model, report = how.model_class.from_pretrained(path_or_id, ignore_mismatched_sizes=True, **kwargs)
    except Exception as error:  # safetensors, OS and JSON errors share no base class
        where = {name: kwargs[name] for name in WHERE if name in kwargs}
        reason = _unconverted(error) or (path_or_id and _unreadable(path_or_id, where)) or _say(error)
        raise ValueError(f"{what} cannot be loaded: {reason}") from error
    problems = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(report[kind]))}"
        for kind in ("missing_keys", "unexpected_keys")
        if report.get(kind)
    ]
    if report.get("mismatched_keys"):
        shapes = (f"{name} {list(found)}, expected {list(wanted)}" for name, found, wanted in report["mismatched_keys"])
        problems.append(f"wrong shapes: {'; '.join(sorted(shapes))}")
    if problems:
        raise ValueError(f"{what} does not fit its configuration; " + "; ".join(problems))
    # The model is a stock one from here on, and is saved under the names of its class.
    model._weight_conversions = None
    return model.eval()


def _say(error: Exception) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return f"it lacks {text}" if isinstance(error, KeyError) else text or type(error).__name__


def _unconverted(error: Exception) -> str:
    """Which weights of another shape, or with a part missing, could not be put together. "" where that is not it.

    transformers prints their names in a report, and raises without them.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        errors = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if errors:  # a traceback, what the error says, and for which weights
            said = {name: [*what.strip().splitlines(), ""][-3:][0] for name, what in errors.items()}
            return "; ".join(f"{name} does not fit: {what}" for name, what in sorted(said.items()))
    return ""


def _unreadable(path_or_id: str | PathLike, where: dict) -> str:
    """Which file of safetensors cannot be read, and why; "" if all can."""
    try:
        index = cached_file(path_or_id, SAFE_WEIGHTS_INDEX_NAME, **where, **adapters.QUIET)
        files = {SAFE_WEIGHTS_NAME}
        if index is not None:
            with open(index, encoding="utf-8") as stream:
                files = set(json.load(stream)["weight_map"].values())
    except Exception as error:
        return f"{SAFE_WEIGHTS_INDEX_NAME} is not an index of weights: {type(error).__name__}: {error}"
    for name in sorted(files, key=str):
        try:
            file = cached_file(path_or_id, name, **where, **adapters.QUIET)
            if file is None and index is not None:
                return f"there is no {name}, which {SAFE_WEIGHTS_INDEX_NAME} names"
            if file is not None:
                with safe_open(file, "pt") as weights:
                    weights.keys()
        except Exception as error:
            return f"{name} cannot be read: {_say(error)}"
    return ""
