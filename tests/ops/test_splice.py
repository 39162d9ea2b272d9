# SPDX-License-Identifier: Apache-2.0
"""splice_ against its reference and against lists; published insertions and deletions; overflow, isolation, errors."""

import re
from pathlib import Path

import pytest
import torch

import numerics
from dlmkernels import ops, reference

OPEN, FROZEN, EDITED, DIRTY = ops.STATE_OPEN, ops.STATE_FROZEN, ops.STATE_EDITED, ops.STATE_DIRTY
MASK, PAD = 90, 91
MUTATED = ("tokens", "length", "state", "commit_step", "commit_confidence")
op = torch.ops.dlmkernels.splice_.default


def generator(seed):
    return torch.Generator().manual_seed(seed)


def choose(g, *values):
    return values[torch.randint(len(values), (), generator=g)]


def clone(case):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def rows(t, index):
    return t[index].contiguous() if isinstance(t, torch.Tensor) and t.dim() else t


def random_case(g, B, T, W, grows, tight=False):
    """All arguments by name; few companions in some cases. `tight`: rows of which some do not fit."""
    case = {
        "tokens": torch.randint(0, 9, (B, T), generator=g),
        "start": torch.randint(-1, T + 1, (B,), generator=g, dtype=torch.int32) // choose(g, 1, 4),
        "fill_token_id": MASK,
        "pad_token_id": PAD,
    }
    rare = torch.rand(B, W, generator=g)
    if choose(g, True, True, False):
        many = torch.randint(0, 9 if tight else 3, (B, W), generator=g, dtype=torch.int32)
        case["insert"] = many * (rare < choose(g, 0.1, 0.5)).int()
    if choose(g, True, True, False):
        case["remove"] = torch.rand(B, W, generator=g) < choose(g, 0.1, 0.5, 1.0)
    if grows:
        low = T // 2 if tight else 0
        case["length"] = torch.randint(low, T + 1 if tight else T // 2 + 1, (B,), generator=g, dtype=torch.int32)
    elif choose(g, True, False):
        case["end"] = torch.randint(0, T + 1, (choose(g, min(B, 1), B),), generator=g, dtype=torch.int32)
    optional = {
        "state": torch.randint(256, (B, T), generator=g, dtype=torch.uint8),
        "commit_step": torch.randint(-1, 9, (B, T), generator=g, dtype=torch.int32),
        "commit_confidence": torch.rand(B, T, generator=g),
    }
    return case | {name: value for name, value in optional.items() if choose(g, True, True, False)}


def assert_same(got, want):
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            where = (got[name] != value).nonzero().tolist()
            assert torch.equal(got[name], value), f"{name} differs at {where[:8]}"


def check(case):
    """Run the op and the reference on copies; everything either may have written must agree. Returns the op's."""
    got, want = clone(case), clone(case)
    out = ops.splice_(**got)
    source, info = reference.splice_(**want)
    assert_same(got | out._asdict(), want | {"source": source, "info": info})
    assert out.source.dtype == out.info.dtype == torch.int32
    return got, out


def row(tokens, start=0, **kwargs):
    """Run one row given as lists; returns what was written, source and info by name."""
    dtypes = {"insert": torch.int32, "remove": torch.bool, "length": torch.int32, "end": torch.int32}
    dtypes |= {"state": torch.uint8, "commit_step": torch.int32, "commit_confidence": torch.float32}
    case = {"tokens": torch.tensor([tokens]), "start": torch.tensor([start], dtype=torch.int32)}
    case |= {"fill_token_id": MASK, "pad_token_id": PAD}
    for name, value in kwargs.items():
        per_row = name in ("length", "end")
        case[name] = torch.tensor([value] if not per_row else value, dtype=dtypes[name]).reshape(
            1 if per_row else (1, -1)
        )
    got, out = check(case)
    written = {name: got[name][0].tolist() for name in MUTATED if name in got}
    return written | {"source": out.source[0].tolist()} | dict(zip(ops.SPLICE_FIELDS, out.info[0].tolist()))


class TestReference:
    @pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
    @pytest.mark.parametrize("grows", [False, True], ids=["fixed", "grows"])
    def test_random(self, grows, tight):
        g = generator(2 * grows + tight)
        overflows = 0
        for _ in range(150):
            T = choose(g, 1, 2, 9, 40, 70)
            _, out = check(random_case(g, 12, T, choose(g, 0, 1, 5, 20, 90), grows, tight))
            overflows += int((out.info[:, 2] > 0).sum())
        assert overflows > 20 or not tight

    @pytest.mark.parametrize(
        ("B", "T", "W"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0), (200, 7, 4), (2, 9000, 4096)]
    )
    @pytest.mark.parametrize("grows", [False, True], ids=["fixed", "grows"])
    def test_sizes(self, B, T, W, grows):
        for seed in range(4):
            check(random_case(generator(seed), B, T, W, grows))

    def test_huge_counts(self):
        for mode in ({"length": [4]}, {}):
            out = row([1, 2, 3, 4, 5], insert=[0, 2**31 - 1, 2**31 - 1, 5], **mode)
            assert out["tokens"] == ([1, 2, 3, 4, 5] if mode else [1, MASK, MASK, MASK, MASK])
            assert out["overflow"] == 2**31 - 1


