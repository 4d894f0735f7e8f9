"""Our numbers against those of lm-evaluation-harness's own `hf` model on the same weights."""

import json
from functools import lru_cache, partial
from pathlib import Path

import jax.numpy as jnp
import lm_eval
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import eval_harness
import model_runner
from config import EvalConfig
from errors import UserError
from eval_harness import JAXNanoGPT
from evaluation.tries import Trie, arrays, pack, row_lengths
from formats import hugging_face
from kernels import cpu_kernels

pytestmark = pytest.mark.slow

EOT = "<|endoftext|>"
TEXT = (
    "the naive approach is the naive one, and the other approach is the other one; "
    "so the world goes on. "
)


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    """Give engines few and small programs: to compile those of a user takes 20 s for each model."""
    with pytest.MonkeyPatch.context() as patch:
        few = model_runner.StepSize(max_num_seqs=4, prefill_tokens=32, num_scheduler_steps=1)
        patch.setattr(model_runner, "CPU_STEP", few)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A random GPT-2 of 40 positions with a byte-level BPE of 290 tokens."""
    path = tmp_path_factory.mktemp("model")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=290, min_frequency=1, special_tokens=[EOT])
    bpe.save_model(str(path))
    end = bpe.token_to_id(EOT)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=40,
        vocab_size=290,
        initializer_range=0.3,
        bos_token_id=end,
        eos_token_id=end,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)
    hugging_face.save_json(
        path / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 40, **special},
    )
    return path


@pytest.fixture(scope="module")
def ours(directory):
    return JAXNanoGPT(init_from=str(directory))


@pytest.fixture(scope="module")
def theirs(directory):
    # Without logits_cache: lm-eval 0.4.13 takes a shared logit from the wrong place where
    # "a b" + "c" meets "a" + "b c".
    return HFLM(
        pretrained=str(directory), device="cpu", batch_size=4, dtype="float32", logits_cache=False
    )


def ask(method, args: list[tuple]) -> list:
    """Return what a model's method answers to requests with these arguments."""
    requests = [Instance(method.__name__, {}, a, i) for i, a in enumerate(args)]
    return method(requests, disable_tqdm=True)


