# Two commands on a fresh machine: `make demo` and `make test`. Everything happens in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
INPUTS := settings.ini setup.py constraints.txt
QUICK := not slow and not gpu and not net and not browser and not diffusion

.PHONY: demo test notebooks pytest test-faults test-slow test-browser docs lint check bench doctor clean
demo: $(VENV)/.installed-demo ## real brain -> dataset -> report (medvol_demo/report.html)
	$(BIN)/medvol demo --out medvol_demo

test: notebooks pytest ## all notebooks, then the tests

notebooks: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 timeout 1200 $(BIN)/python nbs/_dev.py test --workers 2

pytest: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "$(QUICK)" --durations=10

test-slow: $(VENV)/.installed-test ## the tests that take long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not gpu and not net and not browser"

test-browser: $(VENV)/.installed-test ## the viewers in JupyterLab, needs a Chromium on the system
	$(BIN)/python -m pytest -q -m browser

test-faults: $(VENV)/.installed-test ## every injected fault, with a summary
	$(BIN)/python -m tests.faults.report

docs: $(VENV)/.installed-test ## docs/_build/html
	$(BIN)/python -m sphinx -j 2 -W --keep-going -q -b html docs docs/_build/html

lint: $(VENV)/.installed-test
	$(BIN)/ruff check nbs tests benchmarks docs setup.py

check: $(VENV)/.installed-test ## the package must be what the notebooks export
	$(BIN)/python nbs/_dev.py check

bench: $(VENV)/.installed-test ## ratios against references, benchmarks/RESULTS.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks all --write

doctor: $(VENV)/.installed-demo
	$(BIN)/medvol doctor

clean: ## what the commands above made, except the environment
	rm -rf nbs/*.ipynb docs/_build docs/nbs docs/reference medvol_demo .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(INPUTS) | $(BIN)/python
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/python
	$(PIP) -e ".[all,dev,docs]"
	touch $@ $(VENV)/.installed-demo
