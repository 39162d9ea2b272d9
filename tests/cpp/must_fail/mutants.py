# SPDX-License-Identifier: Apache-2.0
"""Plants the faults of a `.mutants` file in copies of the kernels: `mutants.py select_tokens.mutants csrc out.h tsan`.

For a sanitizer's build (asan, tsan), only those in which it should notice something else than the plain build does.

The header that comes of it holds each copy in a namespace of its own, `dlm::cuda::mutants::<name>`, an unchanged one
named `none` among them, and a macro MUTANTS(ROW) with a row for each: ROW(name, what notices it in the plain build,
under AddressSanitizer, under ThreadSanitizer).

    copies cuda/sort.cuh cuda/select_tokens.cuh       files to copy, in the order of their inclusion

    mutant sort_reads_too_early: value value race     a name, and what notices it (must_fail.h)
    @@ cuda/sort.cuh
    -        __syncthreads();                         like a diff: lines to find, which must be there exactly once,
             read(key);                               and what to put in their place; how lines are indented and
    +                                                 broken does not matter

A mutant may change several places, each with a line `@@`.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple


class Hunk(NamedTuple):
    file: str
    find: str
    put: str


class Mutant(NamedTuple):
    name: str
    noticed_by: list[str]
    hunks: list[Hunk]


def parse(text: str) -> tuple[list[str], list[Mutant]]:
    """The files to copy, and the mutants."""
    copies: list[str] = []
    mutants: list[Mutant] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("copies "):
            copies += line.split()[1:]
        elif match := re.fullmatch(r"mutant (\w+): (\S+) (\S+) (\S+)", line):
            mutants.append(Mutant(match[1], list(match.groups()[1:]), []))
        elif line.startswith("@@ "):
            mutants[-1].hunks.append(Hunk(line[3:].strip(), "", ""))
        elif line[:1] in ("-", "+", " ") and mutants and mutants[-1].hunks:
            file, find, put = mutants[-1].hunks[-1]
            find += line[1:] + "\n" if line[0] != "+" else ""
            put += line[1:] + "\n" if line[0] != "-" else ""
            mutants[-1].hunks[-1] = Hunk(file, find, put)
        elif line.strip() and not line.startswith("#"):
            raise ValueError(f"line {number} is neither copies, mutant, @@, a line to find nor one to put: {line}")
    return copies, mutants


def planted(mutant: Mutant, sources: dict[str, str]) -> dict[str, str]:
    """The sources with the mutant's faults."""
    changed = dict(sources)
    for file, find, put in mutant.hunks:
        if file not in changed:
            raise ValueError(f"mutant {mutant.name}: {file} is not among the copies")
        pattern = r"\s+".join(map(re.escape, find.split()))
        found = len(re.findall(pattern, changed[file])) if pattern else 0
        if found != 1:
            raise ValueError(f"mutant {mutant.name}: {found} places in {file}, where there must be one, read\n{find}")
        changed[file] = re.sub(pattern, lambda _, put=put: put.strip(), changed[file])
    if not mutant.hunks or changed == sources:
        raise ValueError(f"mutant {mutant.name} changes nothing")
    return changed


def in_namespace(name: str, sources: dict[str, str], folder: Path) -> str:
    """The sources one after the other, what is in dlm::cuda there in a namespace within it."""
    inner, text = f"dlm::cuda::mutants::{name}", ""
    for file, source in sources.items():
        body = re.sub(r"^#\s*(include|pragma once)\b.*$", "", source, flags=re.M)
        body = body.replace("namespace dlm::cuda {", f"namespace {inner} {{")
        text += f'#line 1 "{folder / file}"\n{body}'
    return text


def told_apart_by(flavour: str, mutants: list[Mutant]) -> list[Mutant]:
    """All for the plain build; for another, the mutants that it notices otherwise."""
    index = ["plain", "asan", "tsan"].index(flavour)
    return [m for m in mutants if index == 0 or m.noticed_by[index] != m.noticed_by[0]]


def header(copies: list[str], mutants: list[Mutant], folder: Path) -> str:
    sources = {file: (folder / file).read_text(encoding="utf-8") for file in copies}
    included = re.findall(r"^#\s*include\s*(\S+)", "\n".join(sources.values()), flags=re.M)
    needed = [name for name in dict.fromkeys(included) if name.strip('"') not in copies]
    text = "#pragma once\n" + "".join(f"#include {name}\n" for name in needed)
    # What a fault leaves out may have been the only use of something.
    text += '#pragma GCC diagnostic push\n#pragma GCC diagnostic ignored "-Wunused"\n'
    text += '#pragma GCC diagnostic ignored "-Wunused-parameter"\n'
    text += in_namespace("none", sources, folder)
    for mutant in mutants:
        text += in_namespace(mutant.name, planted(mutant, sources), folder)
    rows = [("none", "-", "-", "-"), *((mutant.name, *mutant.noticed_by) for mutant in mutants)]
    names = [row[0] for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"two mutants have one name: {', '.join(sorted(names))}")
    listed = " ".join(f'ROW({name}, "{plain}", "{asan}", "{tsan}")' for name, plain, asan, tsan in rows)
    return text + f"#pragma GCC diagnostic pop\n#define MUTANTS(ROW) {listed}\n"


def main(arguments: list[str]) -> int:
    listing, folder, out = map(Path, arguments[:3])
    try:
        copies, mutants = parse(listing.read_text(encoding="utf-8"))
        for mutant in mutants:
            planted(mutant, {file: (folder / file).read_text(encoding="utf-8") for file in copies})
        text = header(copies, told_apart_by(arguments[3], mutants), folder)
    except ValueError as error:
        print(f"{listing}: {error}", file=sys.stderr)
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