def assert_same(actual: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    """Compare answers: greedy exactly, log-probabilities nearly."""
    actual_logprobs, actual_greedy = zip(*actual, strict=True)
    expected_logprobs, expected_greedy = zip(*expected, strict=True)
    assert actual_greedy == expected_greedy
    np.testing.assert_allclose(actual_logprobs, expected_logprobs, rtol=1e-5, atol=1e-4)


def test_loglikelihood_equals_hf(ours, theirs):
    """Catches a token that is off by one at a context's end, a context that loses the wrong end,
    and branches of a trie that see each other."""
    words = TEXT.split()
    args = [
        ("the naive", " approach"),
        ("the naive", " approach is"),
        ("the naive", " one"),
        ("the naive ", "one"),
        ("", "the"),
        ("the naive", " approach"),
        ("", TEXT[:30]),
        (TEXT * 3, " the other"),
        (TEXT * 3, " the naive one"),
        (TEXT * 3, " é世界"),
        ("a", TEXT[:60]),
        ("é", "\n\n"),
    ]
    args += [(" ".join(words[:i]), " " + word) for i in range(1, 12) for word in words[:5]]
    assert_same(ask(ours.loglikelihood, args), ask(theirs.loglikelihood, args))


def test_likeliest_and_longest_continuations(ours, theirs):
    """Catches is_greedy of one token instead of all, a limit of block_size that is off by one,
    and a continuation that is cut without a word."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 280, 60).tolist()
    context, other = tokens[:5], [7]
    likely = ours.model.generate([context, context + other], 4, temperature=0)
    pairs = [
        (None, tokens[:1], tokens[1:41]),
        (None, tokens[:20], tokens[20:60]),
        (None, context, likely[0][5:]),
        (None, context, likely[0][5:8] + other),
        (None, context, likely[1][5:]),
    ]
    pairs += [(None, other, [token]) for token in range(100)]  # more targets than places in a row
    expected = theirs._loglikelihood_tokens(pairs, True)
    assert [greedy for _, greedy in expected[:5]] == [False, False, True, False, False]
    assert_same(ours._loglikelihood_tokens(pairs, True), expected)
    for bad in ((None, tokens[:1], tokens[1:42]), (None, tokens[:1], []), (None, [], tokens[:1])):
        with pytest.raises(UserError, match="block_size=40"):
            ours._loglikelihood_tokens([bad], True)


def test_rolling_equals_hf(ours, theirs):
    """Catches a window that scores a token twice or never, at lengths around multiples of
    block_size."""
    tokens = ours.text.encode(TEXT * 4)
    texts = [ours.text.decode(tokens[:n]) for n in (1, 2, 39, 40, 41, 79, 80, 81)]
    args = [(text,) for text in [*texts, ""]]
    actual = ask(ours.loglikelihood_rolling, args)
    expected = ask(theirs.loglikelihood_rolling, args)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def test_generation_equals_hf(ours, theirs):
    """Catches a stop string that is kept or found in the context, a context that leaves no room,
    and results out of order."""
    [plain] = ask(theirs.generate_until, [("the naive", {"until": [], "max_gen_toks": 20})])
    stop = plain[6:9]  # occurs in what is generated
    args = [
        (context, {"until": until, "max_gen_toks": n})
        for until, n in ((["zzz"], 9), ([stop, "zzz"], 20), (stop, 20))
        for context in ("the naive", "so", TEXT, TEXT * 2, "one,")
    ]
    texts = ask(ours.generate_until, args)
    assert texts == ask(theirs.generate_until, args)
    stopped = texts[5]
    assert plain.startswith(stopped) and len(stopped) < len(plain)
    assert stop not in stopped


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"temperature": 0.0}, {"do_sample": False, "temperature": 0.0}]
)
def test_greedy_however_it_is_asked_for(ours, how):
    """Catches a temperature that is taken for an option nobody knows where nothing is sampled:
    many tasks of lm-eval give both."""
    short = {"max_gen_toks": 4}
    greedy = ask(ours.generate_until, [("the naive", short)])
    assert ask(ours.generate_until, [("the naive", short | how)]) == greedy


def test_generation_that_cannot_be_had(ours):
    """Catches options of a task that are ignored, and a context that is lost whole."""
    for kwargs, word in (
        ({"max_gen_toks": 40}, "block_size=40"),
        ({"num_beams": 4, "max_gen_toks": 4}, "num_beams"),
    ):
        with pytest.raises(UserError, match=word):
            ask(ours.generate_until, [("so", kwargs)])


def test_sampling_follows_the_seed_and_the_temperature(ours):
    """Catches do_sample that is ignored, and repeats of one request that all give the same
    sample."""
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    args = [("the naive", sampled)] * 10
    texts = ask(ours.generate_until, args)
    assert len(set(texts)) == 10
    assert texts == ask(ours.generate_until, args)
    cold = ask(ours.generate_until, [("the naive", sampled | {"temperature": 1e-4})])
    assert cold == ask(ours.generate_until, [("the naive", {"max_gen_toks": 12})])


def test_what_begins_a_document_is_as_with_hf(directory, tmp_path):
    """Catches a model that was trained with a token before each document and scored without it, in
    the middle of a text, or before an answer."""
    bpe = tokenizers.ByteLevelBPETokenizer(
        str(directory / "vocab.json"), str(directory / "merges.txt")
    )
    begin, end = "<begin>", EOT
    backend = tokenizers.Tokenizer.from_str(bpe.to_str())
    backend.add_special_tokens([begin])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, eos_token=end
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        vocab_size=300,
        initializer_range=0.3,
        bos_token_id=backend.token_to_id(begin),
        eos_token_id=backend.token_to_id(end),
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    ours = JAXNanoGPT(init_from=str(tmp_path))
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", logits_cache=False)
    args = [("one way", " goes on"), ("", "world"), ("so ", "one"), ("a" * 60, " other")]
    assert_same(ask(ours.loglikelihood, args), ask(theirs.loglikelihood, args))
    texts = [("one way or an other",), ("so on " * 30,)]
    np.testing.assert_allclose(
        ask(ours.loglikelihood_rolling, texts),
        ask(theirs.loglikelihood_rolling, texts),
        rtol=1e-5,
        atol=1e-4,
    )


def test_a_request_does_not_depend_on_its_neighbours(ours, directory):
    """Catches answers that go to the wrong request, or a pad that is seen."""
    tokens = ours.text.encode(TEXT * 2)
    pairs = [(None, tokens[:i], tokens[i : i + 5]) for i in range(1, 30, 2)]
    together = ours._loglikelihood_tokens(pairs, True)
    one_row = JAXNanoGPT(init_from=str(directory), batch_size=1)
    assert_same(one_row._loglikelihood_tokens(pairs[::-1], True)[::-1], together)
    assert_same([one_row._loglikelihood_tokens([pair], True)[0] for pair in pairs], together)
    one_row.max_length = 5  # a row shorter than the pieces of the head
    short = [(None, tokens[i : i + 2], tokens[i + 2 : i + 5]) for i in range(4)]
    assert_same(one_row._loglikelihood_tokens(short, True), ours._loglikelihood_tokens(short, True))


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=30),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_tries_hold_every_sequence(sequences, data):
    """Catches a branch that sees its sibling, a token at the wrong depth, a target that is lost,
    and a token that is computed twice in a row."""
    T, B = 12, 2
    targets = [
        data.draw(st.lists(st.integers(3, 9), min_size=1, max_size=len(s))) for s in sequences
    ]
    rows = pack(list(range(len(sequences))), sequences, targets, T)
    seen = []
    for start in range(0, len(rows), B):
        batch = rows[start : start + B]
        packed = arrays(batch, B)
        trie = Trie.create(jnp.array(packed.depth), jnp.array(packed.end), "float32")
        visible = np.asarray(trie.visible)
        assert visible.any(-1).all()
        owners = [scored.request for row in batch for scored in row.scored]
        for i, place, target in zip(owners, packed.places, packed.targets, strict=False):
            b, t = divmod(place, T)
            path = np.flatnonzero(visible[b, t])
            assert packed.depth[b][path].tolist() == list(range(len(path)))
            seen.append((i, packed.tokens[b][path].tolist(), target))
        for b, row in enumerate(batch):
            paths = [np.flatnonzero(visible[b, t]) for t in range(len(row.tokens))]
            beginnings = {tuple(packed.tokens[b][path]) for path in paths}
            assert len(beginnings) == len(paths)
    assert sorted(seen) == sorted(every_target(sequences, targets))


def every_target(sequences: list[list[int]], targets: list[list[int]]) -> list[tuple]:
    """Return (request, the tokens before a target, the target) of all that is to be scored."""
    expected = []
    for i, (sequence, own) in enumerate(zip(sequences, targets, strict=True)):
        first = len(sequence) - len(own) + 1  # tokens before the first target
        expected += [(i, sequence[: first + j], target) for j, target in enumerate(own)]
    return expected


@pytest.mark.parametrize(
    "longest, lengths",
    [(40, [40]), (512, [512]), (600, [512, 600]), (2048, [512, 1024, 2048])],
)
def test_row_lengths(longest, lengths):
    """Catches a context length that no row has, or a row longer than the context."""
    assert row_lengths(longest) == lengths


def metrics(*names: str) -> list[dict]:
    """Return what a task's YAML says of metrics that are means."""
    return [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]


KINDS: dict[str, dict] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "choices",
        "metric_list": metrics("acc", "acc_norm"),
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": metrics("exact_match"),
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    },
}


