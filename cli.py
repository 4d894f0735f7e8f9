"""The command line: words into a config, a user's mistake into one sentence and exit code 2.

A program calls `run` above its heavy imports. `parse` is the way from words to a config, in order:
pick the preset, refuse words that make no sense, and let tyro make a config of the others by the
rules of flags.py. The words are checked here and not by tyro, whose messages are framed boxes; what
is left for tyro to find is a config that refuses its values.
"""

import contextlib
import difflib
import importlib
import inspect
import io
import os
import re
import signal
import sys
import textwrap
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import tyro

from errors import UserError
from flags import RULES, Flag, flags_of

Config = TypeVar("Config")

HELP_WORDS = {"-h", "--help"}

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a program that Ctrl+C has ended."""

CALLBACK_IS_OVER = 0.02
"""Seconds after which a callback of the garbage collector has ended."""

MARKERS = (
    tyro.conf.FlagConversionOff,  # --bias=False, not --no-bias
    tyro.conf.OmitArgPrefixes,  # --n_layer, not --model.n_layer
    tyro.conf.PositionalMetavarFromFieldName,
)
"""How tyro writes flags."""


@dataclass(frozen=True)
class Preset(Generic[Config]):
    """A config with a name, to start from."""

    description: str
    """One line for --help: what it does, how large it is, how long it takes."""
    config: Config
    """The values that flags then change."""


@dataclass
class GivenFlag:
    """A flag among the words of a command line."""

    place: int
    """Index of the word that names it."""
    flag: Flag
    """What it sets."""
    values: list[str]
    """The words of its value."""


def run(
    program: str, config_class: type[Config], presets: dict[str, Preset[Config]] | None = None
) -> NoReturn:
    """Run a program: read its flags, then call main(config) of the module `program`, and exit.

    A program calls this above its imports, so that --help and a mistyped flag are answered at
    once: JAX loads only when the flags are right. main returns the exit code, None for 0."""
    config = parse(config_class, presets)
    with interrupt_is_quiet(), user_errors():
        sys.exit(load_program(program).main(config))


def load_program(name: str) -> types.ModuleType:
    """Return the module of a program; fail if a package that it needs is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        fail(f"it needs {error.name}, which is not installed: pip install -r requirements.txt")


def parse_command(
    commands: dict[str, tuple[type[Config], dict[str, Preset[Config]] | None]],
) -> Config:
    """Read the command line `COMMAND ...`; a command has a config class and, perhaps, presets."""
    words = sys.argv[1:]
    if not words or words[0] not in commands:
        if HELP_WORDS & set(words):
            print_commands(commands)
            sys.exit(0)
        if words and not words[0].startswith("-"):
            fail(f"there is no command {words[0]!r}: the commands are {', '.join(commands)}")
        fail(f"name a command first: {', '.join(commands)}")
    config_class, presets = commands[words[0]]
    return parse(config_class, presets, words[1:], command=words[0])


def print_commands(commands: dict[str, tuple]) -> None:
    """Print the help of a program with commands: a line for each."""
    program = program_name()
    print(f"usage: {program} COMMAND [--key=value ...]\n")
    width = max(len(name) for name in commands)
    for name, (config_class, _) in commands.items():
        summary = config_class.__doc__.splitlines()[0]
        print(hanging(f"{name:{width}}  {summary}", indent=width + 2))
    print(f"\n{program} COMMAND --help lists the flags of a command.")


def parse(
    config_class: type[Config],
    presets: dict[str, Preset[Config]] | None = None,
    argv: list[str] | None = None,
    command: str = "",
) -> Config:
    """Read the command line `[PRESET] --key=value ...` as a config_class.

    Where there are presets, one must be named, first or as --preset=NAME. A mistake prints one
    sentence to stderr and exits with code 2; --help prints every flag and exits with 0."""
    words = sys.argv[1:] if argv is None else argv
    asks_help = bool(HELP_WORDS & set(words))
    default = None
    if presets:
        name, words = pick_preset(words, presets)
        if name is not None:
            default = presets[name].config
        elif not asks_help:
            fail(f"name a preset first, one of {', '.join(presets)}")
    flags = flags_of(config_class)
    if not asks_help:
        check_names(words, flags)
        given, plain = split_words(words, flags)
        check_values(given)
        check_complete(given, plain, flags)
        words = complete_booleans(words, given)
    usage = " ".join(filter(None, [program_name(), command, "PRESET" if presets else ""]))
    with closed_pipe_is_quiet():
        return call_tyro(
            config_class,
            words,
            default=default,
            usage=usage,
            description=help_text(config_class, presets, usage),
        )


def pick_preset(
    words: list[str], presets: dict[str, Preset[Config]]
) -> tuple[str | None, list[str]]:
    """Split the words into the name of a preset, None if there is none, and the rest."""
    rest = list(words)
    assignments = [word for word in rest if word.startswith("--preset=")]
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
    elif assignments:
        name = assignments[0].removeprefix("--preset=")
        rest.remove(assignments[0])
    elif "--preset" in rest[:-1]:
        place = rest.index("--preset")
        name = rest[place + 1]
        del rest[place : place + 2]
    else:
        return None, rest
    if name not in presets:
        fail(f"there is no preset {name!r}: the presets are {', '.join(presets)}")
    return name, rest


def flag_name(word: str) -> str | None:
    """Return the field that a word such as --n_layer=3 or --n-layer sets; None if it is no flag.

    A negative number is none."""
    match = re.match(r"--?([a-zA-Z][^=]*)", word)
    return match[1].replace("-", "_") if match else None


