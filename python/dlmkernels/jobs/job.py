# SPDX-License-Identifier: Apache-2.0
"""A batch job: answer a file of requests, in one process or divided among several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engine.engine import Engine
from .answers import answers
from .files import Input, Share, check_apart, is_whole, merge, opened


class Job:
    """Answer the lines of a file. A job that was killed resumes where it stopped, without decoding anything twice.

    >>> job = Job("prompts.jsonl", "out.jsonl", {"model": "demo"})
    >>> job.run(lambda: dk.Engine(model, tokenizer=tokenizer))

    Parameters
    ----------
    input, output : str or Path
        JSON Lines files; see `read_line` and `answers` for their records.
    description : dict
        Everything the answers depend on besides the input, such as the model and options; values must be JSON
        serializable. It is stored next to the output, so that a job with a different description does not resume it.
    seed : int
        See `Line.seed`.
    share : Share, optional
        Which lines this process answers. If None, RANK and WORLD_SIZE in the environment decide. Every process writes
        its own file; the last one to finish merges them.
    skip_errors : bool
        Whether invalid lines become records with `error`. If False, they raise before anything is decoded.
    restart : bool
        Whether to overwrite an existing output and start over. Only for a single process.
    token_ids, chat : bool
        See `answers`.

    Attributes
    ----------
    errors : int
        Number of lines that this process has recorded as errors, out of those that it has answered.

    Raises
    ------
    ValueError
        If the input is empty or has invalid lines (unless `skip_errors`), if the output's folder does not exist, if the
        input or output is a folder, if the output is the input, or if `restart` is used with several processes.
    OSError
        If the input cannot be read.
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
            raise ValueError("--restart works with one process only: remove the output files of all processes instead")
        if self.output.parent != Path() and not self.output.parent.is_dir():
            raise ValueError(f"--output: folder {self.output.parent} does not exist")
        if Path(input).is_dir():
            raise ValueError(f"--input: {input} is a folder; expected a file")
        check_apart(Path(input), self.output, self.share)
        try:
            self.input = Input.scan(Path(input))
        except OSError as error:
            raise OSError(f"--input: {input}: {error.strerror or error}") from error
        self.errors = 0
        if not self.input.lines:
            raise ValueError(f"--input: {input} is empty")
        if self.input.errors and not skip_errors:
            more = self.input.error_count - 1
            others = f" (and {more} more invalid line{'s' * (more > 1)})" if more else ""
            raise ValueError(
                f"--input: {self.input.errors[0]}{others}; pass --skip-errors to record such lines as errors in the "
                "output"
            )
        self.description = description | {
            "input_sha256": self.input.digest, "seed": seed, "token_ids": token_ids, "chat": chat,
            "processes": self.share.count,
        }  # fmt: skip

    def run(self, make_engine: Callable[[], Engine]) -> int:
        """Answer the remaining lines.

        Parameters
        ----------
        make_engine : callable
            Loads the model and returns an Engine. Called only if lines remain.

        Returns
        -------
        int
            Number of lines answered in this run.
        """
        several = self.share.count > 1
        if several and is_whole(self.output, self.description, self.input.lines, self.share):
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
                self.errors += "error" in record
                bar.update()
