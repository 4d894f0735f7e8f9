"""Words become configs, and what cannot is one sentence and exit code 2."""

import gc
import re
import signal
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import pytest

import cli
from bench import BENCHES
from cli import parse
from config import (
    EvalConfig,
    ExportConfig,
    SampleConfig,
    TrainConfig,
)
from errors import UserError
from flags import memory_size, memory_text, value_of
from serving.config import ServeConfig
from training.prepare_config import PrepareConfig
from training.presets import TRAIN_PRESETS

ROOT = Path(__file__).parents[1]

PROGRAMS = {
    "train": (TrainConfig, TRAIN_PRESETS),
    "sample": (SampleConfig, None),
    "prepare": (PrepareConfig, None),
    "export": (ExportConfig, None),
    "eval_harness": (EvalConfig, None),
    "server": (ServeConfig, None),
}
COMMANDS = PROGRAMS | {f"bench {name}": bench for name, bench in BENCHES.items()}


def parse_as(program, *words):
    """The config that a program, or a command of bench.py, makes of the words."""
    config_class, presets = COMMANDS[program]
    return parse(config_class, presets, list(words))


def refusal_of(capsys, program, *words):
    """The sentence with which a program refuses the words."""
    with pytest.raises(SystemExit) as end:
        parse_as(program, *words)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.count("\n") == 1, err
    return err


# Words that mean something.


def test_flags_override_the_preset_and_nothing_else():
    """Catches a flag that is parsed but lost, or one that resets its neighbours to the class
    defaults."""
    before = TRAIN_PRESETS["shakespeare_char_cpu"].config
    c = parse_as(
        "train", "shakespeare_char_cpu", "--n_layer=2", "--bias=True", "--out_dir=elsewhere"
    )
    assert (c.model.n_layer, c.model.bias, c.out_dir) == (2, True, Path("elsewhere"))
    assert c.model.n_embd == before.model.n_embd
    assert (c.batch_size, c.max_iters) == (before.batch_size, before.max_iters)


@pytest.mark.parametrize("words", [["gpt2"], ["--preset=gpt2"], ["--preset", "gpt2"]])
def test_ways_to_name_a_preset(words):
    """Catches a preset that is understood in one spelling and ignored in another."""
    assert parse_as("train", *words) == TRAIN_PRESETS["gpt2"].config
    assert parse_as("train", *words, "--seed=1").seed == 1


def test_a_flag_may_be_written_in_three_ways():
    """Catches a value that is lost where the spellings are mixed."""
    c = parse_as("train", "gpt2", "--n_layer", "3", "--n-head=6", "--n_embd=96", "--seed", "0")
    assert (c.model.n_layer, c.model.n_head, c.model.n_embd, c.seed) == (3, 6, 96, 0)


def test_a_boolean_flag_alone_is_true():
    """Catches a flag that swallows the next one, or a value that is ignored."""
    c = parse_as("train", "gpt2", "--remat", "--eval_only", "--tensorboard", "false", "--dry_run")
    assert (c.model.remat, c.eval_only, c.tensorboard, c.dry_run) == (True, True, False, True)


def test_none_and_several_words():
    """Catches a None that becomes the path "None", or a list of words cut to its first."""
    assert parse_as("sample", "--init_from=gpt2", "--top_k=None").top_k is None
    assert parse_as("train", "gpt2", "--data_dir=None").data_dir is None
    c = parse_as("prepare", "text", "--input", "a.txt", "b.txt", "--tokenizer=char")
    assert (c.input, c.tokenizer) == ((Path("a.txt"), Path("b.txt")), "char")
    c = parse_as("bench generate", "--prompt_tokens", "1", "2", "--batch_sizes", "4", "--peers")
    assert (c.prompt_tokens, c.batch_sizes, c.peers) == ((1, 2), (4,), ())


