#!/bin/sh
# What only a GPU can tell, in order of worth, in under 25 minutes: sh benchmarks/on_gpu.sh OUT
#
# Each command has a limit in seconds and a log in OUT; the lines that count are printed as they
# come. PY: a Python with a JAX that sees the GPU. NANOGPT: a checkout of nanoGPT, raced in training.
# SMALL=1 tries all of it in small, on any device.
out=${1:?"usage: sh benchmarks/on_gpu.sh OUT"}
python=${PY:-python3}
mkdir -p "$out"
# Several processes share the card's memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

run() { # name, limit in seconds, pattern of the lines that count, command
    name=$1 limit=$2 pattern=$3
    shift 3
    echo "== $name: $*"
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    echo "   exit code $?"
    grep -aE "$pattern" "$out/$name.log" | cut -c1-300 | tail -12
}

if [ -n "$SMALL" ]; then
    tests="tests/test_scheduler.py"
    bits="--requests 8 --max_num_seqs 4 --n_layer 1 --n_embd 64 --block_size 64"
    train="--preset=shakespeare_char_cpu --n_layer=1 --rounds=1 --steps=2"
    kernel="--rows 1 --page_sizes 16"
    small="--n_layer 1 --n_head 2 --n_embd 64"
    job="$small --requests 4 --prompt_tokens 4 8 --output_tokens 4 8 --batch_sizes 4"
    streams="$small --requests 1 --streams 1"
else
    tests="tests/test_paged_attention.py tests/test_engine.py tests/test_model.py tests/test_sampling.py tests/test_train.py"
    bits="--requests 100 --max_num_seqs 16 --num_scheduler_steps 8"
    train="--preset=gpt2 --gradient_accumulation_steps=1 --batch_size=16 --loss_chunks=1 --rounds=3 --steps=10"
    kernel="--rows 1 8 64 256 --page_sizes 16"
    job="--requests 256 --prompt_tokens 100 512 --output_tokens 100 512 --kv_cache_memory 20GB --batch_sizes 256"
    streams="--requests 8 --streams 1 8 64 256"
fi

# shellcheck disable=SC2086 # the options are words
{
    run tests 420 "passed|failed|^FAILED" "$python" -m pytest -q -n 8 $tests -k "not mosaic_tpu"
    run bits_float32 180 "requests have" "$python" tests/same_bits.py $bits
    run bits_bfloat16 180 "requests have" "$python" tests/same_bits.py $bits --dtype bfloat16
    run train 180 "ms_per_step" "$python" bench.py train $train ${NANOGPT:+--nanogpt="$NANOGPT"}
    run job 240 "tokens_per_s" "$python" bench.py generate --dtype bfloat16 $job --peers transformers --streams --rounds 1
    run streams 240 "tokens_per_s" "$python" bench.py generate --dtype bfloat16 $streams --peers --rounds 3
    run kernel 240 '^{' "$python" bench.py kernel $kernel
}
