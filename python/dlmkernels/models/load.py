# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint into its stock transformers class, without running any code that ships with it."""

from __future__ import annotations

import difflib
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
from .checkpoint import ADAPTER_CONFIG, WHERE, check_flag, locate, read_object, weight_files, weight_shapes
from .families import FAMILIES
from .published import Plan, Question, UnknownField, plan, renamed

OF_ONE_REPOSITORY = ("revision", "subfolder", "_commit_hash")
KINDS = ("missing_keys", "unexpected_keys")
#: Keywords that `from_pretrained` accepts beyond its signature, in any supported version of transformers.
PASSED_ON = {
    "allow_all_kernels", "attn_implementation", "device_map", "device_mesh", "disable_mmap", "distributed_config",
    "dtype", "experts_implementation", "fusion_config", "generation_config", "kernel_config", "low_cpu_mem_usage",
    "max_memory", "offload_buffers", "offload_folder", "offload_state_dict", "quantization_config", "subfolder",
    "torch_dtype", "tp_plan", "tp_size", "tqdm_class", "use_kernels", "variant",
}  # fmt: skip
#: Keywords of `from_pretrained` that `load` rejects, each with the reason or what to use instead.
OWN = {
    "config": "pass configuration fields as keywords", "ignore_mismatched_sizes": "all shapes must match",
    "key_mapping": "the family determines it", "output_loading_info": "any mismatch is an error",
    "state_dict": "weights come from the checkpoint", "use_safetensors": "use allow_pickle",
    "dlm_family": "use family", "gguf_file": "GGUF files are not supported", "weights_only": "it is always True",
    "adapter_kwargs": "adapters are merged", "adapter_name": "adapters are merged",
    "device": "pass device_map=…, such as 'cuda', or call .to(…) on the model",
}  # fmt: skip


def load(
    path_or_id: str | PathLike, *, family: str | None = None, base: str | PathLike | None = None,
    allow_pickle: bool = False, **kwargs: Any,
):  # fmt: skip
    """Load a diffusion language model.

    Parameters
    ----------
    path_or_id : str or path
        A local folder or Hub id in Hugging Face format: a published checkpoint of any known family, a stock
        transformers model, or a LoRA adapter in PEFT format, which is merged into its base model (PEFT is not needed).
        "demo" is the small model that ships with the package (write "./demo" for a local folder of that name).
        Also accepted: a training checkpoint (`.ckpt`, `.pth`, `.pt`) of MDLM, BD3-LM, Duo, SEDD or Diffusion-LM, from
        which the moving averages of the weights are read. It needs `family` and `allow_pickle`, and `block_size` or
        `num_attention_heads` if the file does not reveal them. Or a folder with the published files of Plaid or
        SSD-LM, which need `allow_pickle`.
    family : str, optional
        Family that determines how the model is decoded (a key of `FAMILIES`). Needed if the configuration does not
        identify it; a `LlamaForCausalLM`, for example, may have been trained in any way.
    base : str or path, optional
        Base model of an adapter, if it is not at the location given in `adapter_config.json`.
    allow_pickle : bool
        Whether to also read `pytorch_model.bin`, with `torch.load(weights_only=True)`, and training checkpoints, from
        which only tensors are read. If False, only safetensors files are read.
    **kwargs
        Arguments of transformers' `from_pretrained` (`dtype`, `device_map`, `quantization_config`, `revision`,
        `attn_implementation`, …), and configuration fields that override the checkpoint's
        (`max_position_embeddings`, `mask_token_id`, …).

    Returns
    -------
    PreTrainedModel
        The model, in evaluation mode and ready for `generate`. It is an instance of the architecture's stock class, so
        transformers alone can save it and load it again. The family is stored in `config.dlm_family`.

    Raises
    ------
    TypeError
        If `path_or_id` is not a string or path, or a keyword is neither a supported argument of `from_pretrained` nor
        a configuration field.
    ValueError
        If the checkpoint does not exist, its model type is unknown or fits several families, a configuration field has
        an invalid value, weights are missing, unexpected or of the wrong shape, the files cannot be read, or `base` is
        given for a model that is not an adapter.

    Notes
    -----
    A checkpoint is treated as data, and none of its code is run. Configuration fields that select implementations (of
    attention or experts), kernels or other files are ignored. Its quantizer must be an installed library unless
    `quantization_config` is passed, and its weight index may only name files in its own folder.
    """
    check_flag("allow_pickle", allow_pickle)
    for name in OWN.keys() & kwargs.keys():
        raise TypeError(f"load does not accept {name}: {OWN[name]}")
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code is not supported: load never runs code from a checkpoint. Load the model yourself and "
            "pass it to dlmkernels.generate"
        )
    _check_family(family)
    for name in ("dtype", "torch_dtype"):
        _check_dtype(name, kwargs.get(name))
    if str(path_or_id).endswith(training_files.SUFFIXES) and os.path.isfile(os.path.expanduser(path_or_id)):
        _check_no_base(path_or_id, base)
        return _load_training_file(os.path.expanduser(path_or_id), family, allow_pickle, kwargs)
    path, where = locate(path_or_id, {name: kwargs[name] for name in WHERE if name in kwargs})
    folders = {"plaid": training_files.is_plaid, "ssd-lm": training_files.is_ssd_lm}
    if any(family in (None, name) and is_one(path) for name, is_one in folders.items()):
        _check_no_base(path_or_id, base)
        return _load_training_file(path, family, allow_pickle, kwargs)
    raw, where = _read(path, CONFIG_NAME, where)
    adapter, where = _read(path, ADAPTER_CONFIG, where)
    if adapter is not None:
        return _load_adapted(path, adapter, base, family, where, allow_pickle, kwargs)
    _check_no_base(path_or_id, base)
    return _load(path, raw, family, where, allow_pickle, kwargs)


