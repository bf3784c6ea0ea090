# `make` lists what there is.
PYTHON ?= python3
PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check
BUILDER ?= docker build
DEPLOY := .venv/deploy/bin

.DEFAULT_GOAL := help
.PHONY: help up down reset demo test lint format api-docs fuzz bench bench-report bench-review bench-costs bench-scale profile backup restore chaos image lint-deploy sbom audit clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

up: .venv/.runtime  ## start everything, in the foreground (PORT=8000 FLOWER_PORT=5555)
	@.venv/bin/python -m stack up

down: .venv/.runtime  ## stop everything
	@.venv/bin/python -m stack down

reset: .venv/.runtime  ## stop everything and forget data, secrets and logs
	@.venv/bin/python -m stack reset

demo: .venv/.runtime  ## cast votes while `make up` runs, and watch them being counted
	@.venv/bin/python -m stack.demo $(ARGS)

# Where it is set, each of the hundreds of processes that the tests start would compile the product anew.
test: export PYTHONDONTWRITEBYTECODE :=
test: .venv/.dev  ## run the tests (ARGS="-k closing")
	@.venv/bin/python -m stack run -- python -m pytest $(ARGS)

lint: .venv/.dev  ## check style, types, layers and migrations
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/lint-imports
	@# Compares models with files; the URL keeps it from asking whatever server runs at the usual port.
	DATABASE_URL=postgres://127.0.0.1:1/none .venv/bin/python -W ignore manage.py makemigrations --check --dry-run

format: .venv/.dev  ## bring the code into shape
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

api-docs: .venv/.runtime  ## write docs/openapi.yaml and docs/postman.json anew
	@DATABASE_URL=postgres://127.0.0.1:1/none .venv/bin/python -W ignore manage.py write_api_docs

fuzz: .venv/.dev  ## let schemathesis look for answers that the schema does not know (ARGS=...)
	@.venv/bin/python -m stack run -- python -m tests.fuzz $(ARGS)

bench: .venv/.dev  ## measure the pipeline beside its peers and limits, in ten minutes (ARGS=...)
	@.venv/bin/python -m bench $(ARGS)

bench-report: .venv/.bench  ## write docs/performance.md and its plots from what `make bench` measured
	@.venv/bench/bin/python -m bench.report

bench-review: .venv/.runtime  ## measure rulings and rules in a table of ten million votes (ARGS=...)
	@.venv/bin/python -m stack run -- python -m bench.review $(ARGS)

bench-costs: .venv/.runtime  ## measure what one vote costs each part (ARGS=...)
	@.venv/bin/python -m bench.costs $(ARGS)

bench-scale: .venv/.runtime  ## measure large tables, many polls, backlogs, memory: half an hour, 15 GB (ARGS=...)
	@.venv/bin/python -m bench.scale $(ARGS)

profile: .venv/.runtime  ## show where the time of a vote goes, hop by hop (ARGS=...)
	@.venv/bin/python -m bench.hops $(ARGS)

backup: .venv/.runtime  ## copy database and broker definitions into .local/backups (ARGS="--to /mnt --with-secrets")
	@.venv/bin/python -m stack run -- python -m stack.backup backup $(ARGS)

restore: .venv/.runtime  ## put a backup back, while Nexus is stopped (FROM=.local/backups/... ARGS=--replace)
	@test -n '$(FROM)' || { echo "Which backup? make restore FROM=.local/backups/..."; exit 1; }
	@.venv/bin/python -m stack run -- python -m stack.backup restore '$(FROM)' $(ARGS)

chaos: .venv/.dev  ## break everything under load: does every 202 count exactly once? (ARGS="--list")
	@.venv/bin/python -m chaos $(ARGS)

image:  ## build the container image (BUILDER="buildah build")
	$(BUILDER) --tag nexus .

lint-deploy: .venv/.deploy  ## check Dockerfile, compose files, Kubernetes manifests and workflows
	$(DEPLOY)/hadolint Dockerfile
	$(DEPLOY)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml deploy/compose.monitoring.yml
	$(DEPLOY)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(DEPLOY)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(DEPLOY)/zizmor --offline --quiet .github
	@# The others are kinds that Kubernetes itself does not know.
	$(DEPLOY)/kubernetes-validate --strict --quiet $(filter-out %/kustomization.yaml %/worker-scaling.yaml,$(wildcard deploy/kubernetes/*.yaml))

sbom: .venv/.deploy  ## write sbom.cdx.json: what the product runs on, down to the last package
	@rm -rf .venv/product && .venv/bin/python -m venv .venv/product
	@.venv/product/bin/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	$(DEPLOY)/cyclonedx-py environment --output-reproducible --output-file sbom.cdx.json .venv/product
	@rm -rf .venv/product

audit: .venv/.deploy  ## ask PyPI for known flaws of what the product runs on
	$(DEPLOY)/pip-audit --requirement requirements.txt

clean:  ## stop everything; remove .venv, caches and downloaded packages
	@test ! -x .venv/bin/python || .venv/bin/python -m stack down
	rm -rf .venv .local/packages .local/fronts .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

.venv/bin/python:
	@command -v '$(PYTHON)' > /dev/null || { echo "'$(PYTHON)' is not there. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, and '$(PYTHON)' is older. Name a newer one: make PYTHON=python3.12"; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2> /dev/null || { echo "'$(PYTHON)' can't make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Making a virtual environment in .venv ..."
	@'$(PYTHON)' -m venv --clear .venv

.venv/.runtime: requirements.txt | .venv/bin/python
	@echo "Installing requirements.txt ..."
	@$(PIP) -r requirements.txt
	@touch $@

.venv/.dev: requirements-dev.txt .venv/.runtime
	@echo "Installing requirements-dev.txt ..."
	@$(PIP) -r requirements-dev.txt
	@touch $@

.venv/.bench: requirements-bench.txt | .venv/bin/python
	@echo "Installing requirements-bench.txt ..."
	@.venv/bin/python -m venv --clear .venv/bench
	@.venv/bench/bin/python -m pip install -qq --disable-pip-version-check -r requirements-bench.txt
	@touch $@

.venv/.deploy: requirements-deploy.txt | .venv/bin/python
	@echo "Installing requirements-deploy.txt ..."
	@.venv/bin/python -m venv --clear .venv/deploy
	@.venv/deploy/bin/python -m pip install -qq --disable-pip-version-check -r requirements-deploy.txt
	@touch $@
