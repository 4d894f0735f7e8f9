"""The command line: flags into a config, a user's mistake into one sentence and exit code 2."""

import contextlib
import dataclasses
import importlib
import io
import re
import sys
from pathlib import Path
from typing import NoReturn, TypeVar, get_type_hints

import tyro

Config = TypeVar("Config")


def parse(
    config_class: type[Config],
    presets: dict[str, Config] | None = None,
    argv: list[str] | None = None,
) -> Config:
    """The command line `[PRESET] --key=value ...` as a config_class. Where presets are given, one must be named, first or as
    --preset=NAME.

    Bad input prints one sentence to stderr and exits with code 2; --help prints every knob and exits with 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    description, default = config_class.__doc__, None
    if presets:
        description += f"\n\nPRESET is one of: {', '.join(presets)}"
        named = [a for a in argv if a.startswith("--preset=")] or [
            a for a in argv[:1] if not a.startswith("-")
        ]
        if named:
            argv.remove(named[0])
            name = named[0].removeprefix("--preset=")
            if name not in presets:
                fail(f"there is no preset {name!r}; the presets are {', '.join(presets)}")
            default = presets[name]
        elif not {"-h", "--help"} & set(argv):
            fail(f"name a preset first: {', '.join(presets)}")
    flags = booleans(config_class)
    argv = [
        f"{a}=True" if a in flags and after.startswith("--") else a
        for a, after in zip(argv, [*argv[1:], "--"])
    ]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                config_class,
                args=argv,
                default=default,
                description=description,
                use_underscores=True,
                prog=Path(sys.argv[0]).name,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as e:
        if e.code:
            fail(sentence_of(errors.getvalue()))
        raise


def booleans(config_class: type) -> set[str]:
    """The flags that are True or False; alone they are True."""
    kinds = get_type_hints(config_class)
    nested = [booleans(kind) for kind in kinds.values() if dataclasses.is_dataclass(kind)]
    return {f"--{name}" for name, kind in kinds.items() if kind is bool}.union(*nested)


def parse_command(commands: dict[str, tuple[type[Config], dict[str, Config] | None]]) -> Config:
    """The command line `COMMAND ...`, where each command has a config class and, perhaps, presets."""
    name, *argv = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        lines = (
            f"  {command:10} {config_class.__doc__.splitlines()[0]}"
            for command, (config_class, _) in commands.items()
        )
        print(
            f"usage: {Path(sys.argv[0]).name} COMMAND [--key=value ...]; COMMAND --help lists its flags",
            *lines,
            sep="\n",
        )
        sys.exit(0)
    if name not in commands:
        fail(f"name a command first: {', '.join(commands)}")
    return parse(*commands[name], argv)


def sentence_of(box: str) -> str:
    """The words of tyro's framed error as one line, without the help text below them."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    text = re.sub(r"\s+", " ", " ".join(lines))
    text = re.split(r"─{3,} (?:Argument helptext|For full helptext)", text)[0]
    text = re.sub(r" ?─{3,} ?", "; ", text).strip().removeprefix("Error parsing ")
    return re.sub(r"^\w+Config: ", "", text) + " (--help lists every flag)"


def fail(sentence: str) -> None:
    """End the program: one sentence on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """Inside, a user's mistake (ValueError; OSError: files, disk) ends the program in one sentence, exit code 2."""
    try:
        yield
    except (ValueError, OSError) as e:
        if isinstance(e, FileNotFoundError) and e.filename:
            e = f"there is no file {e.filename}"
        fail(str(e))


def run(
    program: str, config_class: type[Config], presets: dict[str, Config] | None = None
) -> NoReturn:
    """Run a program: read its flags, then call main(config) of the module `program`, and exit.

    A program calls this above its imports, so that --help and a mistyped flag are answered at
    once: JAX loads only when the flags are right. main returns the exit code, None for 0."""
    config = parse(config_class, presets)
    with user_errors():
        sys.exit(importlib.import_module(program).main(config))
