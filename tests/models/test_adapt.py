# SPDX-License-Identifier: Apache-2.0
"""Adapting a model: it is never touched, threads share it, wrappers are seen through, causal ones are refused."""

import functools
import multiprocessing
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import MethodType, SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

import dlmkernels as dk
import small_models
from dlmkernels import AttentionWindow, adapt, generate
from dlmkernels.models.devices import input_device
from dlmkernels.models.twin import twin_of
from dlmkernels.models.wrappers import unwrap
from small_models import MASK, build, prompts

OPTIONS = {"max_new_tokens": 8, "block_length": 4, "steps": 4, "eos_policy": "none"}


def decoded(model, ids=None, **options):
    return generate(model, prompts(1, 6) if ids is None else ids, **(OPTIONS | options)).generated


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def wanted(model):
    return decoded(model)


class TestTheModelIsNotTouched:
    @pytest.fixture(autouse=True)
    def _same_before_and_after(self, model):
        ids = prompts(2, 9, seed=5)
        with torch.no_grad():
            self.own = lambda: model(ids).logits
            before, attention = self.own(), model.config._attn_implementation
            state = {name: dict(vars(module)) for name, module in model.named_modules()}
            self.before = before
            yield
            assert torch.equal(self.own(), before)
        assert model.config._attn_implementation == attention
        for name, module in model.named_modules():
            assert all(value is state[name][key] for key, value in vars(module).items())

    def test_by_a_decoding(self, model):
        decoded(model, cache="dual")

    def test_while_a_rule_looks(self, model):
        looked, own, before = [], self.own, self.before

        class Looking(dk.Threshold):
            def act(self, step):
                looked.append(torch.equal(own(), before))
                return super().act(step)

        decoded(model, rule=Looking(0.9), steps=None)
        assert looked and all(looked)

    def test_while_a_streamer_looks(self, model):
        looked = []
        streamer = SimpleNamespace(
            put=lambda tokens: looked.append(torch.equal(self.own(), self.before)), end=lambda: None,
            put_draft=lambda tokens: looked.append(torch.equal(self.own(), self.before)),
        )  # fmt: skip
        generate(model, prompts(1, 6), streamer=streamer, **OPTIONS)
        assert len(looked) > 4 and all(looked)

    def test_by_an_exception(self, model):
        class Failing(dk.Threshold):
            def act(self, step):
                raise KeyError("in the rule")

        with pytest.raises(KeyError, match="in the rule"):
            decoded(model, rule=Failing(0.9), steps=None)

    def test_while_threads_decode(self, model):
        with ThreadPoolExecutor(4) as pool:
            decodings = [pool.submit(decoded, model) for _ in range(12)]
            same = [torch.equal(self.own(), self.before) for _ in range(40)]
            results = [d.result() for d in decodings]
        assert all(same) and all(torch.equal(r, results[0]) for r in results)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
    def test_in_a_forked_child(self, model):
        """A child that is forked in the middle of a decoding."""
        own, before, results = self.own, self.before, []

        class Forking(dk.Threshold):
            def act(self, step):
                if not results:
                    context = multiprocessing.get_context("fork")
                    queue = context.SimpleQueue()
                    child = context.Process(target=lambda: queue.put(torch.equal(own(), before)))
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of forking a process with threads
                        child.start()
                    child.join(60)
                    results.append(child.exitcode == 0 and queue.get())
                return super().act(step)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        try:
            decoded(model, rule=Forking(0.9), steps=None)
        finally:
            torch.set_num_threads(threads)
        assert results == [True]

    def test_our_attention_alone_is_refused(self, model):
        twin = adapt(model)._twin
        with pytest.raises(RuntimeError, match="dlm_window"):
            twin(prompts(1, 4))


