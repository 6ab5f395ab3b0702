# Every target sets up what it lacks, so each of them may be the first command in a fresh checkout.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
EXTRAS := all

# Overridable: `make run PYTHON=python3.12`, `make run TORCH=torch` (the newest build, CUDA where pip offers it),
# `make checkpoints MINUTES=120`. The choice of TORCH is remembered in .venv for the calls that follow.
ifndef PYTHON
PYTHON := $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
endif
TORCH ?= $(or $(shell cat $(VENV)/torch.txt 2>/dev/null),torch==2.13.0)
MINUTES ?= 30
STAGES := autoencoder decoder decoder_norms photo_autoencoder photo_decoder text detector base teacher kd turbo distilled

# More torch threads than cores make everything many times slower.
ifndef OMP_NUM_THREADS
OMP_NUM_THREADS := $(shell $(or $(PYTHON),false) -I snapgen_core/threads.py)
endif
export OMP_NUM_THREADS
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export OPENBLAS_NUM_THREADS ?= $(OMP_NUM_THREADS)

.DEFAULT_GOAL := help
.PHONY: help venv run test lab demo checkpoints kdtable fewsteps clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

venv: $(STAMP) ## create .venv and install the package with everything it needs

run: $(STAMP) ## run the notebooks and draw the first pictures
	$(BIN)/snapgen run

# As many workers as cores, each with one thread: a test's small networks gain little from a second one.
test: $(STAMP) ## run all tests, then every notebook against its committed outputs
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses $(OMP_NUM_THREADS) --dist loadfile
	$(BIN)/python -m pytest notebooks --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 600

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

demo: $(STAMP) ## open the studio to browsers of this machine, at http://localhost:8866/
	$(BIN)/snapgen demo

checkpoints: $(STAMP) ## train every stage again, MINUTES each, and ship the weights
	@set -e; for stage in $(STAGES); do \
		$(BIN)/snapgen train $$stage --minutes $(MINUTES) --run-dir exports/runs/tiny/$$stage --ship; \
	done

# The rows of notebook 04's tables: continuations of one student, 500 steps of 256, with three seeds each. It is a base student
# early in its training, where a short run still shows. In the second table half of the scenes carry a wrong caption. All of it
# takes some twelve hours on two cores; the results here come from an H100, fp32 products in TensorFloat-32 in the second table.
# What has its result is not run again: to measure anew, remove exports/results/kd*/*-seed-* and exports/runs/tiny/kd-*.
KD_START := exports/runs/tiny/base-early/weights/base
KD_task := --constant 0,0
KD_output := --constant 1,0
KD_features := --constant 1,0.03
KD_constant := --constant 10,0.03
KD_ROWS := task output features scaled constant-10,0.03
KD_RUNS := $(foreach seed,0 1 2,$(foreach row,kd/task kd/scaled $(addprefix kd-mis/,$(KD_ROWS)),exports/results/$(row)-seed-$(seed).json))
COMMA := ,
RELAYS := $(foreach levels,0-0.5 0.5-0.7 0.7-0.85 0.85-0.95 0.95-1,exports/results/relay/$(levels).json)
kdtable: $(RELAYS) exports/results/kd/start.json $(KD_RUNS) ## make notebook 04's results: train and score its rows
exports/results/relay/%.json: | $(STAMP)
	@mkdir -p $(@D)
	$(BIN)/snapgen evaluate --stage base --relay $(subst -,$(COMMA),$*) --images 50 --json $@
# Asked for by the recipes that need it, not as a prerequisite: results that are there need no early student.
$(KD_START): | $(STAMP)
	$(BIN)/snapgen train base --steps 3500 --no-score --run-dir exports/runs/tiny/base-early
exports/results/kd/start.json: | $(STAMP)
	@mkdir -p $(@D)
	@$(MAKE) --no-print-directory $(KD_START)
	$(BIN)/snapgen evaluate --stage base --checkpoint $(KD_START) --images 100 --json $@
define kd_row
	@mkdir -p $(@D)
	@$(MAKE) --no-print-directory $(KD_START)
	$(BIN)/snapgen train kd --student $(KD_START) --seed $(lastword $(subst -, ,$*)) --steps 500 --batch 256 --rate 0.0008 --no-score --run-dir exports/runs/tiny/$(notdir $(@D))-$* $(KD_$(firstword $(subst -, ,$*))) $(KD_DATA)
	$(BIN)/snapgen evaluate --stage kd --checkpoint exports/runs/tiny/$(notdir $(@D))-$*/weights/kd --images 100 --json $@
endef
exports/results/kd/%.json: | $(STAMP)
	$(kd_row)
exports/results/kd-mis/%.json: KD_DATA := --mislabel 0.5
exports/results/kd-mis/%.json: | $(STAMP)
	$(kd_row)

# The short runs behind notebook 05's ablation: 300 turns of the student each. A run that has its result is not run again.
FEW_kd := --only kd --steps 300
FEW_adversarial := --only adversarial --steps 400
FEW_both := --steps 400
fewsteps: $(foreach part,kd adversarial both,exports/results/few-steps-only-$(part).json) ## train and score the runs behind notebook 05's ablation
exports/results/few-steps-only-%.json: | $(STAMP)
	$(BIN)/snapgen train distilled $(FEW_$*) --no-score --run-dir exports/runs/tiny/distilled-only-$*
	$(BIN)/snapgen evaluate --stage distilled --checkpoint exports/runs/tiny/distilled-only-$*/weights/distilled --images 50 --variety --json $@

clean: ## remove .venv and caches (never shipped data nor training runs)
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache data/cache exports/runs/notebooks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One pip call for torch and the package: pip then keeps the CPU build of torch where one is offered.
$(STAMP): pyproject.toml $(VENV)/torch.txt
	@test -n "$(PYTHON)" || { echo "snapgen: needs Python 3.11 or newer; name one: make run PYTHON=/path/to/python"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet $(TORCH) -e ".[$(EXTRAS)]"
	@touch $@

# Changes only when TORCH does, so that another TORCH installs again and the same one does not.
$(VENV)/torch.txt: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
