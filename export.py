"""Make a Hugging Face directory of a trained model: python export.py --out_dir=DIR --to=HF_DIR"""

import cli
from config import ExportConfig

if __name__ == "__main__":
    cli.run("export", ExportConfig)

from utils import load_model


def main(config: ExportConfig) -> None:
    """Write the directory config.to, and say which checkpoint went into it.

    UserError if config.out_dir holds no model, or config.to exists."""
    model, tokenizer, step = load_model(config.out_dir)
    model.save_pretrained(config.to, tokenizer)
    print(
        f"step {step} of {config.out_dir} is in {config.to}: "
        "AutoModelForCausalLM.from_pretrained loads it"
    )
    if not model.config.bias:
        print("the model has no biases, and Hugging Face's GPT-2 always has: there they are zeros")
