"""What tests of several files are given: the tiny model, saved and trained, and data."""

import json
import logging
from functools import partial

import datasets
import easy_vqa
import pytest
import torch
from hub_server import TOKEN, HubServer
from lightvlm import modeling_lightvlm
from lightvlm.hub import push
from lightvlm.hub.build import save
from lightvlm.training import prepare_easy_vqa
from saved import CARD
from tiny import CALIBRATION, make_dynamic, make_model, make_processor
from transformers import AttentionInterface, set_seed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # one of several processes, which would take each other's cores
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Return a cache of datasets of its own, for subprocesses too."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield folder


@pytest.fixture
def in_vllm(monkeypatch):
    """Make a configuration as vLLM does, and the model's warnings, each as if it were the first, seen by caplog."""
    AttentionInterface.register("vllm", ALL_ATTENTION_FUNCTIONS["sdpa"])
    for logger in (modeling_lightvlm.logger, logging.getLogger("transformers")):
        monkeypatch.setattr(logger, "propagate", True)
    modeling_lightvlm.logger.warning_once.cache_clear()

    def configure(config):
        config.text_config._attn_implementation = "vllm"
        return config

    return configure


@pytest.fixture(autouse=True)
def seeded():
    set_seed(0)


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(params=["clip-phi", "clip-llama", "siglip-phi"])
def tiny(request):
    """Return a model of each supported kind of parts, and its processor."""
    vision, text = request.param.split("-")
    return make_model(vision, text), make_processor(vision)


def prepare(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare_easy_vqa.py", "--output-dir", str(folder)])
        prepare_easy_vqa.main()
    return folder


@pytest.fixture(scope="session")
def easy_vqa_folder(tmp_path_factory):
    """Return what `prepare_easy_vqa.py` writes of the first 300 images of each split; only for reading."""
    with pytest.MonkeyPatch.context() as patch:
        for split in ("train", "test"):
            paths = getattr(easy_vqa, f"get_{split}_image_paths")()
            few = {image: paths[image] for image in sorted(paths)[:300]}
            asked = zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True)
            about_few = [*zip(*(row for row in asked if row[2] in few), strict=True)]
            patch.setattr(easy_vqa, f"get_{split}_image_paths", partial(dict, few))
            patch.setattr(easy_vqa, f"get_{split}_questions", partial(tuple, about_few))
        return prepare(tmp_path_factory.mktemp("easy-vqa-300"))


@pytest.fixture(scope="session")
def whole_easy_vqa_folder(tmp_path_factory):
    """Return what `prepare_easy_vqa.py` writes, in half a minute; only for reading."""
    return prepare(tmp_path_factory.mktemp("easy-vqa"))


@pytest.fixture(scope="module")
def data_dir(easy_vqa_folder, tmp_path_factory):
    """Return the first sixty captions of each split, which are enough for drawing, and quick."""
    folder = tmp_path_factory.mktemp("cells")
    (folder / "images").mkdir()
    for split in ("train", "test"):
        captions = json.loads((easy_vqa_folder / f"{split}_captions.json").read_text())[:60]
        (folder / f"{split}_captions.json").write_text(json.dumps(captions))
        (folder / "images" / split).symlink_to(easy_vqa_folder / "images" / split)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return a folder of the tiny model and its processor; only for reading."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["clip-phi", "clip-llama", "siglip-phi"])
def dynamic(request):
    """Return a model of each supported kind of parts that gives images what they need, and its processor."""
    vision, text = request.param.split("-")
    return make_dynamic(vision, text), make_processor(vision)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a tiny checkpoint with a card; only for reading."""
    folder = tmp_path_factory.mktemp("trained")
    save(make_model(dynamic_budget=CALIBRATION), make_processor(), folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Return a server that this process takes for the Hub, without xet, whose protocol it does not speak."""
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


@pytest.fixture
def unchecked(monkeypatch):
    """Leave out the fresh process, which takes seconds."""
    monkeypatch.setattr(push, "check_folder", lambda folder, name: None)


@pytest.fixture
def data(tmp_path):
    """Return a folder with a model and the rows that runs of training/sft.py learn from."""
    from sft_run import make_data  # which needs the trainers

    return make_data(tmp_path)


@pytest.fixture
def logs(monkeypatch):
    """Return what the trainers of a test log."""
    from sft_run import log_trainers

    return log_trainers(monkeypatch)
