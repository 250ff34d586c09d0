# `make demo` and `make test` each start from nothing: they make .venv and install into it.
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/python minidiff.py train

test: .venv/installed
	.venv/bin/python -m pytest -q test_minidiff.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.PHONY: demo test
