# SPDX-License-Identifier: Apache-2.0
"""A masked language model that others trained: Sapiens, a RoBERTa on heavy chains of human antibodies.

Prihoda et al., "BioPhi", mAbs 14:2020203 (2022). Its weights (MIT licence) are in the package sapiens 1.0.5, which is
downloaded without what it depends on: that would replace torch.
"""

import argparse
import subprocess
import sys
import zipfile

import pytest
import torch

import dlmkernels as dk

pytestmark = pytest.mark.slow

MASK = 24
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"  # ids 4 to 23; 0 and 2 begin and end a sequence
# Variable domains of heavy chains of antibodies that are drugs, from their published (INN) sequences.
CHAINS = {
    "trastuzumab": "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "adalimumab": "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS",
    "bevacizumab": "EVQLVESGGGLVQPGGSLRLSCAASGYTFTNYGMNWVRQAPGKGLEWVGWINTYTGEPTYAADFKRRFTFSLDTSKSTAYLQMNSLRAEDTAVYYCAKYPHYYGSSHWYFDVWGQGTLVTVSS",
    "pembrolizumab": "QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSLQFDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS",
    "nivolumab": "QVQLVESGGGVVQPGRSLRLDCKASGITFSNSGMHWVRQAPGKGLEWVAVIWYDGSKRYYADSVKGRFTISRDNSKNTLFLQMNSLRAEDTAVYYCATNDDYWGQGTLVTVSS",
}  # fmt: skip


def renamed(name):
    """The key of a fairseq encoder in RobertaForMaskedLM."""
    for old, new in (
        ("decoder.sentence_encoder.embed_tokens", "roberta.embeddings.word_embeddings"),
        ("decoder.sentence_encoder.embed_positions", "roberta.embeddings.position_embeddings"),
        ("decoder.sentence_encoder.emb_layer_norm", "roberta.embeddings.LayerNorm"),
        ("decoder.sentence_encoder.layers", "roberta.encoder.layer"),
        ("self_attn.q_proj", "attention.self.query"),
        ("self_attn.k_proj", "attention.self.key"),
        ("self_attn.v_proj", "attention.self.value"),
        ("self_attn.out_proj", "attention.output.dense"),
        ("self_attn_layer_norm", "attention.output.LayerNorm"),
        ("fc1", "intermediate.dense"),
        ("fc2", "output.dense"),
        ("final_layer_norm", "output.LayerNorm"),
        ("decoder.lm_head.weight", "lm_head.decoder.weight"),
        ("decoder.lm_head.", "lm_head."),
    ):
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("sapiens")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "sapiens==1.0.5", "-d", str(folder)]
    done = subprocess.run(download, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package registry: {done.stderr[-200:]}")
    (wheel,) = folder.glob("*.whl")
    checkpoint = zipfile.ZipFile(wheel).extract("sapiens/models/v1/checkpoint_vh.pt", folder)
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    config = transformers.RobertaConfig(
        vocab_size=25, hidden_size=128, num_hidden_layers=4, num_attention_heads=8, intermediate_size=256,
        max_position_embeddings=146, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config).eval()
    weights = {renamed(name): value for name, value in weights.items()}
    weights["lm_head.decoder.bias"] = weights["lm_head.bias"]
    # fairseq has no token types: theirs add nothing
    weights["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, 128)
    model.load_state_dict(weights)
    model.save_pretrained(folder / "model")
    return transformers.AutoModelForMaskedLM.from_pretrained(folder / "model").eval()


def masked_chains(share, draws=3):
    """Sequences [B, T], ended and padded on the left; the same with that share of the residues masked; the padding."""
    rows = [[0, *(4 + AMINO_ACIDS.index(a) for a in chain), 2] for chain in CHAINS.values()]
    longest = max(map(len, rows))
    tokens = torch.tensor([[1] * (longest - len(r)) + r for r in rows]).repeat(draws, 1)
    residues = tokens >= 4
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)).masked_fill(~residues, 2.0).argsort(1)
    ranks = order.argsort(1)
    hidden = ranks < (residues.sum(1) * share).long()[:, None]
    return tokens, tokens.masked_fill(hidden, MASK), (tokens != 1).long(), hidden


def recovered(model, share, **options):
    """Share of the masked residues that are found again, and forwards a sequence."""
    tokens, canvas, attention_mask, hidden = masked_chains(share)
    adapted = dk.adapt(model)
    out = dk.infill(adapted, canvas, attention_mask, mask_token_id=MASK, eos_policy="none", **options)
    assert out.complete.all() and torch.equal(out.sequences[~hidden], tokens[~hidden])
    return (out.sequences == tokens)[hidden].double().mean().item(), out.num_forwards.double().mean().item()


def test_logits_are_the_models_own(model):
    _, canvas, attention_mask, _ = masked_chains(0.3, draws=1)
    adapted = dk.adapt(model)
    # one forward of one step: the confidences are those of the model's own attention, row by row
    out = dk.infill(adapted, canvas, attention_mask, steps=1, mask_token_id=MASK, eos_policy="none")
    for row in range(len(canvas)):
        alone = canvas[row, attention_mask[row] == 1]
        with torch.no_grad():
            z = model(alone[None]).logits[0]
        z[:, MASK] = -torch.inf  # never proposed
        p = z.softmax(-1)
        open_ = alone == MASK
        got = out.confidence[row, attention_mask[row] == 1][open_]
        torch.testing.assert_close(got, p.max(-1).values[open_], rtol=0, atol=1e-5)


def test_few_forwards_recover_as_much_as_one_residue_at_a_time(model):
    """With half of a chain known, residues say little about each other that the rest does not say."""
    single, forwards = recovered(model, 0.5, steps=200)
    assert single > 0.7 and 50 < forwards < 70
    for options in ({"steps": 8}, {"rule": dk.Threshold(0.5)}):
        share, forwards = recovered(model, 0.5, **options)
        assert share > single - 0.04 and forwards < 10, (options, share, single, forwards)


def test_the_order_matters_where_little_is_known(model):
    shares = {steps: recovered(model, 0.9, steps=steps)[0] for steps in (1, 4, 32)}
    assert shares[1] + 0.05 < shares[4] < shares[32]
    at_random, _ = recovered(model, 0.9, steps=32, score="random", seed=1)
    assert at_random < shares[32] - 0.04


def test_characters_that_the_tokenizer_does_not_know():
    from transformers import AutoTokenizer

    from dlmkernels.demo import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    with pytest.raises(
        ValueError, match=r"input_ids contains characters that the tokenizer does not know; got 'Why A1=.'"
    ):
        dk.generate(dk.load("demo"), "Why A1=?", tokenizer=tokenizer, max_new_tokens=4)


def test_a_streamed_answer_has_the_text_so_far():
    from transformers import AutoTokenizer

    from dlmkernels.demo import MODEL_DIR

    with dk.Engine(dk.load("demo"), slots=2, max_length=96, tokenizer=AutoTokenizer.from_pretrained(MODEL_DIR),
                   block_length=4) as engine:  # fmt: skip
        request = engine.add_request("A1234567890123456+8765432109876544=", max_new_tokens=17, streaming=True)
        texts = [output.text for output in engine.request_id_iter(request)]
    assert texts[-1] == "10000000000000000" and len(texts) > 3
    assert all(texts[-1].startswith(text) for text in texts) and sorted(texts, key=len) == texts
