# make serve      the example app and its embedded model, on http://127.0.0.1:8000/
# make test       the whole suite; a part of it with ARGS="tests/test_cli.py -k chat"
# make faults     every fault that we know of, on real servers, and a table of them; some minutes
# make soak       mixed load with faults for SECONDS=300: what a worker holds at the end
# make coverage   the suite, and what it covers
# make lint       ruff
# make types      mypy
# make bench      what a token costs here and in other servers; ROUNDS, SECONDS, STREAMS and
#                 ONLY make it shorter: make bench ROUNDS=1 SECONDS=2 STREAMS=600 ONLY=streams
# make bench-docs its results, into docs/performance.md
# make clean
#
# PYTHON=python3.12, PORT=8001 and BIND=0.0.0.0 choose others. `make serve` without make:
#
#   python3 -m venv .venv
#   .venv/bin/pip install -e ".[embedded]"
#   .venv/bin/flask llmstream model install
#   .venv/bin/gunicorn -c example_app/gunicorn.conf.py "example_app:create_app()"

PYTHON ?= python3
PORT ?= 8000
BIND ?= 127.0.0.1
ADDRESS := $(if $(findstring :,$(BIND)),$(BIND),$(BIND):$(PORT))

RUN := .venv/bin/python -m
PYTEST ?= pytest
# Two makes at once take turns in .venv, where the system has a flock.
TURN := $(if $(shell command -v flock),flock Makefile)
INSTALL = @$(TURN) $(MAKE) --silent .venv/installed-
# Clients that do not fit into .venv. Without npm those for Node are not tested.
NODE := tests/clients/node
CLIENTS := .venv/litellm/installed $(if $(shell command -v npm),$(NODE)/node_modules/.package-lock.json)
INSTALL_CLIENTS = @$(TURN) $(MAKE) --silent $(CLIENTS)
CORE := flask_llmstream/core/*,flask_llmstream/framing/*,flask_llmstream/dialects/*

ROUNDS ?= 5
SECONDS ?= 5
BENCH = --rounds $(ROUNDS) --seconds $(SECONDS) \
  $(if $(ONLY),--only $(ONLY)) $(if $(STREAMS),--streams $(STREAMS))

.PHONY: serve test faults soak coverage lint types bench bench-docs clean preflight

serve:
	@$(PYTHON) tools/preflight.py $(ADDRESS)
	$(INSTALL)embedded
	@$(RUN) flask llmstream model install
	@echo
	@echo "http://$(ADDRESS)/ once it listens. From a shell:"
	@echo
	@echo "curl -N http://$(ADDRESS)/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\": \"small\", \"stream\": true, \"messages\": [{\"role\": \"user\", \"content\": \"Why rinse rice?\"}]}'"
	@echo
	@exec $(RUN) gunicorn -c example_app/gunicorn.conf.py --bind $(ADDRESS) "example_app:create_app()"

test: preflight
	$(INSTALL)test,lint
	$(INSTALL_CLIENTS)
	$(RUN) $(PYTEST) $(ARGS)

faults: preflight
	$(INSTALL)test,lint
	FAULTS=full $(RUN) $(PYTEST) tests/faults $(ARGS)

soak: SECONDS = 300
soak: preflight
	$(INSTALL)test,lint
	PYTHONPATH=tests $(RUN) faults.soak --seconds $(SECONDS) $(ARGS)

coverage: preflight
	$(INSTALL)test,lint
	$(RUN) coverage erase
	$(MAKE) test PYTEST="coverage run -m pytest"
	$(RUN) coverage combine --quiet
	$(RUN) coverage report --skip-covered
	@echo "Of the protocol's core, 98 % must be covered:"
	$(RUN) coverage report --include='$(CORE)' --fail-under=98

lint: preflight
	$(INSTALL)test,lint
	$(RUN) ruff format --check
	$(RUN) ruff check

types: preflight
	$(INSTALL)test,lint
	$(RUN) mypy

bench: preflight
	$(INSTALL)bench
	@$(RUN) flask llmstream model install
	@$(RUN) benchmarks $(BENCH)

bench-docs: preflight
	$(INSTALL)bench
	@$(RUN) benchmarks.document

clean:
	rm -rf .venv $(NODE)/node_modules build dist *.egg-info .coverage* htmlcov .*_cache .hypothesis

preflight:
	@$(PYTHON) tools/preflight.py

# pip runs again when what it installs from has changed, or a run of it was cut short.
.venv/installed-%: setup.cfg pyproject.toml
	echo "Installing what it takes to $* into .venv"
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check -e ".[$*]"
	touch $@

# LiteLLM wants another openai than the rest.
.venv/litellm/installed: tests/clients/litellm.txt
	echo "Installing LiteLLM into $(@D)"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# npm writes this file last.
$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json
	echo "Installing the clients for Node into $(NODE)"
	npm ci --prefix $(NODE) --loglevel error --no-audit --no-fund
	touch $@
