# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a small masked diffusion model shipped with the package, and the tasks it was trained on."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"

#: A question that the model answers.
PROMPT = "A1234567890123456+8765432109876544="

__all__ = ["MODEL_DIR", "PROMPT"]
