#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""ptx2cpp.py IN.ptx OUT.cpp: turn the PTX that nvcc made into C++ that runs on the SIMT machine.

The tests then execute what nvcc compiled, inline assembly included, not another compilation of the source. A PTX
register becomes a local variable, an instruction a statement, a branch a goto, a kernel a function that is found by the
kernel's symbol. Each rule below matches a whole opcode, modifiers included; an instruction without a rule stops the
translation with a message, so nothing is ever passed over in silence.
"""

import re
import sys

C_TYPE = {f"{kind}{n}": f"{'' if kind == 's' else 'u'}int{n}_t" for kind in "usb" for n in (8, 16, 32, 64)}
C_TYPE |= {"f32": "float", "f64": "double", "pred": "bool"}
SIZE = {t: int(t[1:]) // 8 for t in C_TYPE if t != "pred"}
SPECIAL = {"%tid": "simt::current->thread", "%ctaid": "simt::current->block"}
SPECIAL |= {"%ntid": "simt::block_dim", "%nctaid": "simt::grid_dim"}
FLOATS = ("f32", "f64")

RULES = []  # (compiled pattern, function(kernel, operands, match))


def rule(pattern):
    """Register a rule. In patterns: INT, BITS and FLOAT stand for a type, captured as `t`."""
    pattern = pattern.replace("INT", "(?P<t>[us](?:8|16|32|64))").replace("BITS", "(?P<t>[usb](?:8|16|32|64))")
    pattern = pattern.replace("FLOAT", "(?P<t>f32|f64)")

    def register(function):
        RULES.append((re.compile(pattern), function))
        return function

    return register


def unsigned(t):
    return "u" + t[1:]


def split(text):
    """Split operands at the commas outside brackets."""
    parts, depth, part = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += c
    return parts + ([part.strip()] if part.strip() else [])


def vector(operand):
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


class Kernel:
    """One entry point: its variables, and the statements made so far."""

    def __init__(self, name, params, shared, files):
        self.name, self.shared, self.files = name, shared, files
        self.registers, self.local = {}, {}  # variable -> PTX type; local arrays -> bytes
        self.lines, self.scopes, self.scope_count = [], [], 0
        self.params, at = {}, 0
        for align, size, param in params:
            at = (at + align - 1) // align * align
            self.params[param] = at
            at += size
        self.param_bytes = at

    def stop(self, what):
        raise SystemExit(f"ptx2cpp: kernel {self.name}: {what}")

    # --- operands ---

    def variable(self, operand):
        for scope in reversed(self.scopes):
            if operand in scope:
                return scope[operand]
        return re.sub(r"[%$]", "", operand)

    def read(self, operand, t):
        """C++ expression for an operand read as type `t`."""
        name = self.variable(operand.lstrip("!"))
        if operand.startswith("!"):
            return f"!{name}"
        if name in self.registers:
            has = self.registers[name]
            if t == "pred":
                return name
            if t in FLOATS:
                return name if has == t else f"bits<{C_TYPE[t]}>({name})"
            if has in FLOATS:
                name = f"bits<uint{SIZE[has] * 8}_t>({name})"
            return f"({C_TYPE[t]}){name}"
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return f"bits<float>(0x{found[1]}u)"
        if found := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            return f"bits<double>(0x{found[1]}ull)"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            digits = operand.rstrip("U")
            # The most negative number has no positive counterpart in its type.
            literal = f"-1 - {int(digits[1:]) - 1}ll" if digits.startswith("-") else f"{digits}ull"
            return f"({C_TYPE[t]})({literal})"
        if (found := re.fullmatch(r"(%\w+)\.([xyz])", operand)) and found[1] in SPECIAL:
            return f"{SPECIAL[found[1]]}.{found[2]}"
        if operand == "%laneid":
            return "simt::current->lane"
        if operand in self.params:
            return f"(uint64_t)(params + {self.params[operand]})"
        if operand in self.local:
            return f"(uint64_t){self.variable(operand)}"
        if operand in self.shared:
            return f"({C_TYPE[t]}){self.shared[operand]}u"
        return self.stop(f"operand not translated: {operand}")

    def address(self, operand, space):
        """Address of `[base + offset]`: 32 bits in shared memory, else a pointer of the host."""
        found = re.fullmatch(r"\[\s*([^+\]]+?)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not found:
            self.stop(f"address not translated: {operand}")
        return f"({self.read(found[1], 'u32' if space == 'shared' else 'u64')} + {found[2] or 0})"

    def pointer(self, operand, space):
        address = self.address(operand, space)
        return f"shared({address})" if space == "shared" else address

    def emit(self, statement):
        self.lines.append("  " + statement)

    def write(self, register, t, expression):
        """Assign an expression of type `t`."""
        if register == "_":
            return self.emit(f"(void)({expression});")
        name = self.variable(register)
        if name not in self.registers:
            self.stop(f"not a register: {register}")
        has = self.registers[name]
        if has in FLOATS and t not in FLOATS:
            expression = f"bits<{C_TYPE[has]}>((uint{SIZE[has] * 8}_t)({expression}))"
        elif has not in (*FLOATS, "pred") and t in FLOATS:
            expression = f"bits<uint{SIZE[t] * 8}_t>({expression})"
        return self.emit(f"{name} = {expression};")

    # --- statements ---

    def instruction(self, text):
        if guard := re.match(r"@(!?)(\S+)\s+(.*)", text):
            start = len(self.lines)
            self.instruction(guard[3])
            body = " ".join(line.strip() for line in self.lines[start:])
            self.lines[start:] = [f"  if ({guard[1]}{self.variable(guard[2])}) {{ {body} }}"]
            return
        opcode, _, operands = text.partition(" ")
        for pattern, function in RULES:
            if match := pattern.fullmatch(opcode):
                function(self, split(operands), match)
                return
        self.stop(f"instruction not translated: {text}")

    def declare(self, text):
        if found := re.fullmatch(r"\.reg \.(\w+) (.*)", text):
            t = found[1]
            if t not in C_TYPE:
                self.stop(f"register type not translated: {text}")
            for name in split(found[2]):
                if many := re.fullmatch(r"%(\w+)<(\d+)>", name):
                    self.registers |= {f"{many[1]}{i}": t for i in range(int(many[2]))}
                elif self.scopes:
                    self.scopes[-1][name] = f"{name.lstrip('%')}_scope{self.scope_count}"
                    self.registers[self.scopes[-1][name]] = t
                else:
                    self.registers[self.variable(name)] = t
        elif found := re.fullmatch(r"\.local \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
            self.local[found[2]] = (int(found[1]), int(found[3]))
        elif not text.startswith(".pragma"):
            self.stop(f"directive not translated: {text}")

    def location(self, text):
        """`#line` of a .loc; for what is inlined from ptx.cuh, the place of the call."""
        place = re.match(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?", text)
        file, line = place[1], place[2]
        if place[3] and self.files.get(file, "").endswith("ptx.cuh"):
            file, line = place[3], place[4]
        if line != "0":
            self.lines.append(f'#line {line} "{self.files.get(file, "ptx")}"')

    def translate(self, text):
        skip, label = re.compile(r"\s+|//[^\n]*"), re.compile(r"([$\w]+):")
        loc = re.compile(r"\.loc\s[^\n]*")
        at = 0
        while at < len(text):
            if found := skip.match(text, at):
                at = found.end()
            elif found := loc.match(text, at):
                self.location(found[0])
                at = found.end()
            elif text[at] == "{":
                self.scope_count += 1
                inside = text[at : text.index("}", at)]
                self.scopes.append({n: f"{n}_scope{self.scope_count}" for n in re.findall(r"^\s*(\w+):", inside, re.M)})
                at += 1
            elif text[at] == "}":
                self.scopes.pop()
                at += 1
            elif found := label.match(text, at):
                self.lines.append(f"{self.variable(found[1])}: ;")
                at = found.end()
            else:
                end = text.index(";", at)
                statement = " ".join(text[at:end].split())
                at = end + 1
                self.declare(statement) if statement.startswith(".") else self.instruction(statement)

    def function(self):
        body = "\n".join(self.lines)
        used = set(re.findall(r"\w+", body))
        by_type = {}
        for name, t in self.registers.items():
            if name in used:
                by_type.setdefault(C_TYPE[t], []).append(name + "{}")
        declared = [f"  {t} {', '.join(names)};" for t, names in by_type.items()]
        declared += [f"  alignas({align}) uint8_t {name}[{size}];" for name, (align, size) in self.local.items()]
        return (
            f"static void ptx_{self.name}([[maybe_unused]] const uint8_t* params) {{\n"
            + "\n".join([*declared, body])
            + f"\n}}\nstatic const simt::RegisterTranslated register_{self.name}(\n"
            + f'    "{self.name}", ptx_{self.name}, {self.param_bytes});\n'
        )


# --- data movement --------------------------------------------------------------------------------------------------


@rule(r"mov\.(?P<t>pred|f32|f64|[usb](?:16|32|64))")
def mov(k, a, m):
    t = m["t"]
    if a[0].startswith("{"):
        parts = vector(a[0])
        width = SIZE[t] * 8 // len(parts)
        k.emit(f"{{ const uint64_t whole = {k.read(a[1], 'u64' if SIZE[t] == 8 else 'u32')};")
        for i, part in enumerate(parts):
            k.write(part, f"u{width}", f"(uint{width}_t)(whole >> {i * width})")
        k.emit("}")
    elif a[1].startswith("{"):
        parts = vector(a[1])
        width = SIZE[t] * 8 // len(parts)
        pieces = [f"(uint64_t)(uint{width}_t){k.read(p, f'u{width}')} << {i * width}" for i, p in enumerate(parts)]
        k.write(a[0], t, f"({C_TYPE[unsigned(t)]})({' | '.join(pieces)})")
    else:
        k.write(a[0], t, k.read(a[1], t))


@rule(r"cvta(?P<to>\.to)?\.(?P<space>global|local|param|shared)\.u64")
def cvta(k, a, m):
    value = k.read(a[1], "u64")
    if m["space"] == "shared":
        to = "simt::smem_address((const void*)({}))" if m["to"] else "shared((uint32_t)({}))"
        value = to.format(value)
    k.write(a[0], "u64", value)


VECTOR = r"(?P<v>\.v[24])?\.(?P<t>[usb](?:8|16|32|64)|f32|f64)"


@rule(r"ld(?:\.(?P<space>global|shared|local|param))?(?:\.nc)?(?P<hint>\.L1::no_allocate)?" + VECTOR)
def ld(k, a, m):
    t, space = m["t"], m["space"] or "generic"
    parts = vector(a[0])
    if SIZE[t] * len(parts) == 16 and space in ("global", "shared"):  # as the wrappers do: counted
        call = f"ptx::ld_shared_16({k.address(a[1], space)})"
        if space == "global":
            call = f"ptx::ld_global_16((const void*){k.address(a[1], space)})"
        k.emit(f"{{ const uint4 v = {call};")
        if len(parts) == 2:
            for part, (low, high) in zip(parts, ("xy", "zw")):
                k.write(part, "u64", f"(uint64_t)v.{high} << 32 | v.{low}")
        else:
            for part, field in zip(parts, "xyzw"):
                k.write(part, "u32", f"v.{field}")
        k.emit("}")
        return
    for i, part in enumerate(parts):
        k.write(part, t, f"load<{C_TYPE[t]}>({k.pointer(a[1], space)} + {i * SIZE[t]})")


@rule(r"st(?:\.(?P<space>global|shared|local))?" + VECTOR)
def st(k, a, m):
    t, space = m["t"], m["space"] or "generic"
    parts = vector(a[1])
    if len(parts) == 4 and SIZE[t] == 4 and space in ("global", "shared"):
        values = ", ".join(k.read(p, "u32") for p in parts)
        target = k.address(a[0], space) if space == "shared" else f"(void*){k.address(a[0], space)}"
        k.emit(f"ptx::st_{space}_16({target}, uint4{{{values}}});")
        return
    for i, part in enumerate(parts):
        k.emit(f"store<{C_TYPE[t]}>({k.pointer(a[0], space)} + {i * SIZE[t]}, {k.read(part, t)});")


@rule(r"ld\.acquire\.gpu\.global\.u32")
def ld_acquire(k, a, m):
    k.write(a[0], "u32", f"ptx::load_acquire((const uint32_t*){k.address(a[1], 'global')})")


@rule(r"st\.release\.gpu\.global\.u32")
def st_release(k, a, m):
    k.emit(f"ptx::store_release((uint32_t*){k.address(a[0], 'global')}, {k.read(a[1], 'u32')});")


@rule(r"atom\.acq_rel\.gpu\.global\.add\.u32")
def atom_acq_rel(k, a, m):
    call = f"ptx::atomic_add_acq_rel((uint32_t*){k.address(a[1], 'global')}, {k.read(a[2], 'u32')})"
    k.write(a[0], "u32", call)


@rule(r"(?P<o>atom|red)\.(?P<space>global|shared)\.(?P<f>add|min|max|or|exch|cas)\." + "BITS")
def atom(k, a, m):
    t = m["t"]
    if m["o"] == "red":
        a = ["_", *a]
    name = "atomic" + {"cas": "CAS"}.get(m["f"], m["f"].capitalize())
    values = ", ".join(k.read(x, t) for x in a[2:])
    k.write(a[0], t, f"{name}(({C_TYPE[t]}*)({k.pointer(a[1], m['space'])}), {values})")


@rule(r"cp\.async\.cg\.shared\.global(?:\.L2::128B)?")
def cp_async(k, a, m):
    if a[2] != "16":
        k.stop(f"cp.async of {a[2]} bytes")
    source_bytes = k.read(a[3], "u32") if len(a) > 3 else "16"
    k.emit(f"cp_async_16({k.address(a[0], 'shared')}, {k.address(a[1], 'global')}, {source_bytes});")


@rule(r"cp\.async\.commit_group")
def cp_async_commit(k, a, m):
    k.emit("simt::cp_async_commit();")


@rule(r"cp\.async\.wait_group")
def cp_async_wait(k, a, m):
    k.emit(f"simt::cp_async_wait({k.read(a[0], 'u32')});")


# --- control and synchronisation ------------------------------------------------------------------------------------


@rule(r"bra(?:\.uni)?")
def bra(k, a, m):
    k.emit(f"goto {k.variable(a[0])};")


@rule(r"ret|exit")
def ret(k, a, m):
    k.emit("return;")


@rule(r"(?:bar|barrier)(?:\.cta)?\.(?P<what>sync|arrive)(?:\.aligned)?")
def bar(k, a, m):
    function = "barrier" if m["what"] == "sync" else "barrier_arrive"
    threads = k.read(a[1], "u32") if len(a) > 1 else "0"
    k.emit(f"simt::{function}({k.read(a[0], 'u32')}, {threads}, simt::Site::current());")


@rule(r"bar\.warp\.sync")
def bar_warp(k, a, m):
    k.emit(f"__syncwarp({k.read(a[0], 'u32')});")


@rule(r"nanosleep\.u32")
def nanosleep(k, a, m):
    k.emit("ptx::spin_pause();")


@rule(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32")
def shfl(k, a, m):
    target = a[0].split("|")
    operands = ", ".join(k.read(x, "u32") for x in (a[4], a[1], a[2], a[3]))
    k.emit(f"{{ const uint64_t got = shuffle('{m['mode'][0]}', {operands});")
    k.write(target[0], "b32", "(uint32_t)got")
    if len(target) > 1:
        k.write(target[1], "pred", "got >> 32")
    k.emit("}")


@rule(r"vote\.sync\.(?P<what>any|all|ballot)\.(?P<t>pred|b32)")
def vote(k, a, m):
    k.write(a[0], m["t"], f"__{m['what']}_sync({k.read(a[2], 'u32')}, {k.read(a[1], 'pred')})")


@rule(r"redux\.sync\.(?P<what>add|min|max|and|or|xor)\.BITS")
def redux(k, a, m):
    t = m["t"].replace("b", "u")
    k.write(a[0], t, f"__reduce_{m['what']}_sync({k.read(a[2], 'u32')}, {k.read(a[1], t)})")


# --- matrices -------------------------------------------------------------------------------------------------------


@rule(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<n>[124])(?P<trans>\.trans)?\.shared\.b16")
def ldmatrix(k, a, m):
    suffix = "_trans" if m["trans"] else ""
    k.emit(f"{{ uint32_t r[{m['n']}]; ptx::ldmatrix{suffix}(r, {k.address(a[1], 'shared')});")
    for i, part in enumerate(vector(a[0])):
        k.write(part, "b32", f"r[{i}]")
    k.emit("}")


@rule(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<e>bf16|f16)\.(?P=e)\.f32")
def mma(k, a, m):
    d, x, y, c = (vector(v) for v in a)
    k.emit(f"{{ float c[4] = {{{', '.join(k.read(v, 'f32') for v in c)}}};")
    k.emit(f"const uint32_t a[4] = {{{', '.join(k.read(v, 'u32') for v in x)}}};")
    k.emit(f"ptx::mma_m16n8k16_{m['e']}(c, a, {k.read(y[0], 'u32')}, {k.read(y[1], 'u32')});")
    for i, part in enumerate(d):
        k.write(part, "f32", f"c[{i}]")
    k.emit("}")


# --- arithmetic -----------------------------------------------------------------------------------------------------

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
NEGATED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # true where unordered


@rule(r"setp\.(?P<c>[a-z]+)(?:\.(?P<b>and|or|xor))?\.(?P<t>f32|f64|[usb](?:16|32|64))")
def setp(k, a, m):
    t, compare, target = m["t"], m["c"], a[0].split("|")
    x, y = k.read(a[1], t), k.read(a[2], t)
    if t in FLOATS and compare in NEGATED:
        # Not (x op y) would be wrong for C++'s !=, which is true where unordered.
        value = f"!({x} < {y} || {x} > {y})" if compare == "equ" else f"!({x} {NEGATED[compare]} {y})"
    elif t in FLOATS and compare in ("nan", "num"):
        value = f"({'!' if compare == 'num' else ''}({x} != {x} || {y} != {y}))"
    elif t in FLOATS and compare == "ne":
        value = f"({x} < {y} || {x} > {y})"
    elif compare in COMPARE:
        value = f"({x} {COMPARE[compare]} {y})"
    else:
        k.stop(f"comparison not translated: {m[0]}")
    other = None
    if m["b"]:
        operator = {"and": "&&", "or": "||", "xor": "!="}[m["b"]]
        third = k.read(a[3], "pred")
        value, other = f"{value} {operator} {third}", f"!{value} {operator} {third}"
    k.emit("{ const bool yes = " + value + (f", no = {other or '!yes'}; " if len(target) > 1 else "; "))
    k.write(target[0], "pred", "yes")
    if len(target) > 1:
        k.write(target[1], "pred", "no")
    k.emit("}")


@rule(r"selp\.(?P<t>f32|f64|[usb](?:16|32|64))")
def selp(k, a, m):
    k.write(a[0], m["t"], f"{k.read(a[3], 'pred')} ? {k.read(a[1], m['t'])} : {k.read(a[2], m['t'])}")


@rule(r"(?P<o>and|or|xor|not)\.pred")
def logic(k, a, m):
    x = [k.read(v, "pred") for v in a[1:]]
    forms = {"and": "{0} && {1}", "or": "{0} || {1}", "xor": "{0} != {1}", "not": "!{0}"}
    k.write(a[0], "pred", forms[m["o"]].format(*x))


@rule(r"(?P<o>add|sub|and|or|xor|not|neg|mul\.lo|mad\.lo)\.BITS")
def integer(k, a, m):
    u = unsigned(m["t"])  # the same bits, and overflow is defined
    x = [k.read(v, u) for v in a[1:]]
    forms = {"add": "{0} + {1}", "sub": "{0} - {1}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}"}
    forms |= {"not": "~{0}", "neg": "-{0}", "mul.lo": "{0} * {1}", "mad.lo": "{0} * {1} + {2}"}
    k.write(a[0], u, f"({C_TYPE[u]})({forms[m['o']].format(*x)})")


@rule(r"(?P<o>mul|mad)\.wide\.(?P<t>[us](?:16|32))")
def wide(k, a, m):
    t = f"{m['t'][0]}{SIZE[m['t']] * 16}"
    u, wide_u = C_TYPE[t], C_TYPE[unsigned(t)]
    value = f"({wide_u})(({u}){k.read(a[1], m['t'])} * ({u}){k.read(a[2], m['t'])})"
    if m["o"] == "mad":
        value += f" + {k.read(a[3], unsigned(t))}"
    k.write(a[0], unsigned(t), value)


@rule(r"(?P<o>mul|mad)\.hi\.INT")
def mul_hi(k, a, m):
    t = m["t"]
    value = f"high_product<{C_TYPE[t]}>({k.read(a[1], t)}, {k.read(a[2], t)})"
    if m["o"] == "mad":
        value = f"({C_TYPE[unsigned(t)]}){value} + {k.read(a[3], unsigned(t))}"
    k.write(a[0], unsigned(t), value)


@rule(r"(?P<o>shl|shr)\.BITS")
def shift(k, a, m):
    t = m["t"].replace("b", "u")
    name = "shift_left" if m["o"] == "shl" else "shift_right"
    k.write(a[0], t, f"{name}<{C_TYPE[t]}>({k.read(a[1], t)}, {k.read(a[2], 'u32')})")


@rule(r"shf\.(?P<d>[lr])\.(?P<mode>wrap|clamp)\.b32")
def shf(k, a, m):
    operands = ", ".join(k.read(v, "u32") for v in a[1:])
    k.write(a[0], "b32", f"funnel({int(m['d'] == 'l')}, {int(m['mode'] == 'clamp')}, {operands})")


@rule(r"(?P<o>min|max)\.INT")
def min_max(k, a, m):
    x, y = k.read(a[1], m["t"]), k.read(a[2], m["t"])
    k.write(a[0], m["t"], f"{x} {'<' if m['o'] == 'min' else '>'} {y} ? {x} : {y}")


@rule(r"abs\.s(?P<n>32|64)")
def absolute(k, a, m):
    x = k.read(a[1], f"s{m['n']}")
    k.write(a[0], f"u{m['n']}", f"{x} < 0 ? -{k.read(a[1], 'u' + m['n'])} : {k.read(a[1], 'u' + m['n'])}")


@rule(r"(?P<o>div|rem)\.INT")
def divide(k, a, m):
    name = "quotient" if m["o"] == "div" else "remainder"
    k.write(a[0], m["t"], f"{name}<{C_TYPE[m['t']]}>({k.read(a[1], m['t'])}, {k.read(a[2], m['t'])})")


@rule(r"(?P<o>popc|clz)\.b(?P<n>32|64)")
def count_bits(k, a, m):
    x = k.read(a[1], f"u{m['n']}")
    value = (
        f"__builtin_popcountll({x})"
        if m["o"] == "popc"
        else f"{x} ? __builtin_clzll({x}) - {64 - int(m['n'])} : {m['n']}"
    )
    k.write(a[0], "u32", value)


@rule(r"bfind\.shiftamt\.u32")
def bfind_shift(k, a, m):
    k.write(a[0], "u32", f"bfind_shift({k.read(a[1], 'u32')})")


@rule(r"bfi\.b(?P<n>32|64)")
def bfi(k, a, m):
    t = f"u{m['n']}"
    operands = [k.read(a[1], t), k.read(a[2], t), k.read(a[3], "u32"), k.read(a[4], "u32")]
    k.write(a[0], t, f"bfi<{C_TYPE[t]}>({', '.join(operands)})")


@rule(r"(?P<o>prmt|brev)\.b32|(?P<b>bfe)\.u32|(?P<l>lop3)\.b32")
def bit_functions(k, a, m):
    name = m["o"] or (m["b"] and "bfe_u32") or m["l"]
    k.write(a[0], "u32", f"{name}({', '.join(k.read(v, 'u32') for v in a[1:])})")


@rule(r"(?P<o>add|sub|mul|div|fma|neg|abs|min|max|sqrt|rcp)(?:\.rn)?\.FLOAT")
def floating(k, a, m):
    t = m["t"]
    one = f"({C_TYPE[t]})1"
    forms = {"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}"}
    forms |= {"fma": "std::fma({0}, {1}, {2})", "neg": "-{0}", "abs": "std::fabs({0})", "sqrt": "std::sqrt({0})"}
    forms |= {"min": "std::fmin({0}, {1})", "max": "std::fmax({0}, {1})", "rcp": one + " / {0}"}
    k.write(a[0], t, forms[m["o"]].format(*(k.read(v, t) for v in a[1:])))


@rule(r"rcp\.approx\.ftz\.f64")
def rcp_gross(k, a, m):
    k.write(a[0], "f64", f"rcp_gross({k.read(a[1], 'f64')})")


@rule(r"copysign\.FLOAT")
def copysign(k, a, m):
    sign, magnitude = (k.read(v, m["t"]) for v in a[1:])
    k.write(a[0], m["t"], f"std::copysign({magnitude}, {sign})")


@rule(r"(?P<o>rcp|div)\.(?:approx|full)(?:\.ftz)?\.f32")
def approximate_division(k, a, m):
    operands = ["1.0f"] * (m["o"] == "rcp") + [k.read(v, "f32") for v in a[1:]]
    k.write(a[0], "f32", " / ".join(operands))


@rule(r"max\.NaN\.(?P<t>f32|bf16x2|f16x2)")
def max_nan(k, a, m):
    name, t = ("max_nan", "f32") if m["t"] == "f32" else (f"max_nan_{m['t'][:-2]}", "u32")
    k.write(a[0], t, f"ptx::{name}({k.read(a[1], t)}, {k.read(a[2], t)})")


@rule(r"ex2\.approx\.f32")
def exp2_with_subnormals(k, a, m):
    k.write(a[0], "f32", f"std::exp2({k.read(a[1], 'f32')})")


@rule(r"(?P<o>ex2|lg2)\.approx\.ftz\.f32")
def transcendental(k, a, m):
    k.write(a[0], "f32", f"ptx::{'exp2' if m['o'] == 'ex2' else 'log2'}_approx({k.read(a[1], 'f32')})")


# --- conversions ----------------------------------------------------------------------------------------------------


@rule(r"cvt\.(?P<d>[us](?:8|16|32|64))\.INT")
def cvt_integer(k, a, m):
    k.write(a[0], m["d"], f"({C_TYPE[m['d']]}){k.read(a[1], m['t'])}")


@rule(r"cvt\.rn\.(?P<d>f32|f64)\.INT")
def cvt_from_integer(k, a, m):
    k.write(a[0], m["d"], f"({C_TYPE[m['d']]}){k.read(a[1], m['t'])}")


@rule(r"cvt\.(?P<r>rzi|rni|rmi|rpi)\.(?P<d>[us](?:16|32|64)|f32|f64)\.FLOAT")
def cvt_round(k, a, m):
    function = {"rzi": "trunc", "rni": "nearbyint", "rmi": "floor", "rpi": "ceil"}[m["r"]]
    value = f"std::{function}({k.read(a[1], m['t'])})"
    k.write(a[0], m["d"], value if m["d"] in FLOATS else f"to_integer<{C_TYPE[m['d']]}>({value})")


@rule(r"cvt\.(?:rn\.f32\.f64|f64\.f32|rn\.f64\.f32)")
def cvt_float(k, a, m):
    d, s = m[0].split(".")[-2:]
    k.write(a[0], d, f"({C_TYPE[d]}){k.read(a[1], s)}")


@rule(r"cvt\.f32\.(?P<s>f16|bf16)")
def cvt_widen(k, a, m):
    raw = k.read(a[1], "u16")
    k.write(a[0], "f32", f"simt::half_to_float({raw})" if m["s"] == "f16" else f"bits<float>((uint32_t){raw} << 16)")


@rule(r"cvt\.rn\.(?P<d>f16|bf16)\.f32")
def cvt_narrow(k, a, m):
    name = "half" if m["d"] == "f16" else "bf16"
    k.write(a[0], "u16", f"(uint16_t)simt::float_to_{name}({k.read(a[1], 'f32')})")


@rule(r"cvt\.rn\.(?P<d>f16|bf16)x2\.f32")
def cvt_pack(k, a, m):
    k.write(a[0], "u32", f"ptx::pack_{m['d']}({k.read(a[2], 'f32')}, {k.read(a[1], 'f32')})")


# --- the file -------------------------------------------------------------------------------------------------------


def translate(text):
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M))
    shared = {}
    for extern, name, size in re.findall(r"^(\.extern )?\.shared \.align \d+ \.b\d+ (\w+)\[(\d*)\]", text, re.M):
        if not extern or size:
            raise SystemExit(f"ptx2cpp: static shared memory {name}: take it from a SmemCarver")
        shared[name] = 0
    if found := re.search(r"^\s*(?:\.visible |\.weak )*(?:\.const|\.global|\.func) .*", text, re.M):
        raise SystemExit(f"ptx2cpp: not translated: {found[0].strip()}")
    functions = []
    for entry in re.split(r"(?m)^(?=(?:\.visible |\.weak )?\.entry )", text)[1:]:
        name = re.search(r"\.entry (\w+)\(", entry)[1]
        head, _, body = entry.partition("\n{")
        params = []
        for found in re.finditer(r"\.param (?:\.align (\d+) )?\.(\w+) (\w+)(?:\[(\d+)\])?", head):
            size = SIZE[found[2]] * int(found[4] or 1)
            params.append((int(found[1] or size), size, found[3]))
        kernel = Kernel(name, params, shared, files)
        kernel.translate(body[: re.search(r"\n}\s", body).start()])
        functions.append(kernel.function())
    if not functions:
        raise SystemExit("ptx2cpp: no kernel in the file")
    header = '// Made by ptx2cpp.py\n#include "ptx/ptx_run.h"\nusing namespace ptx_run;\n\n'
    return header + "\n".join(functions)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    with open(source) as file:
        result = translate(file.read())
    with open(target, "w") as file:
        file.write(result)
