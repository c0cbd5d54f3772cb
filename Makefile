# Short names for the scripts in tools/utils, which need only bash.
.PHONY: help setup demo test test-fast bench faults
help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1 - \2/p' $(MAKEFILE_LIST)
setup: ## install what is missing: system packages, .venv, Caffe
	@tools/utils/setup.sh
demo: ## set up, then train a sparse JacintoNet11 on real digits with real Caffe, and report
	@tools/utils/demo.sh
test: ## set up, then run all checks and tests
	@tools/utils/test.sh
test-fast: ## set up, then run all checks and the quick tests
	@tools/utils/test.sh --fast
bench: ## set up, then run the benchmarks of docs/benchmarks.md
	@tools/utils/bench.sh
faults: ## set up, then kill, fill and damage real trainings for ten minutes, and compare them with undisturbed ones
	@tools/utils/faults.sh
