# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint: locate them, and read configurations and weight shapes before building a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import PurePosixPath
from typing import Any

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import cached_files, extract_commit_hash

#: Arguments of `from_pretrained` that determine where files are looked up.
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
QUIET: dict[str, Any] = {
    f"_raise_exceptions_for_{trouble}": False for trouble in ("missing_entries", "connection_errors", "gated_repo")
}
ADAPTER_CONFIG = "adapter_config.json"
#: Name of the model that ships with the package.
DEMO = "demo"
#: Names of the causal model that ships with the package, and of its drafter.
DEMO_CAUSAL, DEMO_DRAFTER = "demo-causal", "demo-drafter"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
#: Timeout, in seconds, for asking the Hub whether a model exists.
HUB_SECONDS = 5.0

Shapes = dict[str, tuple[int, ...]]


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


# --- where ------------------------------------------------------------------------------------------------------------


def locate(path_or_id: str | PathLike, where: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the folder or Hub id, and the lookup arguments `where`.

    A local folder takes precedence. A name that cannot be a Hub id is not looked up there. If the Hub cannot be used,
    the model must already be in the local cache, and `local_files_only` is added to `where`.

    Raises
    ------
    TypeError
        If `path_or_id` is not a string or path.
    ValueError
        If there is neither a folder nor a model of that name on the Hub.
    """
    if not isinstance(path_or_id, (str, PathLike)):
        raise TypeError(f"path_or_id must be a folder or Hub id, as a string or path; got {type(path_or_id).__name__}")
    name = os.path.expanduser(os.fspath(path_or_id))
    if name == DEMO:
        from ..demo import MODEL_DIR

        return str(MODEL_DIR), where
    if "\0" in name:
        raise ValueError(f"path_or_id must be a folder or Hub id; got {name!r:.200}, which contains a null character")
    if os.path.isdir(name):
        return name, where
    if name in (DEMO_CAUSAL, DEMO_DRAFTER):
        from ..demo import CAUSAL_DIR, DRAFTER_DIR

        return str(CAUSAL_DIR if name == DEMO_CAUSAL else DRAFTER_DIR), where
    if os.path.exists(name):
        raise ValueError(f"path_or_id: '{name}' is a file; expected the folder that contains {CONFIG_NAME}")
    if isinstance(path_or_id, PathLike) or not HUB_ID.fullmatch(name):
        raise ValueError(f"path_or_id: there is no folder {_shown(name)}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"path_or_id: there is no folder {_shown(name)}, and the name is not a valid Hub id (at most 96 "
            "characters, without '--' or '..')"
        ) from None
    return name, where | _reach(name, where)


def _shown(name: str) -> str:
    """Return a name in quotes, shortened if it is long."""
    return f"'{name}'" if len(name) <= 200 else f"'{name[:200]}…' ({len(name)} characters)"


def _reach(name: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to add to `where` for a model on the Hub; raise ValueError if the model cannot be found."""
    trouble = "downloads are switched off"
    if not (where.get("local_files_only") or constants.HF_HUB_OFFLINE):
        try:
            HfApi().model_info(
                name, revision=where.get("revision"), token=where.get("token"), timeout=HUB_SECONDS
            )  # fmt: skip
            return {}
        except RevisionNotFoundError:
            raise ValueError(f"path_or_id: '{name}' has no revision '{where.get('revision')}' on the Hub") from None
        except RepositoryNotFoundError:
            raise ValueError(
                f"path_or_id: there is no folder '{name}', and no model of that name on the Hub (if it is private, "
                "pass token=…)"
            ) from None
        except HfHubHTTPError as error:
            trouble = f"the Hub responded with HTTP status {error.response.status_code}"
        except Exception as error:  # the error's class depends on the HTTP client
            trouble = f"the Hub cannot be reached ({type(error).__name__})"
    places = {key: where[key] for key in ("cache_dir", "revision") if where.get(key)}
    for file in (CONFIG_NAME, ADAPTER_CONFIG):
        if isinstance(try_to_load_from_cache(name, file, **places), str):
            return {"local_files_only": True}
    raise ValueError(
        f"path_or_id: there is no folder '{name}' and no downloaded model of that name in the cache, and {trouble}"
    )


# --- what -------------------------------------------------------------------------------------------------------------


def read_object(path_or_id: str, name: str, where: Mapping[str, Any]) -> tuple[dict[str, Any], str | None] | None:
    """Return the JSON object in a file of the checkpoint, and its revision; None if there is no such file.

    Raises
    ------
    ValueError
        If the file does not contain a JSON object.
    """
    file = cached_file(path_or_id, name, **where, **QUIET)
    if file is None:
        return None
    with open(file, encoding="utf-8") as stream:
        value = json.load(stream)
    if not isinstance(value, dict):
        raise ValueError(f"{name} must contain a JSON object; got {type(value).__name__}")
    return value, extract_commit_hash(file, None)


def weight_files(
    path_or_id: str, where: Mapping[str, Any], allow_pickle: bool = False, variant: str | None = None
) -> list[str]:
    """Return the files that contain the weights, the same ones that transformers would read.

    Raises
    ------
    ValueError
        If there are none, or their index names a file that is missing or outside the checkpoint's folder.
    """
    kinds = [(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)][: 1 + bool(allow_pickle)]
    for names in kinds:
        whole, index = (_with_variant(name, variant) for name in names)
        file = cached_file(path_or_id, whole, **where, **QUIET)
        if file is not None:
            return [file]
        file = cached_file(path_or_id, index, **where, **QUIET)
        if file is not None:
            return _shards(path_or_id, index, file, where)
    raise ValueError(
        f"there is no {_with_variant(SAFE_WEIGHTS_NAME, variant)}; load reads pickled weights only with "
        "allow_pickle=True"
    )


def _with_variant(name: str, variant: str | None) -> str:
    stem, dot, rest = name.partition(".")
    return f"{stem}.{variant}{dot}{rest}" if variant else name


def _shards(path_or_id: str, index: str, file: str, where: Mapping[str, Any]) -> list[str]:
    """Return the weight files named in an index."""
    try:
        with open(file, encoding="utf-8") as stream:
            read = json.load(stream)
        names, metadata = sorted(set(read["weight_map"].values()), key=str), read["metadata"]
        metadata.keys()  # transformers adds keys to it
    except Exception as error:
        raise ValueError(f"{index} is not a valid weight index: {type(error).__name__}: {error}") from error
    for name in names:
        if not _is_inside(name):
            raise ValueError(f"{index} names {name!r}; expected a file in the checkpoint's folder")
        if os.path.isdir(path_or_id) and cached_file(path_or_id, name, **where, **QUIET) is None:
            raise ValueError(f"{index} names {name}, but there is no such file")
    files = cached_files(path_or_id, names, **where, **QUIET)
    if files is None or len(files) < len(names):
        raise ValueError(f"some of the files named in {index} are missing")
    return list(files)


def _is_inside(name: Any) -> bool:
    """Return whether a name is that of a file in or below the folder. Symbolic links are not resolved."""
    if not isinstance(name, str) or not name or re.search(r"[\\:\0]", name):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def weight_shapes(files: list[str]) -> Shapes:
    """Return names and shapes of all weights in the files, without reading the weights.

    Raises
    ------
    ValueError
        If a file cannot be read.
    """
    shapes: Shapes = {}
    for file in files:
        try:
            shapes |= _header(file)
        except Exception as error:  # errors of safetensors and pickle share no base class
            raise ValueError(f"{os.path.basename(file)} cannot be read: {' '.join(str(error).split())}") from error
    return shapes


def _header(file: str) -> Shapes:
    if file.endswith(".safetensors"):
        with safe_open(file, "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    weights = torch.load(file, map_location="meta", weights_only=True)
    return {name: tuple(weight.shape) for name, weight in weights.items()}
