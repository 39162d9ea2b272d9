# SPDX-License-Identifier: Apache-2.0
"""Train the demo model on one CPU thread and export it, or evaluate an exported model.

    python examples/train_demo.py --minutes 65 --output /tmp/demo-model
    python examples/train_demo.py --evaluate python/dlmkernels/demo/model

The model is a masked diffusion model: a plain Llama that attends to the whole canvas (prompt and answer) in both
directions and predicts all blanks at once. Training blanks a random share of each canvas and minimizes the
cross-entropy of the blanks. Needs torch, numpy, transformers and safetensors, and a C++ compiler for ``torch.compile``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlmkernels.demo.tasks import EOS, EOS_ID, MASK, MASK_ID, PAD, PAD_ID, TASKS, TOKENS

SHAPE = dict(
    vocab_size=32,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
ROPE_THETA = 10000.0
ROWS = {"sudoku": 44, "addition": 10, "running-sum": 10}  # canvases per batch
WEIGHT = {"sudoku": 1.0, "addition": 4.0, "running-sum": 4.0}  # loss weight of a blank; Sudokus have many more blanks
LENGTH = max(task.length for task in TASKS.values())


# ---- Model: module names are those of transformers' Llama, so that it loads the state dict unchanged. ----


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + SHAPE["rms_norm_eps"]) * self.weight


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        d, f = SHAPE["hidden_size"], SHAPE["intermediate_size"]
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d), RMSNorm(d)
        linear = {"q_proj": (d, d), "k_proj": (d, d), "v_proj": (d, d), "o_proj": (d, d)}
        self.self_attn = nn.ModuleDict({k: nn.Linear(*v, bias=False) for k, v in linear.items()})
        linear = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
        self.mlp = nn.ModuleDict({k: nn.Linear(*v, bias=False) for k, v in linear.items()})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        batch, length, d = x.shape
        heads = SHAPE["num_attention_heads"]
        attn, mlp = self.self_attn, self.mlp
        # One matrix product for q, k and v, and one for gate and up: fewer, larger products are faster on a CPU.
        weight = torch.cat([attn[k].weight for k in ("q_proj", "k_proj", "v_proj")])
        qkv = F.linear(self.input_layernorm(x), weight)
        q, k, v = qkv.view(batch, length, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Softmax is written out because the backward pass of fused attention is slow on CPUs at these sizes. It does
        # not subtract the maximum, because scores stay far below 60, and divides after the product with v.
        scores = q @ k.transpose(-1, -2) * (d // heads) ** -0.5
        weight = torch.exp(scores.float().clamp(-60, 60)) * visible
        context = (weight @ v).float() / weight.sum(-1, keepdim=True)
        context = context.transpose(1, 2).reshape(batch, length, d)
        x = x + attn["o_proj"](context)
        weight = torch.cat([mlp[k].weight for k in ("gate_proj", "up_proj")])
        gate, up = F.linear(self.post_attention_layernorm(x), weight).chunk(2, -1)
        return x + mlp["down_proj"](F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).type_as(x)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        d = SHAPE["hidden_size"]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(SHAPE["vocab_size"], d),
                "layers": nn.ModuleList(Layer() for _ in range(SHAPE["num_hidden_layers"])),
                "norm": RMSNorm(d),
            }
        )
        self.lm_head = nn.Linear(d, SHAPE["vocab_size"], bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 if into_residual or "lm_head" in name else p.shape[1] ** -0.5)
        half = d // SHAPE["num_attention_heads"] // 2
        angle = torch.arange(LENGTH)[:, None] * ROPE_THETA ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor, visible: Tensor) -> Tensor:
        """Return the cross-entropy at every position, float32 ``[B, T]``.

        ``visible``, float ``[B, 1, 1, T]``, is 0 for padding, which is not attended to, and 1 elsewhere.
        """
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, self.cos, self.sin, visible)
        logits = self.lm_head(self.model["norm"](x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(ids)


# ---- Training ----


def make_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy ids and targets (int64), and which positions are blank (bool), ``[B, T]`` each, grouped by task."""
    targets = np.full((sum(ROWS.values()), LENGTH), PAD_ID, dtype=np.int64)
    blank = np.zeros(targets.shape, dtype=bool)
    start = 0
    for name, rows in ROWS.items():
        task = TASKS[name]
        part = slice(start, start + rows)
        # Noise level, U(0, 1) stratified over the rows. Most Sudoku rows get medium levels, which need deductions.
        t = (rng.permutation(rows) + rng.random(rows)) / rows
        if name == "sudoku":
            t = np.where(rng.random(rows) < 0.75, 0.2 + 0.55 * t, t)
        targets[part, : task.length] = task.training_rows(rows, rng)
        blank[part, task.prompt_length : task.length] = (
            rng.random((rows, task.length - task.prompt_length)) < t[:, None]
        )
        start += rows
    ids = np.where(blank, MASK_ID, targets)
    return torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(blank)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = Denoiser()
    loss_at = torch.compile(model)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    params = dict(model.named_parameters())
    matrices = [p for k, p in params.items() if p.ndim == 2 and "layers" in k]
    others = [p for k, p in params.items() if not (p.ndim == 2 and "layers" in k)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True),
    ]
    print(f"{sum(p.numel() for p in params.values()):,} parameters", flush=True)
    step, elapsed, tokens = 0, 0.0, 0
    if args.checkpoint and Path(args.checkpoint).exists():
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        ema, step, elapsed, tokens = saved["ema"], saved["step"], saved["elapsed"], saved["tokens"]

    weight = torch.tensor([WEIGHT[name] for name, rows in ROWS.items() for _ in range(rows)])[:, None]
    last, report, save, sums = time.monotonic(), 0.0, elapsed + 300, np.zeros((2, len(ROWS)))
    while True:
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1 or elapsed > save:
            if args.checkpoint:
                state = dict(model=model.state_dict(), ema=ema, step=step, elapsed=elapsed, tokens=tokens)
                torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, args.checkpoint)
            export(ema, Path(args.output))
            save = elapsed + 300
        if progress >= 1:
            break
        # Warm-up, plateau, linear decay to zero; progress is measured in time unless --steps is given.
        lr = args.lr * min(1, (step + 1) / 200, (1 - progress) / args.decay)
        ids, targets, blank = make_batch(np.random.default_rng([args.seed, step]))
        visible = (ids != PAD_ID).float()[:, None, None, :]
        with torch.autocast("cpu", torch.bfloat16):
            losses = loss_at(ids, targets, visible) * blank
        ((losses * weight).sum() / (blank * weight).sum()).backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0, foreach=True)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1e-3 if step > 500 else 1e-2)

        step, tokens = step + 1, tokens + ids.numel()
        elapsed, last = elapsed + time.monotonic() - last, time.monotonic()
        for i, (loss, count) in enumerate(zip(losses.detach().split([*ROWS.values()]), blank.split([*ROWS.values()]))):
            sums[:, i] += loss.sum().item(), count.sum().item()
        if elapsed > report:
            text = "  ".join(f"{name} {x:.4f}" for name, x in zip(ROWS, sums[0] / sums[1]))
            print(f"{elapsed / 60:.1f} min, step {step}, {tokens / elapsed:.0f} tok/s, lr {lr:.0e}: {text}", flush=True)
            report, sums = elapsed + 30, np.zeros_like(sums)
    print(f"done: {step} steps, {tokens / 1e6:.1f} M tokens, {elapsed / 60:.1f} min", flush=True)


