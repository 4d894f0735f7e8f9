"""The build backend that pyproject.toml names: it answers `pip install .` with one sentence.

The modules here are called config, model and utils. In site-packages they would shadow, or be
shadowed by, modules of the same name of anybody else's.
"""

import sys
from typing import NoReturn

SENTENCE = (
    "JAX-nanoGPT-vLLM is a checkout of scripts to run and change, not a package: "
    "install what it needs with `pip install -r requirements.txt`, or run `make demo`."
)


def refuse(*arguments: object, **settings: object) -> NoReturn:
    """End the build with the sentence and without a traceback."""
    sys.exit(SENTENCE)


# The hooks of PEP 517 and PEP 660 that pip and `python -m build` call first.
get_requires_for_build_wheel = refuse
get_requires_for_build_sdist = refuse
get_requires_for_build_editable = refuse
build_wheel = refuse
build_sdist = refuse
build_editable = refuse
