# SPDX-License-Identifier: Apache-2.0
"""The files of a job: its input, its output, and a description of the job.

Answers are written in input order, so the number of complete lines in the output is the progress of the job. A process
may be killed at any time: an incomplete last line is cut off when the job is resumed. `out.jsonl.job`, next to
`out.jsonl`, describes the job. A job with a different description does not touch the output.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .lines import Line, LineError, read_line

#: Interval in seconds at which written answers are flushed to disk (fsync).
SYNC_SECONDS = 5.0


@dataclass(frozen=True)
class Share:
    """The lines that one process answers: every `count`-th line, starting from line `rank` (counted from 0).

    Attributes
    ----------
    rank, count : int
        Number of the process, from 0, and number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """Read RANK and WORLD_SIZE, which torchrun and accelerate set. Without them, one process answers all lines."""
        try:
            share = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        except ValueError as error:
            raise ValueError(f"RANK and WORLD_SIZE in the environment must be integers: {error}") from None
        if share.count < 1:
            raise ValueError(f"WORLD_SIZE must be at least 1; got {share.count}")
        if not 0 <= share.rank < share.count:
            raise ValueError(
                f"RANK must be from 0 to {share.count - 1}, because WORLD_SIZE is {share.count}; got {share.rank}"
            )
        return share

    def has(self, number: int) -> bool:
        """Return whether line `number`, counted from 1, belongs to this share."""
        return (number - 1) % self.count == self.rank

    def lines_of(self, total: int) -> int:
        """Return how many of `total` lines belong to this share."""
        return len(range(self.rank, total, self.count))

    def file(self, output: Path) -> Path:
        """Return the path that this process writes to."""
        if self.count == 1:
            return output
        return output.with_name(f"{output.stem}.rank-{self.rank}-of-{self.count}{output.suffix}")

    @property
    def how_to_restart(self) -> str:
        """How the user can start a job over, for error messages."""
        if self.count == 1:
            return "choose another name, or pass --restart to start over"
        return "choose another name, or remove the output files of all processes to start over"


@dataclass(frozen=True)
class Input:
    """A file of requests that has been scanned once.

    Attributes
    ----------
    path : Path
    lines : int
        Number of lines.
    digest : str
        SHA-256 of the file's bytes.
    errors : list of LineError
        Errors of the first ten invalid lines.
    error_count : int
        Number of invalid lines.
    """

    path: Path
    lines: int
    digest: str
    errors: list[LineError]
    error_count: int

    @classmethod
    def scan(cls, path: Path) -> Input:
        """Read and check a whole file, so that invalid lines are found before a model is loaded."""
        digest, errors, count, number = hashlib.sha256(), [], 0, 0
        seen: dict[Any, int] = {}
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                digest.update(text)
                try:
                    line = read_line(number, text)
                    if line.id is not None and seen.setdefault(line.id, number) != number:
                        raise LineError(number, f"id {line.id!r} is already used by line {seen[line.id]}")
                except LineError as error:
                    count += 1
                    errors += [error] if count <= 10 else []
        return cls(path, number, digest.hexdigest(), errors, count)

    def requests(self, share: Share, done: int) -> Iterator[Line | LineError]:
        """Yield the lines of a share, skipping its first `done` lines."""
        seen: set[Any] = set()
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                mine = share.has(number)
                try:
                    line: Line | LineError = read_line(number, text)
                    assert isinstance(line, Line)
                    if line.id is not None and line.id in seen:
                        line = LineError(number, f"id {line.id!r} is already used by an earlier line")
                    elif self.error_count and line.id is not None:
                        seen.add(line.id)
                except LineError as error:
                    line = error
                if mine and done:
                    done -= 1
                elif mine:
                    yield line


