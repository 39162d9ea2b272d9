# SPDX-License-Identifier: Apache-2.0
"""The dependency rules of csrc/README.md: common <- {cuda, cpu} <- torch <- python."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dlmkernels

ROOT = Path(__file__).resolve().parents[1]
CSRC, PYTHON, TESTS = ROOT / "csrc", ROOT / "python" / "dlmkernels", ROOT / "tests"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cuh", ".cu"})
MAY_INCLUDE = {
    "common": {"common"},
    "cpu": {"common", "cpu"},
    "cuda": {"common", "cuda"},
    "torch": {"common", "cpu", "cuda", "torch", "pybind11"},
}
# Headers that are neither ours nor the standard library's, and the one place for each.
INTRINSICS = re.compile(r"\w*intrin\.h|arm_neon\.h|arm_sve\.h")
ELSEWHERE = [
    (INTRINSICS, re.compile(r"cpu/simd_\w+\.h")),
    (re.compile(r"cuda_\w+\.h"), re.compile(r"cuda/device\.h|torch/cuda_stream\.h")),
    (re.compile(r"simt/\w+\.h"), re.compile(r"cuda/(device\.h|ptx\.cuh)")),  # the machine of the native tests
    (re.compile(r"dlfcn\.h"), re.compile(r"torch/symbols\.h")),
    (re.compile(r"cpuid\.h|unistd\.h|sys/\w+\.h|asm/\w+\.h"), re.compile(r"cpu/isa\.cpp")),
]
MACHINE_CODE = re.compile(r"\b(__)?asm(__)?\b|\b_mm\d*_\w+|\b__m(64|128|256|512)\w*|\b_tile_\w+")
MACHINE_CODE_FILES = re.compile(r"cpu/simd_\w+\.h|cuda/ptx\.cuh")
NOT_IN_KERNELS = re.compile(
    r"\b(malloc|calloc|realloc|free|alloca|new|delete|throw|try|catch|printf|fprintf|puts|exit|abort|assert"
    r"|std::(thread|jthread|async|mutex|atomic|vector|string|map|set|deque|list|function|unique_ptr|shared_ptr"
    r"|make_unique|make_shared|cout|cerr|stable_sort|stable_partition|inplace_merge)|omp)\b"
)


def relative(path):
    return path.relative_to(CSRC).as_posix()


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.M)


def code(path):
    """The text of a source file without comments and string literals."""
    text = re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', path.read_text(encoding="utf-8"))
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def ops():
    """Op names, from their schemas."""
    return re.findall(r'DLM_DEF\(\s*m,\s*"(\w+)\(', (CSRC / "torch/ops.cpp").read_text(encoding="utf-8"))


def cmake_ops():
    return re.search(r"set\(ops ([\w\s]+)\)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))[1].split()


def functions(path):
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def imports(path):
    """Every module a file imports, with every name it takes from one: 'torch', '.', '._C', 'dlmkernels._C' ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def test_sources_are_found():
    assert {relative(path).split("/")[0] for path in SOURCES} >= {"common", "cpu", "torch"} and len(SOURCES) > 15
    assert sorted(name.rstrip("_") for name in ops()) == sorted(cmake_ops())


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_includes_point_down(path):
    name = relative(path)
    folder = name.split("/")[0]
    for header in includes(path):
        top = header.split("/")[0]
        place = next((files for headers, files in ELSEWHERE if headers.fullmatch(header)), None)
        if place:
            assert place.fullmatch(name), f"{name} includes {header}, which belongs in {place.pattern}"
        elif "/" in header:
            assert top in MAY_INCLUDE[folder], f"{name} includes {header}, which {folder}/ must not know"
            if top in MAY_INCLUDE and not header.startswith("torch/"):
                assert (CSRC / header).exists(), f"{name} includes {header} from outside csrc"
        else:
            assert re.fullmatch(r"[a-z_]+[0-9]*", header) or (header == "Python.h" and folder == "torch"), (
                f"{name} includes {header}: neither ours (from the root of csrc) nor of the C++ standard library"
            )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_machine_code_stays_in_its_headers(path):
    name = relative(path)
    if not MACHINE_CODE_FILES.fullmatch(name):
        found = MACHINE_CODE.search(code(path))
        assert not found, f"{name} contains {found[0]}"


KERNELS = [path for path in SOURCES if not re.match(r"torch/|cpu/isa\.", relative(path))]


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernels_only_compute(path):
    """No heap, no exceptions, no printing, no threads."""
    found = NOT_IN_KERNELS.search(code(path))
    assert not found, f"{relative(path)} contains {found[0]}"


@pytest.mark.parametrize("path", [p for p in (CSRC / "cpu").glob("*_*.cpp") if p.stem not in cmake_ops()], ids=relative)
def test_instruction_sets_have_their_namespaces(path):
    """Code compiled with other flags must not be merged with code that runs everywhere."""
    isa = path.stem.rsplit("_", 1)[1]
    assert re.search(rf"namespace dlm::cpu::{isa} {{|#define DLM_NAMESPACE {isa}\n", code(path))


@pytest.mark.parametrize("op", ops())
def test_an_op_is_present_in_every_layer(op):
    name = op.rstrip("_")
    for file in (f"torch/{name}.cpp", f"cpu/{name}.h", f"cpu/{name}.cpp", f"cpu/{name}_generic.cpp"):
        assert (CSRC / file).is_file(), f"csrc/{file} is missing"
    for folder in ("ops", "reference"):
        assert op in functions(PYTHON / folder / f"{name}.py"), f"{folder}/{name}.py has no function {op}"
    assert f'register_fake(add_op_namespace_prefix("{op}"))' in (PYTHON / "ops" / f"{name}.py").read_text(
        encoding="utf-8"
    )
    tests = TESTS / "ops" / f"test_{name}.py"
    assert tests.is_file(), f"tests/ops/{tests.name} is missing"
    for proof in (f"reference.{op}", "opcheck(", "fullgraph=True"):
        assert proof in tests.read_text(encoding="utf-8"), f"{tests.name} does without {proof}"


