# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels serve`."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

from ..decoding.config import DecodingConfig
from ..decoding.presets import preset
from .options import add_decoding, add_model, decoding_options, device_named, load, positive, require

KEY_VARIABLE = "DLMKERNELS_API_KEY"


def add(commands) -> None:
    serve = commands.add_parser(
        "serve", help="serve a model over HTTP with OpenAI-compatible endpoints",
        description="Serve a model at the OpenAI-compatible endpoints /v1/completions and /v1/chat/completions. "
        "Requests that arrive at the same time share forward passes. The decoding options are defaults, which a "
        "request can override.",
        epilog="Example: run `dlmkernels serve --model demo`, then open http://127.0.0.1:8000/ in a browser.",
    )  # fmt: skip
    add_model(serve)
    add = serve.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: only this machine)")
    add("--port", type=int, default=8000, help="port to listen on; 0 picks a free one (default 8000)")
    add("--api-key", metavar="KEY", help=f"key that clients must send (default: ${KEY_VARIABLE})")
    add("--open-to-all", action="store_true", help="allow requests from other machines without a key")
    add("--served-model-name", metavar="NAME",
        help="name of the model in requests and responses (default: the name of its folder)")  # fmt: skip
    add("--slots", type=positive, default=16, metavar="N", help="number of answers decoded at once (default 16)")
    add("--max-length", type=positive, metavar="N",
        help="maximum tokens of prompt plus answer (default: 2048, or the model's limit if lower)")  # fmt: skip
    add("--max-waiting", type=int, default=256, metavar="N",
        help="number of answers that may wait for a slot (default 256)")  # fmt: skip
    add("--max-body", type=positive, default=4 << 20, metavar="BYTES",
        help="maximum size of a request body (default 4 MiB)")  # fmt: skip
    add("--request-timeout", type=float, default=600.0, metavar="S",
        help="seconds after which a request is cancelled (default 600)")  # fmt: skip
    add("--drain-timeout", type=float, default=30.0, metavar="S",
        help="seconds that unfinished requests get after the server is told to stop (default 30)")  # fmt: skip
    add("--deterministic", action="store_true", help="make answers bit-for-bit independent of the load")
    add("--decoding-options", action="store_true", help="let requests set rule, steps and block_length")
    add("--no-live", action="store_true", help="do not serve the page at / that shows requests being decoded")
    add_decoding(serve)
    serve.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require("transformers", "safetensors", "fastapi", "uvicorn", "prometheus_client", wanted_for="serve")
    from ..engine.engine import Engine
    from ..serve import Settings, make_server

    name = args.served_model_name or Path(args.model).name or args.model
    settings = Settings(
        name, args.host, args.port, args.api_key or os.environ.get(KEY_VARIABLE) or None, args.open_to_all,
        max_waiting=args.max_waiting, max_body_bytes=args.max_body, request_timeout=args.request_timeout,
        drain_timeout=args.drain_timeout, decoding_options=args.decoding_options, live=not args.no_live,
    )  # fmt: skip
    changes = decoding_options(args)
    named = preset(args.preset) if args.preset else None
    (named or DecodingConfig()).replace(**changes)  # validate before loading the model, so that mistakes show at once
    with _listening(settings) as listener:
        model, tokenizer = load(args.model, args.dtype, device_named(args.device))
        engine = Engine(
            model, slots=args.slots, max_length=args.max_length, config=named, tokenizer=tokenizer,
            deterministic=args.deterministic, **changes,
        )  # fmt: skip
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"{name} at http://{host}:{listener.getsockname()[1]}/ (stop with Ctrl-C)", file=sys.stderr, flush=True)
        # uvicorn shuts down cleanly, then raises the signal that stopped it a second time: ignore that one
        signal.signal(signal.SIGTERM, lambda *_: None)
        make_server(engine, tokenizer, settings).run(sockets=[listener])
    return 0


def _listening(settings) -> socket.socket:
    """Return the listening socket, bound before the model is loaded so that a port in use is reported at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise OSError(f"--host {settings.host} --port {settings.port}: {error.strerror or error}") from error
    return listener