class TestMeaning:
    def test_insertion(self):
        out = row([1, 2, 3, 9, 9], start=1, insert=[1, 0], end=4, state=[0, EDITED, 0, FROZEN, FROZEN],
                  commit_step=[4, 5, 6, -1, -1], commit_confidence=[0.5, 0.25, 0.75, 0.0, 0.0])  # fmt: skip
        assert out["tokens"] == [1, MASK, 2, 3, 9]
        assert out["state"] == [0, OPEN | DIRTY, EDITED | DIRTY, DIRTY, FROZEN]
        assert out["commit_step"] == [4, -1, 5, 6, -1] and out["commit_confidence"] == [0.5, 0, 0.25, 0.75, 0]
        assert out["source"] == [0, -1, 1, 2, 4]
        assert (out["inserted"], out["removed"], out["overflow"]) == (1, 0, 1)

    def test_removal(self):
        out = row([1, 2, 3, 4, 9], remove=[0, 1], length=4, state=[0, 0, EDITED, OPEN, FROZEN],
                  commit_step=[1, 2, 3, 4, 5])  # fmt: skip
        assert out["tokens"] == [1, 3, 4, PAD, 9] and out["length"] == 3
        assert out["state"] == [0, EDITED | DIRTY, OPEN | DIRTY, FROZEN | DIRTY, FROZEN]
        assert out["commit_step"] == [1, 3, 4, -1, 5] and out["source"] == [0, 2, 3, -1, 4]

    def test_replacement(self):
        out = row([1, 2, 3, 9, 9], insert=[0, 2], remove=[0, 1], length=3)
        assert out["tokens"] == [1, MASK, MASK, 3, 9] and out["length"] == 4

    def test_appending(self):
        out = row([1, 2, 9, 9], start=2, insert=[2], remove=[1], length=2)
        assert out["tokens"] == [1, 2, MASK, MASK] and out["length"] == 4 and out["removed"] == 0

    def test_a_span_keeps_its_size(self):
        assert row([1, 2, 3, 4, 9], insert=[0, 2], end=4)["tokens"] == [1, MASK, MASK, 2, 9]
        out = row([1, 2, 3, 4, 9], remove=[1, 0, 1], end=4, state=[0] * 5)
        assert out["tokens"] == [2, 4, MASK, MASK, 9] and out["state"] == [DIRTY] * 2 + [OPEN | DIRTY] * 2 + [0]
        assert out["overflow"] == 0 and out["source"] == [1, 3, -1, -1, 4]
        assert row([1, 2, 3], insert=[1])["overflow"] == 1

    def test_frozen_positions_stay_and_move(self):
        out = row([1, 2, 3, 9], insert=[1, 0, 0], remove=[1, 1, 1], state=[FROZEN, 0, FROZEN, 0], length=3)
        assert out["tokens"] == [MASK, 1, 3, 9] and out["state"] == [OPEN | DIRTY, FROZEN | DIRTY, FROZEN, 0]
        assert out["removed"] == 1

    def test_dirty_stays_with_the_position(self):
        """Equal tokens next to each other: a position whose token is the same has nothing to be written again."""
        out = row([7, 7, 7, 8], remove=[1], length=4, state=[DIRTY, 0, 0, 0])
        assert out["tokens"] == [7, 7, 8, PAD] and out["state"] == [DIRTY, 0, DIRTY, DIRTY | FROZEN]

    def test_overflow_leaves_the_row_alone(self):
        before = dict(tokens=[1, 2, 3, 9], state=[0, EDITED, OPEN, FROZEN], commit_step=[1, 2, 3, 4])
        out = row(**before, insert=[0, 4], remove=[1, 0], length=3)
        assert {name: out[name] for name in before} == before and out["length"] == 3
        assert out["source"] == [0, 1, 2, 3]
        assert (out["inserted"], out["removed"], out["overflow"]) == (0, 0, 2)

    def test_idle_rows(self):
        for idle in ({"start": -1, "length": 3}, {"start": 4, "length": 3}, {"start": 4, "end": 3}):
            out = row([1, 2, 3, 4], insert=[3], remove=[1], **idle)
            assert out["tokens"] == [1, 2, 3, 4] and out["source"] == [0, 1, 2, 3] and out["inserted"] == 0

    def test_source_moves_anything_else(self):
        g = generator(5)
        case = random_case(g, 8, 30, 10, grows=True)
        x = torch.randint(0, 1000, (8, 30), generator=g)
        case["tokens"] = x.clone()
        got, out = check(case)
        moved = x.gather(1, out.source.clamp(min=0).long())
        old = out.source >= 0
        assert torch.equal(got["tokens"][old], moved[old])
        assert torch.isin(got["tokens"][~old], torch.tensor([MASK, PAD])).all()