def _check_no_base(path_or_id: str | PathLike, base: Any) -> None:
    if base is not None:
        raise ValueError(f"base has no effect: '{path_or_id}' is not an adapter, so it has no base model")


def outline(
    path_or_id: str | PathLike, family: str | None = None, dtype: Any = None
) -> tuple[Callable[[], PreTrainedModel], str]:
    """Return a function that builds the checkpoint's model without its weights, and the name of its family.

    Reads only the configuration. `dtype` is the dtype of the parameters; if None, the one in the configuration, or
    bfloat16 if it has none. Raises the same errors as `load`.
    """
    _check_family(family)
    _check_dtype("dtype", dtype)
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


def _check_family(family: Any) -> None:
    if family is not None and family not in FAMILIES:
        near = difflib.get_close_matches(str(family), FAMILIES, 1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}{hint}")


def _check_dtype(name: str, dtype: Any) -> None:
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(
            f"{name} must be a dtype of torch or its name, such as float32, bfloat16 or float16, or auto; got {dtype!r}"
        )


def _load_training_file(path: str | PathLike, family: str | None, allow_pickle: bool, kwargs: dict[str, Any]):
    """Load a training checkpoint, or a folder with the files of Plaid or SSD-LM."""
    if not allow_pickle:
        if os.path.isdir(path):
            raise ValueError(f"path_or_id: '{path}' holds pickle files: pass allow_pickle=True to read their tensors")
        raise ValueError(f"path_or_id: '{path}' is a pickle: pass allow_pickle=True to read its tensors")
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
    """Read a JSON file of the checkpoint (None if absent); also return `where`, pinned to the same revision."""
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
    """Load the model at `path` with configuration `raw`. `ask(plan)` may raise `Question` before weights are read."""
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
    except Exception as error:  # errors raised by stock configurations share no base class
        raise ValueError(f"path_or_id: '{path}' cannot be loaded: {_say(error)}") from error
    how.config._commit_hash = where.get("_commit_hash")
    passed = {name: value for name, value in (kwargs | where).items() if name in _passed_on()}
    return from_pretrained(how, path, use_safetensors=None if allow_pickle else True, **passed)


