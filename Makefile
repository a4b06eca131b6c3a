# The commands of the book. `make help` lists them; README.md says more.
PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
DEVICE   ?= auto
PROFILE  ?= ci

# With PY=... (an interpreter that has everything already, as on a GPU machine) nothing is installed.
ifdef PY
READY :=
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

export PYTHONPATH := book
# Two chapters run side by side, each on one thread.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup book pdf test nbmake bench chapter lint format clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(READY)  ## make .venv and install what constraints.txt pins

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[test]'
	@touch $@

book: $(READY)  ## run every chapter that changed and build the site into _build/html
	$(PY) -m builder.build

pdf: $(READY)  ## print the built site into _build/affinity-notebook.pdf (needs Chromium)
	$(PY) -m builder.pdf

test: $(READY)  ## run the whole suite: package, chapters, and the built site in a browser
	$(PY) -m pytest --device $(DEVICE) --profile $(PROFILE) $(PYTEST_ARGS)

nbmake: $(READY)  ## run the chapters as a reader's own CI would
	$(PY) -m pytest --nbmake --nbmake-timeout=600 chapters

bench: $(READY)  ## measure ours against the peers, into benchmarks/results
	$(PY) -m benchmarks.run $(BENCH_ARGS)

chapter: $(READY)  ## begin a chapter: part=metric name=my_method [title="My method"] [paper=bibkey]
	@$(PY) -m builder.new_chapter --part "$$part" --name "$$name" --title "$$title" --paper "$$paper"

lint: $(READY)  ## ruff, mypy, and the canonical form of the notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m builder.canonical --check $$(git ls-files -co --exclude-standard 'chapters/*.ipynb')

format: $(READY)  ## mend what lint can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) -m builder.canonical $$(git ls-files -co --exclude-standard 'chapters/*.ipynb')

clean:  ## delete what was built (not .venv)
	rm -rf _build build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find affnb book tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