class TestPublished:
    def test_llada22(self):
        """SPLIT writes a mask and the old token, DELETE nothing; the block is cut or filled up with masks."""
        g, size = generator(1), 32
        for _ in range(50):
            block = torch.randint(0, 9, (4, size), generator=g)
            split, deleted = (torch.rand(4, size, generator=g) < choose(g, 0.05, 0.3) for _ in range(2))
            split &= ~deleted
            canvas = torch.full((4, 70), 77)
            canvas[:, 20:52] = block
            out = ops.splice_(
                canvas, torch.full((4,), 20, dtype=torch.int32), insert=split.int(), remove=deleted,
                end=torch.tensor([52], dtype=torch.int32), fill_token_id=MASK,
            )  # fmt: skip
            for b in range(4):
                edited = []
                for token, is_split, is_deleted in zip(*(x[b].tolist() for x in (block, split, deleted))):
                    edited += [] if is_deleted else [MASK, token] if is_split else [token]
                assert canvas[b, 20:52].tolist() == (edited + [MASK] * size)[:size]
                assert out.info[b].tolist() == [split[b].sum(), deleted[b].sum(), max(0, len(edited) - size)]
            assert (canvas[:, :20] == 77).all() and (canvas[:, 52:] == 77).all()

    def test_dreamon(self):
        """An expanded mask becomes two, a deleted one none, from right to left on a list; the suffix moves along."""
        g = generator(2)
        for _ in range(50):
            prefix, suffix, middle = [1, 2, 3], [4, 5], [MASK] * choose(g, 1, 6, 12)
            acts = [choose(g, "keep", "expand", "delete") for _ in middle]
            plain = prefix + middle + suffix
            for i in reversed(range(len(middle))):
                at = len(prefix) + i
                plain[at : at + 1] = {"keep": [MASK], "expand": [MASK, MASK], "delete": []}[acts[i]]
            n = len(prefix) + len(middle) + len(suffix)
            tokens = torch.tensor([prefix + middle + suffix + [PAD] * 20])
            state = torch.tensor([[FROZEN] * 3 + [OPEN] * len(middle) + [FROZEN] * 22], dtype=torch.uint8)
            length = torch.tensor([n], dtype=torch.int32)
            ops.splice_(
                tokens, torch.tensor([3], dtype=torch.int32), length=length, state=state, fill_token_id=MASK,
                insert=torch.tensor([[a == "expand" for a in acts]]).int(),
                remove=torch.tensor([[a == "delete" for a in acts]]), pad_token_id=PAD,
            )  # fmt: skip
            assert length.item() == len(plain) and tokens[0].tolist() == plain + [PAD] * (n + 20 - len(plain))
            is_open = (state[0] & (OPEN | FROZEN) == OPEN).tolist()
            assert is_open == [token == MASK for token in tokens[0].tolist()]

    def test_daedal(self):
        """The least certain position becomes eight masks."""
        tokens = torch.tensor([[1, 2, MASK, 4, *[PAD] * 8]])
        length = torch.tensor([4], dtype=torch.int32)
        insert = torch.tensor([[0, 0, 7, 0]], dtype=torch.int32)
        ops.splice_(tokens, torch.zeros(1, dtype=torch.int32), insert=insert, length=length, fill_token_id=MASK)
        assert tokens[0].tolist() == [1, 2, *[MASK] * 8, 4, PAD] and length.item() == 11


