# SPDX-License-Identifier: Apache-2.0
"""Load test of a local server: `python benchmarks/soak_server.py [--requests 1000] [--concurrency 32]`.

Of the requests, 5 % are cut off by the client and 5 % are malformed; all others are compared with the answers of
`generate`. Prints the outcomes, the speed, and the memory of the server after each tenth of the run. The exit status is
1 if an answer is missing, wrong or given twice, or if any request remains in the server.
"""

import argparse
import collections
import json
import random
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from transformers import AutoTokenizer

import dlmkernels as dk
from dlmkernels.demo import MODEL_DIR

PROMPTS = [f"A{a:016d}+{b:016d}=" for a, b in [(10**k, 7 * 10**k + 1) for k in range(15)]]


def resident(process: int) -> int:
    """Return the resident memory of a process in bytes."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Soak:
    """The clients of one server, and their statistics."""

    def __init__(self, url: str, expected: dict[str, str]):
        self.url, self.expected = url, expected
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []
        self.ids: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()
        self.client = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=64))

    def wait_for_server(self) -> None:
        """Wait until the server answers."""
        while True:
            try:
                if self.client.get(self.url + "/health").status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)

    def left(self) -> int:
        """Return the number of unfinished answers, after waiting up to ten seconds for them."""
        for _ in range(100):
            left = self.client.get(self.url + "/health").json()["answers_in_flight"]
            if not left:
                return 0
            time.sleep(0.1)
        return left

    def one(self, number: int) -> None:
        """Send one request, whose kind is drawn from its number."""
        draw = random.Random(number)
        kind = draw.random()
        prompt = draw.choice(PROMPTS)
        body = {"model": "demo", "prompt": prompt, "max_tokens": 17}
        started = time.perf_counter()
        if kind < 0.05:
            outcome = self._cut_off(body)
        elif kind < 0.10:
            outcome = self._malformed(body, draw)
        elif kind < 0.55:
            outcome = self._stream(body)
        else:
            outcome = self._whole(body)
        with self.lock:
            self.counts[outcome] += 1
            if outcome in ("whole", "stream"):
                self.seconds.append(time.perf_counter() - started)

    def _whole(self, body: dict) -> str:
        answer = self.client.post(self.url + "/v1/completions", json=body)
        if answer.status_code != 200:
            return f"status {answer.status_code}"
        found = answer.json()
        self._count(found["id"])
        return "whole" if found["choices"][0]["text"] == self.expected[body["prompt"]] else "wrong"

    def _stream(self, body: dict) -> str:
        text, name, ended = "", "", 0
        with self.client.stream("POST", self.url + "/v1/completions", json=body | {"stream": True}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    name = event["id"]
                    text += event["choices"][0]["text"]
                    ended += event["choices"][0]["finish_reason"] is not None
        self._count(name)
        return "stream" if text == self.expected[body["prompt"]] and ended == 1 else "wrong"

    def _count(self, name: str) -> None:
        with self.lock:
            self.ids[name] += 1

    def _cut_off(self, body: dict) -> str:
        host, _, port = self.url.removeprefix("http://").partition(":")
        text = json.dumps(body | {"stream": True}).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                               b"Content-Length: %d\r\n\r\n" % len(text) + text)  # fmt: skip
            connection.recv(1)
        return "cut off"

    def _malformed(self, body: dict, draw: random.Random) -> str:
        change = draw.choice([{"prompt": 5}, {"max_tokens": -1}, {"speed": 1}, {"temperature": "hot"}, {"n": 0}])
        answer = self.client.post(self.url + "/v1/completions", json=body | change)
        return "malformed" if answer.status_code == 400 else f"malformed taken: {answer.status_code}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    args = parser.parse_args()
    model, tokenizer = dk.load("demo"), AutoTokenizer.from_pretrained(MODEL_DIR)
    expected = {p: dk.generate(model, p, tokenizer=tokenizer, max_new_tokens=17, block_length=8).text()[0]
                for p in PROMPTS}  # fmt: skip
    options = [
        "--model",
        "demo",
        "--port",
        "0",
        "--slots",
        str(args.slots),
        "--max-length",
        "96",
        "--block-length",
        "8",
    ]
    command = [sys.executable, "-m", "dlmkernels", "serve", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        soak = Soak(server.stderr.readline().split(" at ")[1].split("/ ")[0], expected)
        soak.wait_for_server()
        started, memory = time.perf_counter(), []
        with ThreadPoolExecutor(args.concurrency) as pool:
            for tenth in range(10):
                numbers = range(tenth * args.requests // 10, (tenth + 1) * args.requests // 10)
                list(pool.map(soak.one, numbers))
                memory.append(resident(server.pid) >> 20)
        seconds = time.perf_counter() - started
        left = soak.left()
        server.terminate()
        status = server.wait(60)
    twice = sum(count > 1 for count in soak.ids.values())
    done = soak.counts["whole"] + soak.counts["stream"]
    print(dict(soak.counts), f"unfinished: {left}, answered twice: {twice}")
    slowest = statistics.quantiles(soak.seconds, n=100)[98]
    print(
        f"{args.requests / seconds:.1f} requests/s, {17 * done / seconds:.0f} tokens/s; seconds per request: median "
        f"{statistics.median(soak.seconds):.3f}, 99th percentile {slowest:.3f}"
    )
    print("MiB after each tenth of the run:", *memory)
    good = {"whole", "stream", "cut off", "malformed"}
    return int(bool(status or left or twice or set(soak.counts) - good or sum(soak.counts.values()) != args.requests))


if __name__ == "__main__":
    sys.exit(main())
