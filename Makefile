# Everything runs in .venv. These targets fill it from locks with hashes.
# `make` alone explains the targets.

ACCEL ?= cpu
PYTHON_MESSAGE = "ruiji needs Python 3.11 to 3.13 with venv: on Debian or Ubuntu run  apt-get install python3 python3-venv"
# The first of these that is 3.11 to 3.13 and can make a virtual environment: the machine's own, to which python3-venv belongs.
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo $$p; break; }; done)
PIP = .venv/bin/python -m pip --disable-pip-version-check --no-input -q
RUIJI = .venv/bin/ruiji
# Extras that `make setup` installs too; an image has all but the Redis.
BESIDE = requirements/embedded.lock requirements/serve.lock requirements/turned.lock
# What is compiled if there is a compiler.
COMPILED := $(wildcard pipeline/_*.c search/ranking/_*.c workers/_*.c)
# Three at a time, also on two cores: many tests wait for processes. A file stays together, for what its tests share.
PYTEST = .venv/bin/python -m pytest -n 3 --dist loadfile

# If it is set, each of the many commands of a test compiles all modules again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo mnist test test-all browser test-page test-compose chaos fuzz contract bench bench-search bench-serve check-models audit lint types format run redis worker up join scale list \
	enqueue status search ruiji logs down certificates lock clean

help: ## Explain the targets
	@echo "ruiji: from a sorted list of images to ranked look-alikes. Settings come from options, RUIJI_* variables, .env"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/made:
	@[ -n "$(PYTHON)" ] || { echo $(PYTHON_MESSAGE) >&2; exit 1; }
	@echo "making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@touch $@

# Tests import a part of what is installed for them, and Python compiles that part then. To compile all of it here takes as
# long as the rest of the installation.
# One stamp per lock; each lock contains the smaller ones, and comes first. The image installs cpu.lock or gpu.lock, the
# service and the hashes; here the embedded Redis comes along.
.venv/cpu: requirements/cpu.lock pyproject.toml $(COMPILED) $(BESIDE) .venv/made
.venv/demo: requirements/demo.lock pyproject.toml $(COMPILED) .venv/made
.venv/dev: requirements/dev.lock pyproject.toml $(COMPILED) .venv/made
.venv/cpu .venv/demo .venv/dev:
	@[ ! -e .venv/gpu ] || { echo "this .venv was set up with ACCEL=gpu; run  make clean  first" >&2; exit 1; }
	@echo "installing $<"
	@$(PIP) install $(if $(filter .venv/dev,$@),--no-compile) --require-hashes -r $< $(patsubst %,-r %,$(filter $(BESIDE),$^))
	@rm -f $(COMPILED:.c=.*.so)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

.venv/gpu: requirements/gpu.lock requirements/torch.txt pyproject.toml $(COMPILED) $(BESIDE) .venv/made
	@[ ! -e .venv/cpu ] && [ ! -e .venv/demo ] && [ ! -e .venv/dev ] \
		|| { echo "this .venv was set up with ACCEL=cpu; run  make clean  first" >&2; exit 1; }
	@echo "installing $< and torch (several GB)"
	@$(PIP) install --require-hashes -r $< $(BESIDE:%=-r %)
	@$(PIP) install -r requirements/torch.txt
	@rm -f $(COMPILED:.c=.*.so)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

.venv/torch: requirements/torch.txt .venv/dev
	@echo "installing torch"
	@$(PIP) install --no-compile -r $<
	@touch $@

# Beside dev, whose versions they are locked to; torch is there for the peer that loads with it.
.venv/bench: requirements/bench.lock .venv/torch
.venv/map: requirements/map.lock .venv/dev
.venv/bench .venv/map:
	@echo "installing $<"
	@$(PIP) install --no-compile --require-hashes -r $<
	@touch $@

# The lock is whole but for torch, which is there already.
.venv/mnist: requirements/mnist.lock .venv/torch
	@echo "installing $<"
	@$(PIP) install --no-compile --require-hashes --no-deps -r $<
	@touch $@

ifeq ($(filter $(ACCEL),cpu gpu),)
$(error ACCEL is cpu or gpu, not '$(ACCEL)')
endif
setup: .venv/$(ACCEL) ## Fill .venv (ACCEL=cpu: onnxruntime, no torch; ACCEL=gpu: onnxruntime-gpu and torch)

demo: .venv/demo ## From 1,797 digits to ranked look-alikes, on embedded Redis and the CPU (SERVE=1: and a page)
	@.venv/bin/python -m examples.digits.demo $(if $(SERVE),--serve)

