PYTHON ?= python3
WORKERS ?= 2
GPU_WORKERS ?= 14

VENV := .venv/bin
# One thread a worker: torch and BLAS would otherwise start one per core in each of them.
CPU_ENV := env -u TRITON_INTERPRET OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTEST := $(VENV)/python -m pytest tests --durations=5

# A GPU host brings its own python3 with torch, triton, jax and pytest; wheels it lacks travel in .whl.
GPU_SITE := $(CURDIR)/build/site
GPU_ENV := env -u TRITON_INTERPRET PYTHONPATH=$(GPU_SITE) XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2

.PHONY: setup demo test test-gpu bench lint gpu-site

setup: .venv/.stamp

# jax-cuda13-plugin makes `import jax_triton` work without a GPU; --no-deps leaves out gigabytes of CUDA.
.venv/.stamp: pyproject.toml constraints.txt
	@echo "Installing the pinned dependencies into .venv (some minutes the first time)"
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install -q -c constraints.txt -e '.[torch,jax,flax,hf,test,bench]'
	$(VENV)/python -m pip install -q -c constraints.txt --no-deps jax-cuda13-plugin
	@touch $@

demo: setup
	$(CPU_ENV) $(VENV)/python -m tests.demo

# TRITON_INTERPRET is read when a kernel is decorated: interpreted and compiled kernels need two processes.
test: lint
	@echo "Tests marked gpu are deselected here: they need an NVIDIA GPU, where 'make test-gpu' runs them."
	$(CPU_ENV) $(PYTEST) -n $(WORKERS) -m "not interpreter and not gpu"
	$(CPU_ENV) TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) -m "interpreter and not gpu"

lint: setup
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/pyright

test-gpu: gpu-site
	$(GPU_ENV) $(PYTHON) -m pytest tests -m gpu -q -n $(GPU_WORKERS) --dist loadgroup -p no:benchmark --durations=5

bench: gpu-site
	$(GPU_ENV) $(PYTHON) -m bench

gpu-site:
	@mkdir -p $(GPU_SITE)
	@if ls .whl/*.whl >/dev/null 2>&1; then \
	  $(PYTHON) -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
	    --target $(GPU_SITE) .whl/*.whl; \
	fi
