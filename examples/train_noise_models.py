# SPDX-License-Identifier: Apache-2.0
"""Train the demo's two models that are conditioned on the noise level, on one CPU thread, and export them.

    python examples/train_noise_models.py mdlm --minutes 45 --output /tmp/mdlm
    python examples/train_noise_models.py langflow --minutes 45 --output /tmp/langflow

Both are `DiTForDiffusionLM`s of the sizes below, trained on Sudoku. ``mdlm`` (Sahoo et al., arXiv:2406.07524) is a
masked model conditioned on time. ``langflow`` (arXiv:2604.11748) sees embeddings with Gaussian noise. In most boards
some cells are given and get no noise (as in DiffuSeq, arXiv:2210.08933). The loss of both models is the cross-entropy
of the clean tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlmkernels.demo.tasks import MASK_ID, PAD_ID, TASKS, TOKENS
from dlmkernels.models.dit import DiTConfig, DiTForDiffusionLM

SIZES = dict(
    vocab_size=len(TOKENS), hidden_size=80, cond_dim=16, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=82,
)  # fmt: skip
KINDS = {
    "mdlm": dict(time="sigma", head="logits", noise="loglinear"),
    "langflow": dict(
        time="gamma", head="flow", noise="gumbel", self_conditioning=True, normalized_embedding=True,
        clean_context=True, gumbel_loc=2.5, gumbel_scale=0.5,
    ),
}  # fmt: skip
ROWS = 18  # boards per batch
TASK = TASKS["sudoku"]
NEVER = -1e4  # logit of tokens that are never predicted
LENGTH = TASK.length


def build(kind: str) -> DiTForDiffusionLM:
    config = DiTConfig(
        **SIZES, **KINDS[kind], pad_token_id=PAD_ID, mask_token_id=MASK_ID if kind == "mdlm" else None,
        attn_implementation="eager",
    )  # fmt: skip
    config.dlm_family = kind
    model = DiTForDiffusionLM(config)
    with torch.no_grad():  # tokens that are never an answer; at this logit they get no gradient
        model.backbone.output_layer.linear.bias[[MASK_ID, PAD_ID]] = NEVER
    return model


def make_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return solved boards int64 `[B, T]`, which cells get noise bool `[B, T]`, and times float64 `[B]`."""
    tokens = TASK.training_rows(ROWS, rng)
    # two thirds of the boards have some given cells
    share = np.maximum(0.0, 1.5 * rng.random((ROWS, 1)) - 0.5)
    noisy = rng.random(tokens.shape) >= share
    noisy[:, : TASK.prompt_length] = False
    times = (rng.permutation(ROWS) + rng.random(ROWS)) / ROWS  # stratified
    return torch.from_numpy(tokens), torch.from_numpy(noisy), torch.from_numpy(times)


class Objective(nn.Module):
    """The training objective. Its `forward` is the part that `torch.compile` compiles."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.model = kind, build(kind)
        if kind == "langflow":
            # cross-entropy of pure noise, in nats; fitted together with the schedule's location and scale
            self.entropy = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, tokens: Tensor, level: Tensor, opinion: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return cross-entropies `[B, T]` and logits `[B, T, V]`, given input embeddings `x` and noise levels `[B]`.

        `x` is `[B, T, hidden]`. `opinion`, the self-conditioning input, has the same shape or is None.
        """
        logits = self.model(inputs_embeds=x, timesteps=level, self_condition=opinion).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return losses.view_as(tokens), logits

    def losses(self, tokens: Tensor, noisy: Tensor, times: Tensor, step: int, run) -> tuple[Tensor, Tensor, Tensor]:
        """Return cross-entropies `[B, T]`, which of them count bool `[B, T]`, and the loss of the noise schedule."""
        generator = torch.Generator().manual_seed(step)
        table = self.model.latent_table()
        if self.kind == "mdlm":
            masked = noisy & (torch.rand(tokens.shape, generator=generator) < times[:, None])
            x = table[tokens.masked_fill(masked, MASK_ID)]
            return run(x, tokens, self.model.level(times), None)[0], masked, torch.zeros(())
        with torch.no_grad():
            gamma = self.model.gamma(times).float()
        signal, spread = torch.sigmoid(-gamma).sqrt()[:, None, None], torch.sigmoid(gamma).sqrt()[:, None, None]
        clean = table[tokens]
        noise = torch.randn(clean.shape, generator=generator)
        x = torch.where(noisy[..., None], signal * clean + spread * noise, clean)
        opinion = torch.zeros_like(clean)
        if step % 2:  # self-conditioning on a first prediction, in every second step
            with torch.no_grad():
                mean = run(x, tokens, gamma, opinion)[1].softmax(-1) @ table
                opinion = torch.where(noisy[..., None], mean, clean)
        losses = run(x, tokens, gamma, opinion)[0]
        # as in LangFlow, the schedule is fitted so that the cross-entropy at gamma is entropy times the Gumbel CDF
        level = (losses.detach() * noisy).sum(1) / noisy.sum(1).clamp(min=1)
        proposal = self.model.proposal
        share = (-((proposal.loc - gamma) / proposal.scale).exp()).exp()
        return losses, noisy, (self.entropy * share - level).square().mean()