mnist: .venv/mnist ## Train on MNIST, search its test set, measure (FULL=1: longer; ARGS="--seed 1"; DATA=folder of the four files)
	@.venv/bin/python -m examples.mnist all $(if $(DATA),--from "$(DATA)") $(if $(FULL),--full) $(ARGS)

test: .venv/dev ## The tests; those that need torch, UMAP, a GPU or compose are skipped
	$(PYTEST) -m "not slow and not compose and not chaos" $(ARGS)

test-all: .venv/mnist .venv/map ## All tests that can run here, torch and UMAP included; see  make chaos  for the long ones
	$(PYTEST) -m "not compose and not chaos" $(ARGS)

# Debian's, where this may install packages; else the one that Playwright brings, whose driver needs libatomic1.
browser: .venv/dev ## A Chromium for the tests of the pages, if there is none
	@.venv/bin/playwright --version >/dev/null 2>&1 \
		&& { command -v chromium || command -v chromium-browser || command -v google-chrome; } \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -q update && apt-get -qy install --no-install-recommends chromium libatomic1; } \
		|| .venv/bin/playwright install chromium \
		|| { echo "no Chromium could be installed: on Debian or Ubuntu run  apt-get install chromium libatomic1" >&2; exit 1; }

test-page: browser ## The tests of the service's pages, in Chromium, which is installed if it is missing
	.venv/bin/python -m pytest tests/serve/page $(ARGS)

chaos: .venv/dev ## Kills, lost Redis, full disks: the full numbers, for an hour (SHORT=1: ten minutes)
	CHAOS=$(if $(SHORT),short,long) .venv/bin/python -m pytest -v -m chaos tests/chaos tests/pipeline/plans/test_interleavings.py tests/search/duplicates $(ARGS)

# The same SEED tries the same examples as long as the code is the same.
fuzz: .venv/dev ## Property tests with other examples than those of make test, and FUZZ=40 times as many (SEED=1, ARGS=FILE)
	@seed=$$(echo $(or $(SEED),$$(od -An -N4 -tu4 /dev/urandom))); echo "SEED=$$seed"; \
	FUZZ=$(or $(FUZZ),40) $(PYTEST) -m "hypothesis and not chaos" --hypothesis-seed=$$seed $(ARGS)

# Their packages come before those of .venv, which serves the rest.
contract: .venv/dev ## Does the queue fit other releases? (VERSIONS="celery==5.6.* kombu==5.6.*"; else the newest)
	@.venv/bin/python -m venv --clear build/contract
	@build/contract/bin/python -m pip --disable-pip-version-check -q install $(or $(VERSIONS:%='%'),--pre 'celery[redis]' kombu)
	@.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(build/contract/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	@build/contract/bin/python -c 'from importlib.metadata import version; print(*(f"{name} {version(name)}" \
		for name in ("celery", "kombu", "redis")), sep=", ")'
	build/contract/bin/python -m pytest -q -p no:cacheprovider tests/pipeline/queue/test_contract.py $(ARGS)

audit: .venv/made ## Compare a lock with the published advisories (needs the network)
	@.venv/bin/python -m venv build/audit
	@build/audit/bin/python -m pip -q install pip-audit
	build/audit/bin/pip-audit --disable-pip --require-hashes -r requirements/cpu.lock

bench: .venv/bench ## Measure against peers, for about an hour (PART=queue: one part; docs/performance.md)
	.venv/bin/python -m benchmarks.extraction $(PART)

test-compose: .venv/dev ## The tests that start containers, one after the other
	.venv/bin/python -m pytest -m compose tests/compose $(ARGS)

bench-search: .venv/bench ## Measure search, about ten minutes (PART=resident|million|commands|near-duplicates|groups|copies|turned)
	.venv/bin/python -m benchmarks.search $(PART)

bench-serve: .venv/bench ## Measure the service, about ten minutes (PART=one|many|pictures|memory|groups|map; needs wrk and Chromium)
	.venv/bin/python -m benchmarks.serve $(PART)

build/models/made: requirements/models.txt pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo $(PYTHON_MESSAGE) >&2; exit 1; }
	@$(PYTHON) -m venv build/models
	@build/models/bin/python -m pip --disable-pip-version-check --no-input -q install -r $< .[cpu]
	@touch $@

