# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests come and go while others are decoded (docs/engine.md)."""

from .engine import Engine as Engine
from .memory import EngineMemory as EngineMemory
from .metrics import EngineMetrics as EngineMetrics
from .request import RequestOutput as RequestOutput
from .request import RequestStatus as RequestStatus
