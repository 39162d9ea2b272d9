# SPDX-License-Identifier: Apache-2.0
"""Put an image into a prompt, as embeddings from a vision tower between those of tokens.

    python examples/image_prompt.py

LLaVA-like diffusion models (LLaDA-V, LaViDa) read an image as a few hundred vectors: the patches of a vision tower,
projected to the width of the language model. `generate` takes them as `inputs_embeds`, together with the embeddings of
the tokens before and after. Here the tower is a CLIP model of transformers and all weights are random, so the output
depends on the image but does not describe it. For a real model, load its language model with `dlmkernels.load` (which
skips the weights that read images), and its tower and projector with the classes that they were saved from.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

import dlmkernels as dk

MASK = 99


def build(seed: int = 0) -> tuple[transformers.LlamaForCausalLM, transformers.CLIPVisionModel, nn.Module]:
    """Build a small language model, a vision tower and the projector between them, all with random weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, mask_token_id=MASK, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    config.dlm_family = "llada"
    model = transformers.LlamaForCausalLM(config).eval()
    tower = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    ).eval()
    projector = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():  # weights with a large gain, so that outputs depend strongly on the context
        for module in (model, projector):
            for p in module.parameters():
                if p.dim() == 2:
                    p.normal_(std=2.0 / p.shape[1] ** 0.5)
    return model, tower, projector


@torch.no_grad()
def embedded_prompt(model, tower, projector, before: Tensor, pixels: Tensor, after: Tensor) -> Tensor:
    """Return the input embeddings `[B, P, hidden]` of tokens, an image, and more tokens.

    Parameters
    ----------
    before, after : Tensor
        Token ids, int64 `[B, n]` and `[B, m]`.
    pixels : Tensor
        float32 `[B, 3, height, width]`, as the tower's image processor returns them.
    """
    patches = tower(pixel_values=pixels).last_hidden_state[:, 1:]  # without the first vector, a summary of the image
    words = model.get_input_embeddings()
    return torch.cat((words(before), projector(patches).to(words.weight.dtype), words(after)), 1)


def main() -> None:
    model, tower, projector = build()
    before, after = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])
    for name, seed in (("an image", 1), ("another", 2)):
        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        prompt = embedded_prompt(model, tower, projector, before, pixels, after)
        out = dk.generate(model, inputs_embeds=prompt, config="llada", steps=12, max_new_tokens=12)
        print(f"{name}: {prompt.shape[1]} vectors in, {out.generated[0].tolist()} out")


if __name__ == "__main__":
    main()
