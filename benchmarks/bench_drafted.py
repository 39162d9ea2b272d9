# SPDX-License-Identifier: Apache-2.0
"""Benchmark drafted decoding against one token per forward, at a given acceptance rate.

The target has 8 random layers, the drafter has one. The drafter runs, but its drafts are then replaced: each is the
target's own token with the given probability, and a wrong one otherwise. So the full cost is measured, and the number
of tokens per forward is known.

    python benchmarks/bench_drafted.py --acceptance 0.8 --width 7 --batch 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import dlmkernels as dk
from dlmkernels.decoding.programs import PROGRAMS, drafted
from dlmkernels.info import processor
from dlmkernels.models.draft_forms import read_form
from dlmkernels.models.drafters import DraftModule

HIDDEN, VOCAB, LAYERS = 1024, 4096, 8


def build(dtype: torch.dtype) -> tuple[torch.nn.Module, dk.Drafter]:
    """Build the target, and a drafter with one narrower layer that sees the output of one of the target's layers."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=HIDDEN, vocab_size=VOCAB, num_attention_heads=16, head_dim=64, max_position_embeddings=1024
    )
    config = transformers.LlamaConfig(
        **sizes, intermediate_size=2816, num_hidden_layers=LAYERS, num_key_value_heads=4, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    target = transformers.LlamaForCausalLM(config).to(dtype).eval()
    target.lm_head.weight.data.normal_(std=0.1)
    own = {"target_layer_ids": [LAYERS // 2], "mask_token_id": 1, "block_size": 16}
    small = sizes | {
        "model_type": "qwen3", "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 2, "architectures": ["DFlashDraftModel"], "dflash_config": own,
    }  # fmt: skip
    form = read_form(small, LAYERS, VOCAB)
    module = DraftModule(form, transformers.Qwen3Config(**form.layers, vocab_size=1), VOCAB, False, False)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(small))
        save_file(module.state_dict(), Path(folder) / "model.safetensors")
        return target, dk.load_drafter(folder, target)


class Accepted(drafted.DraftedProgram):
    """Drafted decoding whose drafts are correct with a given probability."""

    acceptance = 0.8
    known: torch.Tensor

    def draft(self, anchor, used, window):
        drafts = super().draft(anchor, used, window)
        place = window.positions[:, :-1]
        right = self.known.gather(1, place.clamp(0, self.known.shape[1] - 1).long())
        lucky = torch.rand(right.shape, generator=self.chance) < self.acceptance
        return torch.where(drafts < 0, -1, torch.where(lucky, right, (right + 1) % VOCAB))

    def begin(self):
        self.chance = torch.Generator().manual_seed(1)
        return super().begin()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--acceptance", type=float, default=0.8, help="probability that a draft is correct")
    parser.add_argument("--width", default=7, type=lambda x: x if x == "auto" else int(x), help="drafts per forward")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    model, drafter = build(getattr(torch, args.dtype))
    ids = torch.randint(2, VOCAB, (args.batch, 32), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": args.new_tokens, "eos_policy": "none"}
    Accepted.acceptance = args.acceptance

    def run(rule) -> tuple[float, dk.DecodingOutput]:
        start = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
        out = dk.generate(model, ids, rule=rule, **options)
        now = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
        return now - start, out

    Accepted.known = run(dk.NextToken())[1].sequences
    PROGRAMS[dk.Drafted] = Accepted
    rule = dk.Drafted(drafter, args.width)
    pairs = [(run(dk.NextToken()), run(rule)) for _ in range(args.pairs)]
    plain, fast = pairs[0][0][1], pairs[0][1][1]
    gain = int(plain.num_forwards.sum()) / int(fast.num_forwards.sum())
    faster = statistics.median(one[0] / other[0] for one, other in pairs)
    same = (plain.sequences == fast.sequences).float().mean().item()
    print(f"{processor()}, {torch.get_num_threads()} threads, {args.dtype}, batch {args.batch}, width {args.width}")
    print(f"one token per forward: {min(one[0] for one, _ in pairs) / args.new_tokens * 1e3:.2f} ms per token")
    print(f"drafted: {gain:.2f} tokens per forward, {faster:.2f} times faster: {faster / gain:.2f} of that gain")
    print(f"{same:.1%} of the tokens are the same")


if __name__ == "__main__":
    main()
