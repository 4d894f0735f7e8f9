"""The engine on the native CPU code: against XLA, and what only this code promises.

The code itself is tested in test_cpu_kernels.py, the engine in test_engine.py.
"""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from config import CPUConfig, EngineConfig
from engine import Engine
from errors import UserError
from kernels import cpu_kernels
from model import GPT
from same_bits import compare
from sequence import Output, SamplingParams
from tiny_engine import CONFIG, GREEDY, LAYOUT, prompts_of

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

PAGE = LAYOUT.page_size
LLAMA = {
    "norm": "rmsnorm",
    "positions": "rotary",
    "mlp": "gated",
    "activation": "silu",
    "tied_head": False,
}
QWEN = {"n_head": 6, "n_kv_head": 2, "head_size": 10, "qkv_bias": True, "qk_norm": True, **LLAMA}
FEW_PROGRAMS = dataclasses.replace(LAYOUT, max_num_seqs=2, prefill_tokens=2 * PAGE)
"""A layout with few sizes of a call to compile."""
KINDS = ["float32", "bfloat16", "int8"]


@pytest.fixture(autouse=True)
def needs_native_code():
    """Skip where the native code cannot be had."""
    reason = cpu_kernels.unavailable_because()
    if reason is not None:
        pytest.skip(f"no native code: {reason}")


def model_of(kind: str, **shape) -> GPT:
    """Return the tiny model, which computes in bfloat16 if kind says so."""
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    return GPT(dataclasses.replace(CONFIG, dtype=dtype, **shape), rngs=nnx.Rngs(0))


def cpu_of(kind: str) -> CPUConfig:
    """Return how an engine of this kind stores its weights."""
    return CPUConfig(weights="int8" if kind == "int8" else None)


def engine_of(kind: str, **layout) -> Engine:
    """Return an engine of the tiny model on native code, unless layout says otherwise."""
    config = dataclasses.replace(LAYOUT, **dataclasses.asdict(cpu_of(kind)) | layout)
    return Engine(model_of(kind), None, config, progress=False)


def logprobs_of(outputs: list[list[Output]]) -> np.ndarray:
    """Return the logprobs of all new tokens, one output after the other."""
    return np.array([entry.logprob for [output] in outputs for entry in output.logprobs])


