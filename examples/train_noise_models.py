# SPDX-License-Identifier: Apache-2.0
"""Train the demonstration's two models that are told the noise level, on one CPU thread, and export them.

    python examples/train_noise_models.py mdlm --minutes 45 --output /tmp/mdlm
    python examples/train_noise_models.py langflow --minutes 45 --output /tmp/langflow

Both are `DiTForDiffusionLM`s of the sizes below, trained on Sudoku. ``mdlm`` (Sahoo et al., arXiv:2406.07524) is a
masked model that is told the time; ``langflow`` (arXiv:2604.11748) sees embeddings under Gaussian noise. Some cells of
most boards are given, and get no noise (as in DiffuSeq, arXiv:2210.08933). In both cases the loss is the cross-entropy
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
ROWS = 18  # boards in a batch
TASK = TASKS["sudoku"]
NEVER = -1e4  # logit of what is never said
LENGTH = TASK.length


def build(kind: str) -> DiTForDiffusionLM:
    config = DiTConfig(
        **SIZES, **KINDS[kind], pad_token_id=PAD_ID, mask_token_id=MASK_ID if kind == "mdlm" else None,
        attn_implementation="eager",
    )  # fmt: skip
    config.dlm_family = kind
    model = DiTForDiffusionLM(config)
    with torch.no_grad():  # tokens that are no answer, and have no gradient from here on
        model.backbone.output_layer.linear.bias[[MASK_ID, PAD_ID]] = NEVER
    return model


def make_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Solved boards int64 `[B, T]`, which of their cells get noise bool `[B, T]`, and times float64 `[B]`."""
    tokens = TASK.training_rows(ROWS, rng)
    # of two thirds of the boards some cells are given
    share = np.maximum(0.0, 1.5 * rng.random((ROWS, 1)) - 0.5)
    noisy = rng.random(tokens.shape) >= share
    noisy[:, : TASK.prompt_length] = False
    times = (rng.permutation(ROWS) + rng.random(ROWS)) / ROWS  # stratified
    return torch.from_numpy(tokens), torch.from_numpy(noisy), torch.from_numpy(times)


class Objective(nn.Module):
    """What is minimised; its forward is what `torch.compile` compiles."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.model = kind, build(kind)
        if kind == "langflow":
            # cross-entropy of pure noise, in nats; the schedule's location and scale are fitted with it
            self.entropy = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, tokens: Tensor, level: Tensor, opinion: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cross-entropies `[B, T]` and logits `[B, T, V]` of input embeddings `[B, T, hidden]` at levels `[B]`."""
        logits = self.model(inputs_embeds=x, timesteps=level, self_condition=opinion).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return losses.view_as(tokens), logits

    def losses(self, tokens: Tensor, noisy: Tensor, times: Tensor, step: int, run) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropies `[B, T]`, which of them count bool `[B, T]`, and the loss of the schedule."""
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
        if step % 2:  # in half of the steps the model hears what it said without having heard anything
            with torch.no_grad():
                mean = run(x, tokens, gamma, opinion)[1].softmax(-1) @ table
                opinion = torch.where(noisy[..., None], mean, clean)
        losses = run(x, tokens, gamma, opinion)[0]
        # the schedule, as in LangFlow: the cross-entropy at gamma follows entropy times the distribution function
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
        # warm-up, plateau, linear decay to zero; by the clock unless --steps is given
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
    """Write a folder that `dk.load` loads, in bfloat16; the tokenizer is that of the demonstration's first model."""
    model = build(kind)
    model.load_state_dict(state)
    model.config._attn_implementation_internal = None  # the choice of whoever loads it
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--minutes", type=float, default=45, help="length of training, decay included")
    parser.add_argument("--steps", type=int, default=0, help="length in steps instead: repeatable on any machine")
    parser.add_argument("--decay", type=float, default=0.4, help="last share of training with falling learning rate")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grids", type=int, default=1024, help="Sudoku grids searched for; their symmetries are used")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", required=True, help="folder for the exported model")
    parser.add_argument("--checkpoint", help="file to save to every two minutes, and to continue from if it exists")
    torch.set_num_threads(1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
