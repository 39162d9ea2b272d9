// SPDX-License-Identifier: Apache-2.0
// The schemas of all ops on one screen. (a!) marks an argument that the op writes to.
#include "torch/ops.h"

#include "torch/schema.h"

// The namespace of the ops. A build that has to coexist with others in one process uses a different
// name. torch's macros do not expand the name, so one more macro level does that first.
#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME dlmkernels
#endif
#define DLM_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define DLM_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

DLM_LIBRARY(TORCH_EXTENSION_NAME, m) {
  DLM_DEF(m,
          "block_attention(Tensor q, Tensor? k_new, Tensor? v_new, Tensor(a!) k_cache, Tensor(b!) "
          "v_cache, "
          "Tensor? slots=None, Tensor? kv_range=None, *, int causal_block=0, Tensor? "
          "block_origin=None, "
          "Tensor? q_limit=None, Tensor? k_order=None, int window_left=-1, int window_right=-1, "
          "float softcap=0.0, "
          "float? scale=None, Tensor? cache_rows=None, Tensor? k_slots=None, Tensor? visible=None) "
          "-> (Tensor out, Tensor lse)",
          dlm::block_attention);
  DLM_DEF(
      m,
      "token_confidence(Tensor logits, *, Tensor? row_map=None, Tensor? given=None, Tensor? "
      "uncond_logits=None, "
      "Tensor? cfg_scale=None, Tensor? bias=None, Tensor? banned=None, Tensor? bitmask=None, "
      "Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, bool top_p_first=False, "
      "bool keep_crossing=True, str distribution=\"raw\", Tensor? seed=None, Tensor? step=None, "
      "Tensor? position=None, Tensor? redraw=None, bool with_margin=True, bool with_entropy=True) "
      "-> "
      "(Tensor token, "
      "Tensor argmax, "
      "Tensor confidence, Tensor margin, Tensor entropy, Tensor logsumexp, Tensor p_given, Tensor "
      "flags)",
      dlm::token_confidence);
  DLM_DEF(
      m,
      "select_tokens(Tensor score, Tensor eligible, str rule=\"none\", *, Tensor? parameter=None, "
      "bool strict=False, Tensor? gate=None, Tensor? cost=None, Tensor? need=None, Tensor? "
      "fill=None, "
      "Tensor? cap=None, Tensor? order_temperature=None, Tensor? seed=None, Tensor? step=None, "
      "Tensor? position=None) -> (Tensor selected, Tensor count)",
      dlm::select_tokens);
  DLM_DEF(
      m,
      "remask_(Tensor(a!) tokens, Tensor(b!) state, Tensor position, Tensor proposal, *, Tensor? "
      "commit=None, "
      "Tensor? edit=None, Tensor? remask=None, Tensor? renoise=None, Tensor? confidence=None, "
      "Tensor(c!)? commit_step=None, Tensor(d!)? commit_confidence=None, Tensor(e!)? step=None, "
      "Tensor? seed=None, Tensor? origin=None, Tensor? end=None, int mask_token_id=-1, int "
      "vocab_size=0, int[] eos_token_ids=[], "
      "str eos_policy=\"none\", int fill_token_id=-1) -> Tensor",
      dlm::remask_);
  DLM_DEF(
      m,
      "verify_drafts(Tensor drafts, Tensor token, *, Tensor? logits=None, Tensor? logsumexp=None, "
      "Tensor? row_map=None, Tensor? draft_logits=None, Tensor? draft_logsumexp=None, Tensor? "
      "draft_row_map=None, Tensor? banned=None, Tensor? temperature=None, float leniency=1.0, "
      "Tensor? seed=None, Tensor? step=None, Tensor? position=None) -> (Tensor accepted, Tensor "
      "tokens)",
      dlm::verify_drafts);
  DLM_DEF(m,
          "splice_(Tensor(a!) tokens, Tensor start, *, Tensor? insert=None, Tensor? remove=None, "
          "Tensor(b!)? length=None, Tensor? end=None, Tensor(c!)? state=None, Tensor(d!)? "
          "commit_step=None, Tensor(e!)? commit_confidence=None, int fill_token_id=-1, int "
          "pad_token_id=-1) -> (Tensor source, Tensor info)",
          dlm::splice_);
  DLM_DEF(m,
          "soft_embedding(Tensor logits, Tensor weight, *, Tensor? row_map=None, Tensor? "
          "temperature=None, Tensor? top_k=None, int mask_token_id=-1) -> Tensor",
          dlm::soft_embedding);
  DLM_DEF(m,
          "top_candidates(Tensor logits, int k, *, Tensor? row_map=None, Tensor? banned=None, "
          "Tensor? bitmask=None) -> (Tensor ids, Tensor values, Tensor logsumexp)",
          dlm::top_candidates);
  DLM_DEF(
      m,
      "lm_head_confidence(Tensor hidden, Tensor weight, *, Tensor? row_map=None, Tensor? "
      "given=None, Tensor? "
      "uncond_hidden=None, "
      "Tensor? cfg_scale=None, Tensor? bias=None, Tensor? banned=None, Tensor? bitmask=None, "
      "Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, bool top_p_first=False, "
      "bool keep_crossing=True, str distribution=\"raw\", Tensor? seed=None, Tensor? step=None, "
      "Tensor? position=None, Tensor? redraw=None, bool with_margin=True, bool with_entropy=True) "
      "-> "
      "(Tensor token, "
      "Tensor argmax, "
      "Tensor confidence, Tensor margin, Tensor entropy, Tensor logsumexp, Tensor p_given, Tensor "
      "flags)",
      dlm::lm_head_confidence);
  DLM_DEF(
      m,
      "lm_head_candidates(Tensor hidden, Tensor weight, int k, *, Tensor? row_map=None, Tensor? "
      "banned=None, Tensor? bitmask=None) -> (Tensor ids, Tensor values, Tensor logsumexp)",
      dlm::lm_head_candidates);
  DLM_DEF(
      m,
      "shard_confidence(Tensor logits, int first, *, Tensor? weight=None, Tensor? row_map=None, "
      "Tensor? given=None, Tensor? uncond=None, Tensor? cfg_scale=None, Tensor? bias=None, "
      "Tensor? banned=None, Tensor? bitmask=None, Tensor? temperature=None, str "
      "distribution=\"raw\", Tensor? seed=None, Tensor? step=None, Tensor? position=None, "
      "Tensor? redraw=None, bool with_entropy=True) -> Tensor",
      dlm::shard_confidence);
}

