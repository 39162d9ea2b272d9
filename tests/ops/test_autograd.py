# SPDX-License-Identifier: Apache-2.0
"""What autograd learns from the ops: that they have no derivative, and what they write."""

import pytest
import torch

import op_calls
from dlmkernels import ops

FLOAT_RESULTS = [
    "block_attention",
    "token_confidence",
    "remask_",
    "splice_",
    "soft_embedding",
    "top_candidates",
    "lm_head_confidence",
    "lm_head_candidates",
    "shard_confidence",  # in integers
]
GRADIENTS = [
    (op, name)
    for op, call in op_calls.CALLS.items()
    for name, value in op_calls.tensors(call()).items()
    if value.is_floating_point()
]


def directly(op, call):
    """Through torch.ops, past dlmkernels.ops."""
    return op_calls.registered(op)(**call)


def through_ops(op, call):
    return getattr(ops, op)(**call)


@pytest.mark.parametrize("call_of", [directly, through_ops])
@pytest.mark.parametrize("op", op_calls.CALLS)
class TestVersions:
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
    def test_what_is_written_has_a_new_version_and_nothing_else(self, op, call_of, mode):
        call = op_calls.CALLS[op]()
        before = {name: value._version for name, value in op_calls.tensors(call).items()}
        with mode():
            call_of(op, call)
        grown = {name for name, value in op_calls.tensors(call).items() if value._version > before[name]}
        assert grown == set(op_calls.written(op)) & set(call)

    def test_a_base_learns_of_its_view(self, op, call_of):
        call = op_calls.CALLS[op]()
        bases = {}
        for name in set(op_calls.written(op)) & set(call):
            bases[name] = call[name].clone().unsqueeze(0)
            call[name] = bases[name][0]
        before = {name: base._version for name, base in bases.items()}
        call_of(op, call)
        assert all(base._version > before[name] for name, base in bases.items())

    def test_inference_tensors_have_no_version(self, op, call_of):
        """They can be written outside of inference mode, too: there is nothing that autograd could have saved."""
        call = op_calls.CALLS[op]()
        expected, _ = op_calls.run(op, op_calls.cloned(call))
        with torch.inference_mode():
            call = op_calls.cloned(call)
        result = call_of(op, call)
        result = result if isinstance(result, tuple) else (result,)
        assert all(torch.equal(a, b) for a, b in zip(result, expected))


def test_nothing_written_is_no_new_version():
    call = op_calls.block_attention() | {"k_new": None, "v_new": None, "k_slots": None, "visible": None}
    ops.block_attention(**call)
    assert call["k_cache"]._version == call["v_cache"]._version == 0


@pytest.mark.parametrize("call_of", [directly, through_ops])
def test_a_saved_tensor_that_was_overwritten_is_an_error(call_of):
    w = torch.ones(1, 4, 1, 8, requires_grad=True)
    k, v, new = (torch.randn(1, n, 1, 8) for n in (4, 4, 2))
    loss = (k * w).sum()
    call_of("block_attention", {"q": new, "k_new": new, "v_new": new, "k_cache": k, "v_cache": v})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("call_of", [directly, through_ops])
@pytest.mark.parametrize(("op", "name"), GRADIENTS)
class TestGradients:
    @pytest.mark.parametrize("leaf", [True, False])
    def test_no_gradient_without_an_error(self, op, name, call_of, leaf):
        """An op with results of floating point refuses; results that are integers can have no gradient."""
        call = op_calls.CALLS[op]()
        call[name] = call[name].requires_grad_() if leaf else call[name].requires_grad_() * 1
        before = {other: (value.detach().clone(), value._version) for other, value in op_calls.tensors(call).items()}
        if op not in FLOAT_RESULTS:
            assert not any(result.requires_grad for result in call_of(op, call))
            return
        with pytest.raises(RuntimeError, match=f"^{op}: the op is not differentiable, but {name} requires a gradient"):
            call_of(op, call)
        for other, value in op_calls.tensors(call).items():
            assert torch.equal(value, before[other][0]) and value._version == before[other][1]

    def test_detached_and_without_gradients(self, op, name, call_of):
        call = op_calls.CALLS[op]()
        expected, _ = op_calls.run(op, op_calls.cloned(call))
        for mode, value in ((torch.enable_grad, call[name].clone()), (torch.no_grad, call[name].requires_grad_())):
            fresh = op_calls.cloned(call) | {name: value.detach() if mode is torch.enable_grad else value}
            with mode():
                result = call_of(op, fresh)
            result = result if isinstance(result, tuple) else (result,)
            assert all(torch.equal(a, b) for a, b in zip(result, expected))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_gradient_through_a_compiled_graph(backend):
    logits, weight = torch.randn(2, 9), torch.randn(9, 4, requires_grad=True)
    embed = torch.compile(lambda z, e: ops.soft_embedding(z, e).sum(), fullgraph=True, backend=backend)
    with pytest.raises(RuntimeError, match="soft_embedding: the op is not differentiable, but weight"):
        embed(logits, weight).backward()
    with torch.no_grad():
        assert embed(logits, weight).isfinite()
