# SPDX-License-Identifier: Apache-2.0
"""The demonstration: small diffusion models shipped with the package, and the tasks they were trained on."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
#: a causal model of the same tasks, and a drafter for it
CAUSAL_DIR, DRAFTER_DIR = (Path(__file__).parent / name for name in ("causal", "drafter"))
#: A masked model that is told the time, and a continuous one: smaller, and for Sudoku alone.
MDLM_DIR, LANGFLOW_DIR = (Path(__file__).parent / name for name in ("mdlm", "langflow"))

#: A question that the model answers.
PROMPT = "A1234567890123456+8765432109876544="

__all__ = ["CAUSAL_DIR", "DRAFTER_DIR", "LANGFLOW_DIR", "MDLM_DIR", "MODEL_DIR", "PROMPT"]
