# SPDX-License-Identifier: Apache-2.0
"""Files of prompts: right answers, mistakes said at once, jobs that are killed and go on, several processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import dlmkernels as dk
from dlmkernels.cli import main
from dlmkernels.jobs import Job, LineError, answers, read_line
from dlmkernels.jobs.files import Share

ROOT = Path(__file__).parents[2]
OPTIONS = ("--block-length", "8", "--slots", "3")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(dk.demo.MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return dk.load("demo")


def requests(count, seed=0):
    """Lines with prompts, ids and options of many kinds."""
    draw, lines = random.Random(seed), []
    for k in range(count):
        line = {"prompt": f"A{draw.randrange(10**5):05d}+{draw.randrange(10**5):05d}="}
        if k % 3:
            line["id"] = f"request {k}"
        line |= draw.choice(
            [{}, {"temperature": 2.0}, {"temperature": 2.0, "top_k": 5}, {"seed": k, "temperature": 1.5}]
        )
        lines.append(line | {"max_new_tokens": draw.choice([3, 5, 9])})
    return lines


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def command(source, target, *more):
    return [sys.executable, "-m", "dlmkernels", "generate", "--model", "demo", "--input", str(source), "--output",
            str(target), *OPTIONS, *more]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A job of eighteen lines, and what one process made of it."""
    folder = tmp_path_factory.mktemp("done")
    source = write(folder / "in.jsonl", requests(18))
    assert main(command(source, folder / "out.jsonl")[3:]) == 0
    return source, (folder / "out.jsonl").read_bytes()


def test_answers_are_those_of_generate(done, model, tokenizer):
    source, text = done
    for number, (line, record) in enumerate(zip(read(source), text.decode().splitlines(), strict=True), 1):
        record = json.loads(record)
        wanted = read_line(number, json.dumps(line))
        options = {k: v for k, v in line.items() if k in ("max_new_tokens", "temperature", "top_k")}
        out = dk.generate(model, line["prompt"], tokenizer=tokenizer, block_length=8, seed=wanted.seed(0), **options)
        assert record["line"] == number and record.get("id") == line.get("id")
        assert record["text"] == out.text()[0] and record["num_forwards"] == int(out.num_forwards[0])
        assert record["prompt_tokens"] == 13 and record["completion_tokens"] == line["max_new_tokens"]
        assert record["finish_reason"] == "length"


def test_seeds_follow_from_the_id_or_the_number():
    one, other = read_line(3, '{"prompt": "A", "id": "x"}'), read_line(9, '{"prompt": "B", "id": "x"}')
    assert one.seed(0) == other.seed(0) != one.seed(1)
    by_number = [read_line(k, '{"prompt": "A"}').seed(0) for k in (1, 2)]
    assert len({*by_number, one.seed(0)}) == 3 and all(0 <= seed < 2**63 for seed in by_number)
    assert read_line(1, '{"prompt": "A", "seed": -7}').seed(5) == -7


def test_prompts_of_all_kinds(model, tokenizer):
    tokenizer.chat_template = "{{ messages[-1].content }}"
    engine = dk.Engine(model, slots=2, max_length=64, tokenizer=tokenizer, block_length=8)
    text = "A1234567890123456+8765432109876544="
    kinds = [{"prompt": text}, {"token_ids": tokenizer(text)["input_ids"]},
             {"messages": [{"role": "user", "content": text}]}, {"prompt": text, "stop": "000"}]  # fmt: skip
    lines = [read_line(k, json.dumps(kind | {"max_new_tokens": 17})) for k, kind in enumerate(kinds, 1)]
    found = list(answers(engine, lines, token_ids=True))
    assert [record["text"] for record in found] == ["10000000000000000"] * 3 + ["1"]
    assert [record["finish_reason"] for record in found] == ["length"] * 3 + ["stop"]
    assert tokenizer.decode(found[0]["token_ids"]) == "10000000000000000"


