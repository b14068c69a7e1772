# `make chat` and `make test` work from a fresh clone on a machine with Python 3.11, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help chat test check format tiny readout results clean

help: ## List these targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

chat: $(READY) ## Talk to the default model as the user alice
	@$(BIN)/prefmw chat --user alice

test: $(READY) ## Run the whole test suite
	$(BIN)/python -m pytest

check: $(READY) ## Everything a change must pass: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

tiny: $(READY) ## Remake the embedded chat model, its checkpoints and its calibration, resuming runs that were killed
	$(BIN)/prefmw train sft --recipe tiny --out build/tiny
	mkdir -p prefmw/assets/tiny
	cp build/tiny/model/* prefmw/assets/tiny/
	$(BIN)/prefmw train persrm --recipe tiny --out build/tiny-persrm
	mkdir -p prefmw/assets/tiny-persrm
	cp build/tiny-persrm/persrm/* prefmw/assets/tiny-persrm/
	$(BIN)/prefmw train reward --recipe tiny --out build/tiny-reward
	mkdir -p prefmw/assets/tiny-reward
	cp build/tiny-reward/reward/* prefmw/assets/tiny-reward/
	$(BIN)/prefmw train dpa --recipe tiny --out build/tiny-dpa
	mkdir -p prefmw/assets/tiny-dpa
	cp build/tiny-dpa/dpa/* prefmw/assets/tiny-dpa/
	$(BIN)/prefmw prefs calibrate -m tiny --n 48 --out prefmw/assets/calibrations/tiny.json

readout: $(READY) ## Refit the read-out of preferences, resuming a fit that was killed
	mkdir -p build prefmw/assets/readouts
	$(BIN)/prefmw prefs fit-readout --out build/all-MiniLM-L6-v2.safetensors
	cp build/all-MiniLM-L6-v2.safetensors prefmw/assets/readouts/

results: $(READY) ## Remake every table and figure of docs/results.md, resuming runs that were killed
	docs/results.sh $(BIN)/prefmw build/results

format: $(READY) ## Format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the environment and every build product
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
