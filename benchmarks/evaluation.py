"""Speed and agreement of eval_harness.py with lm-eval's own `hf` model: start with bench_eval."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contender import Contender, ContenderProcess, ratio, take_turns
from errors import require, require_at_least

WARM_UP_ITEMS = 100

Answer = tuple[float, bool]  # a log-likelihood, and whether greedy decoding gives that ending


@dataclass(frozen=True)
class BenchEvalConfig:
    """Time to score the items of a task with eval_harness.py and with lm-eval's `hf` model.

    Whether the two agree is told as well."""

    init_from: str
    """a Hugging Face GPT-2 directory with a tokenizer"""
    task: str = "hellaswag"
    """name of a task of lm-eval whose requests are log-likelihoods"""
    include_path: Path | None = None
    """a directory with YAML files of more tasks"""
    items: int = 2000
    """score the first so many items, once, with ours and with hf at its best batch size"""
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    """batch sizes of hf to try, separated by spaces; the best is the fastest at the probe"""
    probe: int = 100
    """the number of items that all batch sizes, and ours, are timed on"""
    rounds: int = 3
    """turns of each contender at the probe; medians count"""

    def __post_init__(self):
        require_at_least(self, 1, "items", "probe", "rounds")
        require(bool(self.batch_sizes), "give at least one of batch_sizes", param="batch_sizes")


class Scoring(Contender):
    """A model of lm-eval that scores a task, float32 on a CPU. A unit of work is one item."""

    def __init__(self, config: BenchEvalConfig, lm):
        from lm_eval.tasks import TaskManager

        self.lm = lm
        self.task = TaskManager(include_path=config.include_path).load([config.task])["tasks"][
            config.task
        ]
        self.task.set_config(key="num_fewshot", value=0)
        self.task.build_all_requests(limit=config.items)
        self.requests: list = []  # of the last run
        self.answers: list[Answer] = []  # to these requests

    def warm_up(self) -> None:
        """Score the first items."""
        self.run(WARM_UP_ITEMS)

    def run(self, n: int) -> None:
        """Score the first n items of the task."""
        self.requests = [r for r in self.task.instances if r.doc_id < n]
        self.answers = self.lm.loglikelihood(self.requests, disable_tqdm=True)

    def report(self) -> dict:
        """Return the answers of the last run, item by item, and the means of its metrics."""
        documents = {}
        answers: dict[int, list[Answer]] = {}
        for request, answer in zip(self.requests, self.answers, strict=True):
            documents[request.doc_id] = request.doc
            answers.setdefault(request.doc_id, []).append(answer)
        scores = [self.task.process_results(documents[i], answers[i]) for i in answers]
        figures = {"answers": list(answers.values())}
        for name in ("acc", "acc_norm"):
            if name in scores[0]:
                figures[name] = statistics.mean(score[name] for score in scores)
        return figures


class OursScoring(Scoring):
    """eval_harness.py's model."""

    def __init__(self, config: BenchEvalConfig):
        from eval_harness import JAXNanoGPT

        super().__init__(config, JAXNanoGPT(init_from=config.init_from))


class HFScoring(Scoring):
    """lm-eval's `hf` model at one batch size."""

    def __init__(self, config: BenchEvalConfig, batch_size: int):
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=config.init_from, device="cpu", dtype="float32", batch_size=batch_size)
        super().__init__(config, lm)


def bench_eval(config: BenchEvalConfig) -> dict:
    """Return items per second of ours and of hf at its best batch size, and how they agree."""
    contenders = {"ours": ContenderProcess(OursScoring, config)}
    for size in config.batch_sizes:
        contenders[f"hf_{size}"] = ContenderProcess(HFScoring, config, size)
    take_turns(contenders, config.rounds, config.probe)
    probe = {name: items_per_second(c.median) for name, c in contenders.items()}
    print(f"items/s on {config.probe} items: {probe}", flush=True)

    peers = [name for name in contenders if name != "ours"]
    best = min(peers, key=lambda name: contenders[name].median)
    reports, answers = score_all_items(contenders, ("ours", best), config.items)
    ours_seconds = contenders["ours"].seconds[-1]
    best_seconds = contenders[best].seconds[-1]
    return {
        "bench": "eval",
        "probe": probe,
        **reports,
        **agreement(answers["ours"], answers[best]),
        **ratio(ours_seconds, [best_seconds]),
    }


def items_per_second(seconds: float) -> float:
    """Return how many items are scored in a second, where one takes so many seconds."""
    return round(1 / seconds, 3)


def score_all_items(
    contenders: dict[str, ContenderProcess], names: tuple[str, ...], items: int
) -> tuple[dict[str, dict], dict[str, list[list[Answer]]]]:
    """Let the contenders of these names score all items, and close every contender.

    Returns their figures and, apart from these, their answers."""
    figures, answers = {}, {}
    for name, contender in contenders.items():
        if name not in names:
            contender.close()
            continue
        contender.measure(items)
        report = contender.close()
        answers[name] = report.pop("answers")
        figures[name] = {"items_per_s": items_per_second(contender.seconds[-1]), **report}
    return figures, answers


def agreement(ours: list[list[Answer]], theirs: list[list[Answer]]) -> dict[str, float]:
    """Compare the answers item by item: the largest difference between two log-likelihoods, and
    the share of the items of which both choose the same ending."""
    differences = []
    same_choices = 0
    for our_answers, their_answers in zip(ours, theirs, strict=True):
        our_logprobs = [logprob for logprob, _ in our_answers]
        their_logprobs = [logprob for logprob, _ in their_answers]
        for a, b in zip(our_logprobs, their_logprobs, strict=True):
            differences.append(abs(a - b))
        same_choices += likeliest(our_logprobs) == likeliest(their_logprobs)
    return {"largest_difference": max(differences), "same_choice": same_choices / len(ours)}


def likeliest(logprobs: list[float]) -> int:
    """Return the index of the ending that has the largest log-likelihood, the first of equals."""
    return logprobs.index(max(logprobs))
