# make finetune   set everything up, fine-tune the default recipe, export it to ONNX
# make test       set everything up, run linters, type checker, import contract and the fast tests
# make test-all   everything that must hold before a change lands: make test, and all of the following four
# make test-slow  the slow tests: sanitizers, wheels, a browser, launchers, and every repetition of a fast test
# make test-instruction-sets  the numerical tests with the instructions of other processors
# make gate       fine-tune and export the default recipe anew, compare it with the recorded baseline (EPOCHS=2: shorter)
# make test-nightly  campaigns of hours: many more cases of what the other tests hold
# make lint       linters, type checker, import contract
# make bench-train  training speed against a plain implementation, in one run
# make native     build the native operators again, after a change of qat/native/src
# make sanitize   the native operators' tests with a library that sanitizers watch
# make baseline   record the gate's baseline from the newest run under runs/
# make pretrain   train the checkpoint that the default recipe starts from
# make clean      remove the environment and all caches
VENV ?= .venv
RECIPE ?= recipes/tiny_int8.yaml
BIN := $(VENV)/bin
BASELINE := tests/baselines/tiny_int8_digits.json
# Tests of numbers that depend on the processor's instructions.
NUMERICAL := tests/ops tests/nn tests/quantize tests/models tests/native/test_passes.py tests/native/test_signs.py \
	tests/export/graphs/test_float32.py tests/train/test_batch_norm_reestimation.py tests/train/test_precision.py
AVX2 := $(if $(findstring avx2,$(shell grep -m1 -o avx2 /proc/cpuinfo 2>/dev/null)),avx2,portable)
# Workers as there are cores, and tests that share what they make in one of them.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

# Each test that starts processes loads PyTorch in them: without stored bytecode that takes ten times as long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: finetune test test-all test-slow test-instruction-sets test-nightly lint gate bench-train native sanitize \
	baseline pretrain clean

finetune: $(VENV)/.user
	$(BIN)/qat finetune --recipe $(RECIPE)
	$(BIN)/qat export --onnx

test: lint
	$(PYTEST)

test-all: test test-slow test-instruction-sets gate

test-slow: $(VENV)/.dev
	$(PYTEST) -m "slow and not exhaustive"

# Of a processor without vector instructions, and of one with AVX2 alone; the variables are oneDNN's, PyTorch's and
# the native library's.
test-instruction-sets: $(VENV)/.dev
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default BNEXT_QAT_KERNELS=portable $(PYTEST) $(NUMERICAL)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 BNEXT_QAT_KERNELS=$(AVX2) $(PYTEST) $(NUMERICAL)

test-nightly: $(VENV)/.dev
	$(PYTEST) -m exhaustive

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A folder of its own: the newest run is this one. A drop of 1.0 is 3 of the 360 images on balance. The floor is two images
# below the worst that was seen.
gate: $(VENV)/.user
	rm -rf runs/gate
	$(BIN)/qat finetune --recipe tiny_int8 --set output.dir=runs/gate $(if $(EPOCHS),--set schedule.epochs=$(EPOCHS))
	$(BIN)/qat export --onnx runs/gate/model.onnx --runs runs/gate
	$(BIN)/qat gate runs/gate/model.onnx --baseline $(BASELINE) --max-drop 1.0 --floor 98 --show-flips

bench-train: $(VENV)/.user
	$(BIN)/python -m benchmarks.train $(ARGS)

# A compiler's error is an error here, where a plain install goes on without the library.
native: $(VENV)/.user
	BNEXT_QAT_NATIVE=require $(BIN)/python -m pip install --quiet --no-deps --editable .

sanitize: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow tests/native/test_sanitized.py

baseline: $(VENV)/.user
	$(BIN)/qat export --onnx runs/baseline.onnx
	$(BIN)/qat gate record runs/baseline.onnx -o $(BASELINE)

pretrain: $(VENV)/.user
	$(BIN)/qat pretrain --recipe recipes/tiny_digits_pretrain.yaml

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# A development environment serves users' commands too.
$(VENV)/.user: pyproject.toml
	@[ -e $(VENV)/.dev ] && [ $(VENV)/.dev -nt pyproject.toml ] || .ci/install $(VENV)
	@touch $@

# Collecting the tests stores the bytecode of all that they load, which each worker would compile for itself. A test
# that can't be loaded is not the environment's matter.
$(VENV)/.dev: pyproject.toml
	.ci/install $(VENV) dev
	@$(BIN)/python -m pytest -q --collect-only >/dev/null 2>&1 || true
	@touch $@
