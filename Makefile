# make finetune   set everything up, fine-tune the default recipe, export it to ONNX
# make test       set everything up, run linters, type checker, import contract and all tests
# make gate       fine-tune and export the default recipe anew, compare it with the recorded baseline (EPOCHS=2: shorter)
# make bench-train  training speed against a plain implementation, in one run
# make native     build the native operators again, after a change of qat/native/src
# make sanitize   the native operators' tests with a library that sanitizers watch
# make baseline   record that baseline from the newest run under runs/
VENV ?= .venv
RECIPE ?= recipes/tiny_int8.yaml
BIN := $(VENV)/bin
BASELINE := tests/baselines/tiny_int8_digits.json

.PHONY: finetune test lint gate bench-train native sanitize baseline pretrain clean

finetune: $(VENV)/.user
	$(BIN)/qat finetune --recipe $(RECIPE)
	$(BIN)/qat export --onnx

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A folder of its own: the newest run is this one. The floor is two images below the worst that was seen.
gate: $(VENV)/.user
	rm -rf runs/gate
	$(BIN)/qat finetune --recipe tiny_int8 --set output.dir=runs/gate $(if $(EPOCHS),--set schedule.epochs=$(EPOCHS))
	$(BIN)/qat export --onnx runs/gate/model.onnx --runs runs/gate
	$(BIN)/qat gate runs/gate/model.onnx --baseline $(BASELINE) --max-drop 1.0 --floor 98

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
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A development environment serves users' commands too.
$(VENV)/.user: pyproject.toml
	@[ -e $(VENV)/.dev ] && [ $(VENV)/.dev -nt pyproject.toml ] || .ci/install $(VENV)
	@touch $@

$(VENV)/.dev: pyproject.toml
	.ci/install $(VENV) dev
	@touch $@