@pytest.mark.parametrize(
    "kind, word, value",
    [
        (int, "-3", -3),
        (float, "1e-3", 1e-3),
        (bool, "false", False),
        (str, "None", "None"),
        (str | None, "None", None),
        (str | None, "", ""),
        (Path | None, "a", Path("a")),
        (int | None, "7", 7),
    ],
)
def test_what_a_word_means(kind, word, value):
    """Catches a union that tries its types in the wrong order."""
    assert value_of(kind, word) == value


# Memory.


@pytest.mark.parametrize(
    "text, size",
    [
        ("1073741824", 2**30),
        ("1GB", 10**9),
        ("512MB", 512 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("2 gib", 2**31),
        ("64kB", 64_000),
    ],
)
def test_memory_has_units(text, size):
    """Catches powers of 1000 and of 1024 that are taken for each other."""
    config = parse_as("server", "--out_dir=out", f"--kv_cache_memory={text}")
    assert config.engine.kv_cache_memory == size
    assert memory_size(memory_text(size)) == size


@pytest.mark.parametrize("text", ["1Gbit", "1G", "GB", "-1GB", "a lot"])
def test_a_wrong_unit_is_told_the_right_ones(text, capsys):
    """Catches a unit that is ignored, and an error that does not help."""
    err = refusal_of(capsys, "server", "--out_dir=out", f"--kv_cache_memory={text}")
    assert repr(text) in err and "512MB" in err and "1.5GiB" in err and "1073741824" in err


# Mistakes.


@pytest.mark.parametrize(
    "command, sentence",
    [
        # Flags that do not exist.
        ("train gpt2 --n_leyer=3", "there is no flag --n_leyer; did you mean --n_layer?"),
        ("train gpt2 -n_layer=3", "there is no flag -n_layer; did you mean --n_layer?"),
        ("train gpt2 --foo 3", "there is no flag --foo (--help lists every flag)"),
        ("train gpt2 --vocab_size=7", "there is no flag --vocab_size (--help"),
        ("train gpt2 --kv_cache_memory=1GB", "there is no flag --kv_cache_memory (--help"),
        ("sample --outdir=a", "there is no flag --outdir; did you mean --out_dir?"),
        ("export --too=a", "there is no flag --too; did you mean --to?"),
        # Values that are missing or of the wrong type.
        ("train gpt2 --n_layer", "--n_layer needs a value: --n_layer=INT"),
        ("train gpt2 --n_layer --bias", "--n_layer needs a value: --n_layer=INT"),
        ("train gpt2 --n_layer=three", "--n_layer: 'three' is not a whole number"),
        ("train gpt2 --n_layer=", "--n_layer: '' is not a whole number"),
        ("train gpt2 --lr_decay_iters=x", "--lr_decay_iters: 'x' is not a whole number or None"),
        ("train gpt2 --learning_rate fast", "--learning_rate: 'fast' is not a number"),
        ("train gpt2 --dtype=float64", "--dtype: 'float64' is not float32 or bfloat16"),
        ("train gpt2 --bias=yes", "--bias: 'yes' is not True or False"),
        ("train gpt2 --out_dir=", "--out_dir: '' is not a path"),
        ("server --out_dir=a --kv_cache_memory", "needs a value: --kv_cache_memory=BYTES"),
        ("eval_harness --out_dir=a --batch_size=x", "--batch_size: 'x' is not a whole number or"),
        ("bench generate --prompt_tokens 3", "needs 2 values: --prompt_tokens INT INT"),
        ("bench generate --prompt_tokens=3,4", "needs 2 values: --prompt_tokens INT INT"),
        ("bench generate --peers vlm", "--peers: 'vlm' is not dense, transformers,"),
        # Words in the wrong place.
        ("train --n_layer=3 gpt2", "name a preset first, one of pystdlib_char, shakespeare_char,"),
        ("train", "name a preset first, one of"),
        ("train gpt3", "there is no preset 'gpt3': the presets are pystdlib_char,"),
        ("train --preset=gpt3", "there is no preset 'gpt3': the presets are"),
        ("train gpt2 shakespeare_char", "'shakespeare_char' is out of place: a flag is written"),
        ("train gpt2 n_layer=3", "'n_layer=3' is out of place: a flag is written --key=value"),
        ("train gpt2 --seed 1 2", "'2' is out of place: a flag is written --key=value"),
        # What is required.
        ("export", "--to is missing: --to=PATH"),
        (
            "prepare",
            "NAME is missing: pystdlib_char, shakespeare_char, shakespeare, openwebtext, text or",
        ),
        ("prepare --tokenizer=char", "NAME is missing: pystdlib_char"),
        ("prepare --tokenizer char", "NAME is missing: pystdlib_char"),
        ("prepare text more", "'more' is out of place"),
        ("prepare wikipedia", "'wikipedia' is not pystdlib_char,"),
        ("sample", "say which model: either --out_dir=DIR or --init_from=gpt2..."),
        # What a config refuses.
        ("train gpt2 --n_embd=100", "n_embd=100 must be divisible by n_head=12"),
        ("train gpt2 --batch_size=0", "batch_size=0 must be at least 1"),
        ("train gpt2 --lr_decay_iters=0", "lr_decay_iters=0 must be at least 1"),
        ("bench train gpt2 --dropout=2", "dropout=2.0 must be in [0, 1)"),
        ("server --out_dir=a --prefill_tokens=4", "prefill_tokens=4 must be a positive multiple"),
    ],
)
def test_a_mistake_is_one_sentence(command, sentence, capsys):
    """Catches a traceback, a silent default, words of Python's or of tyro's, or an error that does
    not name what is wrong and the way out."""
    program = next(name for name in COMMANDS if command.startswith(name))
    words = command.removeprefix(program).split()
    assert sentence in refusal_of(capsys, program, *words)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "name a command first: train, compile,"),
        (["--rounds=1"], "name a command first: train, compile,"),
        (["trian"], "there is no command 'trian': the commands are train, compile,"),
    ],
)
def test_a_mistaken_command_is_one_sentence(words, sentence, capsys, monkeypatch):
    """Catches a command that is guessed, or a traceback."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.parse_command(BENCHES)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"bench.py: {sentence}")


@pytest.mark.parametrize(
    "error, sentence",
    [
        (UserError("n=3 must be even"), "n=3 must be even"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "there is no file a.txt"),
        (PermissionError(13, "Permission denied", "b"), "b: Permission denied"),
    ],
)
def test_a_mistake_while_running_is_one_sentence(error, sentence, capsys):
    """Catches a mistake that is found late and ends in a traceback."""
    with pytest.raises(SystemExit) as end, cli.user_errors():
        raise error
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f": {sentence}\n")


@pytest.mark.parametrize(
    "bug",
    [
        ZeroDivisionError(),
        ValueError("operands could not be broadcast together"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "of a file that nobody has named"),
        OSError(5, "Input/output error"),  # of no file
    ],
)
def test_a_bug_keeps_its_traceback(bug):
    """Catches a fault of the program's own that is told as if it were the user's."""
    with pytest.raises(type(bug)) as error, cli.user_errors():
        raise bug
    assert error.value is bug


# Help.


def help_of(capsys, program):
    """What --help prints, without its frame, in one line."""
    with pytest.raises(SystemExit) as end:
        parse_as(program, "--help")
    assert end.value.code == 0
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("program", COMMANDS)
def test_help_is_pleasant(program, capsys):
    """Catches two parts of a config that have a flag of the same name, a default that is told
    twice or as Python's None, and a flag without a word about it."""
    text = help_of(capsys, program)
    assert "None" not in text.replace("; None: from all", "")
    flags = re.split(r" (?=--[a-z_0-9]+ [A-Z\[{])", text.split("-h, --help")[1])[1:]
    assert flags
    for flag in flags:
        assert len(re.findall(r"\(default: |default:|\(required\)", flag)) == 1, flag
        assert len(flag.split()) > 5, flag


