"""Flags become configs, and what cannot be is one sentence and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

import config
from bench import BENCHES
from cli import parse
from config import TRAIN_PRESETS, GPTConfig, TrainConfig

ROOT = Path(__file__).parents[1]


def test_defaults_are_gpt2():
    """Catches a default that drifts from GPT-2 124M, on which from_pretrained and the gpt2 preset rely."""
    c = GPTConfig()
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size) == (12, 12, 768, 1024, 50257)
    assert (c.head_dim, c.padded_vocab_size, c.num_params()) == (64, 50304, 124_439_808)


def test_flags_override_the_preset_and_nothing_else():
    """Catches a flag that is parsed but lost, or one that resets its neighbours to the class defaults."""
    c = parse(
        TrainConfig,
        TRAIN_PRESETS,
        ["shakespeare_char_cpu", "--n_layer=2", "--bias=True", "--out_dir=elsewhere"],
    )
    before = TRAIN_PRESETS["shakespeare_char_cpu"]
    assert (c.model.n_layer, c.model.bias, c.out_dir) == (2, True, Path("elsewhere"))
    assert (c.model.n_embd, c.batch_size, c.max_iters) == (
        before.model.n_embd,
        before.batch_size,
        before.max_iters,
    )
    assert parse(TrainConfig, TRAIN_PRESETS, ["--preset=gpt2"]) == TRAIN_PRESETS["gpt2"]


def test_a_boolean_flag_alone_is_true():
    """Catches a flag that swallows the next one, or a value that is ignored."""
    c = parse(
        TrainConfig,
        TRAIN_PRESETS,
        ["gpt2", "--remat", "--eval_only", "--tensorboard", "False", "--dry_run"],
    )
    assert (c.model.remat, c.eval_only, c.tensorboard, c.dry_run) == (True, True, False, True)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["gpt2", "--n_leyer=3"], ["--n_leyer", "--n_layer"]),
        (["gpt2", "--n_layer=three"], ["--n_layer", "three"]),
        (["gpt2", "--dtype=float64"], ["float64", "bfloat16"]),
        (["gpt2", "--vocab_size=7"], ["--vocab_size"]),
        (["gpt2", "--n_embd=100"], ["n_embd=100", "n_head=12"]),
        (["gpt2", "--dropout=1.5"], ["dropout=1.5"]),
        (["gpt2", "--batch_size=0"], ["batch_size=0"]),
        (["gpt2", "--warmup_iters=9", "--max_iters=5"], ["warmup_iters=9", "lr_decay_iters=5"]),
        (["gpt2", "--block_size=1001"], ["block_size=1001", "loss_chunks=8"]),
        (["gpt3"], ["gpt3", "shakespeare_char"]),
        ([], ["preset", "shakespeare_char"]),
    ],
)
def test_bad_flags_are_one_sentence(argv, words, capsys):
    """Catches a traceback, a silent default, or an error that does not name what is wrong and the way out."""
    with pytest.raises(SystemExit) as e:
        parse(TrainConfig, TRAIN_PRESETS, argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize("command", BENCHES)
def test_each_command_of_bench_has_flags(command, capsys):
    """Catches two parts of one config that have a flag of the same name."""
    with pytest.raises(SystemExit) as e:
        parse(*BENCHES[command], ["--help"])
    assert e.value.code == 0 and BENCHES[command][0].__doc__.split()[0] in capsys.readouterr().out


@pytest.mark.parametrize("program", ["train.py", "sample.py", "bench.py", "prepare.py"])
def test_help_needs_no_jax(program):
    """Catches a heavy import that creeps above the flags: --help must answer at once."""
    code = (
        f"import sys, runpy; sys.argv = [{program!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: sys.stderr.write('jax' if 'jax' in sys.modules else 'light')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0 and run.stderr == "light" and "usage" in run.stdout, run.stderr


def test_every_knob_of_training_says_what_it_is():
    """Catches a knob without a reason in --help (those whose name is the whole reason are listed)."""
    plain = {"weight_decay", "beta1", "beta2", "warmup_iters", "wandb_project", "wandb_run_name"}
    source = Path(config.__file__).read_text()
    for name in TrainConfig.__dataclass_fields__.keys() - plain - {"model"}:
        field = source.index(f"    {name}: ", source.index("class TrainConfig"))
        assert source[source.index("\n", field) :].lstrip().startswith('"""'), f"{name} has no help"
