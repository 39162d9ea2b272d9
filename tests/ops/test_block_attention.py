# SPDX-License-Identifier: Apache-2.0
"""block_attention against its reference. Whatever no row may read holds NaN in every case here."""

import math

import pytest
import torch
import torch.nn.functional as F

import numerics
from dlmkernels import _C, ops, reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
MASKING = ("causal_block", "block_origin", "q_limit", "k_order", "window_left", "window_right", "k_slots", "visible")
nan, inf = math.nan, math.inf


@pytest.fixture(autouse=True, params=_C.cpu_isas())
def seeded(request):
    """Every test with every instruction set that this machine has.

    One thread: the references run thousands of small torch ops, which only get slower with more.
    """
    threads, isa = torch.get_num_threads(), _C.cpu_isa()
    torch.set_num_threads(1)
    _C.set_cpu_isa(request.param)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    _C.set_cpu_isa(isa)


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def mask_of(c):
    """What each query row sees, bool [B, Q, S], by the reference."""
    q, k_cache, slots = c["q"], c["k_cache"], c["slots"]
    B, Q, S = q.shape[0], q.shape[1], k_cache.shape[1]
    if slots is None:
        slots = torch.arange(Q).expand(B, Q)
    masking = {name: c[name] for name in MASKING if name in c}
    return reference.block_attention_mask(B, Q, S, slots, c["kv_range"], **masking)


def new_slots(c):
    """The slots of the new rows."""
    return c["slots"] if c.get("k_slots") is None else c["k_slots"]


def make(B=2, Q=5, S=70, H=4, G=2, D=32, dtype=torch.float32, new=True, slots=None, kv_range=None, **options):
    """Arguments of one call, with NaN in every element that must not matter."""
    K = Q if options.get("k_slots") is None else options["k_slots"].shape[1]
    c = {
        "q": torch.randn(B, Q, H, D).to(dtype),
        "k_new": torch.randn(B, K, G, D).to(dtype) if new else None,
        "v_new": torch.randn(B, K, G, D).to(dtype) if new else None,
        "k_cache": torch.randn(B, S, G, D).to(dtype),
        "v_cache": torch.randn(B, S, G, D).to(dtype),
        "slots": slots,
        "kv_range": kv_range,
        **options,
    }
    unread = ~mask_of(c).any(1)
    at = torch.arange(K).expand(B, K) if new_slots(c) is None else new_slots(c)
    if new:
        for b in range(B):
            for row, slot in enumerate(at[b].tolist()):
                if slot < 0 or unread[b, slot]:
                    c["k_new"][b, row], c["v_new"][b, row] = nan, nan
        for b in range(B):
            unread[b, [slot for slot in at[b].tolist() if slot >= 0]] = True
    c["k_cache"][unread], c["v_cache"][unread] = nan, nan
    if slots is not None:
        c["q"][slots == -1] = nan
    return c


def copied(c, dtype=None):
    """The same arguments in new memory, floats in another dtype if one is given."""
    return {
        name: (value.to(dtype) if dtype and value.is_floating_point() else value).clone()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in c.items()
    }


def scattered(c):
    """Both caches with the new rows in their slots."""
    caches = c["k_cache"].clone(), c["v_cache"].clone()
    for cache, new in zip(caches, (c["k_new"], c["v_new"])):
        for b, row in torch.cartesian_prod(*map(torch.arange, new.shape[:2])).tolist() if new is not None else ():
            slot = row if new_slots(c) is None else int(new_slots(c)[b, row])
            if slot >= 0:
                cache[b, slot] = new[b, row]
    return caches


