"""Images are encoded once, by whichever run or process comes first."""

import gc
import json

import pytest
import torch
from lightvlm import LightVLM
from lightvlm.common.llava_data import load_llava
from lightvlm.training import features
from lightvlm.training.prepare_easy_vqa import llava_row
from lightvlm.views_lightvlm import lay_out
from tiny import GRIDS, make_image, make_model, make_processor

SIZES = [(84, 84), (250, 240), (60, 84), (120, 250), (168, 168)]  # width, height; the fourth has padding in its tiles


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder and the rows of five images, which are two to a file and a batch."""
    monkeypatch.setattr(features, "SHARD", 2)
    monkeypatch.setattr(features, "BATCH", 1)
    rows = []
    for index, size in enumerate(SIZES):
        make_image(index, size).save(tmp_path / f"{index}.png")
        rows.append(llava_row(index, f"{index}.png", [("what?", str(index))]))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path, load_llava(tmp_path / "data.json", tmp_path)


@pytest.fixture
def encoded(monkeypatch):
    """How many views each call of the encoder had."""
    counts, encode = [], features.encode_shard

    def count(model, batches):
        shard = encode(model, batches)
        counts.append(len(shard["features"]))
        return shard

    monkeypatch.setattr(features, "encode_shard", count)
    return counts


def turn_of(question):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]


def views(grids, **overrides):
    return make_model(image_grid_pinpoints=grids, **overrides), make_processor(pinpoints=grids)


@pytest.mark.parametrize("keep", [None, {1: 0.5}])
@pytest.mark.parametrize("grids", [None, GRIDS])
def test_an_example_is_what_the_model_encodes(data, grids, keep):
    folder, rows = data
    model, processor = views(grids, encoder_keep=keep)
    examples = features.encode_rows(model, processor, rows, folder=folder)
    assert [example["messages"][1]["content"] for example in examples] == ["0", "1", "2", "3", "4"]
    for example, size in zip(examples, SIZES, strict=True):
        inputs = processor(images=make_image(SIZES.index(size), size), return_tensors="pt")
        found, _, layout = features.lay_out_batch(**features.stack_features([example]), config=model.config)
        expected = model.get_image_features(**inputs)
        assert (layout is None) == (grids is None)
        torch.testing.assert_close(found, expected.last_hidden_state.bfloat16().float())
        if grids:
            assert found.shape[1] == layout.lengths[0] == lay_out([example["size"]], model.config, "cpu").lengths[0]


def test_no_tensor_and_no_conversation_of_an_image_stays_in_memory(data, monkeypatch):
    monkeypatch.setattr(features, "SHARD", 256)
    folder, rows = data
    model, processor = views(None)

    def tensors_of(some):
        gc.collect()
        before = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        examples = features.encode_rows(model, processor, some, folder=folder / "features")
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) - before, examples

    tensors_of(rows)
    few, _ = tensors_of(rows.select([0]))
    many, examples = tensors_of(rows)
    assert many == few
    with pytest.raises(IndexError, match="5 images"):
        examples[5]


def test_each_question_is_an_example_with_its_images_features(data):
    folder, rows = data
    model, processor = views(None)
    conversations = [
        [message for turn in range(1 + row) for message in turn_of(f"{row}.{turn}")] for row in range(len(rows))
    ]
    rows = rows.remove_columns("messages").add_column("messages", conversations)
    examples = features.encode_rows(model, processor, rows, folder=folder / "features")
    split = features.SplitTurns(examples)
    names = [example["messages"][0]["content"] for example in (split[index] for index in range(len(split)))]
    assert names == [f"{row}.{turn}" for row in range(5) for turn in range(1 + row)]
    for index, name in enumerate(names):
        assert [message["content"] for message in split[index]["messages"]] == [name, "yes"]
        assert torch.equal(split[index]["features"], examples[int(name[0])]["features"])


def test_a_second_run_encodes_nothing_and_an_interrupted_one_goes_on(data, encoded):
    folder, rows = data
    model, processor = views(None)
    first = features.encode_rows(model, processor, rows, folder=folder / "features")
    assert encoded == [2, 2, 1]
    again = features.encode_rows(model, processor, rows, folder=folder / "features")
    assert encoded == [2, 2, 1]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["features"], other["features"]) and torch.equal(one["prior"], other["prior"])
    (second,) = (folder / "features").glob("*/00000002*")
    second.unlink()
    features.encode_rows(model, processor, rows, folder=folder / "features")
    assert encoded == [2, 2, 1, 2]


def test_another_encoder_other_images_or_another_way_to_prepare_them_are_encoded_anew(data, encoded):
    folder, rows = data
    model, processor = views(None)
    names = {features.name_features(model, processor, rows)}
    make_image(9).save(folder / "0.png")
    names.add(features.name_features(model, processor, rows))
    names.add(features.name_features(model, processor, rows.select([1, 0, 2, 3, 4])))
    processor.image_processor.do_center_crop = False
    names.add(features.name_features(model, processor, rows))
    names.add(features.name_features(LightVLM(model.config), processor, rows))
    model.config.prior_layer = 0
    names.add(features.name_features(model, processor, rows))
    assert len(names) == 6


def test_processes_share_the_files(data, encoded, monkeypatch):
    folder, rows = data
    model, processor = views(None)

    class Process:
        num_processes = 2

        def wait_for_everyone(self):
            if self.process_index == 0:  # the second process has a turn before the first one reads
                run(1)

    def run(index):
        process = Process()
        process.process_index = index
        monkeypatch.setattr(features, "PartialState", lambda: process)
        return features.encode_rows(model, processor, rows, folder=folder / "features")

    examples = run(0)
    assert encoded == [2, 1, 2]
    assert [example["messages"][1]["content"] for example in examples] == ["0", "1", "2", "3", "4"]