BAD = [
    "", "{", "5", "[]", "null", "[" * 100_000, "{}", '{"prompt": ""}', '{"prompt": 5}', '{"prompt": "A", "token_ids": [1]}',
    '{"token_ids": []}', '{"token_ids": [-1]}', '{"token_ids": [1.5]}', '{"token_ids": [true]}', '{"messages": []}',
    '{"messages": [{"role": "user"}]}', '{"prompt": "A", "speed": 1}', '{"prompt": "A", "max_new_tokens": 0}',
    '{"prompt": "A", "max_new_tokens": true}', '{"prompt": "A", "seed": 1.5}', '{"prompt": "A", "seed": 9223372036854775808}',
    '{"prompt": "A", "temperature": -1}', '{"prompt": "A", "temperature": NaN}', '{"prompt": "A", "top_p": 0}',
    '{"prompt": "A", "top_k": 0}', '{"prompt": "A", "stop": 5}', '{"prompt": "A", "stop": [""]}', '{"prompt": "A", "id": ""}',
    '{"prompt": "A", "id": null}', '{"prompt": "A", "id": [1]}',
]  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_lines_that_are_no_requests(text):
    with pytest.raises(LineError, match="line 7: "):
        read_line(7, text)


def test_mistakes_are_said_before_anything_is_decoded(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [*requests(3), '{"prompt": 5}', '{"promt": "A"}', *requests(1)])
    assert main(command(source, tmp_path / "out.jsonl", "--model", "/nowhere")[3:]) == 2
    assert (
        "line 4: prompt must be a non-empty string" in (err := capsys.readouterr().err)
        and "(and 1 more invalid line);" in err
    )
    assert not (tmp_path / "out.jsonl").exists()
    twice = write(tmp_path / "twice.jsonl", [{"prompt": "A", "id": 5}, {"prompt": "B"}, {"prompt": "C", "id": 5}])
    assert main(command(twice, tmp_path / "out.jsonl")[3:]) == 2
    assert "line 3: id 5 is already used by line 1" in capsys.readouterr().err


