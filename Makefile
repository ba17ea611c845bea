# Each target sets up .venv first where needed. constraints.txt pins the versions that were tested.

PYTHON ?= python3
BIN := .venv/bin
DATA := data/easy-vqa
EVAL := $(BIN)/lightvlm eval --image-folder $(DATA)/images
TEST_IMAGES := $(foreach number,0 1 2,$(DATA)/images/test/$(number).png)

.PHONY: run test eval lint checkpoint

run: $(DATA)/test.json
	$(BIN)/lightvlm infer --image $(TEST_IMAGES) --num-image-tokens 576,144,64 \
		--prompt "what shape is in the image?" "what color is the shape?" "is there a red shape?"

test: .venv/ready
	$(BIN)/pytest

eval: $(DATA)/test.json
	$(EVAL) --data-path $(DATA)/test.json --output evaluation/results/easy_vqa.json

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The whole recipe of the next checkpoint, from easy-VQA and mosaics.
TRAIN := $(BIN)/accelerate launch training/sft.py --config training/configs
TEACH := $(BIN)/accelerate launch training/pruner.py --config training/configs/tiny_pruner.yaml
checkpoint: $(DATA)/mosaics_train.json
	$(BIN)/python training/init_decoder.py --output-dir build/decoder \
		--data-path $(DATA)/train.json $(DATA)/mosaics_train.json
	$(BIN)/python training/pretrain_vision.py --variants flat --tokenizer build/decoder --output-dir build/vision-flat
	$(BIN)/python training/pretrain_vision.py --start-from build/vision-flat --learning-rate 5e-4 \
		--half-resolution-steps 1200 --tokenizer build/decoder --output-dir build/vision
	$(BIN)/lightvlm build --vision build/vision --text build/decoder --prior-layer -1 --output-dir build/untrained
	$(TRAIN)/tiny_align.yaml --model_name_or_path build/untrained --output_dir build/aligned
	$(TRAIN)/tiny_sft.yaml --model_name_or_path build/aligned --output_dir build/elastic
	$(TEACH) --model_name_or_path build/elastic --output_dir build/taught
	$(TRAIN)/tiny_sft.yaml --model_name_or_path build/taught --output_dir build/tuned
	$(TEACH) --model_name_or_path build/tuned --output_dir build/trained \
		--question-aware true --per-device-train-batch-size 64

$(DATA)/test.json: .venv/ready
	$(BIN)/python training/prepare_easy_vqa.py --output-dir $(DATA)

$(DATA)/mosaics_train.json: $(DATA)/test.json
	$(BIN)/python training/prepare_mosaics.py --data-dir $(DATA)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,eval,dev]"
	touch $@