def test_help_of_training_describes_the_presets(capsys):
    """Catches a preset that a newcomer cannot choose, because nothing says what it does."""
    text = help_of(capsys, "train")
    for name, preset in TRAIN_PRESETS.items():
        assert f"{name} {preset.description}" in text


def test_help_shows_defaults_as_people_write_them(capsys):
    """Catches bytes that nobody can read, and what a default of None stands for."""
    text = help_of(capsys, "server")
    assert "(default: 1GiB)" in text and "(default: 32 on a CPU, 256 elsewhere)" in text
    assert "(default: a line break)" in help_of(capsys, "sample")


def test_help_of_a_preset_shows_its_values(capsys):
    """Catches a help that shows the defaults of the class where a preset is named."""
    with pytest.raises(SystemExit):
        parse_as("train", "pystdlib_char", "--help")
    assert "(default: 4000)" in capsys.readouterr().out


@pytest.mark.parametrize("program", [*PROGRAMS, "bench"])
def test_help_needs_no_jax(program):
    """Catches a heavy import that creeps above the flags: --help must answer at once."""
    code = (
        f"import sys, runpy; sys.argv = ['{program}.py', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print({'jax', 'torch', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0 and run.stderr == "set()\n", run.stderr
    assert run.stdout.startswith(f"usage: {program}.py")


def test_help_into_a_closed_pipe_is_quiet():
    """Catches the traceback of `train.py --help | head`."""
    run = subprocess.Popen(
        [sys.executable, "train.py", "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    run.stdout.close()
    assert run.stderr.read() == b""
    run.stderr.close()
    run.wait(timeout=60)


# Ctrl+C.


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, though whoever runs the tests may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_one_line(interruptible, monkeypatch, capsys):
    """Catches a traceback, or an exit code that says that all is well, when somebody ends a program
    while its model loads."""

    def load(config):
        signal.raise_signal(signal.SIGINT)

    program = types.SimpleNamespace(main=load)
    monkeypatch.setitem(sys.modules, "program", program)
    monkeypatch.setattr(sys, "argv", ["program.py", "--to=x"])
    with pytest.raises(SystemExit) as end:
        cli.run("program", ExportConfig)
    assert end.value.code == 130
    assert capsys.readouterr().err == "program.py: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupt_in_a_collection():
    """Let Ctrl+C come in a callback of the garbage collector."""

    def callback(phase, info):
        if phase == "start":
            gc.callbacks.remove(callback)
            signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(callback)
    gc.collect()


def interrupt_in_a_weak_references_end():
    """Let Ctrl+C come in the callback of a weak reference."""

    class Anything:
        pass

    thing = Anything()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    assert reference() is None


@pytest.mark.parametrize(
    "interrupt", [interrupt_in_a_collection, interrupt_in_a_weak_references_end]
)
def test_ctrl_c_where_nobody_can_catch_it(interruptible, capsys, interrupt):
    """Catches an interrupt that is raised where Python prints and forgets it: JAX has a callback of
    the garbage collector, so while a model loads every other Ctrl+C was lost."""
    with pytest.raises(SystemExit) as end, cli.interrupt_is_quiet():
        interrupt()
        threading.Event().wait(60)
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


# pip.


def test_pip_install_is_answered_by_a_sentence(monkeypatch):
    """Catches a build that puts modules named config and utils into site-packages, or a hook
    without an answer."""
    monkeypatch.syspath_prepend(ROOT / "deploy")
    import not_a_package

    for hook in ("get_requires_for_build_wheel", "build_wheel", "build_sdist", "build_editable"):
        with pytest.raises(SystemExit, match="not a package: .*pip install -r requirements.txt"):
            getattr(not_a_package, hook)("directory", config_settings={})


def test_a_package_that_is_not_installed_is_one_sentence():
    """Catches: a traceback where only a part of the requirements is installed."""
    program = (
        "import runpy, sys; sys.modules['lm_eval'] = None; "
        "sys.argv = ['eval_harness.py', '--init_from=gpt2', '--tasks=hellaswag']; "
        "runpy.run_path('eval_harness.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(
        "eval_harness.py: it needs lm_eval, which is not"
    )
    assert "Traceback" not in ended.stderr