class TestThreads:
    """Sixteen threads, fifty decodings each, on one model and on two: the tokens of a single one."""

    OPTIONS = {"max_new_tokens": 2, "block_length": 2, "steps": 2, "eos_policy": "none"}

    @pytest.mark.parametrize("number", [1, 2])
    def test_stress(self, number):
        size = {"num_hidden_layers": 1, "hidden_size": 32, "initializer_range": 0.3}
        models = [
            hf.LlamaForCausalLM(hf.LlamaConfig(**(small_models.DECODER | size))).eval(),
            hf.BertForMaskedLM(hf.BertConfig(**(small_models.ENCODER | size))).eval(),
        ]
        threads, each = 16, 50
        ids = [prompts(1, 4 + i % 3, seed=i) for i in range(8)]
        caches = ["none", "dual"]
        singles = {
            (m, i, c): generate(models[m], ids[i], cache=caches[c], **self.OPTIONS).sequences
            for m in range(number) for i in range(len(ids)) for c in range(2)
        }  # fmt: skip
        assert len({tuple(tokens[0, -2:].tolist()) for tokens in singles.values()}) > 4

        def run(thread):
            wrong = 0
            for n in range(each):
                key = ((thread + n) % number, (3 * thread + n) % len(ids), n % 2)
                out = generate(models[key[0]], ids[key[1]], cache=caches[key[2]], **self.OPTIONS)
                wrong += not torch.equal(out.sequences, singles[key])
            return wrong

        with ThreadPoolExecutor(threads) as pool:
            assert sum(pool.map(run, range(threads))) == 0

    def test_one_adapted_model_for_all(self, model, wanted):
        adapted = adapt(model)
        with ThreadPoolExecutor(8) as pool:
            assert all(torch.equal(out, wanted) for out in pool.map(lambda _: decoded(adapted), range(40)))


class TestTwin:
    def test_shares_what_is_of_the_model(self, model):
        twin = twin_of(model, "dlmkernels")
        for (name, a), (_, b) in zip(model.named_modules(), twin.named_modules()):
            assert type(a) is type(b) and a is not b, name
            for kept in ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
                assert getattr(a, kept) is getattr(b, kept), name
        layer = twin.model.layers[0].self_attn
        assert layer.config is twin.config and twin.config._attn_implementation == "dlmkernels"

    def test_configurations_of_parts(self):
        config = hf.LlavaConfig(
            text_config=hf.LlamaConfig(**small_models.DECODER),
            vision_config=hf.CLIPVisionConfig(
                hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                patch_size=4,
            ),
        )  # fmt: skip
        twin = twin_of(hf.LlavaForConditionalGeneration(config), "dlmkernels")
        configs = {id(m.config): m.config for m in twin.modules() if hasattr(m, "config")}
        assert {type(c).__name__ for c in configs.values()} == {"LlavaConfig", "LlamaConfig", "CLIPVisionConfig"}
        assert {c._attn_implementation for c in configs.values()} == {"dlmkernels"}
        assert {*map(id, (twin.config, twin.config.text_config, twin.config.vision_config))} == set(configs)
        assert config._attn_implementation != "dlmkernels" != config.text_config._attn_implementation

    def test_follows_what_happens_to_the_model(self):
        model = build()
        adapted, double = adapt(model), build(seed=1).double()
        model.double()
        assert adapted._twin.lm_head.weight.dtype == torch.float64
        model.load_state_dict(double.state_dict())
        assert torch.equal(adapted._twin.lm_head.weight, double.lm_head.weight)
        calls = []
        handle = model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
        model.float()
        decoded(adapted)
        handle.remove()
        assert calls

    def test_is_in_evaluation_mode(self):
        model = build().train()
        assert not any(m.training for m in twin_of(model).modules()) and all(m.training for m in model.modules())
        with pytest.raises(ValueError, match="training mode"):
            decoded(model)

    def test_replaced_forwards(self, wanted):
        """As accelerate, compilation and patches set them: each must speak of the twin."""
        model = build()
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
        norm, last = model.model.norm, model.model.layers[1]

        def call_old(module, *args, **kwargs):
            return module._old_forward(*args, **kwargs)

        attention._old_forward = attention.forward
        attention.forward = functools.update_wrapper(functools.partial(call_old, attention), attention._old_forward)
        mlp._old_forward = mlp.forward
        mlp.forward = MethodType(call_old, mlp)

        def patched(old):
            return lambda *args, **kwargs: old(*args, **kwargs)

        last.forward = patched(last.forward)

        class Wrapper:
            def __init__(self, inner):
                self.inner = inner

            def __call__(self, *args, **kwargs):
                return self.inner(*args, **kwargs)

        norm.forward = Wrapper(norm.forward)
        assert torch.equal(decoded(model), wanted)
        twin = adapt(model)._twin
        layer = twin.model.layers[0].self_attn
        assert layer.forward.args[0] is layer and layer._old_forward.__self__ is layer
        assert layer.forward.__wrapped__.__self__ is layer
        assert twin.model.layers[1].forward.__closure__[0].cell_contents.__self__ is twin.model.layers[1]
        assert twin.model.norm.forward.inner.__self__ is twin.model.norm

    def test_a_forward_that_cannot_be_followed(self):
        model = build()
        model.model.norm.forward = len
        with pytest.raises(
            ValueError, match=r"forward method of its LlamaRMSNorm was replaced by an object of type builtin"
        ):
            decoded(model)

    def test_attention_that_was_replaced(self):
        """A layer that attends by itself would be causal, and nobody would see it."""
        model = build()

        def own(self, hidden_states, **kwargs):
            return hidden_states, None

        model.model.layers[1].self_attn.forward = MethodType(own, model.model.layers[1].self_attn)
        with pytest.raises(ValueError, match="1 of its 2 layers did not use"):
            decoded(model)

    def test_family_of_an_adapted_model(self, model):
        adapted = adapt(model)
        assert adapt(adapted, family="dream").family.name == "dream" and adapted.family.name == "masked"


