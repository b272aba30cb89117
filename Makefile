# make book                 set up if needed, build the HTML book from the committed outputs
# make serve                the same, then serve it (PORT=8000)
# make test                 set up if needed, run everything CI runs (JOBS=2)
# make chapter CHAPTER=02-loss-guard PROFILE=smoke PARAMS="seeds=3 dataset=digits"
#                           rerun one chapter into _build/chapters
# make notebooks            execute and rewrite the committed notebooks (CHAPTER="..." for some)

PYTHON ?= python3
PORT ?= 8000
JOBS ?= 2
PROFILE ?= smoke
CHAPTER ?=
PARAMS ?=
export PARAMS

VENV := .venv
BIN := $(VENV)/bin
# The stamp carries a checksum of what it stands for. A time would not do: git sets the
# time of a file anew on every checkout, and then pip would need the network again.
STAMP := $(VENV)/ready-$(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')

# Sphinx does not write a page anew when only what surrounds it changed: a chapter added
# would be missing from the sidebars of the others, a removed one would stay.
FRAME := _build/frame-$(shell cat _config.yml _toc.yml book/_ext/* book/_static/* 2>/dev/null \
  | cksum | tr ' ' '-')

.PHONY: book serve test chapter named notebooks setup data

# Sphinx does not repeat the warnings of a page that it has read once, so a second build
# would pass: after a failure the next one starts from nothing.
book: setup
	@test -e $(FRAME) || rm -rf _build/html _build/.doctrees _build/frame-*
	@$(BIN)/jupyter-book build -q -W --keep-going . || { rm -rf _build/.doctrees; exit 1; }
	@touch $(FRAME)
	@echo "The book is built. Open file://$(CURDIR)/_build/html/index.html"

serve: book
	@echo "Serving the book at http://localhost:$(PORT)/ (stop with Ctrl-C)"
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

# One pytest run, so that one summary and one closing line cover everything: style,
# types, the library, every notebook cell (nbval), every chapter at toy size, the built
# book in a browser. Tests of one file stay in one process, as notebook cells must.
test: setup data
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 10 \
	  --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg tests book

chapter: named setup
	@$(BIN)/python book/_tools/notebooks.py chapter "$(CHAPTER)" \
	  --profile "$(PROFILE)" --params "$$PARAMS"

named:
	@if [ -z "$(CHAPTER)" ]; then \
	  echo "Name a chapter: make chapter CHAPTER=02-loss-guard PROFILE=smoke" >&2; exit 1; fi

notebooks: setup
	@$(BIN)/python book/_tools/notebooks.py build $(CHAPTER)

setup: $(STAMP)

$(STAMP):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no $(PYTHON): install Python 3.11 or later, or say PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is older than Python 3.11: say PYTHON=... to use another." >&2; exit 1; }
	@echo "Setting up $(VENV): once, a few minutes, about 5.5 GB (mostly torch)."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f $(VENV)/ready-*
	@touch $@

# Only where the data stand beside the repository; otherwise tests that need them skip.
data: setup
	@if [ -d ../shared/data ] && [ -f src/l2olib/__main__.py ]; then \
	  $(BIN)/python -m l2olib data; fi
