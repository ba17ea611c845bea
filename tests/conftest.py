"""The one tiny model that every test builds on."""

import pytest
from lightvlm.training import prepare_easy_vqa
from tiny import make_model, make_processor
from transformers import set_seed


@pytest.fixture(autouse=True)
def seeded():
    set_seed(0)


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(params=["clip-phi", "clip-llama", "siglip-phi"])
def tiny(request):
    """A model of each supported kind of parts, and its processor."""
    vision, text = request.param.split("-")
    return make_model(vision, text), make_processor(vision)


@pytest.fixture(scope="session")
def easy_vqa_folder(tmp_path_factory):
    """What `prepare_easy_vqa.py` writes; only for reading."""
    folder = tmp_path_factory.mktemp("easy-vqa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare_easy_vqa.py", "--output-dir", str(folder)])
        prepare_easy_vqa.main()
    return folder
