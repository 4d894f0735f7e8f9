"""A conversation with the model in a terminal: sample.py --chat=True.

Start with `Conversation`, which knows nothing of terminals; `talk` reads questions and prints
answers as they come. Each turn is a request to the engine that begins as the one before ended, so
that the engine finds most of it in its prefix cache.
"""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from config import EngineConfig, GPTConfig, SampleConfig
from engine import Engine
from errors import UserError, require
from model import GPT
from paged_attention import choose_implementation, num_pages_for
from sequence import FinishReason, SamplingParams
from serving.chat import NO_CHAT_TEMPLATE, ChatTemplate, load_template
from tokenizer import Tokenizer

PROMPT = "> "
HINT = "Ctrl+C stops an answer, /clear begins anew, Ctrl+D or /quit ends."

Message = dict[str, str]  # role and content


class Conversation:
    """What was said so far, and the engine that says what follows: `ask`, then `answer`."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        params: SamplingParams,
        system: str | None = None,
    ) -> None:
        """params: of every answer; max_tokens is its longest. system: what the model is told
        first."""
        self.engine = engine
        self.template = template
        self.params = params
        self.opening: list[Message] = []
        if system is not None:
            self.opening.append({"role": "system", "content": system})
        self.messages: list[Message] = []  # question, answer, ..., question, answer
        self.question: Message | None = None  # not answered yet
        self.request_id: int | None = None
        self.finish_reason: FinishReason | None = None
        """How the last answer ended; None if it was stopped."""

    def clear(self) -> None:
        """Forget what was said, but for the system prompt."""
        self.messages = []

    def ask(self, said: str) -> int:
        """Begin the answer to a question, and return how many earlier turns had to be forgotten.

        The question, the longest answer and what was said before must fit the model's context: the
        oldest turns go first. Raises UserError if the question alone does not fit, and forgets
        nothing then."""
        question = {"role": "user", "content": said}
        for forgotten in range(0, len(self.messages) + 1, 2):
            messages = self.messages[forgotten:]
            prompt = self.template.encode([*self.opening, *messages, question], True)
            if len(prompt) + self.params.max_tokens <= self._context():
                break
        else:
            raise UserError(
                f"the question makes a prompt of {len(prompt)} tokens, and with an answer of up to "
                f"max_new_tokens={self.params.max_tokens} it does not fit the context of "
                f"{self._context()} tokens: ask a shorter one or lower --max_new_tokens",
                param="max_new_tokens",
            )
        self.request_id = self.engine.add(prompt, self.params)
        self.messages = messages
        self.question = question
        return forgotten // 2

    def answer(self, stopped: Callable[[], bool]) -> Iterator[str]:
        """Yield the text of the answer as it comes. `stopped` is asked before each step.

        Afterwards the question and the answer, as far as it came, are part of the conversation."""
        assert self.question is not None and self.request_id is not None, "ask comes first"
        text = ""
        self.finish_reason = None
        while self.engine.busy:
            if stopped():
                self.engine.cancel(self.request_id)
            for output in self.engine.step():
                text += output.text
                self.finish_reason = output.finish_reason
                yield output.text
        self.messages += [self.question, {"role": "assistant", "content": text}]
        self.question = self.request_id = None

    def _context(self) -> int:
        """Return how many tokens a sequence may have, by the model and by the whole pool."""
        pool = self.engine.stats().pages * self.engine.config.page_size
        return min(self.engine.model_config.block_size, pool)


# The terminal


def require_fitting_flags(config: SampleConfig) -> None:
    """Raise UserError if a flag was given that the others leave without effect."""
    defaults = SampleConfig(init_from="gpt2")
    of_samples, of_chats = ("start", "num_samples"), ("system", "chat_template")
    for name in of_samples if config.chat else of_chats:
        require(
            getattr(config, name) == getattr(defaults, name),
            f"--{name} has no effect {'in' if config.chat else 'without'} --chat=True",
            param=name,
        )


def chat(config: SampleConfig, model: GPT, tokenizer: Tokenizer, name: str) -> None:
    """Talk until the user ends it. name: of the model. Raises UserError where there is no template.

    Only answers go to stdout, so that they can be piped; all else goes to stderr."""
    template = load_template(config, tokenizer)
    if template is None:
        raise UserError(NO_CHAT_TEMPLATE, param="chat_template")
    engine_config = for_one_sequence(config, model.config)
    engine = Engine(model, tokenizer, engine_config, progress=sys.stderr.isatty())
    params = SamplingParams(
        max_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    say(f"{name}, {model.config.num_params() / 1e6:.2f}M parameters. {HINT}")
    talk(Conversation(engine, template, params, config.system))


def for_one_sequence(config: SampleConfig, model: GPTConfig) -> EngineConfig:
    """Return an engine's config for one sequence at a time: no more pages than its context has."""
    engine = EngineConfig(max_num_seqs=1, cpu_kernels=config.cpu_kernels, weights=config.weights)
    attention = choose_implementation(engine.attention, engine.cpu_kernels)
    most = num_pages_for(model, engine.page_size, model.dtype, engine.kv_cache_memory, attention)
    null_page = 1
    context = -(-model.block_size // engine.page_size) + null_page
    return dataclasses.replace(engine, kv_blocks=min(most, context))


def talk(conversation: Conversation) -> None:
    """Read questions from stdin, one a line, and print the answers."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives `input` a history; not every Python has it
    prompt = PROMPT if sys.stdin.isatty() else ""
    while True:
        try:
            said = input(prompt).strip()
        except EOFError:
            return
        if said == "/quit":
            return
        if said == "/clear":
            conversation.clear()
        elif said:
            print_answer(conversation, said)


def print_answer(conversation: Conversation, said: str) -> None:
    """Ask, and print the answer as it comes; what cannot be asked is said in one sentence."""
    try:
        forgotten = conversation.ask(said)
    except UserError as error:
        say(str(error))
        return
    if forgotten:
        say(f"(the oldest {forgotten} turns are forgotten: they no longer fit the context)")
    with interrupts_noted() as interrupted:
        for text in conversation.answer(interrupted):
            print(text, end="", flush=True)
    print("\n", flush=True)
    if conversation.finish_reason is None:
        say("(stopped)")
    elif conversation.finish_reason == "length":
        say(f"(cut off after max_new_tokens={conversation.params.max_tokens})")


def say(sentence: str) -> None:
    """Tell the user something that the model did not say."""
    print(sentence, file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl+C is only noted: the engine must not be left in the middle of a step.

    Gives a function that says whether it came. A second one interrupts as ever."""
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    def was_noted() -> bool:
        return noted

    before = signal.signal(signal.SIGINT, note)
    try:
        yield was_noted
    finally:
        signal.signal(signal.SIGINT, before)
