# SPDX-License-Identifier: Apache-2.0
"""A job: answers to a file of requests, by this process or by its share of several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engine.engine import Engine
from .answers import answers
from .files import Input, Share, is_whole, merge, opened


class Job:
    """Answers to the lines of a file. What has been answered when the process is killed is not decoded again.

    >>> job = Job("prompts.jsonl", "out.jsonl", {"model": "demo"})
    >>> job.run(lambda: dk.Engine(model, tokenizer=tokenizer))

    Parameters
    ----------
    input, output : str or Path
        Files of JSON lines: see `read_line` and `answers`.
    description : dict
        What the answers depend on beside the input, such as model and options; values are JSON. Kept beside the output,
        so that a job which differs does not go on with it.
    seed : int
        See `Line.seed`.
    share : Share, optional
        Which lines are answered here; None: by RANK and WORLD_SIZE in the environment. Every process writes a file of
        its own; the last one puts them together.
    skip_errors : bool
        Lines that are no requests become records with `error`; False: they are refused before anything is decoded.
    restart : bool
        Begin anew where there is an output; for one process alone.
    token_ids, chat : bool
        See `answers`.

    Raises
    ------
    ValueError
        When the input holds lines that are no requests, or none at all.
    OSError
        When it cannot be read.
    """

    def __init__(
        self, input: str | Path, output: str | Path, description: dict[str, Any], *, seed: int = 0,
        share: Share | None = None, skip_errors: bool = False, restart: bool = False, token_ids: bool = False,
        chat: bool = False,
    ):  # fmt: skip
        self.share = Share.of_environment() if share is None else share
        self.output, self.seed = Path(output), seed
        self.skip_errors, self.restart, self.token_ids, self.chat = skip_errors, restart, token_ids, chat
        if restart and self.share.count > 1:
            raise ValueError("--restart: several processes cannot begin anew together; remove the output's files first")
        if self.output.parent != Path() and not self.output.parent.is_dir():
            raise ValueError(f"--output: there is no folder {self.output.parent}")
        self.input = Input.scan(Path(input))
        if not self.input.lines:
            raise ValueError(f"--input: {input} holds no line")
        if self.input.errors and not skip_errors:
            more = self.input.error_count - 1
            raise ValueError(f"--input: {self.input.errors[0]}" + (f" (and {more} more like it)" if more else "")
                             + "; --skip-errors writes such lines into the output as errors")  # fmt: skip
        self.description = description | {
            "input_sha256": self.input.digest, "seed": seed, "token_ids": token_ids, "chat": chat,
            "processes": self.share.count,
        }  # fmt: skip

    def run(self, make_engine: Callable[[], Engine]) -> int:
        """Answer what is left; how many lines were answered now.

        Parameters
        ----------
        make_engine : callable
            Loads the model; called only where something is left to do.
        """
        several = self.share.count > 1
        if several and is_whole(self.output, self.description, self.input.lines):
            return 0
        total = self.share.lines_of(self.input.lines)
        with opened(self.share.file(self.output), self.description, self.share, self.restart) as output:
            before = output.done
            if before < total:
                self._answer(make_engine(), output, total)
            answered = output.done - before
        if several:
            merge(self.output, self.share.count, self.input.lines)
        return answered

    def _answer(self, engine: Engine, output, total: int) -> None:
        from tqdm.auto import tqdm

        left = self.input.requests(self.share, output.done)
        with tqdm(total=total, initial=output.done, unit="line", disable=not sys.stderr.isatty()) as bar:
            for record in answers(engine, left, self.seed, self.token_ids, self.chat):
                output.write(record)
                bar.update()