@functools.cache
def _passed_on() -> set[str]:
    """Return the names of the keywords that are passed on to `from_pretrained`."""
    named = inspect.signature(PreTrainedModel.from_pretrained).parameters.values()
    return (PASSED_ON | {*WHERE} | {p.name for p in named if p.kind is not p.VAR_KEYWORD}) - OWN.keys()


def _load_adapted(path: str, adapter: dict, base, family: str | None, where: dict, allow_pickle: bool, kwargs: dict):
    """Load an adapter's base model and merge the adapter into it."""
    key_mapping: dict[str, str] = {}

    def ask(how: Plan) -> None:
        nonlocal key_mapping
        key_mapping = how.key_mapping
        if family is None and f"d2f-{how.family.name}" in FAMILIES:
            raise Question(
                "its configuration does not reveal how it was trained: pass "
                f"family='{how.family.name}' or family='d2f-{how.family.name}'"
            )

    # These apply to the adapter's repository; the base model has its own.
    base_where = {name: value for name, value in where.items() if name not in OF_ONE_REPOSITORY}
    kwargs = {name: value for name, value in kwargs.items() if name not in OF_ONE_REPOSITORY}
    try:
        base = base or adapters.base_of(adapter)
        if base is None:
            raise ValueError("it does not name its base model: pass base=…")
        base_path, base_where = locate(base, base_where)
        raw, base_where = _read(base_path, CONFIG_NAME, base_where)
        if _read(base_path, ADAPTER_CONFIG, base_where)[0] is not None:
            raise ValueError(f"its base '{base_path}' is itself an adapter; expected a full model")
        model = _load(base_path, raw, family, base_where, allow_pickle, kwargs, ask)
        adapters.merge(model, path, adapter, key_mapping, where, allow_pickle)
    except UnknownField:
        raise
    except Exception as error:
        raise ValueError(f"path_or_id: the adapter at '{path}' cannot be loaded: {_say(error)}") from error
    return model


def from_pretrained(how: Plan, path_or_id: str | PathLike | None, **kwargs: Any):
    """Load the model described by a plan, and check that no weight is missing, unexpected or of the wrong shape."""
    kwargs |= {"config": how.config, "key_mapping": how.key_mapping or None, "output_loading_info": True}
    what = f"path_or_id: the checkpoint at '{path_or_id}'" if path_or_id else "model: its checkpoint"
    try:
        # Mismatched shapes are collected rather than raised, so that the error can name all of them.
        model, report = how.model_class.from_pretrained(path_or_id, ignore_mismatched_sizes=True, **kwargs)
    except Exception as error:  # safetensors, OS and JSON errors share no base class
        raise ValueError(f"{what} cannot be loaded: {_unconverted(error) or _say(error)}") from error
    found = {kind: {name for name in report.get(kind, ()) if not how.leaves_out(name)} for kind in KINDS}
    problems = [f"{kind.replace('_', ' ')}: {', '.join(sorted(names))}" for kind, names in found.items() if names]
    if report.get("mismatched_keys"):
        shapes = (f"{name} {list(found)}, expected {list(wanted)}" for name, found, wanted in report["mismatched_keys"])
        problems.append(f"wrong shapes: {'; '.join(sorted(shapes))}")
    if problems:
        raise ValueError(f"{what} does not match its configuration; " + "; ".join(problems))
    # From here on this is a stock model, to be saved under its class's weight names.
    model._weight_conversions = None
    return model.eval()


def _say(error: Exception) -> str:
    """Return an error's message on one line."""
    text = " ".join(str(error).split())
    # a field that the configuration lacks, or a value that a table of transformers lacks
    return f"{text} is missing or unknown" if isinstance(error, KeyError) else text or type(error).__name__


def _unconverted(error: Exception) -> str:
    """Describe the weights that transformers failed to convert (a wrong shape or a missing part), or return "".

    transformers only prints their names in a report, and raises an error that does not name them.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        errors = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if errors:  # each a traceback, the error's message, and the weights concerned
            said = {name: [*what.strip().splitlines(), ""][-3:][0] for name, what in errors.items()}
            return "; ".join(f"{name} does not fit: {what}" for name, what in sorted(said.items()))
    return ""