@pytest.mark.parametrize(
    "path",
    [PYTHON / "arguments.py", *sorted((PYTHON / "reference").glob("*.py")), *sorted((PYTHON / "ops").glob("*.py"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_op_modules_import_torch_only(path):
    """And each other within their package; of the rest, the ops need arguments.py."""
    ours = {"ops": r"\.\w|\.\.arguments|\.\._ops", "reference": r"\.\w"}.get(path.parent.name, "(?!)")
    modules = {module.split(".")[0] for module in imports(path) if not re.match(ours, module)}
    modules -= set(sys.stdlib_module_names)
    assert modules == {"torch"} or (path.name == "__init__.py" and not modules)


DECODING = sorted((PYTHON / "decoding").glob("**/*.py"))


@pytest.mark.parametrize("path", DECODING, ids=lambda p: p.relative_to(PYTHON).as_posix())
def test_decoding_goes_through_the_ops(path):
    assert not [module for module in imports(path) if re.search(r"(^|\.)_C(\.|$)", module)]


@pytest.mark.parametrize(
    "path", DECODING + sorted((PYTHON / "engine").glob("*.py")), ids=lambda p: p.relative_to(PYTHON).as_posix()
)
def test_decoding_is_made_of_small_modules(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def modules_needed(path):
    """The modules of the package that a file imports, for type checkers alone too."""
    package = ("dlmkernels", *path.relative_to(PYTHON).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = (*package[: len(package) + 1 - node.level], *(node.module or "").split("."))
            base = ".".join(part for part in parts if part)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def import_graph():
    """Name of a module -> names of those it imports. A package's own file counts where something is taken from it."""
    names = {}
    for path in PYTHON.glob("**/*.py"):
        parts = ("dlmkernels", *path.relative_to(PYTHON).with_suffix("").parts)
        names[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in names.items():
        needed = modules_needed(path) & names.keys() - {name}
        # `from . import ops` needs the module and not what the package's own file is made of
        graph[name] = {other for other in needed if not any(deeper.startswith(other + ".") for deeper in needed)}
    return graph


def circles(graph):
    """Sets of modules that import each other, in however many steps."""
    reach = {name: set(others) for name, others in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    return {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}


def test_no_module_imports_itself_by_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}
    graph = import_graph()
    assert len(graph) > 60 and not circles(graph)


#: what each layer of a decoding may know of the others, lowest first
LAYERS = ["state", "standing", "step", "scores", "rules", "constraint", "config", "propose", "forward", "programs",
          "generate"]  # fmt: skip


def test_layers_of_a_decoding():
    graph = {name: others for name, others in import_graph().items() if name.startswith("dlmkernels.decoding.")}

    def layer(name):
        place = name.split(".")[2]
        return LAYERS.index(place) if place in LAYERS else None

    seen = set()
    for name, others in graph.items():
        for other in others & graph.keys():
            if layer(name) is not None and layer(other) is not None:
                seen.add(layer(name))
                assert layer(other) <= layer(name), f"{name} imports {other}"
    assert len(seen) > 6


def test_nothing_knows_the_engine_but_what_is_above_it():
    below = ("ops", "reference", "models", "decoding")
    for name, others in import_graph().items():
        if name.split(".")[1:2] and name.split(".")[1] in below:
            assert not [other for other in others if other.startswith("dlmkernels.engine")], name


def test_there_is_one_loop():
    """Every program is run by the same function; what it reads of the device it reads there."""
    loops = {
        path.relative_to(PYTHON).as_posix()
        for path in DECODING
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "OpenCount"
    }
    assert loops == {"decoding/programs/base.py"}
    assert not [
        path for path in DECODING
        if [name for name in functions(path) if name.startswith("decode")]
    ]  # fmt: skip


# --- the built extension ---------------------------------------------------------------------------------------------


LIBRARY = Path(dlmkernels._C.__file__).with_name("libdlmkernels.so")


def symbols(library, *options):
    nm = shutil.which("nm")
    if not nm:
        pytest.skip("no nm")
    run = subprocess.run([nm, "-D", "-C", *options, str(library)], capture_output=True, text=True, check=True)
    return [line.split(maxsplit=1 + (options[0] == "--defined-only"))[-1] for line in run.stdout.splitlines()]


def test_library_needs_the_stable_abi_alone():
    """One build serves many versions of torch: no C++ symbol of it is linked against. And every Python: none of its."""
    undefined = symbols(LIBRARY, "--undefined-only")
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert not [name for name in undefined if re.search(r"\b(c10|at|torch|caffe2)::", name)]
    assert not [name for name in undefined if re.match(r"_?Py[A-Z_]", name)]


def test_bindings_need_the_library_alone():
    """What a version of Python asks to be built again has no symbol of torch."""
    undefined = symbols(dlmkernels._C.__file__, "--undefined-only")
    assert any(name.startswith("dlm::diagnostics::cpu_isa") for name in undefined)
    assert not [name for name in undefined if "torch" in name]


def test_what_is_exported():
    assert symbols(dlmkernels._C.__file__, "--defined-only") == ["PyInit__C"]
    exported = {name.split("[")[0].split("(")[0] for name in symbols(LIBRARY, "--defined-only")}
    names = ("build_info", "cpu_isa", "cpu_isa_reason", "cpu_isas", "cpu_kernels", "set_cpu_isa")
    assert exported == {f"dlm::diagnostics::{name}" for name in names}
