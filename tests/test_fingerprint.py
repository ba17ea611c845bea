"""A fingerprint changes with whatever decides a checkpoint's answers, and with nothing else."""

import hashlib
import json
import shutil

import pytest
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.inference.fingerprint import fingerprint, hash_files


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / "checkpoint")


def test_one_file_of_weights_has_its_own_sha256_and_several_that_of_sha256sums_lines(checkpoint):
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert fingerprint(checkpoint)["weights_sha256"] == sha256(weights)
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    (checkpoint / "model-00002-of-00002.safetensors").write_bytes(b"more")
    lines = "".join(
        f"{sha256(data)}  model-0000{n}-of-00002.safetensors\n" for n, data in ((1, weights), (2, b"more"))
    )
    assert fingerprint(checkpoint)["weights_sha256"] == sha256(lines.encode())


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_what_configures_a_checkpoint_counts(checkpoint, name):
    before = fingerprint(checkpoint)
    text = (checkpoint / name).read_text()
    is_json = name in ("config.json", "processor_config.json")
    (checkpoint / name).write_text(json.dumps(json.loads(text) | {"new": 1}) if is_json else text + " ")
    after = fingerprint(checkpoint)
    assert before.pop("configuration_sha256") != after.pop("configuration_sha256") and before == after


def test_k_may_be_chosen_after_it_was_measured(checkpoint):
    before = fingerprint(checkpoint)
    for name in ("config.json", "processor_config.json"):
        fields = json.loads((checkpoint / name).read_text()) | {"num_image_tokens": 64, "mean_image_tokens": 48}
        (checkpoint / name).write_text(json.dumps(fields))
    assert fingerprint(checkpoint) == before


def test_what_else_lies_in_the_folder_does_not_count(checkpoint):
    before = fingerprint(checkpoint)
    for name in (
        "results.json",
        "answers.jsonl",
        "answers.jsonl.about.json",
        "trainer_state.json",
        "training_args.bin",
    ):
        (checkpoint / name).write_text("{}")
    (checkpoint / "README.md").write_text("new")
    (checkpoint / "checkpoint-3").mkdir()
    (checkpoint / "checkpoint-3/model.safetensors").write_bytes(b"other")
    assert fingerprint(checkpoint) == before


def test_an_adapter_is_that_of_its_base_and_itself(checkpoint, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(checkpoint)}))
    found = []
    for weights, base in ((b"one", b""), (b"two", b""), (b"two", b"changed")):
        (adapter / "adapter_model.safetensors").write_bytes(weights)
        with open(checkpoint / "model.safetensors", "ab") as file:
            file.write(base)
        found.append(fingerprint(adapter)["weights_sha256"])
    assert len({*found}) == 3


def test_a_name_on_the_hub_is_the_snapshot_in_the_cache(checkpoint, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--me--toy"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "blobs").mkdir()
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    for file in checkpoint.iterdir():
        file.rename(repository / "blobs" / file.name)
        (repository / "snapshots" / ("a" * 40) / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert fingerprint("me/toy") == fingerprint(SHIPPED)


def test_files_that_are_not_here_have_no_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    names = [str(tmp_path / "a"), str(tmp_path / "missing"), "https://a.b/c.png"]
    assert hash_files(names) == dict(zip(names, [sha256(b"a"), None, None], strict=True))