class TestIsolation:
    @pytest.mark.parametrize("grows", [False, True], ids=["fixed", "grows"])
    def test_no_neighbour_in_memory_is_touched(self, grows):
        g = generator(7)
        for _ in range(20):
            case = random_case(g, 4, 16, 8, grows)
            around, inner = {}, dict(case)
            for name in set(MUTATED) & set(case):
                value = case[name]
                around[name] = numerics.poison_(value.new_empty(6, *value.shape[1:]))
                inner[name] = around[name][1:5]
                inner[name].copy_(value)
            guards = {name: t[[0, -1]].clone() for name, t in around.items()}
            ops.splice_(**inner)
            for name, guard in guards.items():
                assert torch.equal(around[name][[0, -1]].nan_to_num(7), guard.nan_to_num(7)), name

    def test_any_batch_gives_the_same_rows(self):
        g = generator(8)
        case = random_case(g, 32, 48, 16, grows=True)
        got, out = check(case)
        for index in (torch.randperm(32, generator=g), *(slice(32 - size, 32) for size in (1, 3, 17))):
            part = {name: rows(value, index) for name, value in clone(case).items()}
            part_out = ops.splice_(**part)
            assert torch.equal(part_out.source, out.source[index]) and torch.equal(part_out.info, out.info[index])
            assert_same(part, {name: rows(value, index) for name, value in got.items()})

    def test_any_number_of_threads(self):
        case = random_case(generator(9), 64, 3000, 500, grows=True)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(clone(case))
                results[-1] |= ops.splice_(**results[-1])._asdict()
        finally:
            torch.set_num_threads(before)
        assert_same(*results)


