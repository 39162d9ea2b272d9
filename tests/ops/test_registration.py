# SPDX-License-Identifier: Apache-2.0
"""Every op declared in csrc/torch/ops.cpp is complete: kernel, fake, documented function, reference."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from dlmkernels import ops, reference

SOURCE = (Path(__file__).resolve().parents[2] / "csrc/torch/ops.cpp").read_text(encoding="utf-8")


def declared():
    """Schema texts by op name; C++ joins adjacent string literals, and so does this."""
    schemas = {}
    for literals in re.findall(r'DLM_DEF\(\s*m,((?:\s*"(?:[^"\\]|\\.)*")+)', SOURCE):
        text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', literals)).replace('\\"', '"')
        schemas[text.split("(")[0]] = text
    return schemas


SCHEMAS = declared()


def registered(op):
    return getattr(torch.ops.dlmkernels, op).default


def test_all_declarations_are_read():
    assert len(SCHEMAS) == SOURCE.count("DLM_DEF(") >= 4


@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_every_op_has_a_kernel_on_every_device(key):
    """CUDA's are not in every build: what is registered there is read from the source."""
    (block,) = re.findall(rf"DLM_LIBRARY_IMPL\(TORCH_EXTENSION_NAME, {key}, m\) {{(.*?)^}}", SOURCE, re.S | re.M)
    assert re.findall(r'm\.impl\("(\w+)"', block) == list(SCHEMAS)


def test_nothing_else_is_registered():
    names = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("dlmkernels::")}
    assert names == set(SCHEMAS)


@pytest.mark.parametrize("op", SCHEMAS)
class TestOp:
    def test_schema_is_the_declared_one(self, op):
        assert str(registered(op)._schema) == str(torch._C.parse_schema(f"dlmkernels::{SCHEMAS[op]}"))

    @pytest.mark.parametrize("key", ["CPU", "Meta"])
    def test_has_a_kernel_and_a_fake(self, op, key):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dlmkernels::{op}", key)

    @pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
    def test_python_arguments_are_the_schema(self, op, module):
        """Same names, same order, same defaults, keyword-only alike."""
        arguments = registered(op)._schema.arguments
        parameters = list(inspect.signature(getattr(module, op)).parameters.values())
        assert [p.name for p in parameters] == [a.name for a in arguments]
        for parameter, argument in zip(parameters, arguments):
            assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only, argument.name
            assert (parameter.default is not parameter.empty) == argument.has_default_value(), argument.name
            if argument.has_default_value():
                default = parameter.default
                assert (list(default) if isinstance(default, tuple) else default) == argument.default_value, (
                    argument.name
                )

    def test_is_documented(self, op):
        text = inspect.getdoc(getattr(ops, op))
        for section in ("Parameters", "Returns", "Raises"):
            assert re.search(rf"^{section}\n-+$", text, re.M), f"ops.{op} has no section {section}"
        for argument in registered(op)._schema.arguments:
            assert re.search(rf"\b{argument.name}\b", text), f"ops.{op} does not explain {argument.name}"
        assert inspect.getdoc(getattr(reference, op))

    def test_outputs_are_named(self, op):
        """Several outputs come as a named tuple with the schema's names."""
        returns = registered(op)._schema.returns
        if len(returns) > 1:
            result = inspect.signature(getattr(ops, op)).return_annotation
            assert list(result._fields) == [r.name for r in returns]
