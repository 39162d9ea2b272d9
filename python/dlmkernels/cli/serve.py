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
        "serve", help="answer requests over HTTP, as OpenAI's servers do",
        description="Serve a model with the endpoints /v1/completions and /v1/chat/completions. Requests that come at "
        "the same time share forwards. Options of the decoding hold for requests that do not say otherwise.",
        epilog="Example: dlmkernels serve --model demo, then open http://127.0.0.1:8000/ in a browser.",
    )  # fmt: skip
    add_model(serve)
    add = serve.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, help="0 takes any free one (default 8000)")
    add("--api-key", metavar="KEY", help=f"what clients must send (default: ${KEY_VARIABLE})")
    add("--open-to-all", action="store_true", help="let other machines in without a key")
    add("--served-model-name", metavar="NAME", help="what requests call the model (default: the name of its folder)")
    add("--slots", type=positive, default=16, metavar="N", help="answers decoded at once (default 16)")
    add("--max-length", type=positive, metavar="N", help="tokens of prompt and answer (default: 2048, or what it can)")
    add("--max-waiting", type=int, default=256, metavar="N", help="answers that may wait for a slot (default 256)")
    add("--max-body", type=positive, default=4 << 20, metavar="BYTES", help="longest request body (default 4 MiB)")
    add("--request-timeout", type=float, default=600.0, metavar="S", help="seconds a request may take (default 600)")
    add("--drain-timeout", type=float, default=30.0, metavar="S",
        help="seconds that requests in flight get when the server is told to stop (default 30)")  # fmt: skip
    add("--deterministic", action="store_true", help="answers that do not depend on the load, bit for bit")
    add("--decoding-options", action="store_true", help="let requests choose rule, steps and block_length")
    add("--no-live", action="store_true", help="without the page / on which decodings are watched")
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
    (named or DecodingConfig()).replace(**changes)  # before anything is loaded: mistakes should show at once
    with _listening(settings) as listener:
        model, tokenizer = load(args.model, args.dtype, device_named(args.device))
        engine = Engine(
            model, slots=args.slots, max_length=args.max_length, config=named, tokenizer=tokenizer,
            deterministic=args.deterministic, **changes,
        )  # fmt: skip
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"{name} at http://{host}:{listener.getsockname()[1]}/ (stop with Ctrl-C)", file=sys.stderr, flush=True)
        # uvicorn has ended in order when it raises the signal again that it was told to end by
        signal.signal(signal.SIGTERM, lambda *_: None)
        make_server(engine, tokenizer, settings).run(sockets=[listener])
    return 0


def _listening(settings) -> socket.socket:
    """The socket, bound before the model is loaded, so that a port in use is known at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise OSError(f"--host {settings.host} --port {settings.port}: {error.strerror or error}") from error
    return listener
