"""Write text with a trained model: python sample.py --out_dir=DIR --start="To be"

Or with a pretrained one: python sample.py --init_from=gpt2 --start="To be"
Or talk with one:         python sample.py --init_from=FILE.gguf --chat=True
"""

import cli
from config import SampleConfig

if __name__ == "__main__":
    cli.run("sample", SampleConfig)

from pathlib import Path

from errors import read_text, require
from kernels.cpu_kernels import choose_packing
from serving import conversation
from tokenizer import StreamDecoder
from utils import open_model

SEPARATOR = "-" * 15


def main(config: SampleConfig) -> None:
    """Print the samples, the first one as it is generated; or talk, with --chat=True.

    All are rows of one batch that grow together; the others are printed when all are done."""
    conversation.require_fitting_flags(config)
    model, tokenizer, name = open_model(config)
    if config.chat:
        conversation.chat(config, model, tokenizer, name)
        return
    start = read_start(config.start)
    prompt = tokenizer.encode_prompt(start)
    require(len(prompt) > 0, "--start must not be empty", param="start")
    packing = choose_packing(model.config.dtype, config.weights, config.cpu_kernels)
    model = model.for_inference(packing=packing)
    print(f"{name}, {model.config.num_params() / 1e6:.2f}M parameters\n")
    print(start, end="", flush=True)
    samples: list[list[int]] = [[] for _ in range(config.num_samples)]
    decoder = StreamDecoder(tokenizer)
    for burst in model.stream(
        [prompt] * config.num_samples,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_token=tuple(tokenizer.stop_ids),
    ):
        for sample, new in zip(samples, burst, strict=True):
            sample += new
        print(decoder.push(burst[0]), end="", flush=True)
    print(decoder.finish())
    for sample in samples[1:]:
        print(SEPARATOR)
        print(start + tokenizer.decode(sample))


def read_start(start: str) -> str:
    """Return the text that --start means: what a file holds for FILE:path, else itself."""
    if start.startswith("FILE:"):
        return read_text(Path(start.removeprefix("FILE:")), param="start")
    return start