class TestCompiled:
    """Compilation is not run here: what it leaves on a model is seen through."""

    @pytest.mark.parametrize("how", ["whole", "in place", "forward", "a layer", "inner"])
    def test_is_seen_through(self, how, wanted):
        model = build()
        if how == "whole":
            model = torch.compile(model)
        elif how == "in place":
            model.compile()
            model.model.layers[0].compile()
        elif how == "forward":
            model.model.layers[0].forward = torch.compile(model.model.layers[0].forward)
        elif how == "a layer":
            model.model.layers[1] = torch.compile(model.model.layers[1])
        else:
            model.model = torch.compile(model.model)
        assert torch.equal(decoded(model), wanted)
        assert torch.equal(decoded(model, cache="dual"), decoded(build(), cache="dual"))


class Low(nn.Module):
    """A low-rank adapter beside the layer that it adapts."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.enabled = base, True
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        out = self.base_layer(x)
        return out + x @ self.a.T @ self.b.T if self.enabled else out


class Adapted(nn.Module):
    """What PEFT makes of a model, as far as it can be seen from outside."""

    def __init__(self, base, peft_type="LORA", **config):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = base
        self.peft_config = {"default": SimpleNamespace(peft_type=peft_type, **config)}
        self.active_adapters = ["default"]

    def get_base_model(self):
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


class Handing(nn.Module):
    """A wrapper for parallel execution of another library."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class DistributedDataParallel(Handing):
    pass


def with_adapter(seed=3):
    model = build()
    torch.manual_seed(seed)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Low(layer.self_attn.q_proj)
    return model


WRAPPERS = {
    "compiled": torch.compile, "adapted": Adapted, "data parallel": nn.DataParallel,
    "distributed": DistributedDataParallel, "another": Handing,
}  # fmt: skip


