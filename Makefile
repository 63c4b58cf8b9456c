# make finetune   set everything up, fine-tune the default recipe, export it to ONNX
# make test       set everything up, run linters, type checker, import contract and all tests
VENV ?= .venv
RECIPE ?= recipes/tiny_int8.yaml
BIN := $(VENV)/bin

.PHONY: finetune test lint pretrain clean

finetune: $(VENV)/.user
	$(BIN)/qat finetune --recipe $(RECIPE)
	$(BIN)/qat export --onnx

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

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
