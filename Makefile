# Every target sets up .venv by itself; all it needs is Python 3.11+ with venv and pip.
# Another interpreter: `make test PYTHON=python3.12`.

PYTHON ?= python3
BIN := .venv/bin
QUICKSTART_DIR := runs/quickstart

.PHONY: quickstart test lint types clean
.NOTPARALLEL:

# Continues an earlier quickstart; `make quickstart OVERWRITE=1` starts again.
quickstart: .venv/.installed
	$(BIN)/codesign quickstart --out $(QUICKSTART_DIR) $(if $(filter 1,$(OVERWRITE)),--overwrite,$(if $(wildcard $(QUICKSTART_DIR)),--resume))

test: .venv/.installed-dev
	$(BIN)/pytest -n 2 --dist loadfile

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-dev
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or later is required, and '$(PYTHON)' is not; name one: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: pyproject.toml | .venv/.created
	@echo "Installing codesign and its dependencies into .venv (once, a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml | .venv/.created
	@echo "Installing codesign, its dependencies and the developers' tools into .venv (once, a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch .venv/.installed $@
