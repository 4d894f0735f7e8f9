"""Write text with a trained model: python sample.py --out_dir=DIR | --init_from=gpt2 --start="To be" """

import cli
from config import SampleConfig

if __name__ == "__main__":
    cli.run("sample", SampleConfig)

from pathlib import Path

from errors import require
from tokenizer import StreamDecoder
from utils import open_model


def main(config: SampleConfig) -> None:
    """Print the samples, the first as it is generated: all rows of the batch grow together, the others follow when it is done."""
    model, tokenizer, name = open_model(config)
    start = (
        Path(config.start[5:]).read_text(encoding="utf-8")
        if config.start.startswith("FILE:")
        else config.start
    )
    prompt = tokenizer.encode(start)
    require(len(prompt) > 0, "--start must not be empty")
    model = model.for_inference()
    print(f"{name}, {model.config.num_params() / 1e6:.2f}M parameters\n")
    rows = [[] for _ in range(config.num_samples)]
    decoder = StreamDecoder(tokenizer)
    print(start, end="", flush=True)
    for burst in model.stream(
        [prompt] * config.num_samples,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_token=tokenizer.eos_id,
    ):
        rows = [row + new for row, new in zip(rows, burst)]
        print(decoder.push(burst[0]), end="", flush=True)
    print(decoder.finish())
    for row in rows[1:]:
        print("-" * 15)
        print(start + tokenizer.decode(row))