class TestWrappers:
    @pytest.mark.parametrize("outer", WRAPPERS)
    @pytest.mark.parametrize("inner", [None, *WRAPPERS])
    def test_nested_in_any_order(self, outer, inner, model, wanted):
        wrapped = WRAPPERS[outer](WRAPPERS[inner](model) if inner else model)
        assert unwrap(wrapped) is model
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(decoded(wrapped), wanted)

    @pytest.mark.parametrize("wrap", WRAPPERS)
    def test_family_is_kept(self, wrap, model):
        adapted = adapt(WRAPPERS[wrap](model), family="dream")
        assert adapted.family.name == "dream" and adapted.reuses_kv

    def test_adapters_stay_active(self, wanted):
        model = with_adapter()
        wrapped = Adapted(model)
        active = decoded(wrapped)
        merged = build()
        with torch.no_grad():
            for layer, source in zip(merged.model.layers, model.model.layers):
                low = source.self_attn.q_proj
                layer.self_attn.q_proj.weight += low.b @ low.a
        assert torch.equal(active, decoded(merged)) and not torch.equal(active, wanted)
        held = adapt(wrapped)
        assert torch.equal(decoded(held), active)
        for layer in model.model.layers:
            layer.self_attn.q_proj.enabled = False
        assert torch.equal(decoded(wrapped), wanted)
        assert torch.equal(decoded(held), wanted)  # a model that is held follows

    @pytest.mark.parametrize(
        "config", [{"is_prompt_learning": True}, {"peft_type": "XLORA"}, {"alora_invocation_tokens": [1]}], ids=str
    )
    def test_adapters_that_act_outside(self, config, model):
        with pytest.raises(ValueError, match=r"adapter 'default' .* acts outside the layers"):
            decoded(torch.compile(Adapted(model, **config)))

    def test_a_wrapper_that_computes(self, model):
        """What it holds must not be decoded in its place."""

        class Doubling(Handing):
            def forward(self, *args, **kwargs):
                out = self.module(*args, **kwargs)
                out.logits = 2 * out.logits
                return out

        wrapped = Doubling(model)
        assert unwrap(wrapped) is wrapped

    def test_log_likelihood(self, model):
        prompt, answer = prompts(1, 5), prompts(1, 4, seed=3)
        plain = dk.log_likelihood(model, prompt, answer, num_samples=2, seed=0)
        wrapped = dk.log_likelihood(Adapted(torch.compile(model)), prompt, answer, num_samples=2, seed=0)
        assert torch.equal(plain.per_token, wrapped.per_token)


class TestPeft:
    """With the library itself, where it is installed."""

    @pytest.fixture(autouse=True)
    def peft(self):
        self.peft = pytest.importorskip("peft")

    def test_lora(self, wanted):
        config = self.peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        wrapped = self.peft.get_peft_model(build(), config).eval()
        active = decoded(wrapped)
        held = adapt(torch.compile(wrapped))
        with wrapped.disable_adapter():
            assert torch.equal(decoded(wrapped), wanted) and torch.equal(decoded(held), wanted)
        assert torch.equal(decoded(held), active) and not torch.equal(active, wanted)
        assert torch.equal(decoded(wrapped.merge_and_unload()), active)

    def test_prompt_learning(self):
        config = self.peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        with pytest.raises(ValueError, match="PROMPT_TUNING and acts outside"):
            decoded(self.peft.get_peft_model(build(), config).eval())


class Toy(nn.Module):
    """One layer of attention of an unknown class: causal, bidirectional, or none at all."""

    def __init__(self, sees="everything", vocab_size=MASK + 1):
        super().__init__()
        torch.manual_seed(0)
        self.sees, self.calls = sees, []
        self.table = nn.Embedding(vocab_size, 16)
        self.config = SimpleNamespace(vocab_size=vocab_size, mask_token_id=MASK, eos_token_id=1, pad_token_id=0)
        self.eval()

    def forward(self, input_ids, attention_mask=None):
        self.calls.append(input_ids.shape)
        x = self.table(input_ids)
        if self.sees != "itself":
            causal = self.sees == "the left"
            x = (
                x
                + nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=causal)[:, 0]
            )
        return SimpleNamespace(logits=x @ self.table.weight.T)


