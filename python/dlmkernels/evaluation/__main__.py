# SPDX-License-Identifier: Apache-2.0
"""`python -m dlmkernels.evaluation`: lm-eval's command line, with the model and tasks of this package as defaults."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import TASKS_DIR, register

COMMANDS = ("run", "ls", "validate")
#: Variables that --offline sets to 1, so that Hugging Face's libraries only read local files.
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")

#: Errors reported in one line, because users can fix their cause. Any other exception is a bug and shows a traceback.
USER_ERRORS = (ValueError, TypeError, ImportError, OSError)


def parse(arguments: Sequence[str]) -> tuple[object, argparse.Namespace]:
    """Parse lm-eval's arguments and fill in this package's defaults, without loading anything.

    Parameters
    ----------
    arguments : sequence of str
        Arguments of lm-eval, starting with `run` (which may be omitted), `ls` or `validate`.

    Returns
    -------
    cli : HarnessCLI
        lm-eval's command line.
    args : Namespace
        The parsed arguments.
    """
    from lm_eval._cli import HarnessCLI

    cli = HarnessCLI()
    words = [word for word in arguments if word != "--offline"]
    if words and words[0] not in COMMANDS and words[0] not in ("-h", "--help"):
        words.insert(0, "run")
    args = cli._parser.parse_args(words)
    if getattr(args, "command", None) in COMMANDS:
        own = getattr(args, "include_path", None)
        args.include_path = [str(TASKS_DIR)] + ([own] if own else [])
    if getattr(args, "command", None) == "run" and not args.config:
        args.model = args.model or "dlmkernels"
        args.device = args.device or _device()
    return cli, args


def _device() -> str:
    """Return the default device. lm-eval's own default is a GPU, whether there is one or not."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run lm-eval. Returns the exit code: 0 on success, 2 for a user error."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--offline" in arguments:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
    try:
        register()
        from lm_eval.utils import setup_logging

        setup_logging()
        cli, args = parse(arguments)
        cli.execute(args)  # type: ignore[attr-defined]
    except USER_ERRORS as error:
        if os.environ.get("DLMKERNELS_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"dlmkernels.evaluation: error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