def test_lines_with_errors_can_be_skipped(tmp_path):
    lines = ['{"prompt": 5}', *requests(2), {"prompt": "A", "max_new_tokens": 10_000}, {"prompt": "B?", "id": 1},
             {"prompt": "1+1=", "id": 1}]  # fmt: skip
    source = write(tmp_path / "in.jsonl", lines)
    assert main(command(source, tmp_path / "out.jsonl", "--skip-errors")[3:]) == 0
    found = read(tmp_path / "out.jsonl")
    assert [record["line"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert "prompt must be" in found[0]["error"] and "max_length" in found[3]["error"]
    assert "earlier line" in found[5]["error"] and "text" in found[1] and "text" in found[2]


def test_texts_that_have_no_utf8_form(tmp_path):
    lines = ['{"prompt": "1+1=", "id": "\\ud800"}', '{"prompt": "\\udc00"}', *requests(1)]
    source = write(tmp_path / "in.jsonl", lines)
    assert main(command(source, tmp_path / "out.jsonl", "--skip-errors")[3:]) == 0
    found = read(tmp_path / "out.jsonl")
    assert [record["line"] for record in found] == [1, 2, 3] and found[0]["id"] == "\ud800" and "text" in found[2]


@pytest.mark.parametrize(("options", "words"), [
    (("--output", "x"), "no effect without --input"), (("--restart",), "no effect without --input"),
    (("--input", "x"), "--input needs --output"), (("--input", "x", "--output", "y", "--prompt", "A"), "--prompt"),
    (("--input", "/nowhere", "--output", "y"), "/nowhere"), (("--input", os.devnull, "--output", "y"), "is empty"),
    (("--input", "x", "--output", "y", "--infill"), "--infill"),
])  # fmt: skip
def test_options_that_do_not_go_together(capsys, options, words):
    assert main(["generate", "--model", "demo", *options]) == 2
    assert words in capsys.readouterr().err


def test_files_are_checked_before_decoding(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", requests(2))
    assert main(command(tmp_path / "none.jsonl", tmp_path / "out.jsonl")[3:]) == 2
    assert f"--input: {tmp_path / 'none.jsonl'}: No such file" in capsys.readouterr().err
    assert main(command(source, tmp_path)[3:]) == 2
    assert f"--output: {tmp_path} is a folder" in capsys.readouterr().err


def test_errors_are_counted_apart(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": ""}\n{"prompt": 5}\n')
    assert main(command(source, target)[3:]) == 2
    assert "(and 1 more invalid line); pass --skip-errors" in capsys.readouterr().err
    assert main(command(source, target, "--skip-errors")[3:]) == 0
    assert "0 lines answered, 2 recorded as errors" in capsys.readouterr().err


# --- jobs that end before their end ----------------------------------------------------------------------------------


def test_a_job_that_is_done_is_left_as_it_is(done, tmp_path, capsys, monkeypatch):
    source, text = done
    target = source.with_name("out.jsonl")
    monkeypatch.setattr("dlmkernels.cli.batch.load", None)  # nothing is loaded
    assert main(command(source, target)[3:]) == 0 and target.read_bytes() == text
    assert "0 lines answered, 18 already answered by an earlier run" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [0, 150, -1])
def test_a_job_goes_on_wherever_its_output_ends(done, tmp_path, cut):
    source, text = done
    target = tmp_path / "out.jsonl"
    target.write_bytes(text[:cut])
    (tmp_path / "out.jsonl.job").write_bytes(source.with_name("out.jsonl.job").read_bytes())
    assert main(command(source, target)[3:]) == 0 and target.read_bytes() == text


def test_a_job_that_is_killed_again_and_again(done, tmp_path):
    """SIGKILL wherever it happens to be, five times; then no line is missing, double or different."""
    source, text = done
    target, draw, sizes = tmp_path / "out.jsonl", random.Random(1), []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for kill in range(3):
        process = subprocess.Popen(command(source, target), env=environment, stderr=subprocess.DEVNULL)
        before = target.stat().st_size if target.exists() else 0
        while process.poll() is None and (target.stat().st_size if target.exists() else 0) <= before:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        process.send_signal((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[kill])
        code = process.wait(60)
        assert code in (0, 130, -signal.SIGKILL, -signal.SIGTERM)
        sizes.append(target.stat().st_size)
    assert 0 < sizes[0] < len(text)
    assert subprocess.run(command(source, target), env=environment).returncode == 0
    assert target.read_bytes() == text


def test_an_output_of_something_else_is_not_touched(done, tmp_path, capsys):
    source, text = done
    target = tmp_path / "out.jsonl"
    target.write_text("mine\n")
    assert main(command(source, target)[3:]) == 2 and target.read_text() == "mine\n"
    assert "was not written by a batch job" in capsys.readouterr().err
    (tmp_path / "out.jsonl.job").write_bytes(source.with_name("out.jsonl.job").read_bytes())
    assert main(command(source, target)[3:]) == 2 and target.read_text() == "mine\n"
    assert "is not the answer to line 1" in capsys.readouterr().err
    target.write_bytes(text)
    for more, name in ((("--seed", "3"), "seed"), (("--temperature", "1"), "options"), (("--token-ids",), "token_ids")):
        assert main(command(source, target, *more)[3:]) == 2 and target.read_bytes() == text
        assert f"belongs to another job: {name} was" in capsys.readouterr().err
    other = write(tmp_path / "other.jsonl", requests(2, seed=5))
    assert main(command(other, target)[3:]) == 2
    assert "input_sha256" in capsys.readouterr().err
    assert main(command(other, target, "--restart")[3:]) == 0 and len(read(target)) == 2


@pytest.mark.parametrize("more", [(), ("--restart",)])
def test_the_output_cannot_be_the_input(done, tmp_path, capsys, more):
    source = write(tmp_path / "a.jsonl", requests(2))
    text = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    os.link(source, tmp_path / "out.jsonl.job")
    for target, words in (
        (source, f"--output must be another file than --input, which would be overwritten; got --input {source} and"),
        (tmp_path / "link.jsonl", f"--output {tmp_path}/link.jsonl"),
        (tmp_path / "out.jsonl", f"(the job also writes {tmp_path}/out.jsonl.job)"),
        (tmp_path, f"--output: {tmp_path} is a folder; expected a file"),
    ):
        assert main(command(source, target, *more)[3:]) == 2
        assert words in capsys.readouterr().err and source.read_bytes() == text
    assert main(command(tmp_path, tmp_path / "out.jsonl", *more)[3:]) == 2
    assert f"--input: {tmp_path} is a folder" in capsys.readouterr().err


def test_the_output_of_a_process_cannot_be_the_input(tmp_path):
    source = write(tmp_path / "out.rank-1-of-2.jsonl", requests(2))
    for rank in range(2):
        with pytest.raises(ValueError, match=r"also writes .*/out.rank-1-of-2.jsonl\)"):
            Job(source, tmp_path / "out.jsonl", {}, share=Share(rank, 2))


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"", b"[" * 100_000])
def test_a_damaged_description_is_named(done, tmp_path, capsys, text):
    source, answers_of = done
    target = tmp_path / "out.jsonl"
    target.write_bytes(answers_of)
    (tmp_path / "out.jsonl.job").write_bytes(text)
    assert main(command(source, target)[3:]) == 2 and target.read_bytes() == answers_of
    err = capsys.readouterr().err
    assert f"--output: {target}.job, the description of the job that wrote {target}, is damaged: choose" in err
    assert "pass --restart" in err
    with pytest.raises(ValueError, match=r"is damaged: .*or remove the output files of all processes"):
        Job(source, target, {}, share=Share(0, 2)).run(lambda: None)


def test_two_processes_do_not_write_one_file(done, tmp_path, capsys):
    import fcntl

    source, _ = done
    with (tmp_path / "out.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(command(source, tmp_path / "out.jsonl")[3:]) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_a_disk_that_is_full(done, tmp_path):
    """As many bytes as some answers take, and no more: an error, and a job that goes on when there is room."""
    source, text = done
    target = tmp_path / "out.jsonl"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)); import signal; " \
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import sys; from dlmkernels.cli import main; " \
            "sys.exit(main(sys.argv[1:]))"  # fmt: skip
    out = subprocess.run([sys.executable, "-c", limit, *command(source, target)[3:]], capture_output=True, text=True)
    assert out.returncode == 2 and "File too large" in out.stderr and "Traceback" not in out.stderr
    assert 0 < target.stat().st_size <= 700
    assert main(command(source, target)[3:]) == 0 and target.read_bytes() == text


# --- several processes -----------------------------------------------------------------------------------------------


def test_shares_are_all_of_it():
    for count in (1, 2, 3, 7):
        shares = [Share(rank, count) for rank in range(count)]
        for total in (0, 1, 5, 20):
            assert sum(share.lines_of(total) for share in shares) == total
            assert all(sum(share.has(n) for share in shares) == 1 for n in range(1, total + 1))
            assert all(s.lines_of(total) == sum(s.has(n) for n in range(1, total + 1)) for s in shares)


@pytest.mark.parametrize(("variables", "words"), [
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be from 0 to 1, because WORLD_SIZE is 2; got 2"), ({"RANK": "x"}, "must be integers"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1; got 0"),
])  # fmt: skip
def test_environments_that_cannot_be(done, monkeypatch, capsys, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(command(done[0], "never.jsonl")[3:]) == 2
    assert words in capsys.readouterr().err


def test_processes_one_after_the_other(done, tmp_path, model, tokenizer):
    """Three shares, in an order of their own; only the last one puts them together."""
    source, text = done
    target = tmp_path / "out.jsonl"
    description = {"model": "demo"}

    def run(rank):
        engine = lambda: dk.Engine(model, slots=2, max_length=96, tokenizer=tokenizer, block_length=8)  # noqa: E731
        return Job(source, target, description, share=Share(rank, 3)).run(engine)

    assert [run(2), run(0)] == [6, 6] and not target.exists()
    assert run(2) == 0 and not target.exists()
    assert run(1) == 6 and target.read_bytes() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.job"]
    assert run(0) == 0 and target.read_bytes() == text


def test_torchrun_gives_the_same_lines(done, tmp_path):
    source, text = done
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    out = subprocess.run(
        [*torchrun, *command(source, tmp_path / "out.jsonl")[2:]], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.job"]


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_the_same_lines(done, tmp_path):
    source, text = done
    out = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "ray_batch.py"), "demo", str(source), str(tmp_path / "out.jsonl"),
         "--batch-size", "8", "--block-length", "8"],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    assert (tmp_path / "out.jsonl").read_bytes() == text
