# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible HTTP server for one engine: `dlmkernels serve --model PATH`. Needs the extra `serve`."""

from .app import create_app as create_app
from .run import Server as Server
from .run import make_server as make_server
from .settings import Settings as Settings

__all__ = ["Server", "Settings", "create_app", "make_server"]
