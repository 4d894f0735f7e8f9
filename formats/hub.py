"""Models of the Hugging Face Hub, brought into its cache.

Start with `fetch`, which returns the directory of a model, wherever it is.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from errors import UserError, require
from formats.hugging_face import first_line

HUB = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}


def fetch(name_or_dir: str | Path, *files: str) -> Path:
    """Return a local directory as it is, or the cache's directory of a name of HUB.

    Of the latter, files are downloaded unless the cache has them. Raises UserError."""
    if name_or_dir in HUB:
        return download(HUB[str(name_or_dir)], files)
    require(
        Path(name_or_dir).is_dir(),
        f"there is no directory {name_or_dir}; the models that can be downloaded are "
        f"{', '.join(HUB)}",
    )
    return Path(name_or_dir)


def download(repository: str, files: Iterable[str]) -> Path:
    """Return the directory of the cache that holds these files of a repository of the Hub.

    The client shows its own progress."""
    import huggingface_hub as hub  # here, because a local directory does not need it

    with one_hub_warning():
        for file in files:
            try:
                path = hub.hf_hub_download(repository, file)
            except Exception as e:  # whatever the client and the libraries under it raise
                raise UserError(
                    f"cannot get {file} of {repository} from {hub.constants.ENDPOINT} or the "
                    f"cache: {first_line(e)} ({type(e).__name__}); a local directory needs neither"
                ) from e
    return Path(path).parent


@contextlib.contextmanager
def one_hub_warning() -> Iterator[None]:
    """Inside, the Hub's client warns once, in one line.

    By itself it writes two lines for each of its retries, which go on for about half a minute if
    there is no network."""
    from huggingface_hub.utils import logging as hub_logging  # attaches the client's own handler

    first_only = FirstWarning()
    # A program that configured logging, such as the server, gets each record a second time.
    handlers = [*hub_logging.get_logger().handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(first_only)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(first_only)


class FirstWarning(logging.Filter):
    """Lets the first warning of the Hub's client through, as one line, and drops the later ones."""

    def __init__(self) -> None:
        super().__init__("huggingface_hub")
        self.warned = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be shown."""
        is_of_client = super().filter(record)
        if not is_of_client or record.levelno != logging.WARNING:
            return True
        if self.warned:
            return False
        self.warned = True
        line = first_line(record.getMessage())
        record.msg = f"{line} (later warnings, also of retries, are not shown)"
        record.args = ()
        return True
