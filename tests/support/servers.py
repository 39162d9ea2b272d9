# SPDX-License-Identifier: Apache-2.0
"""Servers for tests, each in a thread of its own."""

import socket
import threading
from contextlib import contextmanager

from transformers import AutoTokenizer

import dlmkernels as dk
from dlmkernels.demo import MODEL_DIR
from dlmkernels.serve import Settings, make_server

#: a chat becomes its last message: what the demo model can read
TEMPLATE = (
    "{% if messages[-1]['content'] == 'refuse' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ messages[-1]['content'] }}"
)
PROMPT = "A1234567890123456+8765432109876544="
SUM = "10000000000000000"


def demo_tokenizer(template=TEMPLATE):
    """The demo model's, with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.chat_template = template
    return tokenizer


@contextmanager
def serving(template=TEMPLATE, slots=4, max_length=96, model=None, tokenizer=None, **settings):
    """A server of the demo model; its URL, with `service` and `server` as attributes."""
    tokenizer = demo_tokenizer(template) if tokenizer is None else tokenizer
    options = {"block_length": 8} | settings.pop("engine", {})
    engine = dk.Engine(model or dk.load("demo"), slots=slots, max_length=max_length, tokenizer=tokenizer, **options)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = make_server(engine, tokenizer, Settings("demo", port=0, **{"drain_timeout": 5.0} | settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"


class Running:
    """A server that runs.

    Attributes
    ----------
    url : str
    server : Server
    service : Service
    thread : Thread
    """

    def __init__(self, url, server, thread):
        self.url, self.server, self.thread = url, server, thread
        self.service = server.config.app.state.service

    @property
    def address(self):
        """Host and port, for sockets."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)