DLM_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("block_attention", TORCH_BOX(&dlm::block_attention));
  m.impl("token_confidence", TORCH_BOX(&dlm::token_confidence));
  m.impl("select_tokens", TORCH_BOX(&dlm::select_tokens));
  m.impl("remask_", TORCH_BOX(&dlm::remask_));
  m.impl("verify_drafts", TORCH_BOX(&dlm::verify_drafts));
  m.impl("splice_", TORCH_BOX(&dlm::splice_));
  m.impl("soft_embedding", TORCH_BOX(&dlm::soft_embedding));
  m.impl("top_candidates", TORCH_BOX(&dlm::top_candidates));
  m.impl("lm_head_confidence", TORCH_BOX(&dlm::lm_head_confidence));
  m.impl("lm_head_candidates", TORCH_BOX(&dlm::lm_head_candidates));
  m.impl("shard_confidence", TORCH_BOX(&dlm::shard_confidence));
}

#ifdef DLM_WITH_CUDA
DLM_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, m) {
  m.impl("block_attention", TORCH_BOX(&dlm::block_attention));
  m.impl("token_confidence", TORCH_BOX(&dlm::token_confidence));
  m.impl("select_tokens", TORCH_BOX(&dlm::select_tokens));
  m.impl("remask_", TORCH_BOX(&dlm::remask_));
  m.impl("verify_drafts", TORCH_BOX(&dlm::verify_drafts));
  m.impl("splice_", TORCH_BOX(&dlm::splice_));
  m.impl("soft_embedding", TORCH_BOX(&dlm::soft_embedding));
  m.impl("top_candidates", TORCH_BOX(&dlm::top_candidates));
  m.impl("lm_head_confidence", TORCH_BOX(&dlm::lm_head_confidence));
  m.impl("lm_head_candidates", TORCH_BOX(&dlm::lm_head_candidates));
  m.impl("shard_confidence", TORCH_BOX(&dlm::shard_confidence));
}
#endif