class TestUnknownModels:
    def test_causal_is_refused(self):
        with pytest.raises(ValueError, match=r"Toy attends causally.*dlmkernels.adapt\(model, causal=True\)"):
            decoded(Toy("the left"))
        with pytest.raises(ValueError, match="Toy attends causally"):
            dk.log_likelihood(Toy("the left"), prompts(1, 4), prompts(1, 4))
        with pytest.raises(ValueError, match="Toy attends causally"):
            adapt(torch.compile(Handing(Toy("the left"))))

    def test_stock_class_of_unknown_type(self):
        torch.manual_seed(0)
        model = hf.OPTForCausalLM(
            hf.OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                         max_position_embeddings=64, word_embed_proj_dim=32, mask_token_id=MASK)
        ).eval()  # fmt: skip
        for _ in range(2):
            with pytest.raises(ValueError, match="OPTForCausalLM attends causally"):
                decoded(model)
        model.train()
        with pytest.raises(ValueError, match="OPTForCausalLM attends causally"):
            adapt(model)
        assert model.training

    @pytest.mark.parametrize("sees", ["everything", "itself"])
    def test_others_decode(self, sees):
        model = Toy(sees)
        with pytest.warns(UserWarning, match="does not know model type 'Toy'"):
            adapted = adapt(model)
        assert len(model.calls) == 3
        assert decoded(adapted).shape == (1, 8) and not (decoded(adapted) == MASK).any()

    def test_causal_where_it_is_wanted(self):
        model = Toy("the left")
        with pytest.warns(UserWarning, match="Toy"):
            adapted = adapt(model, causal=True)
        assert not model.calls and not (decoded(adapted) == MASK).any()

    def test_bidirectional_where_it_is_known(self):
        model = Toy()
        with pytest.warns(UserWarning, match="Toy"):
            adapt(model, causal=False)
        assert not model.calls

    @pytest.mark.parametrize("sees", ["everything", "itself", "the left"])
    def test_models_of_one_length(self, sees):
        """They cannot be tried with a short text: the first canvas tells."""

        class Long(Toy):
            def forward(self, input_ids, attention_mask=None):
                if input_ids.shape[1] != 14:
                    raise IndexError("14 tokens alone")
                return super().forward(input_ids, attention_mask)

        with pytest.warns(UserWarning, match="Long"):
            adapted = adapt(Long(sees))
        if sees == "the left":
            with pytest.raises(ValueError, match="Long attends causally"):
                decoded(adapted)
            with pytest.warns(UserWarning, match="Long"):
                adapted = adapt(Long(sees), causal=True)
        assert not (decoded(adapted) == MASK).any()

    def test_option_without_an_effect(self, model):
        for given in (model, adapt(model)):
            with pytest.raises(ValueError, match="causal must be None for"):
                adapt(given, causal=True)

    def test_family_is_kept(self):
        with pytest.warns(UserWarning):
            assert adapt(Toy(), family="dream").family.name == "dream"

    def test_warning_is_given_once(self):
        model = Toy()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                decoded(model)
            dk.log_likelihood(model, prompts(1, 4), prompts(1, 4), num_samples=1)
        assert len([w for w in caught if "does not know" in str(w.message)]) == 1

    def test_known_type_of_another_class(self):
        """A type is not called known and unknown in one breath."""
        model = Toy()
        model.config.model_type = "llama"
        with pytest.warns(UserWarning) as caught:
            adapt(model)
        (text,) = {str(w.message) for w in caught}
        assert text.startswith("dlmkernels knows model type 'llama' as LlamaForCausalLM, not Toy")


