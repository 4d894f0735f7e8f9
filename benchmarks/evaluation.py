"""DOC"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contender import Contender, take_turns


@dataclass(frozen=True)
class BenchEvalConfig:
    """Time to score the items of a task with eval_harness.py and with lm-eval's own `hf` model, and whether they agree."""

    init_from: str
    """a Hugging Face GPT-2 directory with a tokenizer"""
    task: str = "hellaswag"
    """name of a task of lm-eval whose requests are log-likelihoods"""
    include_path: Path | None = None
    """a directory with YAML files of more tasks"""
    items: int = 2000
    """score the first so many items, once, with ours and with hf at its best batch size"""
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    """of hf, separated by spaces; the best is the fastest on"""
    probe: int = 100
    """so many items"""
    rounds: int = 3
    """turns of each contender at the probe; medians count"""


def eval_job(config: BenchEvalConfig, lm) -> Callable:
    """run(n) scores the first n items of the task with a model of lm-eval; run.memory() tells the answers and the metrics."""
    import lm_eval.tasks

    task = lm_eval.tasks.TaskManager(include_path=config.include_path).load([config.task])["tasks"][
        config.task
    ]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=config.items)

    def run(n: int) -> None:
        requests = [request for request in task.instances if request.doc_id < n]
        run.answers = list(zip(requests, lm.loglikelihood(requests, disable_tqdm=True)))

    def memory() -> dict:
        items = {}
        for request, answer in run.answers:
            items.setdefault(request.doc_id, (request.doc, []))[1].append(answer)
        scores = [task.process_results(doc, answers) for doc, answers in items.values()]
        metrics = {
            name: statistics.mean(score[name] for score in scores)
            for name in ("acc", "acc_norm")
            if name in scores[0]
        }
        return {"answers": [answers for _, answers in items.values()], **metrics}

    run.warm_up, run.memory = lambda: run(100), memory
    return run


def ours_eval(config: BenchEvalConfig) -> Callable:
    import eval_harness

    return eval_job(config, eval_harness.JAXNanoGPT(init_from=config.init_from))


def hf_eval(config: BenchEvalConfig, batch_size: int) -> Callable:
    from lm_eval.models.huggingface import HFLM

    return eval_job(
        config,
        HFLM(pretrained=config.init_from, device="cpu", dtype="float32", batch_size=batch_size),
    )


def bench_eval(config: BenchEvalConfig) -> dict:
    """Items per second, float32 on a CPU; the largest difference between two log-likelihoods; whether each item's choice is
    the same."""
    contenders = {"ours": Contender(ours_eval, config)}
    contenders |= {f"hf_{b}": Contender(hf_eval, config, b) for b in config.batch_sizes}
    take_turns(contenders, config.rounds, config.probe)
    report = {
        "bench": "eval",
        "probe": {name: round(1 / c.median, 3) for name, c in contenders.items()},
    }
    print(f"items/s on {config.probe} items: {report['probe']}", flush=True)
    best = min(
        (name for name in contenders if name != "ours"), key=lambda name: contenders[name].median
    )
    answers = {}
    for name, contender in contenders.items():
        if name in ("ours", best):
            contender.measure(config.items)
        told = contender.close()
        if name in ("ours", best):
            answers[name] = told.pop("answers")
            report[name] = {"items_per_s": round(1 / contender.seconds[-1], 3), **told}
    pairs = list(zip(answers["ours"], answers[best]))
    logprobs = [[[logprob for logprob, _ in item] for item in pair] for pair in pairs]
    choice = lambda item: item.index(max(item))
    report["largest_difference"] = max(
        abs(a - b) for ours, theirs in logprobs for a, b in zip(ours, theirs)
    )
    report["same_choice"] = sum(choice(ours) == choice(theirs) for ours, theirs in logprobs) / len(
        pairs
    )
    report["ratio"] = round(contenders[best].seconds[-1] / contenders["ours"].seconds[-1], 3)
    return report
