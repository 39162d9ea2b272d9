# SPDX-License-Identifier: Apache-2.0
"""Random drafters in every published form, and their forwards restated in plain torch."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, silu

HIDDEN, HEADS, GROUPS, WIDTH, INNER, BLOCK = 64, 4, 2, 16, 96, 6
FORMS = (
    "dflash", "dflash-sliding", "dflash-causal", "dflash2", "dspark", "dspark-gated", "dspark-rnn",
    "speculators-dflash", "speculators-dflash2", "speculators-dspark", "speculators-reduced", "muse",
)  # fmt: skip
KNOWN = 40  # tokens of a reduced vocabulary


def config_of(form, vocab=97, mask=96, layers=2, taps=(0, 2), target_layers=4, hidden=HIDDEN):
    """What `config.json` holds."""
    types = ["full_attention"] * layers
    if "sliding" in form or form in ("speculators-dflash", "speculators-dflash2"):
        types[-1] = "sliding_attention"
    if form == "muse":
        types = ["sliding_attention"] * layers
    body = {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": INNER, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH, "rms_norm_eps": 1e-6,
        "vocab_size": vocab, "rope_theta": 10000.0, "max_position_embeddings": 256, "layer_types": types,
        "sliding_window": 4, "hidden_act": "silu",
    }  # fmt: skip
    own = {"target_layer_ids": list(taps), "mask_token_id": mask}
    second = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": 5}
    third = {
        "markov_rank": 8, "markov_head_type": {"dspark-gated": "gated", "dspark-rnn": "rnn"}.get(form, "vanilla"),
        "enable_confidence_head": True, "confidence_head_with_markov": True,
    }  # fmt: skip
    if form.startswith("speculators"):
        kind = {"reduced": "dspark"}.get(form.partition("-")[2], form.partition("-")[2])
        more = {"dflash2": second, "dspark": third}.get(kind, {})
        return {
            "speculators_model_type": kind, "transformer_layer_config": body, "block_size": BLOCK,
            "aux_hidden_state_layer_ids": [i + 1 for i in taps], "mask_token_id": mask,
            "draft_vocab_size": KNOWN if form == "speculators-reduced" else vocab,
        } | more  # fmt: skip
    if form.startswith("dspark"):
        return body | own | third | {"architectures": ["Qwen3DSparkModel"], "block_size": BLOCK}
    if form == "muse":
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        return (
            {k: v for k, v in body.items() if k not in ("rope_theta", "vocab_size")}
            | own
            | {"model_type": "muse_glimmer_assistant", "architectures": ["MuseGlimmerAssistantModel"]}
            | {"block_size": BLOCK, "rope_parameters": rope}
        )
    named = {"dflash2": "DFlash2DraftModel"}.get(form, "DFlashDraftModel")
    own |= {"block_size": BLOCK, "num_target_layers": target_layers}
    own |= second if form == "dflash2" else {}
    own |= {"causal_head": True} if form == "dflash-causal" else {}
    return body | {"architectures": [named], "dflash_config": own}


def weights_of(form, config, vocab=97, seed=0):
    """Random weights of unit gain under their published names."""
    body = config.get("transformer_layer_config", config)
    d, layers = body["hidden_size"], body["num_hidden_layers"]
    taps = len(config.get("aux_hidden_state_layer_ids") or config.get("target_layer_ids")
               or config["dflash_config"]["target_layer_ids"])  # fmt: skip
    shapes = {"norm.weight": (d,), "fc.weight": (d, taps * d), "hidden_norm.weight": (d,)}
    for i in range(layers):
        at, inner = f"layers.{i}.", body["intermediate_size"]
        for name, shape in {
            "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (HEADS * WIDTH, d), "self_attn.k_proj.weight": (GROUPS * WIDTH, d),
            "self_attn.v_proj.weight": (GROUPS * WIDTH, d), "self_attn.o_proj.weight": (d, HEADS * WIDTH),
            "self_attn.q_norm.weight": (WIDTH,), "self_attn.k_norm.weight": (WIDTH,),
            "mlp.gate_proj.weight": (inner, d), "mlp.up_proj.weight": (inner, d), "mlp.down_proj.weight": (d, inner),
        }.items():  # fmt: skip
            shapes[at + name] = shape
        if "dflash2" in form:
            for conv in ("attention_conv", "mlp_conv"):
                shapes[f"{at}{conv}.base_kernel"] = (2, 2, d)
                shapes[f"{at}{conv}.kernel_projection.weight"] = (4 * d // 16, d)
    if "dflash2" in form:
        for name in ("predecessor_codebook", "successor_codebook"):
            shapes[f"candidate_selector.{name}"] = (vocab, 8)
        shapes["candidate_selector.hidden_projection.weight"] = (8, d)
    known = config.get("draft_vocab_size", vocab)
    if "dspark" in form or form == "speculators-reduced":
        shapes |= {"markov_head.markov_w1.weight": (vocab, 8), "markov_head.markov_w2.weight": (known, 8)}
        shapes |= {"confidence_head.proj.weight": (1, d + 8), "confidence_head.proj.bias": (1,)}
        if form == "dspark-gated":
            shapes |= {"markov_head.gate_proj.weight": (8, d + 8), "markov_head.gate_proj.bias": (8,)}
        if form == "dspark-rnn":
            shapes |= {"markov_head.joint_proj.weight": (24, d + 16), "markov_head.joint_proj.bias": (24,)}
    if form.startswith("dspark"):
        shapes |= {"embed_tokens.weight": (vocab, d), "lm_head.weight": (vocab, d)}
    if form == "speculators-reduced":
        shapes["lm_head.weight"] = (known, d)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 1 + 0.2 * x if "norm" in name else 0.5 * x
        elif "codebook" in name or "markov_w1" in name or "embed" in name:
            weights[name] = x
        else:
            weights[name] = 1.5 * x / shape[-1] ** 0.5
    for name in weights:
        if "base_kernel" in name:
            weights[name] = 0.5 + 0.3 * weights[name]
    if form == "speculators-reduced":
        ids = torch.randperm(vocab, generator=generator)[:known].sort().values
        weights["d2t"] = ids - torch.arange(known)
        weights["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
    if form == "muse":
        names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
        weights = {names.get(name, name): x for name, x in weights.items()}
    return weights


def write(folder, form, *, vocab=97, seed=0, config=None, weights=None, **options):
    """A checkpoint in `folder`; returns its path, configuration and weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(form, vocab=vocab, **options) if config is None else config
    weights = weights_of(form, config, vocab, seed) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors")
    return folder, config, weights