class TestAutocast:
    CACHES = ("none", "prefix", "dual", "delayed")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("kind", ["llama", "qwen3", "bert"])
    def test_decodes(self, kind, cache, dtype):
        model = build(kind)
        with torch.autocast("cpu", dtype):
            out = decoded(model, cache=cache)
        assert not (out == MASK).any()
        assert torch.equal(decoded(model, cache=cache), decoded(build(kind), cache=cache))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_logits_are_those_of_the_model(self, dtype):
        """As near to float32 as the model's own forward under autocast is."""
        model, tokens, positions = build(), prompts(2, 12), torch.arange(12).expand(2, -1)
        mask = torch.zeros(2, 1, 12, 12)
        adapted = adapt(model)
        with torch.no_grad():
            gold = model(tokens, attention_mask=mask).logits
            with torch.autocast("cpu", dtype):
                own = model(tokens, attention_mask=mask.to(dtype)).logits
                cache = dk.KVCache(12)
                ours = adapted.logits(adapted.hidden(tokens, positions, AttentionWindow(cache=cache)))
        assert cache.layer(0, None, None)[0].dtype == dtype == ours.dtype
        assert (ours - gold).abs().max() <= 2 * (own - gold).abs().max()

    def test_exact_cache(self):
        with torch.autocast("cpu", torch.bfloat16):
            options = {"attention": "block", "block_length": 4}
            assert torch.equal(decoded(build(), cache="block", **options), decoded(build(), cache="none", **options))

    def test_norms_in_float32(self):
        """Queries and keys come out of such norms in another dtype than values."""
        model = build("qwen3").bfloat16()
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.forward = MethodType(lambda self, x: type(self).forward(self, x.float()).float(), norm)
        assert not (decoded(model, cache="dual") == MASK).any()

    def test_a_cache_of_another_dtype(self):
        """Autocast that begins in the middle: what is in the cache stays what it is."""
        model, tokens, positions = build(), prompts(1, 6), torch.arange(6)[None]
        adapted, cache = adapt(model), dk.KVCache(6)
        with torch.no_grad():
            adapted.hidden(tokens, positions, AttentionWindow(cache=cache))
            with torch.autocast("cpu", torch.bfloat16):
                adapted.hidden(tokens, positions, AttentionWindow(cache=cache))
        assert cache.layer(0, None, None)[0].dtype == torch.float32


class TestDevices:
    def test_window_follows_a_device_once(self):
        origin = torch.zeros(2, dtype=torch.int32)
        cache = dk.KVCache(4)
        window = AttentionWindow(kv_range=torch.stack((origin, origin + 4), 1), block_origin=origin, cache=cache)
        moved = window.to("meta", non_blocking=True)
        assert moved.kv_range.device.type == moved.block_origin.device.type == "meta" and moved.cache is cache
        assert moved.slots is None and window.kv_range.device.type == "cpu"
        assert window.to("meta") is moved and moved.to("cpu") is window and window.to("cpu") is window
        assert moved.to("meta") is moved
        moved.attended.add(3)
        assert window.attended == {3}

    def test_values_that_are_missing(self):
        model = build()
        model.model.layers[1].to("meta")
        with pytest.raises(ValueError, match=r"parameter model.layers.1.\S+ is on the device 'meta'"):
            decoded(model)

    def test_where_tokens_are_expected(self):
        model = build()
        assert input_device(model) == torch.device("cpu")
        table = model.get_input_embeddings()
        table.to("meta")
        assert input_device(model) == torch.device("meta")
        table._hf_hook = SimpleNamespace(execution_device="cpu")
        assert input_device(model) == torch.device("cpu")
        table._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(), SimpleNamespace(execution_device="cpu")])
        assert input_device(model) == torch.device("cpu")
        assert input_device(nn.Identity()) == torch.device("cpu")

    @pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch"])
    @pytest.mark.parametrize("cache", ["none", "dual"])
    def test_offloaded(self, how, cache, tmp_path):
        accelerate = pytest.importorskip("accelerate")
        model = build()
        if how == "cpu_offload":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        elif how == "disk_offload":
            accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        else:
            places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
                      "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
            model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
        assert any(p.is_meta for p in model.parameters())
        before = model(prompts(1, 5)).logits
        assert torch.equal(decoded(model, cache=cache), decoded(build(), cache=cache))
        assert torch.equal(model(prompts(1, 5)).logits, before)
        assert any(p.is_meta for p in model.parameters())
