# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of the small random models' 97 ids whose tokens can write JSON, and what is drawn from an automaton."""

import string

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from small_models import EOS, MASK, PAD, VOCAB

PIECES = ['{"', '": ', '", "', '"}', "true", "false", "null", "ab", "12", "\\n"]
CHARACTERS = string.ascii_letters[:26] + string.digits + '{}[]":,. -+_\\/TZEé' + string.ascii_uppercase[:4]


def tokenizer():
    """Single characters and some longer pieces; 0, 1 and 96 are special, the rest are words."""
    texts = [*CHARACTERS, *PIECES]
    texts += [f"w{k}" for k in range(VOCAB - 3 - len(texts))]
    vocab = {"<pad>": PAD, "<eos>": EOS, "<mask>": MASK} | {text: k for k, text in enumerate(dict.fromkeys(texts), 2)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>")


def drawn(automaton, texts, rng, most=200):
    """A text that an automaton accepts, by a random walk that ends where it may, or takes the shortest way then."""
    step = distances(automaton)
    state, text = automaton.start, ""
    for left in range(most, -most, -1):
        after = automaton.table[automaton.class_of, state]
        usable = np.flatnonzero(after != len(automaton.final) - 1)
        if automaton.final[state] and (left < most // 2 or rng.random() < 0.15 or not len(usable)):
            return text
        if left < most // 2:
            usable = usable[step[after[usable]] == step[after[usable]].min()]
        token = int(rng.choice(usable))
        state, text = after[token], text + texts[token]
    raise AssertionError("no end")


def distances(automaton):
    """How many tokens there are from each state to an end at least."""
    far = np.where(automaton.final, 0, 10**6)
    for _ in range(len(far)):
        nearer = np.minimum(far, 1 + far[automaton.table].min(0))
        if (nearer == far).all():
            return far
        far = nearer
    return far
