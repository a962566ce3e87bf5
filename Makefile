# The contract of the checks. `.ci/run` = a fresh environment, then test, lint and type. Everything here runs on a CPU.
PYTHON ?= python
SEEDS ?= 0 1 2
RUNS ?= runs
LAUNCH = accelerate launch --config_file accelerate_configs/cpu.yaml
export HF_HUB_DISABLE_TELEMETRY = 1
export TRL_EXPERIMENTAL_SILENCE = 1

.PHONY: format lint type test slow slow-tests slow-learning slow-kill slow-distributed recipes results compare preferences mutants mutants-functional invariants-trl112 seams-latest

format:  ## rewrite the sources in the house style
	ruff check --fix .
	ruff format .

lint:  ## fail where `make format` would change something
	ruff check .
	ruff format --check .

type:
	mypy rlhf_ext/functional

test:  ## one case of each kind, offline, no GPU
	pytest

slow: slow-tests slow-learning slow-kill slow-distributed  ## matrices and learning runs; each part takes at most 60 minutes

slow-tests:
	pytest -m slow -n 0 --ignore tests/distributed

slow-distributed:  ## two processes against one: DDP, ZeRO-2, ZeRO-3, FSDP2; the tables go to docs/scaling.md
	RESULTS=benchmarks/results pytest -m slow -n 0 tests/distributed; \
	status=$$?; $(PYTHON) benchmarks/results.py; exit $$status

slow-kill:  ## 20 PPO runs killed at random times, on one and on two processes, and resumed to the same bits
	$(PYTHON) benchmarks/kill_resume.py --result benchmarks/results/kill_resume.json; \
	status=$$?; $(PYTHON) benchmarks/results.py; exit $$status

slow-learning:  ## the quickstart meets its goals on every seed; the table goes to docs/results.md
	for seed in $(SEEDS); do rlhf-ext quickstart --seed $$seed --output_dir $(RUNS)/quickstart-$$seed || exit 1; done
	$(PYTHON) benchmarks/quickstart_seeds.py --runs $(RUNS) --seeds $(SEEDS) --result benchmarks/results/quickstart.json; \
	status=$$?; $(PYTHON) benchmarks/results.py; exit $$status

recipes:  ## each recipe, two steps, from its own YAML
	pytest -n 0 tests/test_recipes.py

results:  ## rewrite the tables of docs/ from benchmarks/results/*.json
	$(PYTHON) benchmarks/results.py

compare:  ## policy-gradient trainers on the toy world, TRL's among them; what is done already is not run again
	$(PYTHON) benchmarks/compare.py --tune --output_dir $(RUNS)/compare --peer_environment $(RUNS)/trl112
	$(PYTHON) benchmarks/compare.py --seeds 5 --output_dir $(RUNS)/compare --peer_environment $(RUNS)/trl112 \
	--result benchmarks/results/compare.json --plot docs/compare.png
	$(PYTHON) benchmarks/results.py

preferences:  ## reward models on the toy world, truth known; what is done already is not run again
	$(PYTHON) benchmarks/preferences.py --seeds 5 --output_dir $(RUNS)/preferences
	$(PYTHON) benchmarks/preferences_report.py --runs $(RUNS)/preferences \
	--result benchmarks/results/preferences.json --plot docs/preferences.png
	$(PYTHON) benchmarks/results.py

mutants:  ## bring each pitfall back by one line: its test in tests/invariants/ must turn red; docs/invariants.md
	$(PYTHON) benchmarks/mutants_invariants.py --result benchmarks/results/mutants.json; \
	status=$$?; $(PYTHON) benchmarks/results.py; exit $$status

mutants-functional:  ## break each formula on purpose: a test must notice
	$(PYTHON) benchmarks/mutants.py

invariants-trl112:  ## the same checks on TRL 1.12's PPO, in an environment of its own; docs/invariants.md
	$(PYTHON) benchmarks/invariants_trl112.py --environment $(RUNS)/trl112 \
	--result benchmarks/results/invariants_trl112.json && $(PYTHON) benchmarks/results.py

seams-latest:  ## the newest TRL in front of the installed one: which seams broke?
	work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && pip install -q --no-deps --upgrade --target "$$work" trl \
	&& PYTHONPATH="$$work" $(PYTHON) -c "import trl; print('trl', trl.__version__)" \
	&& PYTHONPATH="$$work" $(PYTHON) -m pytest -n 0 tests/test_seams.py
