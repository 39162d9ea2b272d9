# SPDX-License-Identifier: Apache-2.0
"""The files of a job: what is asked, what has been answered, and what job it was.

Answers stand in the output in the order of the input, so that what is done is the number of whole lines. A process may
be killed at any time: a line without its end is cut off when the job goes on. Beside `out.jsonl` stands
`out.jsonl.job`, which says what the job was; a job that differs does not touch the output.
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

#: seconds after which what has been written is forced to the disk
SYNC_SECONDS = 5.0


@dataclass(frozen=True)
class Share:
    """Which of the lines a process answers: every `count`-th, from its rank on.

    Attributes
    ----------
    rank, count : int
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """From RANK and WORLD_SIZE, which torchrun and accelerate set; alone where they are not set."""
        try:
            share = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        except ValueError as error:
            raise ValueError(f"RANK and WORLD_SIZE in the environment must be integers: {error}") from None
        if not 0 <= share.rank < share.count:
            raise ValueError(f"RANK must be from 0 to WORLD_SIZE - 1; got {share.rank} of {share.count}")
        return share

    def has(self, number: int) -> bool:
        """Whether line `number`, from 1, is one of them."""
        return (number - 1) % self.count == self.rank

    def lines_of(self, total: int) -> int:
        """How many of `total` lines these are."""
        return len(range(self.rank, total, self.count))

    def file(self, output: Path) -> Path:
        """Where this process writes."""
        if self.count == 1:
            return output
        return output.with_name(f"{output.stem}.rank-{self.rank}-of-{self.count}{output.suffix}")


@dataclass(frozen=True)
class Input:
    """A file of requests that has been read once.

    Attributes
    ----------
    path : Path
    lines : int
    digest : str
        SHA-256 of its bytes.
    errors : list of LineError
        The first ten lines that are no requests.
    error_count : int
    """

    path: Path
    lines: int
    digest: str
    errors: list[LineError]
    error_count: int

    @classmethod
    def scan(cls, path: Path) -> Input:
        """Read all of a file, so that mistakes are known before a model is loaded."""
        digest, errors, count, number = hashlib.sha256(), [], 0, 0
        seen: dict[Any, int] = {}
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                digest.update(text)
                try:
                    line = read_line(number, text)
                    if line.id is not None and seen.setdefault(line.id, number) != number:
                        raise LineError(number, f"id {line.id!r} is that of line {seen[line.id]}, too")
                except LineError as error:
                    count += 1
                    errors += [error] if count <= 10 else []
        return cls(path, number, digest.hexdigest(), errors, count)

    def requests(self, share: Share, done: int) -> Iterator[Line | LineError]:
        """The lines of a share, without the first `done` of them."""
        seen: set[Any] = set()
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                mine = share.has(number)
                try:
                    line: Line | LineError = read_line(number, text)
                    assert isinstance(line, Line)
                    if line.id is not None and line.id in seen:
                        line = LineError(number, f"id {line.id!r} is that of an earlier line, too")
                    elif self.error_count and line.id is not None:
                        seen.add(line.id)
                except LineError as error:
                    line = error
                if mine and done:
                    done -= 1
                elif mine:
                    yield line


class Output:
    """A file of answers that is being written."""

    def __init__(self, path: Path, file: IO[bytes], done: int):
        self.path, self._file, self.done = path, file, done
        self._synced = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        """Add an answer."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.done += 1
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have what was written on the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """A file, made if there is none, that no other process opens in this way meanwhile."""
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output: another process is writing {path}") from None
        yield file


@contextmanager
def opened(path: Path, job: dict[str, Any], share: Share, restart: bool) -> Iterator[Output]:
    """The output of a job, new or with what has been answered already.

    Raises
    ------
    ValueError
        When there is a file that belongs to another job, or none; or one that another process writes.
    """
    with locked(path) as file:
        description = path.with_name(path.name + ".job")
        if restart:
            file.truncate(0)
            description.unlink(missing_ok=True)
        if description.exists():
            _check_same(path, json.loads(description.read_text("utf-8")), job)
        elif path.stat().st_size:
            raise ValueError(
                f"--output: {path} exists and was not written by such a job: choose another name, or pass --restart "
                "to overwrite it"
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


def _check_same(path: Path, before: dict[str, Any], job: dict[str, Any]) -> None:
    differing = [name for name in {**before, **job} if before.get(name) != job.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"--output: {path} belongs to a job with another {name} ({before.get(name)!r}, now {job.get(name)!r}): "
            "choose another name, or pass --restart to begin anew"
        )


def _whole_lines(path: Path, file: IO[bytes], share: Share) -> int:
    """How many answers a file holds; what was not written to its end is cut off."""
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
                f"--output: line {count + 1} of {path} is not the answer to line {number} of the input: the file has "
                "been changed; choose another name, or pass --restart to begin anew"
            )
        end += len(text)
        count += 1
    file.truncate(end)
    return count


def is_whole(output: Path, job: dict[str, Any], lines: int) -> bool:
    """Whether the answers of all processes have been put together by an earlier run of the same job."""
    description = output.with_name(output.name + ".job")
    if not output.exists():
        return False
    if not description.exists():
        raise ValueError(f"--output: {output} exists and was not written by such a job: choose another name")
    _check_same(output, json.loads(description.read_text("utf-8")), job)
    if _count(output) != lines:
        raise ValueError(f"--output: {output} does not hold {lines} answers: it has been changed; remove it")
    return True


def merge(output: Path, shares: int, lines: int) -> bool:
    """Put the answers of all processes into one file, in order, if all are there; whether that is done.

    The process that ends last does it. The files of the single processes are removed.
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
    """Lines of a file that have their end."""
    with path.open("rb") as file:
        return sum(text.endswith(b"\n") for text in file)