@pytest.mark.on_cpu
class TestErrors:
    B, T, W = 4, 10, 6

    def good(self):
        B, T, W = self.B, self.T, self.W
        return {
            "tokens": torch.zeros(B, T, dtype=torch.long),
            "start": torch.zeros(B, dtype=torch.int32),
            "insert": torch.ones(B, W, dtype=torch.int32),
            "remove": torch.ones(B, W, dtype=torch.bool),
            "length": torch.full((B,), 7, dtype=torch.int32),
            "state": torch.ones(B, T, dtype=torch.uint8),
            "commit_step": torch.zeros(B, T, dtype=torch.int32),
            "commit_confidence": torch.zeros(B, T),
            "fill_token_id": MASK,
            "pad_token_id": PAD,
        }

    def refuses(self, message, **changed):
        case = self.good() | changed
        case = {name: value for name, value in case.items() if value is not None}
        before = clone(case)
        with pytest.raises(RuntimeError, match="splice_: " + message):
            ops.splice_(**case)
        on_cpu = {name: v for name, v in before.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
        assert_same(case, on_cpu)

    CANVAS = ("tokens", "state", "commit_step", "commit_confidence")
    REST = ("start", "insert", "remove", "length")

    def test_the_good_call_is_good(self):
        ops.splice_(**self.good())

    @pytest.mark.parametrize("name", CANVAS + REST)
    def test_dtype(self, name):
        self.refuses(rf"{name} must have dtype .*; got Double", **{name: self.good()[name].double()})
        self.refuses(r"end must have dtype Int; got Long", end=torch.tensor([3]))

    @pytest.mark.parametrize("name", CANVAS[1:] + REST)
    def test_device(self, name):
        self.refuses(f"{name} must be on the device of tokens", **{name: self.good()[name].to("meta")})

    @pytest.mark.parametrize("name", CANVAS[1:] + REST)
    def test_rank_and_shape(self, name):
        good = self.good()[name]
        for bad in (good[0], good[None], good[:-1]):
            self.refuses(f"{name} must have shape", **{name: bad})
        if name not in ("insert", *self.REST[::3]):  # insert sets W; start and length are vectors
            self.refuses(f"{name} must have shape", **{name: good[:, :-1].contiguous()})

    @pytest.mark.parametrize("name", (*CANVAS, "insert", "remove"))
    def test_stride(self, name):
        self.refuses(f"{name} must be contiguous", **{name: self.good()[name].t().contiguous().t()})

    def test_width(self):
        wide = torch.zeros(1, 4097, dtype=torch.int32)
        with pytest.raises(RuntimeError, match=r"insert must have at most 4096 slots \(W\); got W = 4097"):
            ops.splice_(wide.long(), wide[0, :1].contiguous(), insert=wide, fill_token_id=1)

    def test_missing(self):
        self.refuses("fill_token_id must be a token id when insert is given; got -1", fill_token_id=-1)
        self.refuses(
            "fill_token_id must be a token id when remove is given", fill_token_id=-1, insert=None, length=None
        )
        self.refuses("pad_token_id must be a token id when remove and length are given; got -1", pad_token_id=-1)
        self.refuses("end must be None when length is given", end=torch.tensor([3], dtype=torch.int32))

    def test_values(self):
        for name, least in (("start", -1), ("length", 0)):
            for bad in (least - 1, 11):
                value = self.good()[name]
                value[2] = bad
                self.refuses(rf"{name} must be in \[{least}, 10\]; got {bad} in row 2", **{name: value})
        end = torch.tensor([3, 11], dtype=torch.int32)
        self.refuses(r"end must be in \[0, 10\]; got 11 in row 2", end=end, length=None)
        insert = self.good()["insert"]
        insert[3, 5] = -1
        self.refuses(r"insert must not be negative; got -1 at \[3, 5\]", insert=insert)


class TestRegistration:
    def test_names_agree_with_params_h(self):
        header = (Path(__file__).parents[2] / "csrc/common/params.h").read_text()
        enum = re.search(r"enum SpliceInfo : int32_t \{(.*?)\}", header, re.S).group(1)
        columns = [name.strip().removeprefix("kSplice").lower() for name in enum.split(",")]
        assert columns == [*ops.SPLICE_FIELDS, "columns"]

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_opcheck(self, seed):
        case = random_case(generator(seed), 4, 12, 6, grows=seed > 0)
        positional = [case.pop(name) for name in ("tokens", "start")]
        torch.library.opcheck(op, positional, case)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compile(self, backend):
        def step(case):
            out = ops.splice_(**case)
            return out.source + 1, out.info * 2, case["tokens"] * 2

        case = random_case(generator(2), 4, 12, 6, grows=True)
        eager, compiled = clone(case), clone(case)
        want = step(eager)
        got = torch.compile(step, fullgraph=True, backend=backend)(compiled)
        assert all(map(torch.equal, got, want))
        assert_same(compiled, eager)
