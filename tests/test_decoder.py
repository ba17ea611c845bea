"""The language model learns from kept tokens of encoded images, and a checkpoint of one view learns to see many."""

import json
from pathlib import Path

import pytest
import torch
from lightvlm import LightVLM, LightVLMConfig, LightVLMProcessor
from lightvlm.data.turns import mask_blocks
from lightvlm.data.views import parse_grids
from lightvlm.training import decoder
from lightvlm.training.prepare_easy_vqa import llava_row
from PIL import Image
from saved import lose_weights
from tiny import GRIDS, NUM_PATCHES, make_image, make_model, make_processor
from trl import TrlParser


@pytest.fixture
def data(tmp_path):
    rows = []
    for index in range(6):
        image = make_image(index).point(lambda value, index=index: value // 4 + 190 * (index % 2))
        image.resize((250, 240) if index < 4 else (84, 84)).save(tmp_path / f"{index}.png")
        turns = [("what color?", "red" if index % 2 else "blue"), ("what shape?", "circle"), ("how many?", "2")]
        rows.append(llava_row(index, f"{index}.png", turns))
    for name, part in (("large", rows[:4]), ("small", rows[4:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    make_model(num_image_tokens=9).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("# a card\n")
    return tmp_path


def train(data, monkeypatch, **options):
    settings = {
        "model_path": data / "model",
        "data_path": [data / "large.json", data / "small.json"],
        "max_images": [4, 1],
        "image_folder": data,
        "output_dir": data / "out",
        "features_dir": data / "features",
        "grids": ["1x1", "1x2", "3x3"],
        "min_image_tokens": 4,
        "log_uniform_max": 20,
        "max_turns": 2,
        "per_device_train_batch_size": 5,
        "max_steps": 60,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        **options,
    }
    parts = [(f"--{name}", *(value if isinstance(value, list) else [value])) for name, value in settings.items()]
    monkeypatch.setattr("sys.argv", ["decoder.py", *(str(part) for option in parts for part in option)])
    decoder.main()
    return LightVLM.from_pretrained(data / "out").eval(), LightVLMProcessor.from_pretrained(data / "out")


def test_a_checkpoint_of_one_view_learns_to_answer_from_many(data, monkeypatch):
    model, processor = train(data, monkeypatch)
    assert model.config.image_grid_pinpoints == processor.grid_pinpoints == [[84, 84], [84, 168], [252, 252]]
    for index in range(4):
        image = Image.open(data / f"{index}.png")
        answer = model.chat(image, "what color?", num_image_tokens=9, processor=processor, max_new_tokens=5)
        assert answer == ("red" if index % 2 else "blue")
    before = LightVLM.from_pretrained(data / "model").state_dict()
    after = model.state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert not any("vision_tower" in name or "scorer" in name or "_score" in name for name in changed)
    for part in ("multi_modal_projector", "pruner.row_embedding", "language_model", "lm_head"):
        assert any(part in name for name in changed), part
    assert after["model.pruner.tile_embedding.weight"].any() and not after["model.pruner.tile_score.weight"].any()
    card = (data / "out/README.md").read_text()
    assert (
        "- decoder: 60 steps on 5 images of large.json, small.json, encoded once, K log-uniform from 4 to 20" in card
    )


@pytest.mark.parametrize("prior", ["attention", "attention+distance"])
@torch.no_grad()
def test_the_loss_is_that_of_the_model_with_the_tokens_that_its_pruner_keeps(data, prior):
    model, processor = make_model(image_grid_pinpoints=GRIDS, prior=prior), make_processor(pinpoints=GRIDS)
    torch.nn.init.normal_(model.model.pruner.tile_embedding.weight)
    args = decoder.DecoderArguments("", [], "", max_turns=1, min_image_tokens=7, log_uniform_max=7, full_share=0)
    args.data_path, args.image_folder = [str(data / "large.json")], str(data)
    rows = decoder.load_rows(args, 0)
    examples = decoder.encode_rows(model, processor, rows, folder=data / "features")
    decoder.rank_patches(model, examples, NUM_PATCHES)
    batch = decoder.ReaderCollator(processor, args)(examples)
    (found,) = decoder.Reader(model.eval())(**batch).values()

    images = [row["images"][0] for row in rows]
    pixels = processor(images=images, num_image_tokens=7, return_tensors="pt")
    inputs = mask_blocks({name: batch[name] for name in ("input_ids", "blocks", "position_ids", "labels")})
    torch.testing.assert_close(found, model(**inputs, **pixels).loss, atol=1e-2, rtol=0)  # features are kept in bf16


def test_files_have_a_number_of_images_each(data, monkeypatch):
    with pytest.raises(ValueError, match="give one number, or one for each of 2 files"):
        train(data, monkeypatch, max_images=[1, 2, 3])


@pytest.mark.parametrize("grids", [["2"], ["0x1"], ["2 x 2"], ["1x1", "axb"]])
def test_grids_are_rows_by_columns(grids):
    with pytest.raises(ValueError, match="write rows x columns, such as 1x1 1x2 2x2"):
        parse_grids(grids, 84)


def test_the_recipe_is_possible():
    path = Path(decoder.__file__).parent / "configs/tiny_views.yaml"
    parser = TrlParser((decoder.DecoderArguments, decoder.DecoderTrainingArguments))
    required = ["--model_path=model", "--output_dir=out", "--use_cpu=true"]
    args, _ = parser.parse_args_and_config(["--config", str(path), *required])
    assert len(args.max_images) == len(args.data_path)
    LightVLMConfig(image_grid_pinpoints=parse_grids(args.grids, 336))


@pytest.mark.parametrize("options", [{"save_strategy": "steps"}, {"resume_from_checkpoint": "true"}])
def test_what_would_leave_nothing_that_loads_or_be_ignored_is_refused(data, monkeypatch, options):
    with pytest.raises(ValueError, match="its end alone is saved"):
        train(data, monkeypatch, **options)


def test_a_checkpoint_that_lacks_weights_is_not_trained(data, monkeypatch):
    lose_weights(data / "model", "lm_head.weight")
    with pytest.raises(ValueError, match="1 missing .lm_head.weight"):
        train(data, monkeypatch)


def test_a_run_shorter_than_its_logging_steps_is_saved(data, monkeypatch):
    train(data, monkeypatch, max_steps=1, logging_steps=500)
    assert "- decoder: 1 steps on 5 images" in (data / "out" / "README.md").read_text()
