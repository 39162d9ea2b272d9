# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests join and leave while others are being decoded (docs/engine.md)."""

from .engine import Engine as Engine
from .memory import EngineMemory as EngineMemory
from .metrics import EngineMetrics as EngineMetrics
from .request import RequestOutput as RequestOutput
from .request import RequestStatus as RequestStatus
