# make train   train a fused MobileNetV2 on the bundled data: builds what is missing first
# make test    the whole test suite, the kernels' own tests (cmake) included
# make lint    ruff
# make clean   remove everything that make made
#
# Python 3.11 or newer and a C++ compiler are enough; nvcc is used where it is found.  Everything is installed into ./.venv:
#
#   PYTHON=python3.12     the Python that .venv is made with
#   VENV=path             another virtual environment: an existing one is used as it is, with the torch it has
#   ARGS="--epochs 3"     for make train: arguments of mnet_kernels.train; for make test: of pytest
#
# The package is installed editable, so that what runs is this tree; it is compiled anew when csrc/ or setup.py changes.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check install
sources := $(shell find csrc -type f -not -path 'csrc/tests/*') setup.py pyproject.toml

.PHONY: train test lint clean
.DELETE_ON_ERROR:

train: $(VENV)/installed
	$(python) -m mnet_kernels.train $(ARGS)

test: $(VENV)/installed
	$(python) -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/bin/ruff
	$(python) -m ruff check .
	$(python) -m ruff format --check .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/bin/ruff: | $(VENV)/bin/python
	$(pip) ruff

# torch first: the extension is compiled against the torch it will run with.  What is installed already stays.
$(VENV)/requirements: pyproject.toml | $(VENV)/bin/python
	$(pip) 'torch>=2.11' torchvision 'setuptools>=77' wheel pybind11 ninja
	@touch $@

$(VENV)/installed: $(VENV)/requirements $(sources)
	$(pip) --no-build-isolation --editable '.[dev]'
	@$(python) -c 'import mnet_kernels.backends.compiled as c; print(c.describe())'
	@touch $@

clean:
	rm -rf .venv build build-ctest dist runs *.egg-info mnet_kernels/_build.json mnet_kernels/*.so
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
