# SPDX-License-Identifier: Apache-2.0
"""What is particular to a GPU: graphs, streams, waits, whole decodings. The ops themselves: `pytest tests --device cuda`.

Every test runs on the CPU as well, where it shows that the test is right.
"""

import contextlib
import re
import warnings
from pathlib import Path

import pytest
import torch

import dlmkernels as dk
from dlmkernels import _C, ops
from dlmkernels.demo import MODEL_DIR
from dlmkernels.demo.tasks import TASKS
from small_models import MASK

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[needs_gpu, pytest.mark.gpu])]
# One operand wide enough that a kernel that did not wait for its stream would read it before it is written.
SLOW = 200_000_000  # cycles


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


class Canvas:
    """Static buffers of one denoising step: logits in, tokens committed in place."""

    B, W, V = 3, 20, 1003

    def __init__(self, device):
        B, W = self.B, self.W
        self.logits = torch.zeros(B * W, self.V, device=device, dtype=torch.bfloat16)
        self.tokens = torch.full((B, W), MASK, device=device)
        self.state = torch.full((B, W), ops.STATE_OPEN, dtype=torch.uint8, device=device)
        self.position = torch.arange(W, dtype=torch.int32, device=device).repeat(B, 1)
        self.step = torch.zeros(B, dtype=torch.int32, device=device)
        self.commit_step = torch.full((B, W), -1, dtype=torch.int32, device=device)
        self.seed = torch.arange(B, device=device)
        self.temperature = torch.full((1,), 0.8, device=device)
        self.threshold = torch.full((1,), 0.08, device=device)
        self.one = torch.ones(1, dtype=torch.int32, device=device)

    def denoise(self):
        """Statistics, selection, commit: three ops, no value read on the host."""
        shape = self.tokens.shape
        stats = ops.token_confidence(
            self.logits, temperature=self.temperature, seed=self.seed, step=self.step, position=self.position.flatten()
        )
        open_ = self.state == ops.STATE_OPEN
        chosen, _ = ops.select_tokens(
            stats.confidence.view(shape), open_, "threshold", parameter=self.threshold, need=self.one
        )
        return ops.remask_(
            self.tokens, self.state, self.position, stats.token.view(shape), commit=chosen, mask_token_id=MASK,
            vocab_size=self.V, confidence=stats.confidence.view(shape), commit_step=self.commit_step, step=self.step,
        )  # fmt: skip

    def fill(self, seed):
        values = 3 * torch.randn(self.logits.shape, generator=torch.Generator().manual_seed(seed))
        self.logits.copy_(values)

    def restart(self):
        self.tokens.fill_(MASK)
        self.state.fill_(ops.STATE_OPEN)
        self.commit_step.fill_(-1)
        self.step.zero_()


def demo():
    """The shipped model in float32, and two puzzles."""
    problems = TASKS["sudoku"].make(2, seed=0)
    return dk.load(MODEL_DIR, dtype=torch.float32), torch.stack([torch.from_numpy(p.ids) for p in problems])


def replayable(function, device):
    """`function` captured in a CUDA graph; on the CPU itself."""
    if device == "cpu":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def test_a_step_in_a_graph(device):
    """Statistics, selection and commit, captured once and replayed on new logits, do what they do when called."""
    captured, called = Canvas(device), Canvas("cpu")
    replay = replayable(captured.denoise, device)
    captured.restart()
    for seed in range(6):
        for canvas in (captured, called):
            canvas.fill(seed)
        replay()
        called.denoise()
        for name in ("tokens", "state", "commit_step", "step"):
            assert torch.equal(getattr(captured, name).cpu(), getattr(called, name)), f"{name} after step {seed}"
    assert 0 < (called.tokens != MASK).sum() < called.tokens.numel()


@pytest.mark.parametrize("filters", [{}, {"top_k": 20}])
def test_the_fused_head_in_a_graph(device, filters):
    """The head's launches and its workspace, captured once and replayed on other hidden states."""
    generator = torch.Generator().manual_seed(3)

    def whole_numbers(*shape):  # their products are the same in every order of addition
        return torch.randint(-2, 3, shape, generator=generator).bfloat16()

    rows = 150  # more than one tile
    arguments = dict(temperature=torch.full((1,), 0.7), seed=torch.arange(rows), position=torch.arange(rows).int())
    arguments |= {name: torch.tensor([value], dtype=torch.int32) for name, value in filters.items()}
    weight, hidden, out = whole_numbers(3001, 40), torch.zeros(rows, 40, dtype=torch.bfloat16, device=device), []
    there = {name: value.to(device) for name, value in arguments.items()}
    weight_there = weight.to(device)
    replay = replayable(lambda: out.append(ops.lm_head_confidence(hidden, weight_there, **there)), device)
    for _ in range(3):
        states = whole_numbers(rows, 40)
        hidden.copy_(states)
        replay()
        expected = ops.lm_head_confidence(states, weight, **arguments)
        assert torch.equal(out[-1].token.cpu(), expected.token) and torch.equal(out[-1].argmax.cpu(), expected.argmax)