# --- restated in float64, one request, nothing cached ---------------------------------------------------------------


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def convolve(x, kernel, base):
    """`kernel` `[W, 2, d / 16]` on top of `base` `[2, d]`."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for o in range(min(2, t + 1)):
            out[t] += (base[o] + kernel[t, o].repeat_interleave(16)) * x[t - o]
    return out


def plain_hidden(form, config, weights, embeddings, taps, anchor, rows, mask, dtype=torch.float64):
    """Hidden states `[rows, d]` of a block behind text of which `taps` `[s, n d]` is known, `embeddings` `[V, d]`."""
    w = {name.replace("encoder.output_norm_enc", "hidden_norm").replace("encoder.fc", "fc"): x.to(dtype)
         for name, x in weights.items() if x.is_floating_point()}  # fmt: skip
    body = config.get("transformer_layer_config", config)
    embeddings = w.get("embed_tokens.weight", embeddings.to(dtype))
    s = len(taps)
    context = rms(linear(taps.to(dtype), w["fc.weight"]), w["hidden_norm.weight"])
    x = embeddings[torch.tensor([anchor] + [mask] * (rows - 1))]
    place = torch.arange(s + rows)
    for i, kind in enumerate(body["layer_types"]):
        v = {name.removeprefix(f"layers.{i}."): x for name, x in w.items() if name.startswith(f"layers.{i}.")}
        gap = place[s:, None] - place
        visible = torch.ones(rows, s + rows, dtype=torch.bool)
        if kind == "sliding_attention":
            window = body["sliding_window"] + (form == "muse")
            visible &= gap < window
            if form in ("muse", "speculators-dflash2"):
                visible &= -gap < window
            else:
                visible &= gap >= 0
        if form == "dflash-causal":
            visible &= gap >= 0

        def attend(a, v=v, visible=visible):
            seen = torch.cat((context, a))
            q = linear(a, v["self_attn.q_proj.weight"]).unflatten(-1, (-1, WIDTH))
            k = linear(seen, v["self_attn.k_proj.weight"]).unflatten(-1, (-1, WIDTH))
            value = linear(seen, v["self_attn.v_proj.weight"]).unflatten(-1, (-1, WIDTH))
            q = rotate(rms(q, v["self_attn.q_norm.weight"]), place[s:])
            k = rotate(rms(k, v["self_attn.k_norm.weight"]), place)
            k, value = (y.repeat_interleave(HEADS // GROUPS, 1) for y in (k, value))
            scores = torch.einsum("qhd,khd->hqk", q, k) * WIDTH**-0.5
            weight = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            return linear(torch.einsum("hqk,khd->qhd", weight, value).flatten(1), v["self_attn.o_proj.weight"])

        def feed(a, v=v):
            inner = silu(linear(a, v["mlp.gate_proj.weight"])) * linear(a, v["mlp.up_proj.weight"])
            return linear(inner, v["mlp.down_proj.weight"])

        for norm, conv, sublayer in (
            ("input_layernorm", "attention_conv", attend), ("post_attention_layernorm", "mlp_conv", feed)
        ):  # fmt: skip
            a = rms(x, v[f"{norm}.weight"])
            if f"{conv}.base_kernel" in v:
                kernel = linear(a, v[f"{conv}.kernel_projection.weight"]).unflatten(-1, (2, 2, -1))
                base = v[f"{conv}.base_kernel"]
                x = x + convolve(sublayer(convolve(a, kernel[:, 0], base[0])), kernel[:, 1], base[1])
            else:
                x = x + sublayer(a)
    return rms(x, w["norm.weight"])


def plain_drafts(form, config, weights, hidden, head, anchor):
    """The likeliest drafts, one after another, of hidden states `[rows, d]`; `head` `[V, d]` is the target's."""
    w = {name: x.double() for name, x in weights.items() if x.is_floating_point()}
    logits = linear(hidden, w.get("lm_head.weight", head.double()))
    from_anchor = "dspark" in form or form == "speculators-reduced"
    if not from_anchor:
        hidden, logits = hidden[1:], logits[1:]
    ids = torch.arange(logits.shape[1])
    if "d2t" in weights:
        ids = ids + weights["d2t"]
    drafts, memory = [], torch.zeros(8, dtype=torch.float64)
    for h, z in zip(hidden, logits):
        if "dflash2" in form:
            best = z.sort(descending=True, stable=True).indices[:5]
            context = w["candidate_selector.predecessor_codebook"][anchor] * (
                w["candidate_selector.hidden_projection.weight"] @ h
            )
            scores = z[best] + w["candidate_selector.successor_codebook"][best] @ context
            anchor = int(best[scores.argmax()])
        elif from_anchor:
            before = w["markov_head.markov_w1.weight"][anchor]
            if form == "dspark-gated":
                gate = w["markov_head.gate_proj.weight"] @ torch.cat((h, before)) + w["markov_head.gate_proj.bias"]
                before = torch.sigmoid(gate) * before
            if form == "dspark-rnn":
                joint = w["markov_head.joint_proj.weight"] @ torch.cat((memory, before, h))
                gate, candidate, said = (joint + w["markov_head.joint_proj.bias"]).chunk(3)
                memory = torch.sigmoid(gate) * memory + (1 - torch.sigmoid(gate)) * candidate.tanh()
                before = said.tanh()
            anchor = int(ids[(z + w["markov_head.markov_w2.weight"] @ before).argmax()])
        else:
            anchor = int(ids[z.argmax()])
        drafts.append(anchor)
    return drafts
