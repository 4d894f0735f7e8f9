"""Run a job on vLLM whenever a line comes: other_interpreters.py starts this, with vLLM's Python.

See WorkerProcess there for what is read and answered.
"""

import json
import os
import sys

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM prints is no answer
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    """Load the model of the first line; then do the job once for each line."""
    from vllm import LLM, SamplingParams

    job = json.loads(sys.stdin.readline())
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        max_num_seqs=job["max_num_seqs"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in job["requests"]]
    lengths = [output_tokens for _, output_tokens in job["requests"]]
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in lengths
    ]
    print("READY", file=answers, flush=True)
    for _ in sys.stdin:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        made = [len(output.outputs[0].token_ids) for output in outputs]
        assert made == lengths, f"vLLM made {made} tokens instead of {lengths}"
        print("DONE", file=answers, flush=True)


if __name__ == "__main__":
    main()