def check_names(words: list[str], flags: dict[str, Flag]) -> None:
    """End the program with a sentence if a word names a flag that does not exist."""
    for word in words:
        name = flag_name(word)
        if name is None or (name in flags and word.startswith("--")):
            continue
        near = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
        advice = f"; did you mean --{near[0]}?" if near else " (--help lists every flag)"
        fail(f"there is no flag {word.partition('=')[0]}{advice}")


def split_words(words: list[str], flags: dict[str, Flag]) -> tuple[list[GivenFlag], list[str]]:
    """Return the flags with the words of their values, and the words that belong to none."""
    given: list[GivenFlag] = []
    plain = []
    for place, word in enumerate(words):
        name = flag_name(word)
        if name is not None:
            _, equals, value = word.partition("=")
            given.append(GivenFlag(place, flags[name], [value] if equals else []))
        elif given and len(given[-1].values) < given[-1].flag.most_values:
            given[-1].values.append(word)
        else:
            plain.append(word)
    return given, plain


def check_values(given: list[GivenFlag]) -> None:
    """End the program with a sentence if a flag has too few values, or one that means nothing."""
    for each in given:
        flag = each.flag
        if len(each.values) < flag.least_values:
            count = "a value" if flag.least_values == 1 else f"{flag.least_values} values"
            fail(f"--{flag.name} needs {count}: {flag.usage}")
        try:
            if each.values:
                flag.read(each.values)
        except UserError as error:
            fail(f"--{flag.name}: {error}")


def check_complete(given: list[GivenFlag], plain: list[str], flags: dict[str, Flag]) -> None:
    """End the program with a sentence if what has no default is missing, or a word too many."""
    names = [each.flag.name for each in given]
    positional = [flag for flag in flags.values() if flag.positional]
    for flag in flags.values():
        if flag.required and not flag.positional and flag.name not in names:
            fail(f"--{flag.name} is missing: {flag.usage} (--help lists every flag)")
    for flag in positional[len(plain) :]:
        fail(f"{flag.name.upper()} is missing: {flag.meaning}")
    for word in plain[len(positional) :]:
        fail(f"{word!r} is out of place: a flag is written --key=value")


def complete_booleans(words: list[str], given: list[GivenFlag]) -> list[str]:
    """Return the words with =True added to the boolean flags that stand alone."""
    completed = list(words)
    for each in given:
        if each.flag.kind is bool and not each.values:
            completed[each.place] += "=True"
    return completed


def call_tyro(
    config_class: type[Config],
    words: list[str],
    default: Config | None,
    usage: str,
    description: str,
) -> Config:
    """Let tyro make a config of the words, or print its help; a mistake is one sentence."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            config = tyro.cli(
                config_class,
                args=words,
                default=default,
                prog=usage,
                description=description,
                use_underscores=True,
                config=MARKERS,
                registry=RULES,
            )
    except SystemExit as end:
        if not end.code:
            raise  # --help was answered
        mistake = user_error_behind(end)
        fail(str(mistake) if mistake else sentence_of(box.getvalue()))
    assert isinstance(config, config_class), f"tyro made {config!r}"
    return config


def user_error_behind(error: BaseException) -> UserError | None:
    """Return the UserError of a config's check, for which tyro gave up; None if it was not one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    return cause


def sentence_of(box: str) -> str:
    """Return the words of tyro's framed message in one line, for a mistake not foreseen here."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", box).split())


def help_text(config_class: type, presets: dict[str, Preset] | None, usage: str) -> str:
    """Return what --help says above the flags."""
    docstring = inspect.getdoc(config_class) or ""
    paragraphs = [hanging(paragraph) for paragraph in docstring.split("\n\n")]
    if presets:
        width = max(len(name) for name in presets)
        lines = [
            hanging(f"  {name:{width}}  {preset.description}", indent=width + 4)
            for name, preset in presets.items()
        ]
        paragraphs.append("\n".join(["PRESET is one of:", *lines]))
        paragraphs.append(f"{usage} --help shows the values of a preset.")
    paragraphs.append("A flag is --key=value or --key value; a {True,False} flag alone is True.")
    return "\n\n".join(paragraphs)


def hanging(text: str, indent: int = 0) -> str:
    """Return the text in lines of at most 79 columns, all but the first indented."""
    return textwrap.fill(text, width=79, subsequent_indent=" " * indent)


def program_name() -> str:
    """Return the name of the file that was run, such as train.py."""
    return Path(sys.argv[0]).name


def fail(sentence: str) -> NoReturn:
    """End the program: one sentence on stderr, exit code 2."""
    print(f"{program_name()}: {sentence}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Inside, a user's mistake ends the program with `fail`; a bug keeps its traceback.

    A mistake is a UserError, or what the system says of a file that it names. Any other ValueError
    or OSError is a bug, which a sentence would hide."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        is_missing = isinstance(error, FileNotFoundError)
        fail(
            f"there is no file {error.filename}"
            if is_missing
            else f"{error.filename}: {error.strerror}"
        )


@contextlib.contextmanager
def interrupt_is_quiet() -> Iterator[None]:
    """Inside, Ctrl+C ends the program with one line, and the exit code that shells have for it."""
    hook = sys.unraisablehook
    try:
        sys.unraisablehook = interrupt_again
        yield
    except KeyboardInterrupt:
        print(f"{program_name()}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        sys.unraisablehook = hook


def interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send a Ctrl+C again that came where nobody can catch it; print any other such exception.

    In a callback of the garbage collector or of a weak reference Python prints an exception and
    goes on. JAX has such a callback, which is called a hundred times while a model loads."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(CALLBACK_IS_OVER, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


@contextlib.contextmanager
def closed_pipe_is_quiet() -> Iterator[None]:
    """Inside, the program ends without a traceback if nobody reads on, as in `--help | head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # Python flushes stdout once more as it exits
        sys.exit(1)
