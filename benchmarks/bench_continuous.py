# SPDX-License-Identifier: Apache-2.0
"""Benchmark decoding a LangFlow model with random weights against a plain loop like its published program."""

import functools
from dataclasses import dataclass

import torch

import dlmkernels as dk
from dlmkernels.models.dit import DiTConfig, DiTForDiffusionLM
from dlmkernels.reference import normals

# vocabulary, width, layers, heads
SIZES = {
    "small": (30522, 256, 4, 4),
    "as published for LM1B": (30522, 768, 12, 12),
    "vocabulary 1024": (1024, 64, 2, 2),
}


@dataclass(frozen=True)
class Case:
    batch: int = 1
    length: int = 128
    steps: int = 8
    size: str = "small"

    def __str__(self):
        return f"LangFlow, {self.size}, batch {self.batch}, {self.length} tokens, {self.steps} forwards"


QUICK = [Case()]
SMALLEST = [Case(length=32, steps=3, size="vocabulary 1024")]
FULL = [Case(batch=4), Case(size="as published for LM1B")]


@functools.cache
def build(size):
    torch.manual_seed(0)
    vocabulary, width, layers, heads = SIZES[size]
    config = DiTConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, time="gamma",
        head="flow", noise="gumbel", self_conditioning=True, normalized_embedding=True,
    )  # fmt: skip
    config.dlm_family = "langflow"
    model = DiTForDiffusionLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.dim() == 2:
            p.data.normal_(std=0.3 / p.shape[1] ** 0.5)
    return model


@torch.no_grad()
def plain_decode(model, noise, case):
    """LangFlow's loop (arXiv:2604.11748): full probability tensors, the table normalized in each step, z in float64."""
    q = torch.linspace(1 - 1e-5, 1e-5, case.steps, device=noise.device)
    gamma, z, opinion = model.gamma(q.double()).float(), noise, None
    softplus = torch.nn.functional.softplus
    for i in range(case.steps):
        logits = model(inputs_embeds=z, timesteps=gamma[i].expand(len(z)), self_condition=opinion).logits
        if i == case.steps - 1:
            return logits.argmax(-1)
        opinion = torch.softmax(logits.float(), -1) @ model.latent_table()
        now, then = gamma[i].double(), gamma[i + 1].double()
        current = z.double() * ((softplus(now) - softplus(then)) / 2).exp()
        end = torch.sigmoid(-then).sqrt() * opinion.double()
        z = end.lerp(current, ((then - now) / 2).exp()).float()
    return None


def test_langflow(benchmark, harness, case):
    model = build(case.size)
    device = next(model.parameters()).device
    seed = torch.arange(case.batch, device=device)
    nothing = torch.zeros(case.batch, 0, dtype=torch.int64, device=device)
    position, before = torch.arange(case.length, device=device), torch.full((1, 1), -1, device=device)
    noise = normals(seed[:, None], position, before, model.config.hidden_size)

    def ours():
        return dk.generate(model, nothing, max_new_tokens=case.length, steps=case.steps, seed=seed).sequences

    assert (ours() == plain_decode(model, noise, case)).float().mean() > 0.99
    harness.compare(
        benchmark, f"generate: {case}", ours, {"plain loop (LangFlow)": lambda: plain_decode(model, noise, case)},
        work=case.batch * case.length, unit="tokens/s",
    )  # fmt: skip
