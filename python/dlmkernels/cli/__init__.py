# SPDX-License-Identifier: Apache-2.0
"""The command line: `dlmkernels demo | generate | serve | plan | bench | info`. One module per command."""

from __future__ import annotations

import argparse
import os
import sys

from ..terminal import make_printable
from . import bench, demo, generate, info, plan, serve
from .options import as_typed

#: Command modules, in the order in which `dlmkernels --help` lists them.
COMMANDS = (demo, generate, serve, plan, bench, info)

#: Errors reported in one line, because users can fix their cause. Any other exception is a bug and shows a traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError, LookupError, MemoryError)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 on success, 2 for a user error, 130 on Ctrl-C, 141 on a broken pipe."""
    for stream in (sys.stdout, sys.stderr):
        make_printable(stream)
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader closed the pipe (`| head`); keep the flush at exit from failing, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except USER_ERRORS as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"dlmkernels: error: {as_typed(message)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dlmkernels", description="Decode diffusion language models in parallel.",
        epilog="Run `dlmkernels COMMAND --help` to list the options of a command.",
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


class _Version(argparse.Action):
    """Print the version and exit."""

    def __call__(self, parser, namespace, values, option_string=None):
        from .. import __version__

        print(f"dlmkernels {__version__}")
        parser.exit()
