# From nothing to a run or a verdict; `make` alone lists the targets. Override like `make test PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv
SPEC ?= gpt-stdlib
# Ranks of the demo; empty: as many of this machine's GPUs as the spec's batch allows, or two processes on the CPU.
RANKS ?=
RUN_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
# Two workers; a file stays on one of them, since its tests may share a launch of several processes, and the long ones
# come first (tests/conftest.py).
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := $(abspath $(VENV))/bin
COUNT_RANKS := import torch; from scaling.batch import legal_world_sizes; from scaling.spec import load_spec; \
	print(legal_world_sizes(load_spec("$(SPEC)"), torch.cuda.device_count() or 2)[-1])
# The launcher's own port is always the same, and taken where another run is on this machine.
FREE_PORT := import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])

# pip compiles with one core what all of them can; some packages have files that are no Python, which no matter.
comma := ,
define install
$(BIN)/python -m pip install --no-compile -e '$(1)'
-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
endef

.PHONY: help demo test test-long lint slim clean
.NOTPARALLEL:

help:
	@echo "make demo    train $(SPEC) under the deepspeed launcher, on the GPUs or with two CPU processes"
	@echo "make test    lint, type and import checks, the check without torch, all tests"
	@echo "make test-long  more of the same for minutes: further backends, sizes and modes"
	@echo "make lint    ruff, pyright and import-linter alone"
	@echo "make slim    the check without torch alone"
	@echo "make clean   remove builds and caches; keeps $(VENV) and runs/"

# The launcher starts `python`, and torch looks for ninja: both must be those of the environment.
demo: $(VENV)/.installed-train
	export PATH="$(BIN):$$PATH"; \
	ranks="$(RANKS)"; [ -n "$$ranks" ] || ranks=$$(python -c '$(COUNT_RANKS)') || exit; \
	exec deepspeed --num_gpus "$$ranks" --master_port $$(python -c '$(FREE_PORT)') launch/train.py --spec "$(SPEC)" --run-dir "$(RUN_DIR)"

# The check without torch and pyright use one core each.
test: $(VENV)/.installed-dev
	$(BIN)/python tests/slim.py & slim=$$!; $(MAKE) lint; lint=$$?; wait $$slim && exit $$lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m long

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

slim: $(VENV)/.installed-dev
	$(BIN)/python tests/slim.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON must be 3.11 or newer")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed-train: pyproject.toml | $(VENV)/bin/python
	$(call install,.[train])
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(call install,.[train$(comma)dev])
	touch $(VENV)/.installed-train $@

clean:
	rm -rf build dist *.egg-info .cache .pytest_cache .ruff_cache .import_linter_cache
	find scaling launch tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
