# make demo: everything from a fresh checkout to a report; make test: everything that must hold.
# Both install the versions of constraints.txt, which are known to work together; `make lock` writes it anew.
# PYTHON=... chooses the interpreter that the virtual environment is made with (3.11 or newer).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# stamps must hold whatever runs in parallel: pip is not made for two installations at once
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
LOCK := constraints.txt
INSTALL := -m pip --disable-pip-version-check install -qq
PIP := $(BIN)/python $(INSTALL) -c $(LOCK)
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
INSTALLED_BENCH := $(VENV)/.installed-bench
INSTALLED_DOCS := $(VENV)/.installed-docs
# an environment of its own, without the lock
NEWEST := .venv-newest
# what changes with the libraries of language models: reading, moving, adapting and fetching them
MODEL_TESTS := tests/test_families.py tests/test_language_model.py tests/test_lora.py tests/test_models.py \
	tests/test_prefix_attacks.py tests/test_prefixed.py tests/test_probe_files.py tests/test_statements.py
OUT ?= runs/demo
WORKERS ?= 2

.PHONY: help demo full thoughts pressure zoo install-test test lint fast-tests slow statistics test-newest bench docs lock facts clean

help:
	@echo "make demo        install, fetch the model, stress six probes, write $(OUT)"
	@echo "make test        lint, types, import contracts and the fast tests"
	@echo "make slow        the fast tests, and which ten of them take longest"
	@echo "make statistics  coverage of intervals over thousands of repeats (long)"
	@echo "make test-newest the model tests against the newest releases of everything, without the lock; only reports"
	@echo "make bench       against rivals, in one run (installs them)"
	@echo "make docs        the site, in site/: pages, the API, notebooks executed"
	@echo "make full        the README's tables (under an hour)"
	@echo "make thoughts    the README's tables of thought manipulation (about an hour)"
	@echo "make zoo         the README's tables of all probes (hours)"
	@echo "make pressure    the README's tables of training pressure (hours)"
	@echo "make lint        ruff, mypy and import-linter alone"
	@echo "make lock        write constraints.txt anew: the newest versions that fit pyproject.toml, for every Python"
	@echo "make facts       write the facts that statements are made of anew"
	@echo "make clean       remove the environment, caches and builds (not runs/)"

demo: $(INSTALLED)
	$(BIN)/elk-stress run --testbed statements --preset demo --out $(OUT)

full: $(INSTALLED)
	$(BIN)/elk-stress run --testbed statements --preset demo --size full --out runs/full

# every attack by which a model games a probe: where the truth is known, at one site of a language model, and through
# its context; killed, it goes on where it stopped
thoughts: $(INSTALLED)
	$(BIN)/elk-stress run --testbed linear --preset thoughts --max-bits 400 --out runs/thoughts/linear
	$(BIN)/elk-stress run --testbed statements --size full --preset thoughts --out runs/thoughts/statements
	$(BIN)/elk-stress run --testbed statements --size full --preset prefixes --out runs/thoughts/prefixes

# every probe, its defences compared with what they defend: where the truth is known, on a language model, of several
# tokens, of several contexts, and under training pressure; the costly attacks on the best defence only
PRESSED := mass_mean,lda,logistic,mlp,quadratic,ensemble,sparse,mahalanobis,logistic_tails,flow,nearest_neighbours
DEFENCES := lipschitz,adversarially_trained,orthogonal_ensemble,secret_subspace,causal
DEFENDED := lipschitz:mlp,adversarially_trained:logistic,orthogonal_ensemble:logistic,secret_subspace:logistic
zoo: $(INSTALLED)
	$(BIN)/elk-stress run --testbed linear --preset zoo --max-bits 200 --out runs/zoo/linear
	$(BIN)/elk-stress run --testbed statements --size full --preset zoo --out runs/zoo/statements
	$(BIN)/elk-stress run --testbed statements --size full --tokens 2 --preset tokens --out runs/zoo/tokens
	for moved in apart together; do for reads in 1 2 4 8; do \
		$(BIN)/elk-stress run --testbed statements --size full --reads $$reads --moved $$moved --probes context_average \
			--threats item/natural/gaussian --attacks gradient --out runs/zoo/contexts-$$reads-$$moved; done; done
	$(BIN)/elk-stress run --testbed statements --size full --preset prefixes --probes adversarially_trained \
		--out runs/zoo/prefixes
	for testbed in superposition compute_in_superposition vault "quirky --models 6"; do \
		$(BIN)/elk-stress train --testbed $$testbed --probes $(PRESSED),$(DEFENCES) \
			--compare $(DEFENDED),causal:logistic,ensemble:mlp --out runs/zoo/$${testbed%% *}; done
	$(BIN)/elk-stress train $(LORA) --steps 150 --checkpoints 8 --probes adversarially_trained --out runs/zoo/lora

