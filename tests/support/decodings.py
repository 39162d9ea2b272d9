# SPDX-License-Identifier: Apache-2.0
"""What tests of decodings share: models in which much depends on context, ragged batches, comparisons with requests
restated alone."""

import pytest
import torch
from torch import Tensor, nn

import dlmkernels as dk
import numerics
import published
from dlmkernels.decoding.poll import OpenCount
from small_models import MASK, PAD, build, prompts

LENGTHS = (5, 11, 8)


def lively(kind: str = "llama", seed: int = 17):
    """A random model in which much depends on context: weights of unit gain and more, biases and norms random too.

    With transformers' own initialisation all masks look alike, and everything is a near tie.
    """
    return enliven(build(kind, seed=seed), seed)


def enliven(model, seed: int = 17):
    """The same of a model that is there: its parameters are drawn anew."""
    head = model.get_output_embeddings().weight
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
            else:
                gain = 4.5 if p is head else p.shape[-1] ** 0.5 if "embed" in name else 2.0
                p.normal_(std=gain / p.shape[-1] ** 0.5)
    model.set_attn_implementation("eager")
    return model


def ragged(lengths=LENGTHS, seed=0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts of these lengths; the same as a batch padded on the left; which of the batch is not padding."""
    rows = [prompts(1, n, seed=100 * seed + n)[0] for n in lengths]
    longest = max(lengths)
    ids = torch.stack([torch.cat((r.new_full((longest - len(r),), PAD), r)) for r in rows])
    valid = torch.stack([torch.arange(longest) >= longest - len(r) for r in rows])
    return rows, ids, valid.long()


def canvas_of(prompt: Tensor, new_tokens: int, mask: int = MASK) -> Tensor:
    return torch.cat((prompt, prompt.new_full((new_tokens,), mask)))


def assert_same(out, row: int, request: published.Request) -> None:
    """Row `row` of a decoding, without its padding, is the restated request."""
    assert request.slack > numerics.TWO_PROGRAMS, (
        f"a near tie ({request.slack:.1e}): this comparison needs another seed"
    )
    pads = out.sequences.shape[1] - len(request.tokens)
    assert torch.equal(out.sequences[row, pads:], request.tokens)
    assert torch.equal(out.commit_step[row, pads:], request.commit_step)
    assert out.num_forwards[row] == request.num_forwards
    numerics.assert_same_probabilities(out.confidence[row, pads:], request.confidence)


def assert_rows_same(model, restated, new_tokens: int, seed: int = 0, **options) -> None:
    """`restated(canvas, start)` for each prompt alone; `generate` for their padded batch, and for the first alone."""
    rows, ids, valid = ragged(seed=seed)
    options = {"eos_policy": "none", "max_new_tokens": new_tokens} | options
    out = dk.generate(model, ids, valid, **options)
    alone = dk.generate(model, rows[0], **options)
    for row, prompt in enumerate(rows):
        request = restated(canvas_of(prompt, new_tokens), len(prompt))
        assert_same(out, row, request)
        if row == 0:
            assert_same(alone, 0, request)


FEW, FEW_MASK = 6, 5  # vocabulary of the made-up models


class Table(nn.Module):
    """Logits that depend on nothing but the column."""

    def __init__(self, rows):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(rows))

    def forward(self, tokens, **kwargs):
        return type("Output", (), {"logits": self.table[: tokens.shape[1]].expand(len(tokens), -1, -1)})()

    def logits(self, tokens):
        return self(tokens).logits


def sure(token: int, p: float, mask_p: float = 1e-12) -> list[float]:
    """Log-probabilities: `p` for one token, `mask_p` for the mask, the rest shared by the others."""
    row = torch.full((FEW,), (1 - p - mask_p) / (FEW - 2))
    row[token], row[FEW_MASK] = p, mask_p
    return row.log().tolist()


def decode(table: Table, canvas: list[int] | list[list[int]], **options):
    options = {"mask_token_id": FEW_MASK, "eos_policy": "none", "config": dk.DecodingConfig(rule=dk.Quota())} | options
    with pytest.warns(UserWarning, match="does not know model type"):
        return dk.infill(table.eval(), torch.tensor(canvas), **options)


class NoRepeats(dk.Constraint):
    """No token beside an equal one."""

    def accepts(self, tokens, proposed):
        after = torch.where(proposed >= 0, proposed, tokens)
        same = after[:, 1:] == after[:, :-1]
        return ~(torch.nn.functional.pad(same, (1, 0)) | torch.nn.functional.pad(same, (0, 1)))


class LateCount(OpenCount):
    """A host that learns late what is open: two counts after the one it learns."""

    lag_on = {"cpu": 2, "cuda": 2}
