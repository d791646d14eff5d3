# make setup   a virtual environment in .venv, the package with its compiled core, the small real model
# make demo    fine-tune that model on built-in data and print base against tuned (about 10 minutes on two cores)
# make test    the whole test suite
# make bench   Lilliput beside its peers, an hour; BENCH="quantize decode --threads 2" for some (docs/benchmarks.md)
# make lint    ruff, mypy, clang-format     make native-test   the compiled core's own tests under the sanitizers

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc CMakeLists.txt -type f 2>/dev/null)
MODEL  := smollm2-135m-instruct

.PHONY: setup demo test lint format native-test bench clean

setup: $(VENV)/.installed
	$(BIN)/lilliput pull $(MODEL)

# An editable install: changes in src/ count at once; changes in csrc/ are compiled again here.
$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/.made
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	@touch $@

# lilliput itself is installed already: this adds only what the extras name.
$(VENV)/.test: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt "lilliput[test,lint]"
	@touch $@

demo: setup
	$(BIN)/lilliput demo -o runs/demo

# Most of a test is Python on one core, so that two files go at once; passive: threads that wait for each other leave the
# cores to the others.
test: setup $(VENV)/.test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h,$(NATIVE))

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cpp %.h,$(NATIVE))

native-test:
	cmake -S . -B build/native-test -DLILLIPUT_TESTS=ON -DLILLIPUT_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/native-test --parallel
	ctest --test-dir build/native-test --output-on-failure

bench: setup
	$(PIP) install --quiet --constraint constraints.txt "lilliput[bench]"
	$(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf $(VENV) build runs
