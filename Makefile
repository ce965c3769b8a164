# `make generate` and `make test` are all a newcomer needs; both build .venv when it is missing.
PYTHON ?= python3
PROMPT ?= The sea was calm that morning, and

.PHONY: generate test lint bench venv clean

generate: .venv/ready
	@.venv/bin/python -m duomoe.generate --prompt "$(PROMPT)" --max-new-tokens 128

test: .venv/ready
	.venv/bin/python -m pytest

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m mypy

bench: .venv/ready
	.venv/bin/python -m pytest tests/benchmarks --benchmark-enable --benchmark-only

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch .venv/ready

clean:
	rm -rf .venv build dist *.egg-info
