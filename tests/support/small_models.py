# SPDX-License-Identifier: Apache-2.0
"""Small random models of every supported stock class, with confidences spread over (0, 1)."""

import torch
import transformers as hf

VOCAB, MASK, EOS, PAD = 97, 96, 1, 0
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": PAD, "eos_token_id": EOS,
    "bos_token_id": None, "mask_token_id": MASK,
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": PAD, "eos_token_id": EOS, "mask_token_id": MASK,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
KINDS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**DECODER, **MOE)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER, type_vocab_size=1)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**ENCODER, bos_token_id=None, cls_token_id=2, sep_token_id=3, local_attention=16)
    ),
}


def build(kind="llama", seed=0, sharpness=8.0):
    """A random model of one kind in evaluation mode; `sharpness` scales its logits."""
    torch.manual_seed(seed)
    model = KINDS[kind]().eval()
    if kind == "qwen3_moe":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=sharpness / 64**0.5)
    return model


def prompts(batch, length, seed=1):
    """Random prompts without special tokens, int64 `[batch, length]`."""
    return torch.randint(4, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))
