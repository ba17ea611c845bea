"""Images are encoded once, by whichever run or process comes first."""

import gc
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread, local

import pytest
import torch
from lightvlm import LightVLM
from lightvlm.data import features
from lightvlm.data.llava import load_llava
from lightvlm.training.prepare_easy_vqa import llava_row
from lightvlm.views_lightvlm import lay_out
from tiny import GRIDS, NUM_PATCHES, make_image, make_model, make_processor

SIZES = [(84, 84), (250, 240), (60, 84), (120, 250), (168, 168)]  # width, height; the fourth has padding in its tiles


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Return a folder and the rows of five images, which are two to a file and a batch."""
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
    """Return how many views each call of the encoder had."""
    counts, encode = [], features.encode_shard

    def count(model, batches):
        shard = encode(model, batches)
        counts.append(len(shard["features"]))
        return shard

    monkeypatch.setattr(features, "encode_shard", count)
    return counts


def turn_of(question):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]


def files(folder):
    """Return the files of features, in the order of their images."""
    found = (folder / "features").glob("*/*.safetensors")
    return sorted(found, key=lambda file: file.stat().st_mtime_ns)


def assert_same(first, again):
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["features"], other["features"]) and torch.equal(one["prior"], other["prior"])
        assert (one["size"], one["messages"]) == (other["size"], other["messages"])


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
        assert (layout.lengths == [NUM_PATCHES]) or grids
        torch.testing.assert_close(found, expected.last_hidden_state.bfloat16().float())
        if grids:
            assert found.shape[1] == layout.lengths[0] == lay_out([example["size"]], model.config, "cpu").lengths[0]


@pytest.mark.slow
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
    assert_same(first, again)
    files(folder)[1].unlink()
    assert_same(first, features.encode_rows(model, processor, rows, folder=folder / "features"))
    assert encoded in ([2, 2, 1, 2], [2, 2, 1, 1])


def test_a_run_on_some_of_the_images_and_others_in_another_order_encodes_the_others_alone(data, encoded):
    folder, rows = data
    model, processor = views(GRIDS)
    features.encode_rows(model, processor, rows.select([0, 1, 2]), folder=folder / "features")
    before = sum(encoded)
    asked = rows.select([4, 2, 1, 0, 2])  # one of them twice
    found = features.encode_rows(model, processor, asked, folder=folder / "features")
    layout = lay_out([SIZES[4][::-1]], model.config, "cpu")
    assert sum(encoded) - before == layout.views[0]
    assert_same(found, features.encode_rows(model, processor, asked, folder=folder / "others"))


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-600] + bytes(500) + data[-100:],
        lambda data: bytes(len(data)),
        lambda data: b"",
    ],
    ids=["cut off", "zeros inside", "zeros", "empty"],
)
def test_a_file_that_was_harmed_is_named_and_encoded_again(data, encoded, harm, caplog):
    folder, rows = data
    model, processor = views(None)
    before = [*features.encode_rows(model, processor, rows, folder=folder / "features")]
    before = [{**example, "features": example["features"].clone()} for example in before]
    harmed, stat = files(folder)[0], files(folder)[0].stat()
    content = harm(harmed.read_bytes())
    harmed.unlink()
    harmed.write_bytes(content)
    os.utime(harmed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = features.encode_rows(model, processor, rows, folder=folder / "features")
    assert len(encoded) == 4 and f"{harmed} is harmed" in caplog.text
    assert_same(before, again)


def test_what_a_killed_run_left_is_removed_and_nothing_else(data, monkeypatch):
    folder, rows = data
    model, processor = views(None)
    save = features.save_file

    def kill(shard, file, *args):
        save(shard, file, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "save_file", kill)
    with pytest.raises(KeyboardInterrupt):
        features.encode_rows(model, processor, rows, folder=folder / "features")
    monkeypatch.setattr(features, "save_file", save)
    (folder / "features/notes.part").write_text("mine")
    assert len([*(folder / "features").rglob("*.part")]) == 2
    features.encode_rows(model, processor, rows.select([4, 3]), folder=folder / "features")
    assert [*(folder / "features").rglob("*.part")] == [folder / "features/notes.part"]


def test_another_run_waits_until_the_images_are_encoded(data, encoded, monkeypatch):
    folder, rows = data
    model, processor = views(None)
    encode, others = features.encode_shard, []

    def start_another(*args):
        monkeypatch.setattr(features, "encode_shard", encode)
        other = Thread(target=lambda: others.append(run()))
        other.start()
        other.join(timeout=1)
        assert other.is_alive()
        return encode(*args)

    def run():
        return features.encode_rows(model, processor, rows, folder=folder / "features")

    monkeypatch.setattr(features, "encode_shard", start_another)
    first = run()
    while not others:
        time.sleep(0.01)
    assert encoded == [2, 2, 1]
    assert_same(first, others[0])


def test_an_image_that_cannot_be_read_is_named(data):
    folder, rows = data
    model, processor = views(None)
    content = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"the image '.*3.png' cannot be read \(.*truncated"):
        features.encode_rows(model, processor, rows, folder=folder / "features")


def test_another_encoder_other_images_or_another_way_to_prepare_them_are_encoded_anew(data, encoded, monkeypatch):
    folder, rows = data
    model, processor = views(None)

    def count(model, rows=rows):
        before = sum(encoded)
        features.encode_rows(model, processor, rows, folder=folder / "features")
        return sum(encoded) - before

    assert count(model) == 5
    assert count(model) == 0
    make_image(9).save(folder / "0.png")
    assert count(model) == 1
    monkeypatch.chdir(folder)
    image = {"path": "1.png", "bytes": None}
    assert features.name_image(image) == features.name_image({**image, "path": str(folder / "1.png")})
    processor.image_processor.do_center_crop = False
    assert count(model, rows.select([0, 4])) == 2
    processor.image_processor.do_center_crop = True
    assert count(LightVLM(model.config)) == 5
    model.config.prior_layer = 0
    assert count(model) == 5


def test_processes_share_the_files(data, encoded, monkeypatch):
    folder, rows = data
    model, processor = views(None)

    barrier, here = Barrier(2), local()  # threads in place of processes

    class Process:
        num_processes = 2

        def __init__(self):
            self.process_index, self.is_main_process = here.index, here.index == 0

        def wait_for_everyone(self):
            barrier.wait()

    def run(index):
        here.index = index
        return features.encode_rows(model, processor, rows, folder=folder / "features")

    monkeypatch.setattr(features, "PartialState", Process)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert sorted(encoded) == [1, 2, 2]
    assert [example["messages"][1]["content"] for example in first] == ["0", "1", "2", "3", "4"]
    assert_same(first, second)
