# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint onto its stock transformers class, without running any code that comes with it."""

from __future__ import annotations

import functools
import inspect
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from . import adapters, fields, training_files
from .checkpoint import ADAPTER_CONFIG, WHERE, locate, read_object, weight_files, weight_shapes
from .families import FAMILIES
from .published import Plan, Question, UnknownField, plan, renamed

OF_ONE_REPOSITORY = ("revision", "subfolder", "_commit_hash")
KINDS = ("missing_keys", "unexpected_keys")
#: What `from_pretrained` takes beyond its signature, in any of the versions of transformers.
PASSED_ON = {
    "allow_all_kernels", "attn_implementation", "device_map", "device_mesh", "disable_mmap", "distributed_config",
    "dtype", "experts_implementation", "fusion_config", "generation_config", "kernel_config", "low_cpu_mem_usage",
    "max_memory", "offload_buffers", "offload_folder", "offload_state_dict", "quantization_config", "subfolder",
    "torch_dtype", "tp_plan", "tp_size", "tqdm_class", "use_kernels", "variant",
}  # fmt: skip
#: What `load` says itself, and how it is told.
OWN = {
    "config": "pass its fields by name", "ignore_mismatched_sizes": "shapes must be right",
    "key_mapping": "families say it", "output_loading_info": "what does not fit is an error",
    "state_dict": "weights come from the checkpoint", "use_safetensors": "see allow_pickle",
    "dlm_family": "pass family", "gguf_file": "GGUF files are not read", "weights_only": "it is always so",
    "adapter_kwargs": "adapters are merged", "adapter_name": "adapters are merged",
}  # fmt: skip


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
        "demo" is the small model that comes with the package ("./demo": a folder of that name). Or a file that a
        training of MDLM, BD3-LM, Duo, SEDD or Diffusion-LM has left (`.ckpt`, `.pth`, `.pt`), whose moving averages are
        taken; this needs `family`, `allow_pickle`, and `block_size` or `num_attention_heads` where nothing in the file
        shows them. Or a folder with the files of Plaid or SSD-LM, which need `allow_pickle`.
    family : str, optional
        How it is decoded (a key of `FAMILIES`), where its configuration does not tell: a `LlamaForCausalLM` may have
        been trained as anything.
    base : str or path, optional
        The model an adapter is for, where it is not where `adapter_config.json` says.
    allow_pickle : bool
        Also read `pytorch_model.bin`, with `torch.load(weights_only=True)`, and files of trainings, of which nothing
        but tensors is read. Off: safetensors alone.
    **kwargs
        Arguments of transformers' `from_pretrained` (`dtype`, `device_map`, `quantization_config`, `revision`,
        `attn_implementation`, …), and fields of the configuration in place of the checkpoint's
        (`max_position_embeddings`, `mask_token_id`, …).

    Returns
    -------
    PreTrainedModel
        In evaluation mode, ready for `generate`. Its class is the stock one of the architecture, and it can be saved
        and loaded again by transformers alone; `config.dlm_family` keeps the family.

    Raises
    ------
    TypeError
        When a keyword is neither an argument of `from_pretrained` nor a field of the configuration.
    ValueError
        When there is no such checkpoint, the model type is not known or fits several families, a field of the
        configuration is not what it must be, weights are missing, unexpected or of another shape, or the files cannot
        be read.

    Notes
    -----
    A checkpoint is data. None of its code is run; what its configuration says of implementations (of attention, of
    experts), of kernels and of other files is not heeded, its quantiser must be an installed library unless
    `quantization_config` is passed, and its index of weights may name files in its own folder alone.
    """
    for name in OWN.keys() & kwargs.keys():
        raise TypeError(f"load takes no {name}: {OWN[name]}")
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code is not supported: load runs no code from a checkpoint. Load the model yourself and "
            "pass it to dlmkernels.generate"
        )
    if str(path_or_id).endswith(training_files.SUFFIXES) and os.path.isfile(os.path.expanduser(path_or_id)):
        return _load_training_file(os.path.expanduser(path_or_id), family, allow_pickle, kwargs)
    path, where = locate(path_or_id, {name: kwargs[name] for name in WHERE if name in kwargs})
    folders = {"plaid": training_files.is_plaid, "ssd-lm": training_files.is_ssd_lm}
    if any(family in (None, name) and is_one(path) for name, is_one in folders.items()):
        return _load_training_file(path, family, allow_pickle, kwargs)
    raw, where = _read(path, CONFIG_NAME, where)
    adapter, where = _read(path, ADAPTER_CONFIG, where)
    if adapter is not None:
        return _load_adapted(path, adapter, base, family, where, allow_pickle, kwargs)
    return _load(path, raw, family, where, allow_pickle, kwargs)


def outline(
    path_or_id: str | PathLike, family: str | None = None, dtype: Any = None
) -> tuple[Callable[[], PreTrainedModel], str]:
    """What makes the model of a checkpoint without its weights, and its family. The configuration alone is read.

    `dtype`: of the parameters; None: what the configuration says, else bfloat16. Raises as `load` does.
    """
    path, where = locate(path_or_id, {})
    raw, _ = _read(path, CONFIG_NAME, where)
    if not raw:
        raise ValueError(f"path_or_id: no readable model configuration at '{path}': there is no {CONFIG_NAME}")
    try:
        how = plan(raw, family, {})
    except Exception as error:
        raise ValueError(f"path_or_id: '{path}' cannot be loaded: {_say(error)}") from error
    dtype = dtype or how.config.dtype or torch.bfloat16
    return lambda: how.model_class._from_config(how.config, dtype=dtype).eval(), how.family.name


def _load_training_file(path: str | PathLike, family: str | None, allow_pickle: bool, kwargs: dict[str, Any]):
    """The model of a file that a training has left."""
    if not allow_pickle:
        raise ValueError(f"path_or_id: '{path}' is a pickle: pass allow_pickle=True, with which its tensors are read")
    changes = {name: value for name, value in kwargs.items() if name not in _passed_on()}
    try:
        if os.path.isdir(path):
            read = training_files.read_plaid if training_files.is_plaid(os.fspath(path)) else training_files.read_ssd_lm
            how, state = read(os.fspath(path), changes)
        elif family == "diffusion-lm":
            content = training_files.read_training_file(os.fspath(path))
            how, state = training_files.read_diffusion_lm(content, changes)
        else:
            weights = training_files.weights_of(training_files.read_training_file(os.fspath(path)))
            how = training_files.plan_of(weights, family, changes)
            state = {f"backbone.{name}": weight for name, weight in weights.items()}
        with torch.device("meta"):
            empty = how.model_class(how.config)
        shapes = {name: tuple(weight.shape) for name, weight in state.items()}
        fields.check_model(empty, how.raw, {name: name for name in state}, shapes)
    except UnknownField:
        raise
    except Exception as error:
        raise ValueError(f"path_or_id: '{path}' cannot be loaded: {_say(error)}") from error
    passed = {name: value for name, value in kwargs.items() if name in _passed_on()}
    return from_pretrained(replace(how, key_mapping={}), None, **{"dtype": torch.float32} | passed, state_dict=state)


def _read(path: str, name: str, where: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """A JSON file of the checkpoint, None if there is none, and `where` to find the rest of the same revision."""
    try:
        found = read_object(path, name, where)
    except Exception as error:  # a file may hold anything
        raise ValueError(f"path_or_id: no readable model configuration at '{path}': {_say(error)}") from error
    if found is None:
        return None, where
    content, commit = found
    return content, where | ({"_commit_hash": commit} if commit else {})


def _load(
    path: str, raw: dict[str, Any] | None, family: str | None, where: dict[str, Any], allow_pickle: bool,
    kwargs: dict[str, Any], ask: Callable[[Plan], None] = lambda how: None,
):  # fmt: skip
    """The model at `path`, whose configuration is `raw`. `ask(plan)` may raise a question before weights are read."""
    if not raw:
        raise ValueError(f"path_or_id: no readable model configuration at '{path}': there is no {CONFIG_NAME}")
    changes = {name: value for name, value in kwargs.items() if name not in _passed_on()}
    try:
        fields.check_quantizer(raw, kwargs.get("quantization_config"))
        how = plan(raw, family, changes)
        ask(how)
        generation, _ = _read(path, GENERATION_CONFIG_NAME, where)
        fields.check({GENERATION_CONFIG_NAME: fields.ids(generation or {})})
        shapes = weight_shapes(weight_files(path, where, allow_pickle, kwargs.get("variant")))
        fields.check_sizes(how.raw, shapes)
        with torch.device("meta"):
            empty = how.model_class(how.config)
        fields.check_model(empty, how.raw, renamed(shapes, how.key_mapping), shapes)
    except UnknownField:
        raise
    except Exception as error:  # what the stock configurations raise has no common base
        raise ValueError(f"path_or_id: '{path}' cannot be loaded: {_say(error)}") from error
    how.config._commit_hash = where.get("_commit_hash")
    passed = {name: value for name, value in (kwargs | where).items() if name in _passed_on()}
    return from_pretrained(how, path, use_safetensors=None if allow_pickle else True, **passed)


@functools.cache
def _passed_on() -> set[str]:
    """Names of the arguments that are for `from_pretrained`."""
    named = inspect.signature(PreTrainedModel.from_pretrained).parameters.values()
    return (PASSED_ON | {*WHERE} | {p.name for p in named if p.kind is not p.VAR_KEYWORD}) - OWN.keys()


def _load_adapted(path: str, adapter: dict, base, family: str | None, where: dict, allow_pickle: bool, kwargs: dict):
    """The base of an adapter, and the adapter merged into it."""
    key_mapping: dict[str, str] = {}

    def ask(how: Plan) -> None:
        nonlocal key_mapping
        key_mapping = how.key_mapping
        if family is None and f"d2f-{how.family.name}" in FAMILIES:
            raise Question(
                f"nothing says how it was trained: pass family='{how.family.name}' or family='d2f-{how.family.name}'"
            )

    # the base has its own revision and folder
    base_where = {name: value for name, value in where.items() if name not in OF_ONE_REPOSITORY}
    kwargs = {name: value for name, value in kwargs.items() if name not in OF_ONE_REPOSITORY}
    try:
        base = base or adapters.base_of(adapter)
        if base is None:
            raise ValueError("it does not name its base model: pass base=…")
        base_path, base_where = locate(base, base_where)
        raw, base_where = _read(base_path, CONFIG_NAME, base_where)
        if _read(base_path, ADAPTER_CONFIG, base_where)[0] is not None:
            raise ValueError(f"its base '{base_path}' is an adapter, too")
        model = _load(base_path, raw, family, base_where, allow_pickle, kwargs, ask)
        adapters.merge(model, path, adapter, key_mapping, where, allow_pickle)
    except UnknownField:
        raise
    except Exception as error:
        raise ValueError(f"path_or_id: the adapter at '{path}' cannot be loaded: {_say(error)}") from error
    return model


def from_pretrained(how: Plan, path_or_id: str | PathLike | None, **kwargs: Any):
    """The model of a plan, its weights checked: nothing may be missing, left over or of another shape."""
    kwargs |= {"config": how.config, "key_mapping": how.key_mapping or None, "output_loading_info": True}
    what = f"path_or_id: the checkpoint at '{path_or_id}'" if path_or_id else "model: its checkpoint"
    try:
        # Shapes that differ are collected rather than raised, so that all of them can be named.
        model, report = how.model_class.from_pretrained(path_or_id, ignore_mismatched_sizes=True, **kwargs)
    except Exception as error:  # safetensors, OS and JSON errors share no base class
        raise ValueError(f"{what} cannot be loaded: {_unconverted(error) or _say(error)}") from error
    found = {kind: {name for name in report.get(kind, ()) if not how.leaves_out(name)} for kind in KINDS}
    problems = [f"{kind.replace('_', ' ')}: {', '.join(sorted(names))}" for kind, names in found.items() if names]
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
