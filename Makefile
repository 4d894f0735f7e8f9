# make demo: from nothing but Python >= 3.11 to a trained model and its text; make serve puts it on a port. make test: the whole suite.
# make bench: README's figures of speed.
PYTHON ?= python3
DEMO = out-pystdlib-char

demo: .venv/installed
	test -f data/pystdlib_char/meta.json || .venv/bin/python prepare.py pystdlib_char
	.venv/bin/python train.py pystdlib_char --init_from=resume
	.venv/bin/python sample.py --out_dir=$(DEMO) --start="def " --num_samples=1 --max_new_tokens=600

# The demo's model on http://127.0.0.1:8000, with a page to try it on.
serve: .venv/installed
	.venv/bin/python server.py --out_dir=$(DEMO) --kv_blocks=512

test: .venv/installed
	.venv/bin/python -m pytest -q

# NANOGPT: a checkout of nanoGPT, to be timed in turns with ours.
bench: .venv/installed
	.venv/bin/python bench.py train --preset=shakespeare_char_cpu $(NANOGPT:%=--nanogpt=%)
	.venv/bin/python bench.py compile --preset=gpt2
	.venv/bin/python bench.py generate --peers dense transformers products --batch_sizes 32 --rounds 2
	.venv/bin/python bench.py generate --peers dense transformers products --batch_sizes 32 --rounds 2 --dtype bfloat16

# The environment is complete or is made again: the stamp is written last.
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

# What makes sense on an accelerator, kernels compiled. PY: a Python with a JAX that sees it.
PY ?= .venv/bin/python
test-gpu:
	$(PY) -m pytest -q tests/test_model.py tests/test_train.py tests/test_paged_attention.py tests/test_engine.py -k "not mosaic_tpu"
	$(PY) tests/same_bits.py

clean:
	rm -rf .venv out-* data/*/

.PHONY: demo serve test bench test-gpu clean
