# SPDX-License-Identifier: Apache-2.0
"""Write a page that plays two decodings of the same Sudoku side by side: `python examples/watch.py watch.html`.

The picture in the README is a screenshot of this page after the third forward:

    chromium --headless --window-size=1200,560 --screenshot=docs/images/watch.png "file://$PWD/watch.html#forward=3"
"""

import argparse

import torch
import transformers

import dlmkernels as dk
from dlmkernels.demo import MODEL_DIR
from dlmkernels.demo.tasks import TASKS

parser = argparse.ArgumentParser(description="Write a page that plays two decodings of the same Sudoku side by side.")
parser.add_argument("page", nargs="?", default="watch.html", help="the file to write (default watch.html)")
path = parser.parse_args().page
model = dk.load(MODEL_DIR, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
board = torch.from_numpy(TASKS["sudoku"].make(2, seed=1)[1].ids)[None]

rules = {"EntropyBound(0.1)": {"rule": dk.EntropyBound(0.1)}, "8 forwards": {"rule": dk.Quota(), "steps": 8}}
by_entropy, by_number = (
    dk.infill(model, board, tokenizer=tokenizer, trace=True, **options).trace for options in rules.values()
)
by_entropy.html(path, beside=by_number, names=list(rules), title="One Sudoku, decoded in two ways")
print(f"open {path} in a browser")
