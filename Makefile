# The targets; each script says at its top what it does.
.PHONY: help demo test bench study fuzz goldens checkpoint clean-demo

help: ## What can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## The whole loop on real pictures from ordinary packages, on this machine; ends with a report
	@demo/run.sh

test: ## Installs what the tests need, then format, lints, documentation and all tests
	@scripts/setup.sh test
	@scripts/test.sh

bench: ## All benches, or one: make bench NAME=fetch
	@scripts/bench.sh $(NAME)

study: ## Whether bootstrapping helps, on a corpus of known truth: make study CORPUS=folder SERVER=serve.py [SEEDS=5] [JOBS=2] (hours)
	@scripts/study.sh "$(CORPUS)" "$(SERVER)" -- --seeds $(or $(SEEDS),5) --jobs $(or $(JOBS),2)

goldens: ## Makes the models' golden files again with transformers (installs torch into .venv-goldens)
	@scripts/setup.sh goldens
	@.venv-goldens/bin/python workers/models/tests/goldens/make_goldens.py
	@.venv-goldens/bin/python workers/models/tests/goldens/make_checkpoints.py

fuzz: ## Fuzzes the parsers of foreign bytes for ten minutes each (needs a nightly toolchain)
	@scripts/fuzz.sh

checkpoint: ## Makes the small checkpoints of the tests again, from the demo's annotated pictures
	@scripts/checkpoint.sh

clean-demo: ## Removes the demo's site, captions and runs; the downloaded packages stay
	@find .cache/demo -mindepth 1 -maxdepth 1 ! -name packages -exec rm -rf {} + 2>/dev/null || true