@pytest.mark.parametrize("kind, tolerance", [("float32", 1e-5), ("bfloat16", 2e-3), ("int8", 5e-3)])
def test_logprobs_are_those_of_xla(kind, tolerance):
    """Catches: weights packed for another product, a bias or an activation left out or applied
    twice, a head whose padding can be sampled."""
    prompts = prompts_of([1, 3, 4, 5, 17, 33, 2, 9])
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=5)
    few = {"max_num_seqs": 2, "prefill_tokens": 2 * PAGE}
    native = engine_of(kind, **few)
    assert (native.runner.attention, native.runner.packing) == ("cpu", kind)
    logprobs = logprobs_of(native.generate(prompts, params, progress=False))
    plain = engine_of(kind, cpu_kernels="off", weights=None, **few)
    assert (plain.runner.attention, plain.runner.packing) == ("xla", None)
    expected = logprobs_of(plain.generate(prompts, params, progress=False))
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "shape",
    [
        {"bias": False},
        {"activation": "relu"},
        {"mlp": "gated", "qkv_bias": False},
        {"bias": False, "qkv_bias": True, **LLAMA},
    ],
)
def test_other_shapes_of_a_model(shape):
    """Catches: a model without biases or with some, whose activation native code does not know, or
    applies to the wrong product, a head of its own."""
    prompts = prompts_of([7, 20])
    model = model_of("float32", **shape)
    outputs = []
    for switch in ("auto", "off"):
        layout = dataclasses.replace(FEW_PROGRAMS, cpu_kernels=switch)
        engine = Engine(model, None, layout, progress=False)
        params = dataclasses.replace(GREEDY, logprobs=1)
        outputs.append(engine.generate(prompts, params, progress=False))
    native, plain = outputs
    np.testing.assert_allclose(logprobs_of(native), logprobs_of(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(kind):
    """Catches anything but the request itself that reaches its numbers, such as whether a token
    came as prompt or was generated; see same_bits.py."""
    ways = compare(
        model_of(kind),
        24,
        max_num_seqs=4,
        page_size=PAGE,
        prefill_tokens=32,
        progress=False,
        cpu=cpu_of(kind),
    )
    for way in ways:
        assert way.must_agree
        assert way.as_it_must_be, f"{way.name}: {way.different} of 24"


def test_same_bits_of_heads_that_share_keys():
    """Catches the same in what Llama and Qwen have: angles, norms of single heads, groups."""
    model = model_of("float32", n_embd=72, **QWEN)  # 72 and 10: narrower than vectors are summed
    ways = compare(model, 16, max_num_seqs=4, page_size=PAGE, prefill_tokens=16, progress=False)
    for way in ways:
        assert way.must_agree
        assert way.as_it_must_be, f"{way.name}: {way.different} of 16"


def test_a_chat_computes_its_past_once():
    """Catches: generated tokens that the next turn of a chat computes again, more than the page
    that the answer has not filled, and other tokens for a prompt whose past was found."""
    engine = engine_of("float32")
    params = dataclasses.replace(GREEDY, max_tokens=5, ignore_eos=True)
    chat: list[int] = []
    for turn in range(10):
        chat += prompts_of([1], seed=turn)[0]
        before = engine.stats()
        [[output]] = engine.generate([chat], params, progress=False)
        computed = engine.stats().computed_tokens - before.computed_tokens
        assert computed <= 1 + PAGE, f"turn {turn} computes {computed} of {len(chat)} tokens"
        [[fresh]] = engine_of("float32").generate([chat], params, progress=False)
        assert output.token_ids == fresh.token_ids
        chat += output.token_ids
    engine.blocks.check()


def test_xla_finds_no_generated_tokens():
    """Catches: generated tokens, which have bits of their own with XLA, that serve as a prefix."""
    engine = engine_of("float32", attention="xla", max_num_seqs=2, prefill_tokens=2 * PAGE)
    assert not engine.runner.same_bits_in_any_shape
    [prompt] = prompts_of([4])
    [[output]] = engine.generate([prompt], GREEDY, progress=False)
    engine.generate([prompt + output.token_ids], GREEDY, progress=False)
    assert engine.stats().hit_tokens == PAGE


@pytest.mark.parametrize(
    "wanted, param",
    [({"weights": "int8"}, "weights"), ({"attention": "cpu"}, "attention")],
)
def test_what_needs_native_code_is_refused_without_it(wanted, param):
    """Catches: a flag that is accepted and ignored."""
    with pytest.raises(UserError, match="cpu_kernels=off") as caught:
        engine_of("float32", cpu_kernels="off", **wanted)
    assert caught.value.param == param


def test_without_a_compiler_xla_computes(monkeypatch):
    """Catches: an engine that does not start where the native code cannot be built."""
    monkeypatch.setattr(cpu_kernels, "available", lambda: "there is no C++ compiler on PATH")
    engine = engine_of("float32")
    assert (engine.runner.attention, engine.runner.packing) == ("xla", None)
    with pytest.raises(UserError, match="weights=int8 needs .* no C.. compiler") as caught:
        engine_of("int8")
    assert caught.value.param == "weights"


def test_dense_generation_on_packed_weights():
    """Catches: a packed model whose dense generation differs from the engine's."""
    engine = engine_of("int8")
    prompts = prompts_of([5, 9])
    packed = model_of("int8").for_inference(packing="int8")
    dense = packed.generate(prompts, GREEDY.max_tokens, temperature=0)
    outputs = engine.generate(prompts, GREEDY, progress=False)
    assert dense == [p + output.token_ids for p, [output] in zip(prompts, outputs, strict=True)]


def test_config_of_the_engine_names_the_cpus():
    """Catches a knob of CPUConfig that an engine's config has not."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    assert {field.name for field in dataclasses.fields(CPUConfig)} < names