class Output:
    """The output file of a job, open for writing. `done` is the number of answers in it."""

    def __init__(self, path: Path, file: IO[bytes], done: int):
        self.path, self._file, self.done = path, file, done
        self._synced = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        """Append the record of an answer."""
        try:
            text = json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, in an id or a message, has no UTF-8 form
            text = json.dumps(record).encode()
        self._file.write(text + b"\n")
        self._file.flush()
        self.done += 1
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Flush written answers to disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def check_apart(input: Path, output: Path, share: Share) -> None:
    """Raise ValueError if a file that the job writes or replaces is its input, or if the output is a folder."""
    names = [output, *(Share(rank, share.count).file(output) for rank in range(share.count))]
    for path in dict.fromkeys(names):
        if path.is_dir():
            raise ValueError(f"--output: {path} is a folder; expected a file")
        for file in (path, *(path.with_name(path.name + ending) for ending in (".job", ".job.new", ".new", ".lock"))):
            if file.exists() and input.exists() and os.path.samefile(input, file):
                raise ValueError(
                    f"--output must be another file than --input, which would be overwritten; got --input {input} and "
                    f"--output {output}" + ("" if file == output else f" (the job also writes {file})")
                )


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, creating it if needed, and hold an exclusive lock on it.

    Raises
    ------
    ValueError
        If another process holds the lock.
    """
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output: another process is writing to {path}") from None
        yield file


@contextmanager
def opened(path: Path, job: dict[str, Any], share: Share, restart: bool) -> Iterator[Output]:
    """Open the output of a job, either new or with the answers of an earlier run.

    Raises
    ------
    ValueError
        If the file exists and was written by another job or by no job, or if another process is writing to it.
    """
    with locked(path) as file:
        description = path.with_name(path.name + ".job")
        if restart:
            file.truncate(0)
            description.unlink(missing_ok=True)
        if description.exists():
            _check_same(path, description, job, share)
        elif path.stat().st_size:
            again = "pass --restart to overwrite it" if share.count == 1 else "remove it"
            raise ValueError(
                f"--output: {path} exists and was not written by a batch job: choose another name, or {again}"
            )
        else:
            temporary = description.with_name(description.name + ".new")
            temporary.write_text(json.dumps(job, indent=1) + "\n", "utf-8")
            os.replace(temporary, description)
        output = Output(path, file, _whole_lines(path, file, share))
        try:
            yield output
        finally:
            output.sync()


def _check_same(path: Path, description: Path, job: dict[str, Any], share: Share) -> None:
    """Raise ValueError if the description of an output is damaged, or differs from that of this job."""
    try:
        before = json.loads(description.read_text("utf-8"))
    except (ValueError, RecursionError):  # also bytes that are not UTF-8
        before = None
    if not isinstance(before, dict):
        raise ValueError(
            f"--output: {description}, the description of the job that wrote {path}, is damaged: {share.how_to_restart}"
        )
    differing = [name for name in {**before, **job} if before.get(name) != job.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"--output: {path} belongs to another job: {name} was {before.get(name)!r} and is now {job.get(name)!r}: "
            f"{share.how_to_restart}"
        )


def _whole_lines(path: Path, file: IO[bytes], share: Share) -> int:
    """Count the answers in a file, after cutting off an incomplete last line."""
    file.seek(0)
    end = count = 0
    for text in iter(file.readline, b""):
        if not text.endswith(b"\n"):
            break
        number = share.rank + 1 + count * share.count
        try:
            is_right = json.loads(text)["line"] == number
        except (ValueError, KeyError, TypeError):
            is_right = False
        if not is_right:
            raise ValueError(
                f"--output: line {count + 1} of {path} is not the answer to line {number} of the input, so the file "
                f"has been modified: {share.how_to_restart}"
            )
        end += len(text)
        count += 1
    file.truncate(end)
    return count


def is_whole(output: Path, job: dict[str, Any], lines: int, share: Share) -> bool:
    """Return whether an earlier run of the same job has already merged the answers of all processes."""
    description = output.with_name(output.name + ".job")
    if not output.exists():
        return False
    if not description.exists():
        raise ValueError(f"--output: {output} exists and was not written by a batch job: choose another name")
    _check_same(output, description, job, share)
    if _count(output) != lines:
        raise ValueError(f"--output: {output} must contain {lines} answers, but it has been modified: remove it")
    return True


def merge(output: Path, shares: int, lines: int) -> bool:
    """Merge the answers of all processes into one file, in input order, once all of them are complete.

    The process that finishes last does the merge and removes the files of the individual processes.

    Returns
    -------
    bool
        Whether the merged file exists.
    """
    all_shares = [Share(rank, shares) for rank in range(shares)]
    files = [share.file(output) for share in all_shares]
    with output.with_name(output.name + ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if output.exists():
            return True
        if not all(file.exists() and _count(file) == share.lines_of(lines) for file, share in zip(files, all_shares)):
            return False
        temporary = output.with_name(output.name + ".new")
        with temporary.open("wb") as whole:
            sources = [file.open("rb") for file in files]
            try:
                for number in range(lines):
                    whole.write(sources[number % shares].readline())
            finally:
                for source in sources:
                    source.close()
            whole.flush()
            os.fsync(whole.fileno())
        description = files[0].with_name(files[0].name + ".job")
        if description.exists():
            os.replace(description, output.with_name(output.name + ".job"))
        os.replace(temporary, output)
        for file in files:
            file.unlink(missing_ok=True)
            file.with_name(file.name + ".job").unlink(missing_ok=True)
    output.with_name(output.name + ".lock").unlink(missing_ok=True)
    return True


def _count(path: Path) -> int:
    """Count the complete lines of a file, those that end with a newline."""
    with path.open("rb") as file:
        return sum(text.endswith(b"\n") for text in file)
