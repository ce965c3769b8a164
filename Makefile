# `make generate` and `make test` are all a newcomer needs; both build .venv when it is missing.
PYTHON ?= python3
PROMPT ?= Emma was not at all surprised when

.PHONY: generate test lint bench bench-policies bench-start bench-cpu venv clean

generate: .venv/ready
	@.venv/bin/python -m duomoe.generate --prompt "$(PROMPT)" --max-new-tokens 128 --temperature 0.8 --top-p 0.95 --seed 1

test: .venv/ready
	# Not `python -m pytest`, which would put this folder, and with it a bare `kernels`, on transformers' path.
	# Two at a time, file by file: most tests use one core.
	.venv/bin/pytest --numprocesses 2 --dist loadfile

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	# mypy finds duomoe.kernels and duomoe.models in an ordinary installation, not in an editable one.
	rm -rf build
	.venv/bin/python -m pip install --quiet --no-deps --target build/installed .
	.venv/bin/python -m mypy build/installed/duomoe

bench: .venv/ready
	.venv/bin/pytest tests/benchmarks --benchmark-enable --benchmark-only

bench-policies: .venv/ready
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python -P tests/benchmarks/policies.py

# START says what to start and load, as `--model W=DIR --expert-memory 25%`; without it, the embedded model.
START ?= --model embedded=duomoe/assets --load embedded=duomoe/assets
bench-start: .venv/ready
	.venv/bin/python -P tests/benchmarks/start.py --out docs/measurements/start.json $(START)

bench-cpu: .venv/ready
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python -P tests/benchmarks/cpu.py

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch .venv/ready

clean:
	rm -rf .venv build dist *.egg-info