def documents() -> list[dict]:
    """Return the items of the local tasks."""
    words = TEXT.split()
    return [
        {
            "question": " ".join(words[i : i + 4]),
            "choices": [words[i + 4], words[i] + " one", "so on"],
            "gold": i % 3,
            "text": " ".join(words[i:] * 3),
        }
        for i in range(12)
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A directory with a task of each kind on local data."""
    path = tmp_path_factory.mktemp("tasks")
    data = path / "docs.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents()))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "fewshot_split": "validation",
        "metadata": {"version": 1.0},
    }
    for name, kind in KINDS.items():
        task = {"task": f"local_{name}", **common, **kind}
        (path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return path


def answers(results: dict, task: str) -> list:
    """Return a model's answers to each item of a task."""
    return [sample["filtered_resps"] for sample in results["samples"][task]]


def test_the_harness_drives_it_by_name_and_agrees_with_hf(directory, tasks):
    """Catches an adapter that only our own program can call, and any difference in a task's
    samples."""
    names = ["local_choice", "local_perplexity", "local_generation"]

    def run(model: str, args: str, **more) -> dict:
        manager = TaskManager(include_path=tasks, include_defaults=False)
        return lm_eval.simple_evaluate(
            model, args, names, num_fewshot=1, task_manager=manager, bootstrap_iters=0, **more
        )

    ours = run("jax-nanogpt", f"init_from={directory}")
    theirs = run("hf", f"pretrained={directory},dtype=float32", device="cpu", batch_size=4)
    for name in names:
        for metric, value in theirs["results"][name].items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert ours["results"][name][metric] == expected
        actual, expected = answers(ours, name), answers(theirs, name)
        if name == "local_generation":
            assert actual == expected
        else:
            actual, expected = np.array(actual, float), np.array(expected, float)
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def test_program(directory, tasks, tmp_path, capsys, monkeypatch):
    """Catches a result that is printed but not written, and samples that are left out."""
    monkeypatch.setattr(eval_harness, "TaskManager", partial(TaskManager, include_defaults=False))
    out = tmp_path / "deep" / "results.json"
    eval_harness.main(
        EvalConfig(
            init_from=str(directory),
            tasks="local_choice,local_perplexity",
            include_path=tasks,
            limit=5,
            output_path=out,
        )
    )
    results = json.loads(out.read_text())
    assert len(results["samples"]["local_choice"]) == 5
    assert results["config"]["model_args"]["limit"] == 5
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("acc_norm", "word_perplexity", str(directory)))


