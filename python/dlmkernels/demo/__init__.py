# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a small masked diffusion model shipped with the package, and the tasks it was trained on."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
#: a causal model of the same tasks, and a drafter for it
CAUSAL_DIR, DRAFTER_DIR = (Path(__file__).parent / name for name in ("causal", "drafter"))

#: A question that the model answers.
PROMPT = "A1234567890123456+8765432109876544="

__all__ = ["CAUSAL_DIR", "DRAFTER_DIR", "MODEL_DIR", "PROMPT"]