def export(state: dict[str, Tensor], folder: Path) -> None:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load without remote code."""
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    special = dict(mask_token_id=MASK_ID, pad_token_id=PAD_ID, eos_token_id=EOS_ID, bos_token_id=None)
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    config = LlamaConfig(**SHAPE, **special, rope_parameters=rope, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.use_cache = False  # attention is bidirectional, so there is no causal cache
    config.save_pretrained(folder)
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, mask_token=MASK, clean_up_tokenization_spaces=False
    )
    fast.model_max_length = SHAPE["max_position_embeddings"]
    fast.save_pretrained(folder)
    # A class name that every version of transformers knows.
    path = folder / "tokenizer_config.json"
    entries = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(entries, indent=2) + "\n")


# ---- Evaluation of an exported folder, with a plain decoding loop ----


@torch.no_grad()
def decode_canvases(model: nn.Module, ids: Tensor, order: str, seed: int = 0) -> tuple[Tensor, float]:
    """Fill the blanks of canvases ``[B, T]``. Returns them and the mean number of forwards per canvas.

    If ``order`` is ``confidence`` or ``random``, each forward fills one blank. If it is a number, each forward fills
    all blanks with at least this probability, and always the most probable one.
    """
    ids, forwards = ids.clone(), 0
    generator = torch.Generator().manual_seed(seed)
    while (alive := (ids == MASK_ID).any(1).nonzero()[:, 0]).numel():
        part = ids[alive]
        everything_visible = torch.zeros(len(part), 1, part.shape[1], part.shape[1], dtype=model.dtype)
        logits = model(input_ids=part, attention_mask=everything_visible, use_cache=False).logits.float()
        logits[..., MASK_ID] = -torch.inf
        confidence, token = logits.softmax(-1).max(-1)
        score = torch.rand(part.shape, generator=generator) if order == "random" else confidence
        score = score.masked_fill(part != MASK_ID, -1)
        fill = F.one_hot(score.argmax(1), part.shape[1]).bool()
        if order not in ("confidence", "random"):
            fill |= score >= float(order)
        ids[alive] = torch.where(fill, token, part)
        forwards += len(alive)
    return ids, forwards / len(ids)


def evaluate(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.evaluate)
    rows = [("sudoku", 40), ("sudoku", 32), ("addition", None), ("addition", 12), ("running-sum", None)]
    print("| task | difficulty | order | solved | forwards |\n|---|---|---|---|---|")
    for name, difficulty in rows:
        problems = TASKS[name].make(args.problems, seed=args.seed, difficulty=difficulty)
        ids = tokenizer([p.canvas for p in problems], return_tensors="pt").input_ids
        for order in args.orders.split(","):
            out, forwards = decode_canvases(model, ids, order, args.seed)
            solved = [TASKS[name].check(p, text) for p, text in zip(problems, tokenizer.batch_decode(out))]
            row = name, "–" if difficulty is None else difficulty, order, f"{np.mean(solved):.1%}", f"{forwards:.1f}"
            print(f"| {' | '.join(map(str, row))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=65, help="training time, including learning rate decay")
    parser.add_argument("--steps", type=int, default=0, help="train for this many steps instead, reproducibly")
    parser.add_argument("--decay", type=float, default=0.4, help="final share of training with decaying learning rate")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="demo-model", help="folder for the exported model")
    parser.add_argument("--checkpoint", help="file to save to every five minutes, and to resume from if it exists")
    parser.add_argument("--evaluate", metavar="FOLDER", help="evaluate an exported model instead of training")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems per row of the table")
    parser.add_argument("--orders", default="confidence,random,0.9,0.99")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.evaluate:
        evaluate(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