check-models: build/models/made ## Compare with torchvision, transformers, timm and open_clip (6 GB, 5 minutes of CPU time; RECORD=1)
	@build/models/bin/python -m tests.models.libraries $(if $(RECORD),--record)
	@OMP_NUM_THREADS=1 build/models/bin/python -m tests.models.architectures $(if $(RECORD),--record)
	@build/models/bin/python -m tests.models.words $(if $(RECORD),--record)
	@OMP_NUM_THREADS=1 build/models/bin/python -m tests.models.towers $(if $(RECORD),--record)

lint: .venv/dev ## Check style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/dev ## Check types
	.venv/bin/mypy

format: .venv/dev ## Format the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Uses what is installed already, else installs the light set-up.
$(RUIJI):
	@$(MAKE) --no-print-directory setup

run: $(RUIJI) ## Everything on this machine: Redis, workers, enqueue, wait
	$(RUIJI) run $(ARGS)

redis: $(RUIJI) ## The embedded Redis, until Ctrl-C
	$(RUIJI) redis $(ARGS)

worker: $(RUIJI) ## A worker on this machine, until Ctrl-C
	$(RUIJI) worker $(ARGS)

# Each of these says whether it uses docker compose or this machine alone.
up: ## Start Redis, reducers, WORKERS=2 workers (GPU=1: one a GPU; SERVE=1: and the page): in containers if docker answers, else here
	@deploy/stack.sh up $${WORKERS:+"$$WORKERS"}

join: ## Start WORKERS=2 workers for the Redis of another host (REDIS_HOST=..., GPU=1)
	@deploy/stack.sh join $${WORKERS:+"$$WORKERS"}

scale: ## Change to WORKERS=5
	$(if $(WORKERS),,$(error say how many: make scale WORKERS=5))@deploy/stack.sh scale "$$WORKERS"

list: ## Write the object list of the media folder
	@deploy/stack.sh ruiji list $(ARGS)

enqueue: ## Publish one task per image of the list (ARGS=--wait follows to the end)
	@deploy/stack.sh ruiji enqueue $(ARGS)

status: ## Show what is done, failed, running and pending
	@deploy/stack.sh ruiji status $(ARGS)

search: ## Look-alikes of QUERY=photo.jpg
	@deploy/stack.sh ruiji search $${QUERY:+"$$QUERY"} $(ARGS)

ruiji: ## Any other command: make ruiji ARGS="failures --format csv"
	@deploy/stack.sh ruiji $(or $(ARGS),--help)

logs: ## Follow the log of the workers
	@deploy/stack.sh logs

down: ## Stop what make up started; nothing is lost
	@deploy/stack.sh down

certificates: ## For several hosts: a CA and the certificate of REDIS_HOST, in secrets/
	$(if $(REDIS_HOST),,$(error say which host: make certificates REDIS_HOST=name))@deploy/stack.sh certificates "$$REDIS_HOST"

# One version of a package for all Pythons: numpy's decides bits, and workers of one plan must have the same.
COMPILE = .venv/bin/uv pip compile -q --universal --fork-strategy fewest --generate-hashes --no-emit-index-url --python-version 3.11

lock: .venv/made ## Resolve the dependencies anew (needs the package uv)
	@$(PIP) install uv
	@for set in "dev cpu heic text embedded demo plot serve turned hub dev" "demo cpu heic text embedded demo serve turned" \
		"cpu cpu heic text" "bench cpu heic text embedded bench"; do \
		set -- $$set; name=$$1; shift; \
		$(COMPILE) $$(printf -- '--extra %s ' "$$@") requirements/build.in pyproject.toml \
			-c requirements/onnxruntime.in $$([ $$name = dev ] || echo "-c requirements/dev.lock") \
			--custom-compile-command "make lock" -o requirements/$$name.lock || exit 1; \
	done
	@$(COMPILE) --extra cpu --extra heic --extra text --extra embedded --extra plot --extra mnist --excludes requirements/torch-apart.in \
		requirements/build.in pyproject.toml -c requirements/onnxruntime.in -c requirements/dev.lock \
		--custom-compile-command "make lock" -o requirements/mnist.lock
	@$(COMPILE) --extra heic --extra text requirements/build.in requirements/gpu.in pyproject.toml -c requirements/onnxruntime.in -c requirements/dev.lock \
		--custom-compile-command "make lock" -o requirements/gpu.lock
	@for extra in embedded map serve turned; do \
		$(COMPILE) requirements/$$extra.in -c requirements/dev.lock --custom-compile-command "make lock" \
			-o requirements/$$extra.lock || exit 1; \
	done

clean: ## Remove .venv and what was built; no features, no data
	rm -rf .venv build demo-output *.egg-info $(COMPILED:.c=.*.so) .pytest_cache .mypy_cache .ruff_cache .hypothesis