@pytest.mark.parametrize(
    "flags, packing, largest_difference",
    [
        ({"cpu_kernels": "off"}, None, 1e-4),
        ({"weights": "int8"}, "int8", 0.5),
        ({"dtype": "bfloat16"}, "bfloat16", 0.5),
    ],
)
def test_flags_reach_the_scores(directory, ours, flags, packing, largest_difference):
    """Catches flags of a CPU that are accepted and ignored, by scores or by the engine."""
    reason = cpu_kernels.unavailable_because()
    if reason is not None:
        pytest.skip(f"no native code: {reason}")
    args = [("the naive", " approach is the naive one"), ("", TEXT[:60])]
    expected = np.array(ask(ours.loglikelihood, args), float)[:, 0]
    other = JAXNanoGPT(init_from=str(directory), **flags)
    differences = np.abs(np.array(ask(other.loglikelihood, args), float)[:, 0] - expected)
    assert 0 < differences.max() < largest_difference
    assert other.packing == packing
    assert other.engine.runner.packing == packing


def test_task_that_cannot_be_had(monkeypatch):
    """Catches a traceback where a sentence should say which data set is missing and what to do."""
    # Once for all: it reads thousands of files.
    monkeypatch.setattr(eval_harness, "TaskManager", lru_cache(TaskManager))
    for name, path, words in (
        ("hellaswag", None, ("hellaswag", "Rowan/hellaswag", "--include_path")),
        ("helaswag", None, ("helaswag", "lm_eval ls tasks")),
        ("hellaswag", Path("nowhere"), ("nowhere",)),
    ):
        with pytest.raises(UserError) as e:
            eval_harness.load_tasks([name], path)
        assert all(word in str(e.value) for word in words), e.value
