# SPDX-License-Identifier: Apache-2.0
"""Decode a file of prompts with Ray Data: `python examples/ray_batch.py MODEL prompts.jsonl out.jsonl --workers 2`.

Each worker is an actor that loads the model once. The answers are the same as those of `dlmkernels generate --input`.
They depend on a line's content and number, not on its worker or batch. Needs the extra `ray`.
"""

import argparse
import json
from pathlib import Path

import numpy
import ray


class Decoder:
    """Ray actor with an engine."""

    def __init__(self, model: str, slots: int, seed: int, options: dict):
        import dlmkernels as dk
        from dlmkernels.cli.options import device_named, load

        loaded, tokenizer = load(model, "auto", device_named("cuda" if ray.get_gpu_ids() else "cpu"))
        self.engine = dk.Engine(loaded, slots=slots, tokenizer=tokenizer, **options)
        self.seed = seed

    def __call__(self, batch: dict[str, numpy.ndarray]) -> dict[str, list]:
        from dlmkernels.jobs import answers, read_line

        lines = (read_line(int(number), text) for number, text in zip(batch["line"], batch["text"]))
        records = list(answers(self.engine, lines, self.seed))
        return {"line": [record["line"] for record in records], "record": [json.dumps(r) for r in records]}


def decode(
    model: str, source: str, target: str, workers: int = 2, gpus: float = 0, slots: int = 16, batch_size: int = 256,
    seed: int = 0, **options,
) -> int:  # fmt: skip
    """Answer the lines of `source` and write the answers to `target` in order. Returns their number."""
    with open(source, encoding="utf-8") as file:
        lines = [{"line": number, "text": text} for number, text in enumerate(file, 1)]
    data = ray.data.from_items(lines).map_batches(
        Decoder, fn_constructor_args=(model, slots, seed, options), batch_size=batch_size, num_gpus=gpus, num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )  # fmt: skip
    records = sorted(data.take_all(), key=lambda row: row["line"])
    Path(target).write_text("".join(json.dumps(json.loads(r["record"]), ensure_ascii=False) + "\n" for r in records))
    return len(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per worker")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--block-length", type=int)
    args = parser.parse_args()
    ray.init(include_dashboard=False)
    options = {} if args.block_length is None else {"block_length": args.block_length}
    decode(args.model, args.source, args.target, args.workers, args.gpus, batch_size=args.batch_size, **options)


if __name__ == "__main__":
    main()
