# make demo   environment, data, a small run on real text, a plot, how to continue
# make test   environment, linter, type checker, tests
#
# Both make .venv once, with the first of python3, python3.12, python3.11 that fits (or PYTHON=...), and need no network
# after that. To use an environment of your own: make test ENV= PY=python

VENV ?= .venv
ENV ?= $(VENV)/.installed
PY ?= $(VENV)/bin/python
SHARDS ?= demo/shards
NEEDED = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

.PHONY: demo test environment
.DELETE_ON_ERROR:

demo: $(ENV)
	@echo "== data: text that is on any machine, as C4-format files, tokenized into $(SHARDS)"
	@$(PY) scripts/prepare_data.py source=embedded tokenizer=train tokenizer_vocab_size=4096 output=$(SHARDS)
	@echo "== training: a 4-layer MoDA model, three or four minutes on two CPU cores"
	@$(PY) train.py experiment=demo data.path=$(SHARDS)

test: $(ENV)
	@echo "== linter and types"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@echo "== tests"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

environment: $(ENV)

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@python=; for candidate in $(PYTHON) python3 python3.12 python3.11; do \
	  if $$candidate -c '$(NEEDED)' 2>/dev/null; then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or 3.12 is needed: install one, or name it with PYTHON=..." >&2; exit 1; fi; \
	echo "== environment: $(VENV), with $$($$python --version); packages are installed once, which takes a few minutes"; \
	[ -x $(VENV)/bin/python ] || $$python -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
