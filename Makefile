# smol_post: `make help` lists the targets. Everything runs from the .venv that make makes.
RECIPE ?= recipes/tiny
RUN ?= runs/$(notdir $(patsubst %/,%,$(RECIPE)))
ARGS ?=
LAUNCH ?=
WORKERS ?= 2
MINUTES ?= 10
PYTHON ?= python3.11

BIN := .venv/bin
READY := .venv/.ready
STAGES := base long-context mid sft apo merge
SYSTEM := $(shell uname -s)

comma := ,
EXTRAS := dev$(comma)eval$(comma)generate$(if $(filter Linux,$(SYSTEM)),$(comma)deepspeed$(comma)scale)

.DEFAULT_GOAL := help
.PHONY: help setup pipeline prepare $(STAGES) evals report check test lint units integration fuzz audit bench reproduce soak docs format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+( [a-z-]+)*:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14
	@echo "long-context, mid, sft, apo, merge: one stage"
	@echo "variables: RECIPE=$(RECIPE) RUN=$(RUN) ARGS=\"key=value ...\" LAUNCH=\"accelerate launch --config_file ...\" WORKERS=$(WORKERS) MINUTES=$(MINUTES)"

setup: $(READY)  ## make .venv with the tested versions
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $(READY)

pipeline: $(READY)  ## the whole chain of RECIPE, evaluated, with a report
	$(BIN)/smol-post run $(RECIPE) --run-dir $(RUN)

prepare: $(READY)  ## tokenise, pack and count the data of RECIPE (a folder or a file), without weights
	$(BIN)/smol-post prepare $(RECIPE) --run-dir $(RUN) $(ARGS)

$(STAGES): $(READY)
	$(if $(LAUNCH),PATH="$(CURDIR)/$(BIN):$$PATH" $(LAUNCH) smol_post/$(subst -,_,$@).py,$(BIN)/smol-post $@) \
		--config $(RECIPE) --run-dir $(RUN) $(ARGS)

evals report: $(READY)  ## evaluate what is whole; write report.html
	$(BIN)/smol-post $@ $(RECIPE) --run-dir $(RUN) $(if $(filter evals,$@),$(ARGS))

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)
check: lint units  ## format, lint, types, unit and golden tests

test: units integration  ## every test, the slow ones too

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

units: $(READY)
	$(PYTEST) --dist worksteal tests/unit tests/golden

integration: $(READY)
	$(PYTEST) --dist loadfile tests/integration

AUDIT := .venv/audit
audit:  ## known vulnerabilities of constraints.txt, by pip-audit in an environment of its own
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
		$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1; } || true
	@PATH="$(CURDIR)/$(AUDIT)/bin:$$PATH" $(PYTHON) tools/audit.py constraints.txt

fuzz: $(READY)  ## odd recipes and rows for MINUTES, each round with others; the first that is not refused well ends it
	end=$$(( $$(date +%s) + 60 * $(MINUTES) )); while [ $$(date +%s) -lt $$end ]; do \
		FUZZ_EXAMPLES=1000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -x tests/unit/test_fuzz.py || exit 1; done

bench: $(READY)  ## measure against the peers; benchmarks/results
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks.run $(ARGS)

reproduce: $(READY)  ## tiny and its ablations over three seeds, an hour or two; docs/reproduction.md
	$(BIN)/python -m benchmarks.reproduction $(ARGS)

soak: $(READY)  ## kill the tiny chain at least 50 times and compare the end, an hour; docs/soak.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak $(ARGS)

docs: $(READY)  ## write docs/keys.md and docs/recipe.schema.json from the recipe classes
	$(BIN)/python -m tools.keys

format: $(READY)  ## format and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv and caches; runs stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