# four organisms with the bits that each probe needs, then LoRA on the language model
ORGANISM := mass_mean,lda,logistic,paper,oracle
LORA := --testbed statements --size full --attack lora --strengths 3 --draws 1
pressure: $(INSTALLED)
	for testbed in superposition compute_in_superposition vault; do \
		$(BIN)/elk-stress train --testbed $$testbed --probes $(ORGANISM) --out runs/pressure/$$testbed; done
	$(BIN)/elk-stress train --testbed quirky --models 6 --probes $(ORGANISM) --out runs/pressure/quirky
	for probe in logistic lda mass_mean; do \
		$(BIN)/elk-stress train $(LORA) --steps 60 --checkpoints 5 --probes $$probe --out runs/lora/$$probe; done
	$(BIN)/elk-stress train $(LORA) --steps 120 --checkpoints 7 --probes ccs --out runs/lora/ccs
	$(BIN)/elk-stress train $(LORA) --steps 60 --checkpoints 5 --probes logistic --modes refit --out runs/lora/refit

install-test: $(INSTALLED_TEST)

test: lint fast-tests

lint: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# one thread each: the workers share the cores. They begin at different files and steal what is left at the end, so that
# what the tests of a file share is made once, not by every worker
FAST := -W error -m "not statistics" -n $(WORKERS) --dist worksteal
fast-tests: $(INSTALLED_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST)

slow: $(INSTALLED_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST) --durations=10

statistics: $(INSTALLED_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -W error -m statistics -n $(WORKERS)

# what the newest releases break or deprecate is for people to read: nothing fails by it
test-newest: | $(NEWEST)/bin/python
	$(NEWEST)/bin/python $(INSTALL) --upgrade -e '.[test]'
	-OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(WORKERS) $(MODEL_TESTS)

bench: $(INSTALLED_BENCH)
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

# the two settings silence what other projects announce about their future; a warning about our pages fails the build
docs: $(INSTALLED_DOCS)
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet

# torch and what it brings are left out: its builds without a GPU differ by index
lock: | $(BIN)/python
	$(BIN)/python $(INSTALL) uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --upgrade \
		--custom-compile-command "make lock" --no-emit-package torch --output-file $(LOCK) > /dev/null
	sed -i.bak -E '/^(cuda|nvidia|triton)/d' $(LOCK) && rm $(LOCK).bak

facts: $(INSTALLED)
	$(PIP) -e '.[lm,facts]'
	$(BIN)/python -m elk_stress.testbeds.collect_facts

clean:
	rm -rf $(VENV) $(NEWEST) site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# the first interpreter that is new enough and can make virtual environments
$(BIN)/python $(NEWEST)/bin/python:
	@for python in $(or $(PYTHON),python3 python3.12 python3.13 python3.11 python3.14 python); do \
		command -v "$$python" > /dev/null || continue; \
		"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || continue; \
		echo "making $(@:/bin/python=) with $$("$$python" --version)"; \
		"$$python" -m venv $(@:/bin/python=); \
		exit 0; \
	done; \
	echo "elk_stress needs Python 3.11 or newer with venv and ensurepip; found none of python3, python3.11 to 3.14." >&2; \
	echo "Install one (on Debian and Ubuntu also the package python3-venv), or say make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; \
	exit 1

$(INSTALLED): pyproject.toml $(LOCK) | $(BIN)/python
	@echo "installing elk_stress and what it needs (some minutes the first time)"
	@$(PIP) -e '.[lm]'
	@touch $@

$(INSTALLED_TEST): $(INSTALLED)
	@echo "installing what the tests need"
	@$(PIP) -e '.[test]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@echo "installing what the site needs"
	@$(PIP) -e '.[docs]'
	@touch $@

$(INSTALLED_BENCH): $(INSTALLED_TEST)
	@echo "installing the rivals"
	@$(PIP) -e '.[test,bench]'
	@touch $@