def optimizers_of(objective: Objective, lr: float) -> list[torch.optim.Optimizer]:
    named = dict(objective.named_parameters())
    schedule = [p for name, p in named.items() if "proposal" in name or name == "entropy"]
    of_blocks = {name: p for name, p in named.items() if "blocks" in name and p.ndim == 2}
    matrices = [p for name, p in of_blocks.items() if ".attn_" in name or ".mlp." in name]
    taken = {id(p) for p in schedule + matrices}
    others = [p for p in named.values() if id(p) not in taken]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    return [muon, adam, *([torch.optim.Adam(schedule, lr=lr)] if schedule else [])]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    TASK.pool_size = args.grids  # type: ignore[attr-defined]
    objective = Objective(args.kind)
    model = objective.model
    run = torch.compile(objective, dynamic=False) if args.compile else objective
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizers = optimizers_of(objective, args.lr)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    step, elapsed, canvases = 0, 0.0, 0
    if args.checkpoint and Path(args.checkpoint).exists():
        saved = torch.load(args.checkpoint)
        objective.load_state_dict(saved["objective"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        ema, step, elapsed, canvases = saved["ema"], saved["step"], saved["elapsed"], saved["canvases"]

    last, report, save, sums = time.monotonic(), elapsed, elapsed + 120, np.zeros(2)
    while True:
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1 or elapsed > save:
            if args.checkpoint:
                state = dict(objective=objective.state_dict(), ema=ema, step=step, elapsed=elapsed, canvases=canvases)
                torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, args.checkpoint)
            export(args.kind, ema, Path(args.output))
            save = elapsed + 120
        if progress >= 1:
            break
        # warm-up, plateau, linear decay to zero; progress is measured in time unless --steps is given
        lr = args.lr * min(1, (step + 1) / 100, (1 - progress) / args.decay)
        tokens, noisy, times = make_batch(np.random.default_rng([args.seed, step]))
        with torch.autocast("cpu", torch.bfloat16):
            losses, counts, extra = objective.losses(tokens, noisy, times, step, run)
        ((losses * counts).sum() / counts.sum() + extra).backward()
        nn.utils.clip_grad_norm_([p for p in objective.parameters() if p.grad is not None], 1.0, foreach=True)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 5e-3 if step > 500 else 2e-2)

        step, canvases = step + 1, canvases + len(tokens)
        elapsed, last = elapsed + time.monotonic() - last, time.monotonic()
        sums += (losses.detach() * counts).sum().item(), counts.sum().item()
        if elapsed > report:
            text = f"{sums[0] / sums[1]:.4f}"
            if args.kind == "langflow":
                fitted = model.proposal.loc, model.proposal.scale, objective.entropy
                text += "  schedule " + " ".join(f"{x.item():.2f}" for x in fitted)
            print(f"{elapsed / 60:.1f} min, step {step}, lr {lr:.0e}: {text}", flush=True)
            report, sums = elapsed + 20, np.zeros_like(sums)
    print(f"done: {step} steps, {canvases:,} canvases, {elapsed / 60:.1f} min", flush=True)


def export(kind: str, state: dict[str, Tensor], folder: Path) -> None:
    """Write a folder that `dk.load` loads, in bfloat16. The tokenizer is that of the demo's masked model."""
    model = build(kind)
    model.load_state_dict(state)
    model.config._attn_implementation_internal = None  # chosen when the model is loaded
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--minutes", type=float, default=45, help="training time, including learning rate decay")
    parser.add_argument("--steps", type=int, default=0, help="train for this many steps instead, reproducibly")
    parser.add_argument("--decay", type=float, default=0.4, help="final share of training with decaying learning rate")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grids", type=int, default=1024, help="Sudoku grids to search for; symmetries give the rest")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", required=True, help="folder for the exported model")
    parser.add_argument("--checkpoint", help="file to save to every two minutes, and to resume from if it exists")
    torch.set_num_threads(1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