def test_ops_run_on_the_current_stream(device):
    """Each op's input is written late on the stream that is current; an op on any other stream would read zeros."""
    logits = torch.randn(64, 5000)
    expected = ops.token_confidence(logits).argmax
    late = torch.zeros(64, 5000, device=device)
    with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext():
        if device == "cuda":
            torch.cuda._sleep(SLOW)
        late.copy_(logits, non_blocking=True)
        token = ops.token_confidence(late).argmax
        chosen, _ = ops.select_tokens(token.view(8, 8).float(), token.view(8, 8) >= 0, "all")
        assert chosen.all().item()
    assert torch.equal(token.cpu(), expected)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_decoding_is_that_of_the_cpu(device, cache):
    """The shipped model in float32: tokens, order and counts, for a ragged batch."""
    model, ids = demo()
    options = {"rule": dk.Threshold(0.9), "cache": cache, "block_length": 27}
    cpu = dk.infill(model, ids, **options)
    out = dk.infill(model.to(device), ids.to(device), **options)
    assert torch.equal(out.sequences.cpu(), cpu.sequences)
    assert torch.equal(out.commit_step.cpu(), cpu.commit_step)


def test_no_wait_in_the_step_loop(device):
    """Twice the steps, not one wait for the device more."""
    model, ids = (x.to(device) for x in demo())

    def waits(steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                dk.infill(model, ids, steps=steps)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in caught)

    waits(4)
    assert waits(16) == waits(8)


@pytest.fixture
def other_device():
    """A device that is not the current one; where there is no second card the test is run on the CPU."""
    return "cuda:1" if torch.cuda.device_count() > 1 else "cpu"


class TestOtherDevice:
    """The ops and the loops go by the device of their tensors, never by the current one."""

    def test_ops(self, other_device):
        here, there = Canvas("cpu"), Canvas(other_device)
        for seed in range(3):
            for canvas in (here, there):
                canvas.fill(seed)
                canvas.denoise()
        for name in ("tokens", "state", "commit_step", "step"):
            moved = getattr(there, name)
            assert moved.device == torch.device(other_device) and torch.equal(moved.cpu(), getattr(here, name)), name
        if other_device != "cpu":
            assert torch.cuda.current_device() == 0

    def test_decoding(self, other_device):
        """A count that was recorded on the current device would be read before it is there."""
        model, ids = demo()
        expected = dk.infill(model, ids, rule=dk.Threshold(0.9), cache="dual", block_length=27)
        out = dk.infill(
            model.to(other_device), ids.to(other_device), rule=dk.Threshold(0.9), cache="dual", block_length=27
        )
        assert torch.equal(out.sequences.cpu(), expected.sequences)
        assert torch.equal(out.commit_step.cpu(), expected.commit_step)


BINDINGS = sorted((Path(__file__).resolve().parents[1] / "csrc" / "torch").glob("*.cpp"))
LAUNCH = re.compile(r"cuda::run_\w+\(")


@pytest.mark.on_cpu
@pytest.mark.parametrize("path", [p for p in BINDINGS if LAUNCH.search(p.read_text())], ids=lambda p: p.stem)
def test_launches_go_by_the_tensors_device(path):
    """Every kernel is started within a `CudaCall` of the tensor that all others share a device with.

    It makes that device the current one and looks up its stream; workspaces are allocated after it.
    """
    code = {path: re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8")) for path in BINDINGS}
    checked = set(re.findall(r'Check check\("\w+", "(\w+)", \1\)', "".join(code.values())))
    branches = re.findall(r"if \((\w+)\.is_cuda\(\)[^\n]*{\n(.*?)\n  }\n", code[path], re.S)
    launches = []
    for anchor, branch in branches:
        call, inside = branch.split("\n", 1)
        assert call.strip() == f"const CudaCall call(check, {anchor});"
        launches += [inside[found.end() : inside.index(";", found.end())] for found in LAUNCH.finditer(inside)]
        if anchor == "anchor":  # the argument of a function, which every caller gives such a tensor
            (name,) = re.findall(r"void (\w+)\(const Check& check, const Tensor& anchor,[^{]*{\n#ifdef", code[path])
            given = re.findall(rf"\b{name}\(check, ([^,]+), ", "".join(code.values()))
            assert given and set(given) <= checked
        else:
            assert anchor in checked
    assert launches and all(arguments.endswith("call.stream()))") for arguments in launches)
    assert len(launches) == len(LAUNCH.findall(code[path]))  # none elsewhere


@needs_gpu
@pytest.mark.gpu
class TestErrors:
    def test_head_dim(self):
        q, kv = torch.zeros(1, 4, 2, 20, device="cuda").half(), torch.zeros(1, 8, 2, 20, device="cuda").half()
        with pytest.raises(
            RuntimeError, match=r"q must have a head dimension that is a multiple of 8 and at most \d+; got 20"
        ):
            ops.block_attention(
                q, None, None, kv, kv.clone(), kv_range=torch.tensor([[0, 8]], dtype=torch.int32).cuda()
            )

    def test_mixed_devices(self):
        with pytest.raises(RuntimeError, match="bias must be on the device of logits"):
            ops.token_confidence(torch.zeros(2, 8, device="cuda"), bias=torch.zeros(8))


@needs_gpu
@pytest.mark.gpu
def test_the_build_serves_this_gpu():
    major, _ = torch.cuda.get_device_capability()
    architectures = _C.build_info()["cuda_architectures"]
    assert f"{major}." in architectures or "+PTX" in architectures
