PYTHON ?= python3
LAB_ARGS ?=
PYTEST_ARGS ?=
CHAPTERS ?=

VENV := .venv
FIRST := notebooks/00_start_here.ipynb
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
LAB_SETTINGS := $(VENV)/share/jupyter/lab/settings
PIP := $(PY) -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup lab test notebooks readme figures lint format bench lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv, or bring it up to date

# The package builds with the pinned hatchling, so --no-build-isolation saves a download.
$(READY): requirements.txt pyproject.toml tools/jupyterlab.json
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		2>/dev/null || { echo "flashedu needs Python 3.11, 3.12 or 3.13, but '$(PYTHON)' is" \
		"$$($(PYTHON) --version 2>/dev/null || echo missing); name another one, as in" \
		"'make lab PYTHON=python3.12'." >&2; exit 1; }
	@echo "Setting up $(VENV). The first time this takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@mkdir -p $(LAB_SETTINGS)
	@cp tools/jupyterlab.json $(LAB_SETTINGS)/overrides.json
	@touch $@

# Without encryption, each kernel prints a warning about its local connection.
lab: $(READY) ## open the notebooks in JupyterLab (LAB_ARGS=... adds options)
	$(PY) -m jupyterlab --ip=127.0.0.1 --LabApp.default_url=/lab/tree/$(FIRST) \
		--KernelManager.transport_encryption=auto \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

# loadscope keeps the cells of a notebook together and in order. One thread for each of the two
# workers: more would wait for one another.
test: $(READY) ## run all tests and re-run every notebook (PYTEST_ARGS=... adds options)
	OMP_NUM_THREADS=1 $(PY) -m pytest tests notebooks --nbval --nbval-current-env --nbval-cell-timeout=120 \
		-n 2 --dist loadscope $(PYTEST_ARGS)

notebooks: $(READY) ## execute the chapters and store them (CHAPTERS="01 03" picks some)
	$(PY) tools/notebooks.py $(CHAPTERS)

readme: $(READY) ## write the README's ladder and picture
	$(PY) tools/readme.py

figures: $(READY) ## draw every figure, light and dark, into build/figures
	$(PY) tools/figures.py

lint: $(READY) ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY) ## format the code and fix what ruff can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(READY) ## run the benchmarks
	$(PY) benchmarks/run.py

lock: $(READY) ## renew the pins in requirements.txt
	$(PY) tools/lock.py

clean: ## remove .venv and everything that tools have written
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o \
		-name '*.egg-info' \) -type d -prune -exec rm -rf {} +
