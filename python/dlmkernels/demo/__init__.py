# SPDX-License-Identifier: Apache-2.0
"""The demo: small models shipped with the package, and the tasks they were trained on."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
#: A causal model trained on the same tasks, and a drafter for it.
CAUSAL_DIR, DRAFTER_DIR = (Path(__file__).parent / name for name in ("causal", "drafter"))
#: A masked model conditioned on the noise level, and a continuous one. Both are smaller and only solve Sudokus.
MDLM_DIR, LANGFLOW_DIR = (Path(__file__).parent / name for name in ("mdlm", "langflow"))

#: An example prompt for the model in `MODEL_DIR`.
PROMPT = "A1234567890123456+8765432109876544="

__all__ = ["CAUSAL_DIR", "DRAFTER_DIR", "LANGFLOW_DIR", "MDLM_DIR", "MODEL_DIR", "PROMPT"]
