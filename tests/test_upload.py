"""The Hub has all of an upload, or nothing."""

import pytest
from hub_server import TOKEN
from huggingface_hub import HfApi
from lightvlm.hub.push import upload


@pytest.fixture
def folder(tmp_path):
    """Return something to upload."""
    (tmp_path / "hub").mkdir()
    for name in ("README.md", "config.json", "model.safetensors"):
        (tmp_path / "hub" / name).write_text(f"---\nlicense: mit\n---\n{name}")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    "broken", ["POST .*/preupload/", "POST .*objects/batch", "PUT /lfs/", "POST .*/commit/", "POST /api/repos"]
)
def test_an_upload_that_breaks_shows_nothing_and_can_be_repeated(hub, folder, broken):
    hub.broken = broken
    with pytest.raises(ValueError, match=r"(?s)did not take me/toy: .*run the same command again"):
        upload(folder, "me/toy", HfApi())
    assert not hub.repos or hub.files("me/toy").keys() == {".gitattributes"}
    hub.broken = None
    upload(folder, "me/toy", HfApi())
    assert hub.files("me/toy").keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert hub.commits == 1


def test_a_hub_that_cannot_be_reached(folder):
    with pytest.raises(ValueError, match="run the same command again"):
        upload(folder, "me/toy", HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))


def test_an_earlier_upload_is_replaced_at_once(hub, folder):
    upload(folder, "me/toy", HfApi())
    hub.files("me/toy")[".eval_results/old.yaml"] = hub.files("me/toy")["picture.png"] = b"x"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    upload(folder, "me/toy", HfApi())
    left = {".gitattributes", "README.md", "config.json", "model-00001-of-00001.safetensors", "picture.png"}
    assert hub.files("me/toy").keys() == left
    assert hub.commits == 2


def test_private_means_private(hub, folder):
    upload(folder, "me/toy", HfApi(), private=True)
    assert hub.repos["me/toy"]["private"]
    upload(folder, "me/open", HfApi())
    before = dict(hub.files("me/open"))
    (folder / "secret.txt").write_text("x")
    with pytest.raises(ValueError, match="me/open is public already"):
        upload(folder, "me/open", HfApi(), private=True, revision="v1")
    assert hub.repos["me/open"] == {"private": False, "refs": {"main": before}}


def test_a_revision_is_a_branch_of_its_own(hub, folder):
    for _ in range(2):
        upload(folder, "me/toy", HfApi(), revision="v1")
    assert hub.files("me/toy").keys() == {".gitattributes"}
    assert "model.safetensors" in hub.files("me/toy", "v1")


def test_a_pull_request_leaves_the_main_branch_alone(hub, folder):
    assert upload(folder, "me/toy", HfApi(), create_pr=True) == f"{hub.url}/me/toy/discussions/1"
    assert hub.files("me/toy").keys() == {".gitattributes"}
    assert "model.safetensors" in hub.files("me/toy", "refs/pr/1")


def test_someone_elses_commit_in_between_stops_the_upload(hub, folder, monkeypatch):
    api = HfApi()
    monkeypatch.setattr(api, "create_branch", lambda *_, **__: None)
    upload(folder, "me/toy", api)
    info = api.model_info("me/toy")
    hub.files("me/toy")["new.txt"] = b"x"
    monkeypatch.setattr(api, "model_info", lambda *_, **__: info)
    with pytest.raises(ValueError, match="the branch has moved on"):
        upload(folder, "me/toy", api)
