# SPDX-License-Identifier: Apache-2.0
"""Two ranks that load a model together and decode with it, each in a process of its own (gloo, on the CPU)."""

import functools
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as hf
from transformers.distributed import DistributedConfig

import checkpoints
import dlmkernels as dk
from small_models import DECODER, MASK, MOE

#: Two vocabularies: one is divided where chunks of 256 tokens end, the other is not.
ALIGNED, UNALIGNED = 1024, 1000
SIZES = DECODER | {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | {"vocab_size": UNALIGNED})),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SIZES | {"vocab_size": ALIGNED, "tie_word_embeddings": True})
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES | MOE | {"vocab_size": ALIGNED})),
}


def save(kind, folder):
    """A random model with a sharp head, as a checkpoint; the published form of LLaDA, with a small vocabulary."""
    folder = Path(folder) / kind
    folder.mkdir()
    if kind == "llada":
        return checkpoints.llada().write(folder)
    torch.manual_seed(1)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=6.0 / 64**0.5)
    model.save_pretrained(folder)
    return folder


def load(kind, folder, **options):
    folder = Path(folder) / kind
    if kind == "llada":
        return dk.load(folder, dtype=torch.float32, **options)
    options = {"dtype": torch.float32, "experts_implementation": "eager"} | options
    return hf.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def requests(batch=3, length=6, seed=2):
    return torch.randint(4, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


def decode(model, **options):
    """What all ranks must have alike."""
    options = {"mask_token_id": MASK, "max_new_tokens": 16, "block_length": 8, "eos_policy": "none"} | options
    out = dk.generate(model, requests(), **options)
    return out.sequences, out.commit_step, out.confidence, out.num_forwards


def said(function):
    """What an error says."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def work(rank, folder, tasks):
    """Do the tasks, functions of this rank's models; what they return goes into a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        models = functools.cache(lambda kind: load(kind, folder, distributed_config=DistributedConfig(tp_size=2)))
        done = {name: task(models, rank) for name, task in tasks.items()}
        torch.save(done, f"{folder}/{rank}.pt")
    except Exception:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def run(folder, tasks):
    """What both ranks have made of the tasks."""
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=work, args=(rank, str(folder), tasks)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
    hanging = [process for process in ranks if process.is_alive()]
    for process in hanging:
        process.kill()
    errors = "\n".join(path.read_text() for path in Path(folder).glob("*.error"))
    assert not hanging and not errors, errors or "the ranks wait for each other"
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
