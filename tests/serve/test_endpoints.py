# SPDX-License-Identifier: Apache-2.0
"""What clients get: OpenAI's own client is one of them, and answers are those of `generate`."""

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

import dlmkernels as dk
from servers import PROMPT, SUM, demo_tokenizer, serving


@pytest.fixture(scope="module")
def running():
    with serving(decoding_options=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(prompt, n, **options):
    return dk.generate(dk.load("demo"), prompt, tokenizer=demo_tokenizer(), max_new_tokens=n, block_length=8, **options)


def test_a_completion(client):
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=17)
    (choice,) = answer.choices
    assert choice.text == SUM and choice.finish_reason == "length" and choice.index == 0 and choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (35, 17, 52)
    assert answer.model == "demo" and answer.object == "text_completion" and answer.id.startswith("cmpl-")


def test_a_chat(client):
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    answer = client.chat.completions.create(model="demo", messages=messages, max_completion_tokens=17)
    (choice,) = answer.choices
    assert choice.message.content == SUM and choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.object == "chat.completion" and answer.usage.completion_tokens == 17


@pytest.mark.parametrize("form", ["texts", "ids", "id"])
def test_prompts_in_every_form(client, form):
    ids = demo_tokenizer()(PROMPT)["input_ids"]
    prompt = {"texts": [PROMPT, "A1+1="], "ids": [ids, ids], "id": ids}[form]
    answer = client.completions.create(model="demo", prompt=prompt, max_tokens=17)
    assert [choice.index for choice in answer.choices] == list(range(1 if form == "id" else 2))
    assert answer.choices[0].text == SUM
    if form == "texts":
        assert answer.choices[1].text == expected("A1+1=", 17).text()[0]
        assert answer.usage.prompt_tokens == 35 + 5 and answer.usage.completion_tokens == 34


def test_a_stream_is_the_answer_block_by_block(client):
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": PROMPT}], max_tokens=17, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 17
    parts = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(part.delta.content for part in parts) == SUM
    assert sum(bool(part.delta.content) for part in parts) >= 3  # 17 tokens are three blocks
    assert parts[0].delta.role == "assistant" and all(part.delta.role is None for part in parts[1:])
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_drafts_show_the_canvas(running):
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 17, "stream": True, "stream_options": {"drafts": True}}
    with httpx.stream("POST", running.url + "/v1/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    drafts = [choice["draft"] for event in events[:-1] for choice in json.loads(event)["choices"] if "draft" in choice]
    assert all(len(draft) == 17 for draft in drafts)
    still_open = [draft.count(None) for draft in drafts]
    assert still_open == sorted(still_open, reverse=True) and still_open[0] > still_open[-1]
    for earlier, later in itertools.pairwise(drafts):
        assert all(a is None or a == b for a, b in zip(earlier, later))


def test_seeds_and_choices_do_not_depend_on_the_load(client):
    def ask(seed):
        return client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=12, temperature=4.0, seed=seed, n=3, extra_body={"top_k": 9}
        )

    alone = {seed: [choice.text for choice in ask(seed).choices] for seed in (1, 2)}
    assert len({text for texts in alone.values() for text in texts}) > 3
    with ThreadPoolExecutor(6) as pool:
        for seed, answer in zip([1, 2] * 3, pool.map(ask, [1, 2] * 3)):
            assert [choice.text for choice in answer.choices] == alone[seed]
    like = expected(PROMPT, 12, temperature=4.0, top_k=9, seed=1, num_return_sequences=3).text()
    assert alone[1] == like


def test_logprobs_of_completions(client):
    (choice,) = client.completions.create(model="demo", prompt=PROMPT, max_tokens=17, logprobs=2).choices
    found = choice.logprobs
    assert "".join(found.tokens) == SUM and found.text_offset == list(range(17))
    for token, value, best in zip(found.tokens, found.token_logprobs, found.top_logprobs):
        assert len(best) == 2 and best[token] == pytest.approx(value, abs=1e-4) and value <= 0
    (plain,) = client.completions.create(model="demo", prompt=PROMPT, max_tokens=17, logprobs=0).choices
    assert plain.logprobs.top_logprobs is None
    assert plain.logprobs.token_logprobs == pytest.approx(found.token_logprobs, abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_chats(client, stream):
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": PROMPT}], max_tokens=17, logprobs=True, top_logprobs=3,
        stream=stream,
    )  # fmt: skip
    entries = [e for part in (answer if stream else [answer]) for e in part.choices[0].logprobs.content]
    assert "".join(entry.token for entry in entries) == SUM
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and bytes(entry.bytes).decode() == entry.token
        assert sum(math.exp(one.logprob) for one in entry.top_logprobs) <= 1 + 1e-5
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_before_them(client, stream):
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=17, stop=["000", "x"], stream=stream)
    parts = list(answer) if stream else [answer]
    assert "".join(part.choices[0].text for part in parts) == "1"
    assert parts[-1].choices[0].finish_reason == "stop"


def test_a_suffix_stands_behind_the_answer(client):
    answer = client.completions.create(model="demo", prompt=PROMPT + "1", suffix="0", max_tokens=15)
    assert answer.choices[0].text == SUM[1:-1] and answer.usage.completion_tokens == 15


def test_rules_can_be_chosen_where_that_is_allowed(client):
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 16}
    slow = client.completions.create(**body, extra_body={"rule": "quota", "steps": 16, "block_length": 8})
    fast = client.completions.create(**body, extra_body={"rule": "threshold:0.5"})
    assert slow.usage.num_forwards == 16 > fast.usage.num_forwards


def test_models_health_and_metrics(client, running):
    (model,) = client.models.list().data
    assert model.id == "demo" and model.max_model_len == 96 and client.models.retrieve("demo").id == "demo"
    assert httpx.get(running.url + "/health").json() == {"status": "ok", "answers_in_flight": 0}
    client.completions.create(model="demo", prompt=PROMPT, max_tokens=17)
    lines = httpx.get(running.url + "/metrics").text.splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    now = running.service.engine.metrics()
    assert values["dlmkernels_tokens_total"] == now.tokens >= 17
    assert values['dlmkernels_requests_total{outcome="finished"}'] == now.finished >= 1
    assert values['dlmkernels_http_requests_total{path="/v1/completions",status="200"}'] >= 1


def test_every_answer_names_its_request(running):
    names = {httpx.get(running.url + path).headers["x-request-id"] for path in ("/health", "/nope", "/v1/models")}
    assert len(names) == 3


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.completions.create(model="gpt", prompt="A")
    with pytest.raises(openai.BadRequestError, match="template rejects"):
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "refuse"}], max_tokens=2)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="demo", prompt="1" * 200, max_tokens=10)
    assert error.value.code == "context_length_exceeded" and "this engine's max_length of 96" in str(error.value)


def test_the_openai_client_can_be_asynchronous(running):
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(*(
                client.completions.create(model="demo", prompt=PROMPT, max_tokens=17) for _ in range(12)
            ))  # fmt: skip
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask()) == [SUM] * 12
