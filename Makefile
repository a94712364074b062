# make demo and make test are all a reader needs; each makes .venv first. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
FLOOR := $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
BIN := .venv/bin
KATEX := .node/node_modules/katex/package.json
STAMP := .venv/installed
comma := ,

.PHONY: demo test notebooks export readme gate fuzz clean
demo: $(STAMP)
	$(BIN)/hsi-mamba demo

test: $(STAMP) $(if $(shell command -v npm),$(KATEX))
	$(BIN)/python -m pytest

notebooks: $(STAMP)  ## run every notebook from a fresh kernel and keep its outputs
	$(BIN)/python tools/run_notebooks.py

export: $(STAMP)  ## notebooks -> package, and the site's sidebar
	$(BIN)/nbdev-export
	$(BIN)/python tools/sidebar.py

readme: $(STAMP)  ## index.ipynb -> README.md
	$(BIN)/python tools/readme.py

gate: $(STAMP)  ## style, one row a notebook
	$(BIN)/python tools/gate.py

fuzz: $(STAMP)  ## 20,000 broken files for every reader; another day, another SEED
	$(BIN)/python tests/fuzz.py --inputs 20000 --seed $(or $(SEED),2) $(if $(HSI_DATA),--data $(HSI_DATA))

clean:
	rm -rf .venv .node build dist _docs _proc .pytest_cache .hypothesis *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < ($(subst .,$(comma),$(FLOOR))) and "hsi-mamba-nb needs Python $(FLOOR) or newer, and $(PYTHON) is %d.%d. Try: make $(MAKECMDGOALS) PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

$(STAMP): $(BIN)/python settings.ini pyproject.toml setup.py $(CONSTRAINTS)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

$(KATEX):
	npm install --silent --no-audit --no-fund --prefix .node "katex@>=0.16"
