# SPDX-License-Identifier: Apache-2.0
"""Benchmark whole decodings of a small random Llama against a plain loop like those of published programs.

Both commit the same number of positions in every forward (a fixed schedule), so they run the same forwards regardless
of the random weights.
"""

import functools
import time
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
import transformers

import dlmkernels as dk

# vocabulary, width, inner width, layers, heads
SIZES = {
    "small": (32000, 256, 688, 4, 8),
    "LLaDA's proportions": (126464, 512, 1536, 8, 8),
    "vocabulary 4096": (4096, 128, 256, 2, 2),
}


@dataclass(frozen=True)
class Case:
    cache: str
    batch: int = 1
    prompt: int = 64
    new: int = 64
    block: int = 32
    steps: int = 16
    size: str = "small"
    dtype: torch.dtype = torch.float32
    softmax: torch.dtype = torch.float64  # dtype of the softmax in the plain loop

    @property
    def mask(self):
        return SIZES[self.size][0] - 1

    def __str__(self):
        return (f"{self.size}, {str(self.dtype)[6:]}, cache {self.cache}, batch {self.batch}, prompt {self.prompt}, "
                f"{self.new} new tokens in blocks of {self.block}, {self.steps} forwards")  # fmt: skip


QUICK = [Case("none"), Case("dual")]
SMALLEST = [Case("dual", new=32, steps=4, size="vocabulary 4096")]
FULL = [
    Case("none", batch=8), Case("dual", batch=8), Case("dual", prompt=512, new=256, steps=64),
    Case("none", prompt=512, new=256, steps=64),
    Case("dual", prompt=128, new=128, steps=32, size="LLaDA's proportions", dtype=torch.bfloat16),
]  # fmt: skip


@functools.cache
def build(size, dtype):
    """Build a Llama with random weights."""
    torch.manual_seed(0)
    vocabulary, width, inner, layers, heads = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model.to(dtype)


def plain_attention(module, query, key, value, attention_mask, scaling=None, bench_cache=None, **kwargs):
    """Bidirectional SDPA. With a cache, rows `bench_cache[1]` of it are updated and queries attend to all of it."""
    if bench_cache is not None:
        layers, rows = bench_cache
        if rows is None:
            layers[module.layer_idx] = (key, value)
        else:
            k, v = layers[module.layer_idx]
            k[:, :, rows], v[:, :, rows] = key, value
            key, value = k, v
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None


transformers.AttentionInterface.register("dlmkernels_bench_plain", plain_attention)


@torch.no_grad()
def plain_decode(model, ids, case):
    """Fast-dLLM's loop (arXiv:2505.22618): logits and softmax of every forwarded position, one topk per batch row."""
    attention = model.config._attn_implementation
    model.config._attn_implementation = "dlmkernels_bench_plain"
    try:
        batch, prompt = ids.shape
        tokens = torch.cat((ids, ids.new_full((batch, case.new), case.mask)), 1)
        positions = torch.arange(prompt + case.new, device=ids.device)[None].expand(batch, -1)
        blocks = case.new // case.block
        steps = case.steps // blocks
        for begin in range(prompt, prompt + case.new, case.block):
            end, layers = begin + case.block, {}
            for step in range(steps):
                whole = case.cache == "none" or step == 0
                part = slice(None) if whole else slice(begin, end)
                cache = None if case.cache == "none" else (layers, None if step == 0 else part)
                logits = model(
                    input_ids=tokens[:, part], position_ids=positions[:, part], bench_cache=cache, use_cache=False
                ).logits
                logits[..., case.mask] = -torch.inf
                token = logits.argmax(-1)
                p = F.softmax(logits.to(case.softmax), -1).gather(-1, token[..., None])[..., 0]
                if whole:
                    token, p = token[:, begin:end], p[:, begin:end]
                is_mask = tokens[:, begin:end] == case.mask
                token = torch.where(is_mask, token, tokens[:, begin:end])
                p = torch.where(is_mask, p, -torch.inf)
                chosen = torch.zeros_like(is_mask)
                for row in range(batch):
                    masks = int(is_mask[row].sum())
                    quota = case.block // steps + (step < case.block % steps)
                    _, best = torch.topk(p[row], k=min(quota, masks))
                    chosen[row, best] = True
                tokens[:, begin:end][chosen] = token[chosen]
        return tokens
    finally:
        model.config._attn_implementation = attention


def ours(model, ids, case):
    return dk.generate(
        model, ids, max_new_tokens=case.new, block_length=case.block, steps=case.steps, cache=case.cache,
        mask_token_id=case.mask, eos_policy="none",
    )  # fmt: skip


def test_decode(benchmark, harness, case):
    ids = torch.randint(4, case.mask, (case.batch, case.prompt))

    # Compare in float32: bfloat16 has many near ties, and all tokens differ after the first that is broken differently.
    model = build(case.size, torch.float32)
    out = ours(model, ids, case)
    assert int(out.num_forwards[0]) == case.steps
    same = (out.sequences == plain_decode(model, ids, case))[:, case.prompt :].float().mean().item()
    assert same > 0.9
    model = build(case.size, case.dtype)
    baselines = {"plain loop (Fast-dLLM)": lambda: plain_decode(model, ids, case)}
    if case.cache != "none":
        llada = replace(case, cache="none", softmax=case.dtype)
        baselines["plain loop without a cache (LLaDA)"] = lambda: plain_decode(model, ids, llada)
    harness.compare(benchmark, f"generate: {case}", lambda: ours(model, ids, case), baselines,
                    work=case.batch * case.new, unit="tokens/s")  # fmt: skip


def test_compiled(benchmark, harness, case):
    """A forward compiled by torch.compile, against the eager one."""
    model = build(case.size, case.dtype)
    ids = torch.randint(4, case.mask, (case.batch, case.prompt))
    eager, compiled = dk.adapt(model), dk.adapt(model, compile=True)
    assert torch.equal(ours(eager, ids, case).sequences, ours(compiled, ids, case).sequences)
    harness.compare(
        benchmark, f"compiled: {case}", lambda: ours(compiled, ids, case), {"eager": lambda: ours(eager, ids, case)},
        work=case.batch * case.new, unit="tokens/s",
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 32])
def test_step_overhead(benchmark, harness, batch):
    """Time per step outside the model's forward and its head: Python, torch and the ops."""
    if harness.floors is not None:
        pytest.skip("on a GPU the model runs concurrently with Python, so this time cannot be separated")
    case = Case("dual", batch=batch, new=128, steps=128, size="vocabulary 4096")
    model = build(case.size, case.dtype)
    in_model = started = 0.0

    def enters(*_):
        nonlocal started
        started = time.perf_counter()

    def leaves(*_):
        nonlocal in_model
        in_model += time.perf_counter() - started

    ids = torch.randint(4, case.mask, (case.batch, case.prompt))
    # Hooks, because `generate` runs its own modules, which share only parameters and hooks with the model's.
    for module in (model.model, model.lm_head):
        module.register_forward_pre_hook(enters)
        module.register_forward_hook(leaves)
    harness.compare(
        benchmark, f"outside the model: {case}", lambda: ours(model, ids, case),
        {"plain loop (Fast-dLLM)": lambda: plain_decode(model, ids, case)},
        work=case.steps, unit="forwards/s", clock=lambda: time.perf_counter() - in_model,
    )  # fmt: skip
    assert in_model > 0