def naive(c, dtype):
    """Attention wholly in one dtype, with the scale on K: the peer."""
    c = copied(c, dtype)
    (_, _, H, D), G = c["q"].shape, c["k_cache"].shape[2]
    visible = mask_of(c)
    k, v = (torch.nan_to_num(cache).repeat_interleave(H // G, 2) for cache in scattered(c))
    s = torch.einsum(
        "bqhd,bshd->bhqs", torch.nan_to_num(c["q"]), k * (D**-0.5 if c.get("scale") is None else c["scale"])
    )
    if softcap := c.get("softcap"):
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible.unsqueeze(1), -inf)
    p = torch.nan_to_num(torch.softmax(s, -1))
    return torch.einsum("bhqs,bshd->bqhd", p, v), torch.logsumexp(s, -1).transpose(1, 2)


def bits(t):
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def spread(c):
    """The same arguments in new memory, each tensor of floats with strides of its own and NaN in between."""
    run = copied(c)
    for n, name in enumerate(("q", "k_new", "v_new", "k_cache", "v_cache")):
        if c[name] is None:
            continue
        (B, rows, heads, D), room = c[name].shape, (n + 1, (2 * n) % 5, 8 * (n + 1))
        wide = torch.full((B, rows + room[0], heads + room[1], D + room[2]), nan, dtype=c[name].dtype)
        run[name] = wide[:, : rows or None, : heads or None, :D].copy_(c[name]) if rows else c[name].clone()
    return run


def check(c, run=None):
    """Run the op and compare all it returns and writes: on `run`, the same values in another layout, or spread."""
    run, gold = run or spread(c), copied(c, torch.float64)
    gold_out, gold_lse = reference.block_attention(**gold)
    out, lse = ops.block_attention(**run)
    assert out.dtype == c["q"].dtype and out.is_contiguous() and lse.dtype == torch.float32
    numerics.assert_close("out", out, gold_out, naive(c, out.dtype)[0])
    numerics.assert_close("lse", lse, gold_lse, naive(c, torch.float32)[1])
    for name, expected in zip(("k_cache", "v_cache"), scattered(c)):
        assert same_bits(run[name], expected), f"{name} is not what the scatter should leave"
        assert torch.equal(torch.nan_to_num(gold[name]), torch.nan_to_num(expected.double()))
    return out, lse


def permuted_slots(B, Q, S, unused=0.2):
    """Distinct random slots, about a fifth of the rows unused."""
    slots = torch.stack([torch.cat((torch.randperm(S), torch.full((Q,), -1)))[:Q] for _ in range(B)]).int()
    slots[torch.rand(B, Q) < unused] = -1
    return slots


def test_visibility_by_hand():
    """The reference's mask against the sentence that defines it, slot by slot."""
    B, Q, S, n = 2, 9, 12, 4
    slots = permuted_slots(B, Q, S)
    kv_range = ints([[[1, 5], [3, 7], [7, 7], [9, 12]], [[0, 0], [2, 6], [4, 5], [8, 11]]])
    origin, q_limit, k_order = ints([3, -1]), torch.randint(0, 9, (B, Q)).int(), torch.randint(0, 9, (B, S)).int()
    mask = reference.block_attention_mask(
        B, Q, S, slots, kv_range, causal_block=n, block_origin=origin, q_limit=q_limit, k_order=k_order,
        window_left=5, window_right=2,
    )  # fmt: skip
    attended = [{*range(1, 7), *range(9, 12)}, {*range(2, 6), *range(8, 11)}]
    for b in range(B):

        def block(x, o=int(origin[b])):
            return -1 if x < o else (x - o) // n

        for row in range(Q):
            i = int(slots[b, row])
            for j in range(S):
                expected = i >= 0 and j in attended[b] and block(j) <= block(i) and -5 <= j - i <= 2
                expected = expected and int(k_order[b, j]) <= int(q_limit[b, row])
                assert bool(mask[b, row, j]) == expected, (b, row, i, j)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("D", [8, 16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (8, 2), (14, 2), (8, 1)])
def test_heads_and_dims(H, G, D, dtype):
    check(make(Q=9, S=75, H=H, G=G, D=D, dtype=dtype))


@pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 101, 128, 129])
@pytest.mark.parametrize("Q", [1, 2, 31, 32, 33, 37])
def test_lengths(Q, S):
    """One row, one slot, and either side of the kernel's tiles of 32 rows and 64 slots."""
    slots = permuted_slots(2, Q, S, unused=0)
    check(make(Q=Q, S=S, H=3, G=3, D=16, slots=slots))
    check(make(Q=Q, S=S, H=7, G=1, D=16, slots=slots, dtype=torch.bfloat16, causal_block=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_real_shape(dtype):
    check(make(B=1, Q=32, S=1024, H=28, G=4, D=128, dtype=dtype, slots=torch.arange(992, 1024).int()[None]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("D", [24, 40, 72, 96, 120, 136, 192, 248, 264, 504])
def test_uneven_dims(D, dtype):
    """Head dimensions that fill no whole number of vectors."""
    check(make(Q=6, S=70, H=3, G=1, D=D, dtype=dtype, causal_block=1))


@pytest.mark.parametrize("rows", [1, 4, 5, 15, 16, 17, 31, 32, 33, 65])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_row_counts(rows, dtype):
    """Either side of rows that have several lanes each, of one vector of rows, and of two."""
    check(make(B=1, Q=rows, S=67, H=2, G=2, D=64, dtype=dtype))


@pytest.mark.parametrize(
    ("D", "dtype"), [(512, torch.float32), (256, torch.float32), (128, torch.float16), (64, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("S", [127, 128, 129, 255, 256, 257, 511, 512, 513, 1025])
def test_many_keys(S, D, dtype):
    """Either side of the spans of 64, 128, 256 and 512 slots by which long caches are divided."""
    check(make(B=1, Q=3, S=S, H=3, G=1, D=D, dtype=dtype, slots=torch.arange(S - 3, S).int()[None]))


def test_more_rows_than_a_work_item():
    """More query rows of a KV head than its keys are converted for at a time."""
    c = make(B=1, Q=44, S=70, H=7, G=1, D=128, dtype=torch.bfloat16, causal_block=4)
    check(c)
    check(make(B=1, Q=530, S=70, H=1, G=1, D=8, slots=torch.arange(530).int()[None] % 70))


LONG = {
    "full": {},
    "causal": {"causal_block": 1},
    "left padding": {"kv_range": ints([[0, 1100], [333, 1100]])},
    "nothing in between": {"kv_range": ints([[[5, 40], [1000, 1090]], [[0, 1], [1099, 1100]]])},
    "window": {"window_left": 40, "window_right": 3},
    "wide window, soft-cap": {"window_left": 600, "window_right": 0, "softcap": 2.0},
    "order and limit": {"q_limit": torch.arange(60).view(2, 30).int() % 7, "k_order": torch.arange(2200).view(2, 1100).int() // 150},
}  # fmt: skip


@pytest.mark.parametrize("mode", LONG)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_modes_over_many_keys(mode, dtype):
    """Rows that see nothing of some spans of a long cache, and work items in which no row does."""
    check(make(2, 30, 1100, H=4, G=2, D=40, dtype=dtype, slots=permuted_slots(2, 30, 1100), **LONG[mode]))


B, Q, S = 3, 37, 150
LIMIT, ORDER = torch.arange(B * Q).view(B, Q).int() % 11, torch.arange(B * S).view(B, S).int() % 13
MODES = {
    "full": {},
    "causal": {"causal_block": 1},
    "block-causal": {"causal_block": 8},
    "block-causal, longer than the cache": {"causal_block": 2**62},
    "one origin": {"causal_block": 8, "block_origin": ints([5])},
    "origins": {"causal_block": 8, "block_origin": ints([0, 13, 149])},
    "origins outside": {"causal_block": 7, "block_origin": ints([-3, 2**31 - 1, -(2**31)])},
    "left padding": {"kv_range": ints([[0, 150], [9, 150], [77, 150]])},
    "left padding, prompt-end blocks": {
        "kv_range": ints([[0, 150], [9, 140], [70, 150]]), "causal_block": 16, "block_origin": ints([31, 31, 31]),
    },
    "two ranges": {"kv_range": ints([[[0, 40], [90, 120]], [[3, 64], [64, 150]], [[10, 74], [140, 141]]])},
    "overlapping ranges": {"kv_range": ints([[[0, 40], [30, 60]], [[3, 100], [5, 9]], [[1, 70], [1, 70]]])},
    "ranges out of order": {"kv_range": ints([[[50, 60], [0, 20]], [[90, 150], [80, 120]], [[5, 5], [0, 9]]])},
    "empty ranges": {"kv_range": ints([[[0, 0], [0, 0]], [[7, 7], [20, 30]], [[40, 30], [0, 50]]])},
    "window": {"window_left": 20, "window_right": 7},
    "window to the left": {"window_left": 70},
    "window to the right": {"window_right": 0},
    "own slot only": {"window_left": 0, "window_right": 0},
    "endless window": {"window_left": 2**62, "window_right": 2**62},
    "order and limit": {"q_limit": LIMIT, "k_order": ORDER},
    "nothing below the limit": {"q_limit": torch.full((B, Q), -1).int(), "k_order": torch.zeros(B, S).int()},
    "everything": {
        "kv_range": ints([[[3, 40], [35, 150]], [[0, 64], [70, 150]], [[20, 90], [100, 149]]]),
        "causal_block": 5, "block_origin": ints([4, 0, 30]), "window_left": 60, "window_right": 3,
        "q_limit": LIMIT, "k_order": ORDER,
    },
    "softcap": {"softcap": 1.5},
    "wide softcap": {"softcap": 50.0},
    "scale": {"scale": 0.25},
    "negative scale, causal": {"scale": -0.1, "causal_block": 1},
    "zero scale": {"scale": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "new"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
def test_modes(mode, dtype, new):
    """Every condition, on permuted slots with unused rows, with new rows and on a cache that is only read."""
    c = make(B, Q, S, H=4, G=2, D=16, dtype=dtype, new=new, slots=permuted_slots(B, Q, S), **MODES[mode])
    out, lse = check(c)
    blind = ~mask_of(c).any(-1)
    assert not out[blind].any() and (lse[blind] == -inf).all()


@pytest.mark.parametrize("mode", ["full", "causal", "origins", "two ranges", "window", "order and limit"])
def test_modes_without_slots(mode):
    check(make(B, Q, S, H=2, G=2, D=16, **MODES[mode]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_torch_agrees(dtype, causal):
    """Plain full and causal attention are torch's scaled_dot_product_attention."""
    c = make(B=2, Q=70, S=70, H=6, G=2, D=64, dtype=dtype, new=False, causal_block=int(causal))
    q, k, v = (c[name].double().transpose(1, 2) for name in ("q", "k_cache", "v_cache"))
    gold = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
    numerics.assert_close("out", ops.block_attention(**c).out, gold, naive(c, dtype)[0])


@pytest.mark.parametrize("spread", [0.01, 30.0])
def test_flat_and_peaked_logits(spread):
    """Logits all alike, and logits so far apart that exponentials underflow."""
    c = make(Q=33, S=200, H=2, G=1, D=64)
    c["q"] *= spread
    _, lse = check(c)
    assert torch.isfinite(lse).all()


def test_logits_of_any_size():
    """Very large logits overflow nothing: the maximum is taken off first."""
    c = make(B=1, Q=3, S=66, H=1, G=1, D=8, new=False)
    c["q"][:] = 0
    c["q"][..., 0] = torch.tensor([1e18, -1e18, 1.0]).view(1, 3, 1)
    c["k_cache"][..., 0] = 1e18
    c["k_cache"][:, 65, :, 0] = 2e18
    out, lse = ops.block_attention(**c)
    assert torch.isfinite(lse).all()
    assert same_bits(out[0, 0, 0], c["v_cache"][0, 65, 0])  # the one largest logit takes all
    numerics.assert_close(
        "mean", out[0, 1, 0], c["v_cache"][0, :65, 0].double().mean(0), c["v_cache"][0, :65, 0].mean(0)
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_scale_of_zero_has_a_cap(dtype):
    """All logits are 0."""
    q, k = torch.randn(1, 2, 1, 8).to(dtype), torch.randn(1, 16, 1, 8).to(dtype)
    out, lse = ops.block_attention(q, None, None, k, k, scale=0.0, softcap=1.0)
    numerics.assert_close("lse", lse, torch.full((1, 2, 1), math.log(16)).double(), torch.full((1, 2, 1), math.log(16)))
    check(make(B=1, Q=2, S=16, H=1, G=1, D=8, new=False, dtype=dtype, scale=0.0, softcap=1.0))


# scale, soft-cap, and what q is multiplied by so that logits are moderate: factors, their quotients and products are 0,
# subnormal, or near the largest float.
FACTORS = [
    (0.0, 0.0, 1.0), (0.0, 1e-45, 1.0), (0.0, 3.4e38, 1.0), (-0.0, 2.0, 1.0),
    (1e-30, 1e12, 1e29), (1e-20, 1e30, 1e19), (1e-38, 1e3, 1e37), (-1e-38, 1e3, 1e37), (1e-39, 0.0, 1e36),
    (3e-39, 2.0, 1e36), (0.3, 1e5, 1.0), (0.3, 1e6, 1.0), (0.3, 1e30, 1.0), (0.3, 2.4e38, 1.0), (0.3, 3.4e38, 1.0),
    (0.3, 1e-40, 1.0), (0.3, 1e-45, 1.0), (0.3, 1.2e-38, 1.0), (1e30, 1e-10, 1.0), (1e30, 2.0, 1e-30),
    (3e38, 0.0, 1e-36), (-3e38, 0.0, 1e-36), (3e38, 2.0, 1e-36), (3.4e38, 3.4e38, 1e-36), (1e38, 3e38, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "softcap", "size"), FACTORS)
def test_factors_of_any_size(scale, softcap, size, dtype):
    scale, softcap = torch.tensor([scale, softcap]).tolist()  # as float32 has them
    c = make(B=2, Q=9, S=150, H=2, G=1, D=32, dtype=dtype, scale=scale, softcap=softcap, causal_block=4)
    c["q"] *= size
    out, lse = check(c)
    assert out.isfinite().all() and lse.isfinite().all()


def test_infinite_logits():
    """A logit of -inf weighs nothing, even where a whole tile, or all a row sees, is made of them."""
    c = make(B=1, Q=3, S=140, H=2, G=1, D=8, new=False)
    c["q"][..., 0] = torch.tensor([1.0, 0.5, -1.0]).view(1, 3, 1)
    c["k_cache"][:, :70, :, 0] = -inf
    out, _ = ops.block_attention(**c)
    assert out[0, 2].isnan().all()  # its logits are +inf
    c["q"], c["slots"] = c["q"][:, :2], ints([[0, 1]])
    check(c)
    out, lse = check(c | {"kv_range": ints([[0, 70]])})
    assert not out.any() and (lse == -inf).all()


# --- what must not matter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
@pytest.mark.parametrize(("Q", "H"), [(40, 4), (10, 2), (4, 1)])
def test_garbage_in_a_long_cache(name, dtype, Q, H):
    """The same across spans, for many rows and few, on both sides of the slot, and for slots outside all ranges."""
    S = 1100
    slots = (torch.arange(2 * Q).view(2, Q) * (1000 // (2 * Q)) + 60).int()
    c = make(B=2, Q=Q, S=S, H=H, G=1, D=72, dtype=dtype, new=False, slots=slots,
             kv_range=ints([[50, S], [50, S]]), causal_block=4)  # fmt: skip
    clean_out, clean_lse = ops.block_attention(**copied(c))
    assert clean_out.isfinite().all()
    c[name][1, 877, 0, 70] = nan
    out, lse = ops.block_attention(**copied(c))
    clean = (torch.arange(2).view(2, 1) == 0) | (c["slots"] // 4 < 877 // 4)
    assert same_bits(out[clean], clean_out[clean]) and same_bits(lse[clean], clean_lse[clean])
    seeing = out[~clean]
    assert len(seeing) and (seeing.isnan().all(-1) if name == "k_cache" else seeing[..., 70].isnan()).all()


def test_nan_in_q_stays_in_its_row():
    c = make(Q=40, S=90, H=6, G=2, D=32, causal_block=4)
    clean_out, clean_lse = ops.block_attention(**copied(c))
    c["q"][1, 7, 3, 5] = nan
    out, lse = check(c)
    assert out[1, 7, 3].isnan().all() and lse[1, 7, 3].isnan()
    out[1, 7, 3], lse[1, 7, 3] = clean_out[1, 7, 3], clean_lse[1, 7, 3]
    assert same_bits(out, clean_out) and same_bits(lse, clean_lse)


@pytest.mark.parametrize("garbage", [nan, inf, -inf])
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_garbage_that_only_others_see(name, garbage, dtype):
    """Rows before a poisoned slot keep their bits, though they share key tiles with rows that see it."""
    c = make(B=1, Q=70, S=70, H=4, G=2, D=32, dtype=dtype, new=False, causal_block=1)
    clean_out, clean_lse = ops.block_attention(**copied(c))
    c[name][0, 41, 1, 3] = garbage
    out, lse = ops.block_attention(**copied(c))
    untouched = torch.zeros(70, 4, dtype=torch.bool)
    untouched[:41] = True
    untouched[:, :2] = True  # heads of the other group
    assert same_bits(out[0][untouched], clean_out[0][untouched])
    assert same_bits(lse[0][untouched], clean_lse[0][untouched])
    if garbage is nan:
        seeing = out[0, 41:, 2:]
        assert (seeing.isnan().all(-1) if name == "k_cache" else seeing[..., 3].isnan()).all()


def test_rows_do_not_depend_on_the_batch():
    options = {"H": 7, "G": 1, "D": 64, "dtype": torch.bfloat16, "causal_block": 8}
    c = make(
        B=5, Q=20, S=140, slots=permuted_slots(5, 20, 140), kv_range=torch.randint(0, 140, (5, 2, 2)).int(), **options
    )
    out, lse = ops.block_attention(**copied(c))
    for b in range(5):
        alone = {k: v[b : b + 1].clone() if isinstance(v, torch.Tensor) else v for k, v in c.items()}
        out_b, lse_b = ops.block_attention(**alone)
        assert same_bits(out_b[0], out[b]) and same_bits(lse_b[0], lse[b])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_long_rows_do_not_depend_on_the_batch(dtype):
    """Alone, the keys of a request are divided among work items; in a large batch they are not."""
    c = make(B=33, Q=3, S=1100, H=2, G=1, D=64, dtype=dtype, new=False, slots=permuted_slots(33, 3, 1100, unused=0), causal_block=32)  # fmt: skip
    out, lse = ops.block_attention(**c)
    for b in range(0, 33, 8):
        alone = {k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in c.items()}
        out_b, lse_b = ops.block_attention(**alone)
        assert same_bits(out_b[0], out[b]) and same_bits(lse_b[0], lse[b])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("new", [True, False])
def test_cache_rows(new, dtype):
    """Some rows of a larger cache, in any order, are what they are alone; an unused batch row reads and writes none."""
    options = {"H": 4, "G": 2, "D": 64, "dtype": dtype, "causal_block": 8, "block_origin": ints([3, 0, 5])}
    c = make(B=3, Q=9, S=140, new=new, slots=permuted_slots(3, 9, 140), **options)
    rows = [4, -1, 1]
    large = {name: torch.randn(6, 140, 2, 64).to(dtype) for name in ("k_cache", "v_cache")}
    for name in large:
        large[name][[4, 1]] = c[name][[0, 2]]
    before = {name: cache.clone() for name, cache in large.items()}
    small = copied(c)
    expected = ops.block_attention(**small)
    got = ops.block_attention(**{**copied(c), **large, "cache_rows": ints(rows)})
    golden = reference.block_attention(
        **{**copied(c), **{k: v.clone() for k, v in before.items()}, "cache_rows": ints(rows)}
    )
    for of_ours, alone, by_reference in zip(got, expected, golden):
        assert same_bits(of_ours[[0, 2]], alone[[0, 2]])
        torch.testing.assert_close(of_ours.float(), by_reference.float(), rtol=0.05, atol=0.05)
    assert not got.out[1].any() and (got.lse[1] == -inf).all()
    for name in large:
        assert same_bits(large[name][[4, 1]], small[name][[0, 2]])
        assert same_bits(large[name][[0, 2, 3, 5]], before[name][[0, 2, 3, 5]])


def bits_of(seen):
    """Booleans [B, Q, K] as words of 32 bits [B, Q, ceil(K / 32)]."""
    words = F.pad(seen.long(), (0, -seen.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (words << torch.arange(32)).sum(-1).to(torch.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "K"), [(torch.float32, 61), (torch.bfloat16, 7), (torch.float16, 33)])
def test_new_rows_with_slots_of_their_own(mode, dtype, K):
    """Every condition, with more and fewer new rows than queries, some of them written nowhere."""
    slots, k_slots = permuted_slots(B, Q, S), permuted_slots(B, K, S)
    check(make(B, Q, S, H=4, G=2, D=16, dtype=dtype, slots=slots, k_slots=k_slots, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "K"), [(torch.float32, 61), (torch.bfloat16, 31), (torch.float16, 32)])
def test_visible(mode, dtype, K):
    """Every condition, and new rows that some queries do not see; some nobody sees, and they hold NaN."""
    slots, k_slots = permuted_slots(B, Q, S), permuted_slots(B, K, S)
    visible = bits_of((torch.rand(B, Q, K) < 0.5) & (torch.rand(B, 1, K) < 0.8))
    check(make(B, Q, S, H=4, G=2, D=16, dtype=dtype, slots=slots, k_slots=k_slots, visible=visible, **MODES[mode]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("Q", "H"), [(1, 1), (3, 1), (40, 1), (64, 4)])
def test_visible_in_a_long_cache(Q, H, dtype):
    """New rows in one place and all over the cache, for every number of rows that the kernels tell apart."""
    for slots in (torch.arange(1000, 1000 + 2 * Q).view(2, Q).int() % 1100, permuted_slots(2, Q, 1100)):
        c = make(2, Q, 1100, H=H, G=1, D=40, dtype=dtype, slots=slots, visible=bits_of(torch.rand(2, Q, Q) < 0.5))
        check(c)


def test_visible_without_slots():
    check(make(2, 20, 70, visible=bits_of(torch.rand(2, 20, 20) < 0.5)))


def test_several_new_rows_in_one_slot():
    """The last one is written, and only who sees all of them sees it."""
    k_slots = ints([[4, 9, 4, 4], [7, 7, -1, 3]])
    check(make(2, 6, 70, k_slots=k_slots, visible=bits_of(torch.rand(2, 6, 4) < 0.7)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_tree_of_drafts(dtype):
    """Each node gets the bits of a sequence that holds its ancestors, itself and nothing else of the tree."""
    context, parents = 67, [-1, 0, 0, 1, 1, 2, 5]
    Q = len(parents)
    seen = torch.eye(Q, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    slots = torch.arange(context, context + Q).int()[None]
    c = make(1, Q, context + Q, H=4, G=2, D=64, dtype=dtype, slots=slots, visible=bits_of(seen[None]))
    out, lse = check(c)
    for node in range(Q):
        path = seen[node].nonzero().flatten()
        own = {name: c[name][:, path] for name in ("q", "k_new", "v_new")}
        of_path = {"slots": slots[:, : len(path)].contiguous(), "visible": None, "causal_block": 1}
        alone_out, alone_lse = ops.block_attention(**{**copied(c), **own, **of_path})
        assert not numerics.far(alone_out[:, -1].float(), out[:, node].float())
        assert not numerics.far(alone_lse[:, -1], lse[:, node])


def test_a_chain_is_causal():
    """Bits of a triangle give the bits of plain causal attention."""
    slots = torch.arange(100, 130).int().expand(2, 30).contiguous()
    c = make(2, 30, 140, H=4, G=2, D=64, slots=slots, kv_range=ints([[0, 130], [9, 130]]), causal_block=1)
    causal = ops.block_attention(**copied(c))
    triangle = bits_of(torch.ones(2, 30, 30, dtype=torch.bool).tril())
    for got, expected in zip(ops.block_attention(**{**copied(c), "causal_block": 0, "visible": triangle}), causal):
        assert same_bits(got, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accepted_rows_move_to_the_front(dtype):
    """As the op's documentation does it; of the second request nothing was accepted but the root."""
    c = make(2, 7, 74, D=64, dtype=dtype, slots=torch.arange(67, 74).int().expand(2, 7).contiguous())
    ops.block_attention(**c)
    k_cache, v_cache = c["k_cache"], c["v_cache"]
    before = [k_cache.clone(), v_cache.clone()]
    accepted, first, depth = ints([[67, 69, 72], [67, -1, -1]]), ints([[67], [67]]), 3
    rows = accepted.clamp(min=0).long()[:, :, None, None].expand(-1, -1, *k_cache.shape[2:])
    front = torch.where(accepted < 0, -1, first + torch.arange(depth)).int()
    ops.block_attention(
        c["q"][:, :0],
        k_cache.gather(1, rows),
        v_cache.gather(1, rows),
        k_cache,
        v_cache,
        accepted[:, :0],
        k_slots=front,
    )
    for cache, old in zip((k_cache, v_cache), before):
        assert same_bits(cache[0, 67:70], old[0, [67, 69, 72]])
        old[0, 67:70] = cache[0, 67:70]
        assert same_bits(cache, old)


def test_context_without_queries():
    """What a drafter injects: keys and values are written, and there is no row to attend."""
    c = make(2, 0, 70, k_slots=ints([[3, 9, -1], [60, 5, 7]]), slots=torch.empty(2, 0, dtype=torch.int32))
    out, lse = check(c)
    assert out.shape == (2, 0, 4, 32) and lse.shape == (2, 0, 4)


def test_rows_do_not_depend_on_their_order():
    c = make(B=2, Q=45, S=140, H=3, G=1, D=64, slots=permuted_slots(2, 45, 140), causal_block=8, window_left=80)
    out, lse = ops.block_attention(**copied(c))
    order = torch.randperm(45)
    moved = {k: v[:, order] if k in ("q", "k_new", "v_new") else v for k, v in copied(c).items()}
    moved["slots"] = c["slots"][:, order].contiguous()
    moved_out, moved_lse = ops.block_attention(**moved)
    assert same_bits(moved_out, out[:, order]) and same_bits(moved_lse, lse[:, order])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("H", "S", "D"), [(3, 140, 64), (1, 600, 72), (7, 600, 72)])
def test_rows_do_not_depend_on_their_number(H, S, D, dtype):
    """One query row at a time over the written cache gives the bits of all rows together."""
    slots = permuted_slots(2, 45, S, unused=0)
    c = make(B=2, Q=45, S=S, H=H, G=1, D=D, dtype=dtype, slots=slots, causal_block=8, softcap=3.0)
    out, lse = ops.block_attention(**c)
    for row in range(0, 45, 4):
        one = {**c, "q": c["q"][:, row : row + 1], "k_new": None, "v_new": None}
        one["slots"] = c["slots"][:, row : row + 1].contiguous()
        one_out, one_lse = ops.block_attention(**one)
        assert same_bits(one_out, out[:, row : row + 1]) and same_bits(one_lse, lse[:, row : row + 1])


@pytest.mark.parametrize(("S", "dtype"), [(400, torch.float32), (1300, torch.bfloat16)], ids=str)
def test_threads_do_not_matter(S, dtype):
    c = make(B=2, Q=64, S=S, H=8, G=2, D=64, dtype=dtype, slots=permuted_slots(2, 64, S), causal_block=16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        run = copied(c)
        results.append((*ops.block_attention(**run), run["k_cache"], run["v_cache"]))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("S", [150, 700])
@pytest.mark.parametrize("pad", [1, 17, 64, 100])
def test_left_padding_does_not_matter(pad, S):
    """A request behind padding gives the bits it gives without."""
    Q = 24
    c = make(B=1, Q=Q, S=S, H=4, G=2, D=32, slots=torch.arange(S - Q, S).int()[None], causal_block=8, window_left=90)
    padded = copied(c)
    for name in ("k_cache", "v_cache"):
        padded[name] = torch.cat((torch.full((1, pad, 2, 32), nan), padded[name]), 1)
    padded |= {"slots": c["slots"] + pad, "kv_range": ints([[pad, S + pad]]), "block_origin": ints([pad])}
    for a, b in zip(ops.block_attention(**c), ops.block_attention(**padded)):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 8, 12])
def test_blocks_against_a_cache_are_the_full_forward(n, dtype):
    """Writing and attending block by block gives the bits of one block-causal forward over everything."""
    T, H, G, D = 72, 6, 2, 32
    q, k, v = (torch.randn(2, T, heads, D).to(dtype) for heads in (H, G, G))
    full, full_lse = ops.block_attention(q, None, None, k, v, causal_block=n)
    k_cache, v_cache = (torch.full((2, 80, G, D), nan, dtype=dtype) for _ in range(2))
    for start in range(0, T, n):
        rows = slice(start, start + n)
        slots = torch.arange(start, start + n).int().expand(2, n).contiguous()
        kv_range = ints([[0, start + n]]).repeat(2, 1)
        out, lse = ops.block_attention(q[:, rows], k[:, rows], v[:, rows], k_cache, v_cache, slots, kv_range)
        assert same_bits(out, full[:, rows]) and same_bits(lse, full_lse[:, rows])
    assert same_bits(k_cache[:, :T], k) and same_bits(v_cache[:, :T], v)


# --- layouts, extents, writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_inputs(dtype):
    """Heads before rows, slices of wider tensors, a cache that is a slice of a bigger one: nothing else is written."""
    c = make(B=2, Q=20, S=90, H=4, G=2, D=32, dtype=dtype, slots=permuted_slots(2, 20, 90))
    run = copied(c)
    for name in ("q", "k_new"):
        run[name] = c[name].transpose(1, 2).contiguous().transpose(1, 2)
    run["v_new"] = torch.cat((c["v_new"], c["v_new"]), -1)[..., :32]
    k_room, v_room = torch.full((5, 2, 100, 2, 40), 7.0).to(dtype), torch.full((2, 3, 90, 32), 7.0).to(dtype)
    run["k_cache"] = k_room[3, :, 4:94, :, 8:].copy_(c["k_cache"])
    run["v_cache"] = v_room[:, :2].transpose(1, 2).copy_(c["v_cache"])
    assert not any(run[name].is_contiguous() for name in ("q", "k_new", "v_new", "k_cache", "v_cache"))
    check(c, run)
    k_room[3, :, 4:94, :, 8:], v_room[:, :2] = 7.0, 7.0
    assert (k_room == 7).all() and (v_room == 7).all()


def test_expanded_inputs():
    """Tensors that are only read may repeat memory."""
    c = make(B=2, Q=5, S=40, H=4, G=2, D=16, new=False)
    for name in ("q", "k_cache", "v_cache"):
        c[name] = c[name][:1, :1].expand(c[name].shape)
    check(c, c)


@pytest.mark.parametrize(
    ("B", "Q", "S"), [(0, 4, 9), (0, 4, 3), (2, 0, 9), (2, 0, 0), (2, 3, 0), (0, 0, 0), (64, 3, 9), (1, 1, 1)]
)
def test_extents(B, Q, S):
    slots = permuted_slots(B, Q, S, unused=0) if B else torch.zeros(B, Q, dtype=torch.int32)
    c = make(B=B, Q=Q, S=S, H=4, G=2, D=16, slots=slots, kv_range=ints([[0, S]]).repeat(B, 1))
    out, lse = check(c)
    assert out.shape == (B, Q, 4, 16) and lse.shape == (B, Q, 4)


def test_writes_go_where_slots_say_and_nowhere_else():
    c = make(B=2, Q=4, S=9, H=2, G=2, D=8, slots=ints([[8, -1, 0, 3], [-1, -1, -1, 5]]))
    c["k_cache"][:], c["v_cache"][:] = 1.0, 2.0
    run = copied(c)
    ops.block_attention(**run)
    expected_k, expected_v = c["k_cache"].clone(), c["v_cache"].clone()
    for b, row, slot in [(0, 0, 8), (0, 2, 0), (0, 3, 3), (1, 3, 5)]:
        expected_k[b, slot], expected_v[b, slot] = c["k_new"][b, row], c["v_new"][b, row]
    assert torch.equal(run["k_cache"], expected_k) and torch.equal(run["v_cache"], expected_v)


def test_last_of_equal_slots_wins():
    c = make(B=2, Q=6, S=9, H=2, G=2, D=8, slots=ints([[4, 4, 2, 4, 2, -1], [0, 0, 0, 0, 0, 0]]))
    check(c)


def test_written_before_anyone_attends():
    """The first row sees what the last one wrote."""
    c = make(B=1, Q=3, S=8, H=1, G=1, D=8, slots=ints([[0, 3, 7]]), kv_range=ints([[7, 8]]))
    out, _ = ops.block_attention(**c)
    assert same_bits(out[0, 0, 0], c["v_new"][0, 2, 0])


# --- errors ----------------------------------------------------------------------------------------------------------


def other(name, *shape, dtype=torch.float32, **kwargs):
    return {name: torch.zeros(*shape, dtype=dtype, **kwargs)}


# B 2, Q 5, S 70, H 4, G 2, D 32
ERRORS = {
    "k_new without v_new": ({"v_new": None}, "k_new and v_new must be given together; got only k_new"),
    "v_new without k_new": ({"k_new": None}, "got only v_new"),
    "q_limit alone": (other("q_limit", 2, 5, dtype=torch.int32), "q_limit and k_order must .* got only q_limit"),
    "k_order alone": (other("k_order", 2, 70, dtype=torch.int32), "got only k_order"),
    "q dtype": ({"q": torch.zeros(2, 5, 4, 32, dtype=torch.float64)}, "q must have dtype .*; got"),
    "k_new dtype": (other("k_new", 2, 5, 2, 32, dtype=torch.bfloat16), "k_new must have dtype Float; got BFloat16"),
    "v_new dtype": (other("v_new", 2, 5, 2, 32, dtype=torch.float16), "v_new must have dtype"),
    "k_cache dtype": (other("k_cache", 2, 70, 2, 32, dtype=torch.float16), "k_cache must have dtype"),
    "v_cache dtype": (other("v_cache", 2, 70, 2, 32, dtype=torch.int32), "v_cache must have dtype"),
    "slots dtype": (other("slots", 2, 5, dtype=torch.int64), "slots must have dtype Int; got Long"),
    "kv_range dtype": (other("kv_range", 2, 2, dtype=torch.int64), "kv_range must have dtype"),
    "block_origin dtype": (other("block_origin", 2), "block_origin must have dtype"),
    "q rank": (other("q", 2, 5, 128), "q must have shape .*; got .2, 5, 128"),
    "k_new shape": (other("k_new", 2, 4, 2, 32), r"k_new must have shape \[2, 5, 2, 32\]; got \[2, 4, 2, 32\]"),
    "v_new shape": (other("v_new", 2, 5, 4, 32), "v_new must have shape"),
    "k_cache batch": (other("k_cache", 3, 70, 2, 32), "k_cache must have shape"),
    "k_cache head dim": (other("k_cache", 2, 70, 2, 16), "k_cache must have shape"),
    "v_cache shape": (other("v_cache", 2, 71, 2, 32), "v_cache must have shape"),
    "slots shape": (other("slots", 2, 6, dtype=torch.int32), "slots must have shape"),
    "kv_range shape": (other("kv_range", 2, 3, dtype=torch.int32), "kv_range must have shape"),
    "kv_range count": (other("kv_range", 2, 0, 2, dtype=torch.int32), "kv_range must hold at least one range"),
    "kv_range rank": (other("kv_range", 4, dtype=torch.int32), "kv_range must have shape"),
    "block_origin count": (other("block_origin", 3, dtype=torch.int32), "block_origin must hold one value"),
    "block_origin rank": (other("block_origin", 2, 1, dtype=torch.int32), "block_origin must have at most one dim"),
    "q_limit shape": ({**other("q_limit", 2, 4, dtype=torch.int32), **other("k_order", 2, 70, dtype=torch.int32)},
                      "q_limit must have shape"),
    "k_order shape": ({**other("q_limit", 2, 5, dtype=torch.int32), **other("k_order", 2, 5, dtype=torch.int32)},
                      "k_order must have shape"),
    "q stride": ({"q": torch.zeros(2, 5, 32, 4).transpose(2, 3)}, "q must have stride 1 in its last dimension"),
    "k_cache stride": ({"k_cache": torch.zeros(2, 70, 2, 64)[..., ::2]}, "k_cache must have stride 1"),
    "v_new stride": ({"v_new": torch.zeros(2, 5, 2, 64)[..., ::2]}, "v_new must have stride 1"),
    "slots stride": ({"slots": torch.zeros(5, 2, dtype=torch.int32).T}, "slots must be contiguous"),
    "kv_range stride": ({"kv_range": torch.zeros(2, 2, dtype=torch.int32).T}, "kv_range must be contiguous"),
    "k_cache expanded": ({"k_cache": torch.zeros(2, 1, 2, 32).expand(2, 70, 2, 32)},
                         "k_cache is written to and must not overlap itself"),
    "v_cache expanded": ({"v_cache": torch.zeros(1, 70, 2, 32).expand(2, 70, 2, 32)},
                         "v_cache is written to and must not overlap itself"),
    "cache_rows dtype": (other("cache_rows", 2, dtype=torch.int64), "cache_rows must have dtype Int; got Long"),
    "cache_rows shape": (other("cache_rows", 3, dtype=torch.int32), r"cache_rows must have shape \[2\]; got \[3\]"),
    "cache row too low": ({"cache_rows": ints([0, -2])}, r"cache_rows must lie in \[-1, 2\); got -2 at 1"),
    "cache row too high": ({"cache_rows": ints([2, 0])}, "cache_rows must lie in .*; got 2 at 0"),
    "cache row twice": ({"cache_rows": ints([1, 1])}, "cache_rows must be distinct .*; got 1 again at 1"),
    "k_slots shape": (other("k_slots", 2, 4, dtype=torch.int32), r"k_slots must have shape \[2, 5\]; got \[2, 4\]"),
    "k_slots dtype": (other("k_slots", 2, 5, dtype=torch.int64), "k_slots must have dtype Int; got Long"),
    "k_slots alone": ({"k_slots": ints([[0] * 5] * 2), "k_new": None, "v_new": None},
                      "k_new is required by k_slots; got None"),
    "new slot too high": ({"k_slots": ints([[0, 1, 2, 3, 4], [0, 1, 2, 70, 4]])},
                          r"k_slots must lie in \[-1, 70\); got 70 at \[1, 3\]"),
    "new rows": (other("k_new", 2, 6, 2, 32) | other("v_new", 2, 6, 2, 32), r"k_new must have shape \[2, 5, 2, 32\]"),
    "visible shape": (other("visible", 2, 5, 2, dtype=torch.int32), r"visible must have shape \[2, 5, 1\]"),
    "visible dtype": (other("visible", 2, 5, 1, dtype=torch.bool), "visible must have dtype Int; got Bool"),
    "visible alone": ({"visible": ints([[[1]] * 5] * 2), "k_new": None, "v_new": None},
                      "k_new is required by visible; got None"),
    "causal_block": ({"causal_block": -1}, "causal_block must be"),
    "window_left": ({"window_left": -2}, "window_left must be"),
    "window_right": ({"window_right": -2}, "window_right must be"),
    "softcap": ({"softcap": -1.0}, "softcap must be"),
    "softcap nan": ({"softcap": nan}, "softcap must be"),
    "scale": ({"scale": inf}, "scale must be finite"),
    "slot too low": ({"slots": ints([[0, 1, 2, 3, 4], [0, 1, -2, 3, 4]])},
                     r"slots must lie in \[-1, 70\); got -2 at \[1, 2\]"),
    "slot too high": ({"slots": ints([[0, 1, 2, 3, 70], [0, 1, 2, 3, 4]])}, "slots must lie in .*; got 70"),
    "range too low": ({"kv_range": ints([[0, 70], [-1, 70]])},
                      r"kv_range must lie in \[0, 70\]; got -1 in batch row 1"),
    "range too high": ({"kv_range": ints([[[0, 9], [10, 71]]] * 2)}, "kv_range must lie in .*; got 71"),
}  # fmt: skip


@pytest.mark.on_cpu  # a GPU would have to wait for the values
@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    """The message names the argument, and nothing has been written."""
    wrong, message = ERRORS[case]
    c = make()
    run = {**copied(c), **wrong}
    with pytest.raises(RuntimeError, match=f"^block_attention: .*{message}"):
        ops.block_attention(**run)
    for name in {"k_cache", "v_cache"} - wrong.keys():
        assert same_bits(run[name], c[name])


@pytest.mark.parametrize(
    "name",
    ["k_new", "v_new", "k_cache", "v_cache", "slots", "kv_range", "block_origin", "q_limit", "k_order", "cache_rows",
     "k_slots", "visible"],
)  # fmt: skip
def test_wrong_device(name):
    c = make(cache_rows=ints([1, 0]), slots=permuted_slots(2, 5, 70), kv_range=ints([[0, 70]] * 2), block_origin=ints([0, 3]),
             q_limit=torch.zeros(2, 5, dtype=torch.int32), k_order=torch.zeros(2, 70, dtype=torch.int32),
             k_slots=permuted_slots(2, 5, 70), visible=ints([[[-1]] * 5] * 2))  # fmt: skip
    with pytest.raises(RuntimeError, match=f"block_attention: {name} must be on the device of q"):
        ops.block_attention(**{**c, name: c[name].to("meta")})


@pytest.mark.on_cpu
@pytest.mark.parametrize("ranges", [1, 3])
def test_every_range_is_looked_at(ranges):
    c = make(kv_range=torch.tensor([10, 60]).repeat(2, ranges, 1).int())
    for wrong in (-1, 71):
        for i in range(4 * ranges):
            kv_range = c["kv_range"].clone()
            kv_range.view(-1)[i] = wrong
            with pytest.raises(RuntimeError, match=f"kv_range must lie in .*; got {wrong} in batch row {i // (2 * ranges)}"):  # fmt: skip
                ops.block_attention(**c | {"kv_range": kv_range})


@pytest.mark.on_cpu
def test_every_slot_is_looked_at():
    c = make(slots=permuted_slots(2, 5, 70))
    for wrong in (-2, 70):
        for i in range(10):
            slots = c["slots"].clone()
            slots.view(-1)[i] = wrong
            with pytest.raises(RuntimeError, match=rf"slots must lie in .*; got {wrong} at \[{i // 5}, {i % 5}\]"):
                ops.block_attention(**c | {"slots": slots})


def test_heads_and_head_dim_errors():
    def call(H, G, D):
        cache = torch.zeros(1, 3, G, D)
        ops.block_attention(torch.zeros(1, 3, H, D), None, None, cache, cache.clone())

    for H, G in [(3, 2), (0, 2), (2, 0)]:
        with pytest.raises(RuntimeError, match="q must have a multiple of k_cache's heads"):
            call(H, G, 8)
    for D in (0, 4, 12, 520):
        with pytest.raises(RuntimeError, match="q must have a head dimension that is a multiple of 8 and at most 512"):
            call(2, 1, D)


def test_more_rows_than_slots():
    with pytest.raises(
        RuntimeError, match=r"slots must be given when q has more rows \(5\) than k_cache has slots \(4\)"
    ):
        ops.block_attention(**make(Q=5, S=70) | other("k_cache", 2, 4, 2, 32) | other("v_cache", 2, 4, 2, 32))


# --- torch's machinery -----------------------------------------------------------------------------------------------

OPCHECK = {
    "plain": {},
    "no new rows": {"new": False},
    "everything": {
        "slots": ints([[4, 2, -1, 0, 9], [1, 2, 3, 4, 5]]), "kv_range": ints([[[0, 9], [10, 20]]] * 2),
        "causal_block": 4, "block_origin": ints([1, 2]), "q_limit": ints([[3] * 5] * 2),
        "k_order": ints([[1] * 20] * 2), "window_left": 9, "window_right": 3, "softcap": 5.0, "scale": 0.3,
        "k_slots": ints([[4, 2, -1], [1, 2, 3]]), "visible": ints([[[5], [1], [7], [0], [2]]] * 2),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", OPCHECK)
def test_opcheck(case):
    c = make(S=20, D=8, **OPCHECK[case])
    c = {k: torch.nan_to_num(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in c.items()}
    positional = [c.pop(name) for name in ("q", "k_new", "v_new", "k_cache", "v_cache", "slots", "kv_range")]
    torch.library.opcheck(torch.ops.dlmkernels.block_attention.default, positional, c)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    """Inside a compiled graph the cache is still written in place, and read again afterwards."""

    def layer(q, k_new, v_new, k_cache, v_cache, slots):
        result = ops.block_attention(q * 2, k_new, v_new, k_cache, v_cache, slots, causal_block=4)
        return result.out + 1, result.lse, k_cache * 2

    c = make(B=2, Q=6, S=40, H=4, G=2, D=16, slots=permuted_slots(2, 6, 40))
    c["k_cache"], c["v_cache"] = torch.randn(2, 40, 2, 16), torch.randn(2, 40, 2, 16)
    c = {k: torch.nan_to_num(c[k]) for k in ("q", "k_new", "v_new", "k_cache", "v_cache", "slots")}
    eager, compiled = copied(c), copied(c)
    expected = layer(**eager)
    got = torch.compile(layer, fullgraph=True, backend=backend)(**compiled)
    assert all(same_bits(a, b) for a, b in zip(got, expected))
    for name in ("k_cache", "v_cache"):
        assert same_bits(compiled[name], eager[name]) and not same_bits(eager[name], c[name])
