# SPDX-License-Identifier: Apache-2.0
"""A model that knows the exact joint distribution of a few positions, and therefore all of its conditionals."""

import itertools

import torch
from torch import Tensor, nn


class Joint(nn.Module):
    """Predicts the last `length` positions of a canvas from those of them that are not masked; ids 0 … V - 1, mask V.

    `table` holds the probabilities of all `V ** length` texts.
    """

    def __init__(self, vocab: int, length: int, prompt: int = 1, seed: int = 0, peak: float = 2.0):
        super().__init__()
        self.vocab, self.length, self.prompt, self.mask = vocab, length, prompt, vocab
        logits = peak * torch.randn(vocab**length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.table = nn.Parameter(torch.softmax(logits, 0).view((vocab,) * length))
        # log-probabilities of every position in every context, [(V + 1) ** length, length, V]
        contexts = [self._conditionals(c) for c in itertools.product(range(vocab + 1), repeat=length)]
        self.register_buffer("contexts", torch.stack(contexts))
        self.eval()

    def _conditionals(self, context: tuple[int, ...]) -> Tensor:
        """ln p(position | context without it), [length, V]."""
        rows = []
        for i in range(self.length):
            at = tuple(slice(None) if j == i or c == self.mask else slice(c, c + 1) for j, c in enumerate(context))
            p = self.table.detach()[at].sum(dim=[j for j in range(self.length) if j != i])
            rows.append((p / p.sum()).log())
        return torch.stack(rows)

    def forward(self, tokens: Tensor, **kwargs):
        text = tokens[:, self.prompt :]
        number = torch.zeros(len(tokens), dtype=torch.int64)
        for i in range(self.length):
            number = number * (self.vocab + 1) + text[:, i].clamp(max=self.vocab)
        logits = torch.full((len(tokens), tokens.shape[1], self.vocab + 1), -torch.inf)
        logits[:, self.prompt :, : self.vocab] = self.contexts[number].float()
        return type("Output", (), {"logits": logits})()

    def number(self, text: Tensor) -> Tensor:
        """Texts `[N, length]` as indices into the flat table."""
        out = torch.zeros(len(text), dtype=torch.int64)
        for i in range(self.length):
            out = out * self.vocab + text[:, i]
        return out
