# SPDX-License-Identifier: Apache-2.0
"""Train the demo's causal model, and the drafter that guesses its next tokens, on the CPU.

    python examples/train_drafter.py target --minutes 20 --output /tmp/causal
    python examples/train_drafter.py drafter --minutes 8 --target /tmp/causal --output /tmp/drafter

The causal model is a Llama that answers the demo's tasks from left to right. Besides the next-token loss it is trained
to fill blocks of mask tokens, so that it can also draft for itself (rule ``SelfSpeculative``). The drafter has the
architecture of DFlash (arXiv:2602.06036): two Qwen3 layers that see the outputs of the frozen model's layers for the
text, one token and mask tokens, and fill all masks at once. Its labels are the tokens that the model itself predicts.
The requirements are those of train_demo.py.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dlmkernels.demo.tasks import EOS_ID, MASK_ID, PAD_ID, TASKS, encode

VOCAB, WIDTH, INNER, HEADS, EPS, THETA = 32, 128, 256, 4, 1e-6, 10000.0
LAYERS, DRAFT_LAYERS, BLOCK = 5, 2, 16
TAPS = [1, 2, 3]  # layers of the target, from 0, whose outputs the drafter sees
MASK = 18  # mask token of blocks; not the blank, which occurs in prompts of Sudokus, but with the same embedding
DECAY = 7.0  # the loss weight of a draft falls with its distance i from the known token: exp(-(i - 1) / DECAY)
ROWS = {  # texts per batch
    "target": {"sudoku": 10, "addition": 20, "running-sum": 16},
    "drafter": {"sudoku": 4, "addition": 8, "running-sum": 10},
}
CLUES = 36, 77  # range of the number of clues in training Sudokus; the end is exclusive
BLOCKS = {"target": 1, "drafter": 4}  # blocks of mask tokens per text


class Texts(NamedTuple):
    """Texts of one task: ids int64 `[B, T]`, start of the answers, and positions of the blocks int64 `[B, N]`."""

    ids: Tensor
    start: int
    anchors: Tensor


def texts(name: str, rows: int, blocks: int, rng: np.random.Generator) -> Texts:
    """Make training texts that end with an end token. A Sudoku is written as puzzle, ``=``, and solution."""
    task = TASKS[name]
    ids = task.training_rows(rows, rng)
    start = task.prompt_length
    if name == "sudoku":
        clues = rng.integers(*CLUES, size=(rows, 1))
        puzzle = np.where(rng.random((rows, 81)).argsort(1).argsort(1) < clues, ids[:, 1:], MASK_ID)
        equals = np.full((rows, 1), encode("=")[0])
        ids = np.hstack([ids[:, :1], puzzle, equals, ids[:, 1:]])
        start = 83
    ids = np.hstack([ids, np.full((rows, 1), EOS_ID)])
    anchors = rng.integers(start - 1, ids.shape[1] - 1, size=(rows, blocks))
    return Texts(torch.from_numpy(ids), start, torch.from_numpy(anchors))


# ---- Models: module names are those of transformers, so that it loads the state dicts unchanged. ----


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * self.weight).type_as(x)


class Layer(nn.Module):
    """A layer of Llama, or of Qwen3, which normalizes queries and keys."""

    def __init__(self, normalises: bool):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(WIDTH), RMSNorm(WIDTH)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in names})
        if normalises:
            self.self_attn.update({"q_norm": RMSNorm(WIDTH // HEADS), "k_norm": RMSNorm(WIDTH // HEADS)})
        sizes = {"gate_proj": (WIDTH, INNER), "up_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.normalises = normalises

    def forward(self, x: Tensor, context: Tensor | None, angles: Tensor, visible: Tensor) -> Tensor:
        """Process `x` `[B, Q, d]`, which follows `context` `[B, C, d]`.

        `angles` is `[B, C + Q, 16]`, `visible` (which positions are attended to) is bool `[B, Q, C + Q]`.
        """
        attn, mlp = self.self_attn, self.mlp
        own = self.input_layernorm(x)
        seen = own if context is None else torch.cat([context.type_as(own), own], 1)
        q, k, v = (
            attn[f"{name}_proj"](y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name, y in {"q": own, "k": seen, "v": seen}.items()
        )
        if self.normalises:
            q, k = attn["q_norm"](q), attn["k_norm"](k)
        q, k = rotate(q, angles[:, None, -q.shape[2] :]), rotate(k, angles[:, None])
        scores = (q @ k.transpose(-1, -2)).float() * (WIDTH // HEADS) ** -0.5
        weight = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).type_as(v)
        x = x + attn["o_proj"]((weight @ v).transpose(1, 2).flatten(2))
        own = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](own)) * mlp["up_proj"](own))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).type_as(x)


def angles_of(positions: Tensor) -> Tensor:
    half = WIDTH // HEADS // 2
    return positions[..., None] * THETA ** (-torch.arange(half) / half)


class Causal(nn.Module):
    """The causal model, equivalent to transformers' Llama."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList(Layer(False) for _ in range(LAYERS))
        embedding = nn.Embedding(VOCAB, WIDTH)
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "norm": RMSNorm(WIDTH)})
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        initialise(self)

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits `[B, Q, V]`, and the outputs of the layers in `TAPS`, `[B, Q, taps * d]`."""
        x, angles, taps = self.model["embed_tokens"](ids), angles_of(positions), []
        for i, layer in enumerate(self.model["layers"]):
            x = layer(x, None, angles, visible)
            taps += [x] if i in TAPS else []
        return self.lm_head(self.model["norm"](x)), torch.cat(taps, -1)


class Drafter(nn.Module):
    """A DFlash drafter, which uses the embedding and the LM head of its target."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.hidden_norm = nn.Linear(len(TAPS) * WIDTH, WIDTH, bias=False), RMSNorm(WIDTH)
        self.layers, self.norm = nn.ModuleList(Layer(True) for _ in range(DRAFT_LAYERS)), RMSNorm(WIDTH)
        initialise(self)

    def forward(self, taps: Tensor, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        context, angles = self.hidden_norm(self.fc(taps)), angles_of(positions)
        for layer in self.layers:
            x = layer(x, context, angles, visible)
        return self.norm(x)


def initialise(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 2:
            small = name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight"))
            nn.init.normal_(p, std=0.02 if small else p.shape[1] ** -0.5)


# ---- Blocks of mask tokens ----


class Blocks(NamedTuple):
    """The blocks of a batch of texts, one after another, each field `[B, N * BLOCK]` unless stated otherwise.

    `visible` `[B, N * BLOCK, T + N * BLOCK]` lets each block attend to the text before it and to itself. `place` is the
    position of each token's label in the text (clamped to its length), `weight` its loss weight, which is 0 for the
    known first token and beyond the end of the text.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    place: Tensor
    weight: Tensor


def blocks_of(batch: Texts) -> Blocks:
    length, offset = batch.ids.shape[1], torch.arange(BLOCK)
    positions = (batch.anchors[:, :, None] + offset).flatten(1)
    first = batch.anchors.repeat_interleave(BLOCK, 1)
    ids = torch.where(positions == first, batch.ids.gather(1, first), MASK_ID)
    number = torch.arange(batch.anchors.shape[1]).repeat_interleave(BLOCK)
    own = (number[:, None] == number).expand(len(ids), -1, -1)
    before = torch.arange(length) < first[:, :, None]
    weight = torch.exp(-(positions - first - 1).float() / DECAY) * ((positions > first) & (positions < length))
    return Blocks(ids, positions, torch.cat([before, own], 2), positions.clamp(max=length - 1), weight)


def target_loss(model: nn.Module, batch: Texts) -> tuple[Tensor, Tensor]:
    """Return the next-token loss of the answers and the loss of the blocks, from one forward."""
    length, blocks = batch.ids.shape[1], blocks_of(batch)
    positions = torch.cat([torch.arange(length).expand(len(batch.ids), -1), blocks.positions], 1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    causal = F.pad(causal, (0, blocks.ids.shape[1])).expand(len(batch.ids), -1, -1)
    logits, _ = model(torch.cat([batch.ids, blocks.ids], 1), positions, torch.cat([causal, blocks.visible], 1))
    text, drafts = logits.float().split([length, blocks.ids.shape[1]], 1)
    following = F.cross_entropy(text[:, batch.start - 1 : -1].flatten(0, 1), batch.ids[:, batch.start :].flatten())
    return following, draft_loss(drafts, batch.ids.gather(1, blocks.place), blocks.weight)


def draft_loss(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / weight.sum()


def drafter_loss(drafter: nn.Module, target: Causal, batch: Texts) -> tuple[Tensor, Tensor]:
    """Return the loss of the blocks, and the mean number of drafts accepted, those before the first wrong one."""
    length, blocks = batch.ids.shape[1], blocks_of(batch)
    positions = torch.arange(length).expand(len(batch.ids), -1)
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(batch.ids), -1, -1)
    with torch.no_grad():
        logits, taps = target(batch.ids, positions, causal)
        said = F.pad(logits.argmax(-1)[:, :-1], (1, 0))  # the target's prediction for each position
        x = target.model["embed_tokens"](blocks.ids)
    hidden = drafter(taps, x, torch.cat([positions, blocks.positions], 1), blocks.visible)
    logits, labels = F.linear(hidden, target.lm_head.weight), said.gather(1, blocks.place)
    right = ((logits.argmax(-1) == labels) & (blocks.weight > 0)).unflatten(1, (-1, BLOCK))[:, :, 1:]
    return draft_loss(logits, labels, blocks.weight), right.long().cumprod(2).sum(2).float().mean()


# ---- Training ----


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    is_target = args.what == "target"
    model: nn.Module = Causal() if is_target else Drafter()
    if not is_target:
        TASKS["sudoku"].pool_size = 4096  # enough, because each grid is shuffled by symmetries
        target = Causal()
        target.load_state_dict(load_file(Path(args.target) / "model.safetensors"))
        target = target.to(torch.float32).requires_grad_(False)
    compiled = torch.compile(model, dynamic=False) if args.compile else model
    params = dict(model.named_parameters())
    averages = {name: p.detach().clone() for name, p in params.items()}
    matrices = [p for name, p in params.items() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in params.items() if not (p.ndim == 2 and "layers" in name)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True),
    ]
    print(f"{sum(p.numel() for p in params.values()):,} parameters", flush=True)
    step, report, begun = 0, 0.0, time.monotonic()
    all_rows = ROWS[args.what]
    sums: dict[str, list[tuple[float, float]]] = {name: [] for name in all_rows}
    while True:
        elapsed = time.monotonic() - begun
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1 or elapsed > report:
            text = "  ".join(f"{n} " + " ".join(f"{x:.4f}" for x in np.mean(s, 0)) for n, s in sums.items() if s)
            print(f"{elapsed / 60:.1f} min, step {step}: {text}", flush=True)
            report, sums = elapsed + 30, {name: [] for name in all_rows}
        if progress >= 1:
            break
        lr = args.lr * min(1, (step + 1) / 200, (1 - progress) / args.decay)
        rng = np.random.default_rng([args.seed, step])
        for name, rows in all_rows.items():
            batch = texts(name, rows, BLOCKS[args.what], rng)
            with torch.autocast("cpu", torch.bfloat16):
                losses = target_loss(compiled, batch) if is_target else drafter_loss(compiled, target, batch)
            (losses[0] + 0.3 * losses[1] if is_target else losses[0]).backward()
            sums[name].append((losses[0].item(), losses[1].item()))
        nn.utils.clip_grad_norm_(params.values(), 1.0, foreach=True)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        torch._foreach_lerp_(list(averages.values()), [p.detach() for p in params.values()], 5e-3)
        if step % 500 == 0:
            export(averages, args.what, Path(args.output))
    export(averages, args.what, Path(args.output))
    print(f"done: {step} steps, {(time.monotonic() - begun) / 60:.1f} min", flush=True)


def export(state: dict[str, Tensor], what: str, folder: Path) -> None:
    """Write a folder with a Llama that transformers loads, or with a drafter in the format of DFlash."""
    config: dict[str, object] = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, rms_norm_eps=EPS, hidden_act="silu", attention_bias=False,
        max_position_embeddings=256, rope_theta=THETA, tie_word_embeddings=False, dtype="bfloat16",
        bos_token_id=None, eos_token_id=EOS_ID, pad_token_id=PAD_ID,
    )  # fmt: skip
    if what == "target":
        config |= dict(architectures=["LlamaForCausalLM"], model_type="llama", num_hidden_layers=LAYERS, mlp_bias=False)
        config["mask_token_id"] = MASK
        table = state["model.embed_tokens.weight"].clone()
        table[MASK] = table[MASK_ID]
        state = {**state, "model.embed_tokens.weight": table}
    else:
        tapped = dict(block_size=BLOCK, target_layer_ids=TAPS, mask_token_id=MASK, num_target_layers=LAYERS)
        config |= dict(architectures=["DFlashDraftModel"], model_type="qwen3", num_hidden_layers=DRAFT_LAYERS)
        config |= dict(layer_types=["full_attention"] * DRAFT_LAYERS, dflash_config=tapped)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: x.to(torch.bfloat16).contiguous() for name, x in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["target", "drafter"])
    parser.add_argument("--minutes", type=float, default=20, help="training time, including learning rate decay")
    parser.add_argument("--steps", type=int, default=0, help="train for this many steps instead, reproducibly")
    parser.add_argument("--decay", type=float, default=0.4, help="final share of training with decaying learning rate")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="folder of the trained causal model, required for the drafter")
    parser.add_argument("--output", required=True, help="folder for the exported model")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if args.what == "drafter" and not args.target:
        parser.error("training the drafter needs --target, the folder of the causal model")
    train(args)


if __name__ == "__main__":
    main()
