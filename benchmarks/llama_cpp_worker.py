"""Run a job on llama.cpp whenever a line comes: other_interpreters.py starts this, with a Python
that has llama-cpp-python, gguf, numpy and safetensors.

See WorkerProcess there for what is read and answered. The job is batched continuously through
llama.cpp's low-level interface: a sequence that ends leaves its place to the next prompt.
"""

import ctypes
import json
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what llama.cpp prints is no answer

import gguf  # noqa: E402 - after the line above
import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

BATCH_TOKENS = 2048  # that a call takes; it computes 512 at a time
QUANTISED = {"bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}  # of llama.cpp's file types

# GPT-2's names, as transformers writes them, and those of GGUF.
TENSORS = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
}
BLOCK_TENSORS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(directory: Path) -> Path:
    """Write the model of a directory of transformers as float32 GGUF; return the file."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    path = directory / "model-float32.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    for name, gguf_name in TENSORS.items():
        writer.add_tensor(gguf_name, tensors[name].astype(np.float32))
    for i in range(config["n_layer"]):
        for name, gguf_name in BLOCK_TENSORS.items():
            weight = tensors[f"h.{i}.{name}.weight"].astype(np.float32)
            bias = tensors[f"h.{i}.{name}.bias"].astype(np.float32)
            # Matrices are (in, out) there and (out, in) here.
            writer.add_tensor(f"blk.{i}.{gguf_name}.weight", np.ascontiguousarray(weight.T))
            writer.add_tensor(f"blk.{i}.{gguf_name}.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(path: Path, weights: str) -> Path:
    """Return a file with the weights of a float32 one stored otherwise."""
    if weights == "float32":
        return path
    target = path.with_name(f"model-{weights}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{QUANTISED[weights]}")
    status = llama_cpp.llama_model_quantize(
        str(path).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert status == 0, f"llama.cpp cannot write {weights}"
    return target


class Runner:
    """A model, and a context for so many sequences of at most n_ctx tokens in all."""

    def __init__(self, path: Path, max_num_seqs: int, requests: list):
        self.max_num_seqs = max_num_seqs
        longest = max(len(prompt) + output_tokens for prompt, output_tokens in requests)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_num_seqs * (longest + 32)
        params.n_batch = BATCH_TOKENS
        params.n_seq_max = max_num_seqs
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, "llama.cpp has no context"
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )

    def add(self, token: int, position: int, sequence: int, sample: bool) -> None:
        """Put a token into the batch."""
        i = self.batch.n_tokens
        self.batch.token[i] = token
        self.batch.pos[i] = position
        self.batch.n_seq_id[i] = 1
        self.batch.seq_id[i][0] = sequence
        self.batch.logits[i] = sample
        self.batch.n_tokens += 1

    def likeliest(self, place: int) -> int:
        """Return the likeliest token after the one in a place of the batch."""
        logits = llama_cpp.llama_get_logits_ith(self.context, place)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def run(self, requests: list) -> None:
        """Generate what all requests ask for, as many at once as there are places."""
        waiting = deque(requests)
        free = list(range(self.max_num_seqs))
        running: dict[int, dict[str, Any]] = {}
        while waiting or running:
            self.batch.n_tokens = 0
            places = {}
            for sequence, state in running.items():
                places[sequence] = self.batch.n_tokens
                self.add(state["token"], state["position"], sequence, sample=True)
                state["position"] += 1
            while waiting and free and self.batch.n_tokens + len(waiting[0][0]) <= BATCH_TOKENS:
                prompt, output_tokens = waiting.popleft()
                sequence = free.pop()
                for position, token in enumerate(prompt):
                    self.add(token, position, sequence, sample=position == len(prompt) - 1)
                places[sequence] = self.batch.n_tokens - 1
                running[sequence] = {"position": len(prompt), "left": output_tokens}
            status = llama_cpp.llama_decode(self.context, self.batch)
            assert status == 0, f"llama_decode returned {status}"
            for sequence, place in places.items():
                state = running[sequence]
                state["token"] = self.likeliest(place)
                state["left"] -= 1
                if state["left"] == 0:
                    llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)
                    free.append(sequence)
                    del running[sequence]


def main() -> None:
    """Load the model of the first line; then do the job once for each line."""
    job = json.loads(sys.stdin.readline())
    path = quantised(write_gguf(Path(job["model"])), job["weights"])
    runner = Runner(path, job["max_num_seqs"], job["requests"])
    print("READY", file=answers, flush=True)
    for _ in sys.stdin:
        runner.run(job["requests"])
        print("DONE", file=answers, flush=True)


if __name__ == "__main__":
    main()
