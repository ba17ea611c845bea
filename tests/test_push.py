"""What is pushed loads and answers without the package, and the Hub has all of it or nothing."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi
from lightvlm import LightVLM
from lightvlm.hub import push
from lightvlm.hub.build import save
from lightvlm.hub.push import upload, write_folder
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.inference.compilation import int8_config
from lightvlm.inference.fingerprint import fingerprint
from lightvlm_cli.main import main
from saved import CARD, HUB_FILES, row
from tiny import CALIBRATION, make_image, make_model, make_processor

FILES = HUB_FILES | {"LICENSE", "README.md"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a tiny checkpoint with a card; only for reading."""
    folder = tmp_path_factory.mktemp("trained")
    save(make_model(dynamic_budget=CALIBRATION), make_processor(), folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "checkpoint")


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
def folder(tmp_path):
    """Return something to upload."""
    (tmp_path / "hub").mkdir()
    for name in ("README.md", "config.json", "model.safetensors"):
        (tmp_path / "hub" / name).write_text(f"---\nlicense: mit\n---\n{name}")
    return tmp_path / "hub"


def run(checkpoint, *options):
    return main(["push", "--model-path", str(checkpoint), *map(str, options)])


LOAD_BY_NAME = """
import sys
from PIL import Image
sys.modules["lightvlm"] = None
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("me/toy", trust_remote_code=True)
print(model.chat(Image.open(sys.argv[1]), "what color?", max_new_tokens=5, do_sample=False))
"""


@pytest.mark.slow
def test_a_checkpoint_is_pushed_and_answers_others_who_load_it_by_name(hub, checkpoint, tmp_path, capfd):
    measured = {"command": "lightvlm eval", **fingerprint(checkpoint)}
    (tmp_path / "a.json").write_text(json.dumps(measured | {"results": [row("gqa")]}))
    ran = f"```python\nopen({str(tmp_path / 'ran')!r}, 'xb').write(open('photo.jpg', 'rb').read())\n```\n"
    (checkpoint / "README.md").write_text(CARD.replace("- loss", f"{ran}\n- loss"))
    options = ["--results", tmp_path / "a.json", "--hub-datasets", "gqa=someone/gqa"]
    assert run(checkpoint, "--repo-id", "me/toy", *options) == 0, capfd.readouterr().err
    assert f"{hub.url}/me/toy/commit/" in capfd.readouterr().out
    assert hub.files("me/toy").keys() == FILES | {".gitattributes", ".eval_results/gqa.yaml"}
    assert hub.commits == 1 and not hub.repos["me/toy"]["private"]
    assert (tmp_path / "ran").read_bytes().startswith(b"\xff\xd8")  # the card's code, on a photo
    make_image().save(tmp_path / "image.png")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", LOAD_BY_NAME, str(tmp_path / "image.png")]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = LightVLM.from_pretrained(checkpoint).chat(
        make_image(), "what color?", max_new_tokens=5, do_sample=False
    )
    assert result.stdout.splitlines()[-1].strip() == expected


def test_a_dry_run_writes_the_folder_and_uploads_nothing(hub, checkpoint, unchecked, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert run(checkpoint, "--repo-id", "me/toy", "--private", "--dry-run", out) == 0, capsys.readouterr().err
    assert {file.name for file in out.iterdir()} == FILES
    assert 'from_pretrained("me/toy"' in (out / "README.md").read_text()
    assert not hub.requests
    assert run(checkpoint, "--dry-run", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(out, "--dry-run", tmp_path / "again") == 0
    assert f'from_pretrained("{tmp_path}/again"' in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"configuration_sha256": "b" * 64}, "a.json measured these weights with another configuration"),
        ({"weights_sha256": "b" * 64}, "a.json measured other weights than "),
        ({"weights_sha256": None}, "a.json does not say which weights it measured"),
        ({"encoder_keep": {"1": 0.5}}, "measured with encoder_keep {'1': 0.5}, and config.json has None: write that"),
    ],
)
def test_results_of_another_checkpoint_are_refused(checkpoint, unchecked, tmp_path, capsys, change, message):
    report = {"command": "lightvlm eval", "results": [row()], **fingerprint(checkpoint), **change}
    (tmp_path / "a.json").write_text(json.dumps({name: value for name, value in report.items() if value}))
    expected = 2 if message else 0
    assert run(checkpoint, "--dry-run", tmp_path / "out", "--results", tmp_path / "a.json") == expected
    assert (message or "") in capsys.readouterr().err
    assert (tmp_path / "out").exists() == (message is None)


def test_weights_are_sharded_and_configuration_and_code_taken_as_they_are(checkpoint, tmp_path, monkeypatch):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"own": 1}))
    (checkpoint / "pruning_lightvlm.py").open("a").write("# changed\n")
    monkeypatch.setattr(push, "save", lambda *arguments: save(*arguments, max_shard_size="100KB"))
    model = LightVLM.from_pretrained(checkpoint)
    write_folder(model, make_processor(), checkpoint, tmp_path / "out", "me/toy", [], {})
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert "# changed" in (tmp_path / "out" / "pruning_lightvlm.py").read_text()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["own"] == 1 and written["auto_map"] == config["auto_map"]
    again = LightVLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_examples_of_the_widget_come_along(checkpoint, tmp_path):
    make_image().save(checkpoint / "example.png")
    sources = {"in the folder": "example.png", "elsewhere": "https://example.org/other.png"}
    widget = "widget:\n" + "".join(f"- src: {source}\n  text: {text}\n" for text, source in sources.items())
    (checkpoint / "README.md").write_text(CARD.replace("license:", f"{widget}license:"))
    arguments = (make_model(), make_processor(), checkpoint)
    write_folder(*arguments, tmp_path / "hub", "me/toy", [], {})
    assert {file.name for file in (tmp_path / "hub").iterdir()} == FILES | {"example.png"}
    assert widget in (tmp_path / "hub" / "README.md").read_text()
    (checkpoint / "example.png").unlink()
    with pytest.raises(ValueError, match="has the example example.png in its widget: put this file in"):
        write_folder(*arguments, tmp_path / "again", "me/toy", [], {})


def test_another_licence_comes_with_its_text(checkpoint, tmp_path):
    model, processor = LightVLM.from_pretrained(checkpoint), make_processor()
    (checkpoint / "README.md").write_text(CARD.replace("mit", "llama2"))
    with pytest.raises(ValueError, match="put its text in .*/LICENSE"):
        write_folder(model, processor, checkpoint, tmp_path / "out", "me/toy", [], {})
    assert not (tmp_path / "out").exists()
    (checkpoint / "LICENSE").write_text("theirs")
    write_folder(model, processor, checkpoint, tmp_path / "out", "me/toy", [], {})
    assert (tmp_path / "out" / "LICENSE").read_text() == "theirs"
    assert (tmp_path / "out" / "LICENSE-CODE").read_text().startswith("MIT License")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(hub, checkpoint, number, capsys):
    model = LightVLM.from_pretrained(checkpoint)
    model.lm_head.weight.data[3, 1] = number
    model.save_pretrained(checkpoint)
    assert run(checkpoint, "--repo-id", "me/toy") == 2
    assert "NaN or infinite: lm_head.weight (of 1)" in capsys.readouterr().err
    assert not hub.repos


def test_weights_that_are_quantized(checkpoint, tmp_path, capsys):
    model = LightVLM.from_pretrained(checkpoint, quantization_config=int8_config())
    model.save_pretrained(checkpoint)
    assert run(checkpoint, "--dry-run", tmp_path / "out") == 2
    assert "push the checkpoint that they were made of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "notes.pkl"])
def test_pickle_files(hub, checkpoint, name, capsys):
    (checkpoint / name).write_bytes(b"")
    assert run(checkpoint, "--repo-id", "me/toy") == 2
    assert f"{name}. Save weights with `model.save_pretrained`" in capsys.readouterr().err
    assert not hub.requests


@pytest.mark.parametrize("field", [{"score": "cls"}, {"score": "question"}])
def test_weights_that_are_missing_or_superfluous(hub, checkpoint, field, capsys):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | field))
    assert run(checkpoint, "--repo-id", "me/toy") == 2
    assert "model.pruner." in capsys.readouterr().err
    assert not hub.repos


def test_code_that_does_not_load_without_the_package_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (checkpoint / "modeling_lightvlm.py").open("a") as file:
        file.write("\nfrom lightvlm import TokenPruner\n")
    assert run(checkpoint, "--dry-run", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "does not load and answer: " in error and "lightvlm" in error.split("answer: ")[1]
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "give --repo-id, or --dry-run"),
        (["--repo-id", "toy"], "give OWNER/toy"),
        (["--repo-id", "me/toy/more"], "me/toy/more"),
        (["--repo-id", "me/to y"], "me/to y"),
        (["--repo-id", "me/toy", "--revision", "v1", "--create-pr"], "leave out --revision"),
        (["--repo-id", "me/toy", "--results", "missing.json"], "missing.json is not what"),
        (
            ["--repo-id", "me/toy", "--hub-datasets", "gqa=someone/gqa"],
            "have nothing of the checkpoint's own about gqa",
        ),
    ],
)
def test_options_that_mean_nothing(hub, checkpoint, options, message, capsys):
    assert run(checkpoint, *options) == 2
    assert message in capsys.readouterr().err
    assert not hub.repos


def test_folders_without_a_checkpoint(hub, checkpoint, tmp_path, capsys):
    assert run(tmp_path / "nowhere", "--repo-id", "me/toy") == 2
    assert "nowhere is no folder with a checkpoint's config.json" in capsys.readouterr().err
    (checkpoint / "README.md").unlink()
    assert run(checkpoint, "--repo-id", "me/toy") == 2
    assert "training/sft.py writes one" in capsys.readouterr().err
    for text in ("gqa", "=a/b", "gqa=b"):
        with pytest.raises(SystemExit):
            run(checkpoint, "--repo-id", "me/toy", "--hub-datasets", text)


@pytest.mark.parametrize("token, message", [("hf_of_nobody", "Invalid user token"), (None, "hf auth login")])
def test_a_wrong_token_is_told_before_the_work_begins(hub, checkpoint, token, message, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(push, "write_folder", None)
    assert run(checkpoint, "--repo-id", "me/toy") == 2
    error = capsys.readouterr().err
    assert message in error and "Log in by `hf auth login`, with a token that may write there." in error
    with pytest.raises(ValueError, match="Log in by"):
        upload(checkpoint, "me/toy", HfApi())
    assert not hub.repos


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


def test_the_shipped_checkpoint_has_what_a_card_needs():
    from lightvlm.hub.card import read_card

    data, intro, training = read_card(SHIPPED)
    assert data.license == "mit" and "nothing else" in " ".join(intro.split())
    assert "On easy-VQA and mosaics of it" in training


def write(checkpoint, output, name="me/toy", results=()):
    write_folder(LightVLM.from_pretrained(checkpoint), make_processor(), checkpoint, output, name, [*results], {})


@pytest.mark.parametrize(
    "name",
    ["config.json", "README.md", "LICENSE", "pruning_lightvlm.py", "chat_template.jinja", "pictures/secret.png"],
)
def test_links_out_of_the_folder_are_refused(hub, checkpoint, tmp_path, name, capsys):
    (checkpoint / "pictures").mkdir()
    secret, link = tmp_path / "secret", checkpoint / name
    secret.write_bytes(link.read_bytes() if link.exists() else b"mine alone")
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    assert run(checkpoint, "--repo-id", "me/toy") == 2
    assert f"{link} is a link out of its folder, to {secret}: put the file itself there" in capsys.readouterr().err
    assert not hub.requests


def test_a_folder_that_leads_elsewhere_is_refused(hub, checkpoint, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (checkpoint / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    assert run(checkpoint, "--repo-id", "me/toy") == 2
    assert "additional_chat_templates is a link out of its folder" in capsys.readouterr().err


def test_a_checkpoint_in_the_cache_of_the_hub_is_taken_with_its_links_to_blobs(
    checkpoint, unchecked, tmp_path, capsys
):
    cache = tmp_path / "models--me--toy"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert run(snapshot, "--dry-run", tmp_path / "out") == 0, capsys.readouterr().err
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    (blobs / "secret").symlink_to(tmp_path / "secret")
    (snapshot / "LICENSE").symlink_to("../../blobs/secret")
    assert run(snapshot, "--dry-run", tmp_path / "again") == 2
    assert "LICENSE is a link out of its folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("picture.png", "picture.png cannot be read as an image: its format is unknown"),
        ("credentials", "credentials is no picture by its name: give one that ends in .jpg"),
        ("real.jpg", "real.jpg cannot be read as an image: its format is unknown"),
    ],
)
def test_what_is_called_a_picture_is_one(checkpoint, tmp_path, name, message):
    (checkpoint / "picture.png").write_text("secret")
    (checkpoint / "credentials").write_text("secret")
    make_image().save(checkpoint / "real.jpg", "PNG")
    (checkpoint / "README.md").write_text(CARD.replace("license:", f"widget:\n- src: {name}\nlicense:"))
    with pytest.raises(ValueError, match=message):
        write(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("widget", ["example.png", "[example.png]", "[{src: 5}]"])
def test_a_widget_without_pictures_has_none(checkpoint, tmp_path, widget):
    (checkpoint / "README.md").write_text(CARD.replace("license:", f"widget: {widget}\nlicense:"))
    write(checkpoint, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES


HF, AWS = "hf_" + "aB3" * 12, "AKIA" + "Z7" * 8  # not written out: scanners of repositories look for these
BEFORE = {
    "README.md": "- loss",
    "LICENSE": "theirs",
    "config.json": '"architectures"',
    "pruning_lightvlm.py": "import torch",
}


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("README.md", f"login(token='{HF}')", "a token, hf_aB3a…"),
        ("README.md", "data: /home/someone/photos", "a path of this machine, /home/someone"),
        ("README.md", "data: C:\\Users\\someone\\photos", "a path of this machine, C:"),
        ("pruning_lightvlm.py", f"# {AWS}", "a token, AKIAZ7Z…"),
        ("pruning_lightvlm.py", "# file:///Users/someone/x", "a path of this machine, /Users/someone"),
        ("LICENSE", "-----BEGIN RSA PRIVATE KEY-----", "a token, -----BE…"),
        ("config.json", '"own": "/home/someone/run",', "a path of this machine, /home/someone"),
    ],
)
def test_a_token_or_a_path_of_this_machine_is_refused_by_file_and_line(checkpoint, tmp_path, name, line, message):
    (checkpoint / "LICENSE").write_text("theirs\n")
    text, before = (checkpoint / name).read_text(), BEFORE[name]
    (checkpoint / name).write_text(text.replace(before, f"{line}\n{before}", 1))
    with pytest.raises(ValueError, match=rf"{name}, line \d+, would publish {message}") as error:
        write(checkpoint, tmp_path / "out")
    number = int(str(error.value).split("line ")[1].split(",")[0])
    assert line[-9:] in (tmp_path / "out" / name).read_text().splitlines()[number - 1]
    assert HF not in str(error.value) and AWS not in str(error.value)


def test_the_user_s_home_is_refused_whatever_it_is_called_but_no_words_of_a_vocabulary(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", "/data/someone")
    model, processor = LightVLM.from_pretrained(checkpoint), make_processor()
    processor.tokenizer.add_tokens(["/home/user"])
    (checkpoint / "README.md").write_text(CARD.replace("- loss", "- data: /data/someone/a.json\n- loss"))
    with pytest.raises(ValueError, match=r"README.md, line \d+, would publish a path of this machine, /data/someone"):
        write_folder(model, processor, checkpoint, tmp_path / "out", "me/toy", [], {})
    (checkpoint / "README.md").write_text(CARD.replace("- loss", "- data: https://example.org/home/a.json\n- loss"))
    write_folder(model, processor, checkpoint, tmp_path / "again", "me/toy", [], {})
    assert "/home/user" in (tmp_path / "again" / "tokenizer.json").read_text()


def test_where_parts_were_loaded_from_is_not_published(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["_name_or_path"] = config["_name_or_path"] = "/home/someone/phi2"
    (checkpoint / "config.json").write_text(json.dumps(config))
    write(checkpoint, tmp_path / "out")
    assert "_name_or_path" not in (tmp_path / "out" / "config.json").read_text()


def test_commands_that_measured_name_what_others_load(checkpoint, tmp_path):
    command = f"lightvlm eval --model-path {checkpoint}{{}} --data-path a.json"
    write(checkpoint, tmp_path / "out", results=[row() | {"command": command.format("")}])
    assert "`lightvlm eval --model-path me/toy --data-path a.json`" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="would publish a path of this machine"):
        write(checkpoint, tmp_path / "two", results=[row() | {"command": command.format("/checkpoint-5")}])


def test_code_of_folder_and_card_runs_without_tokens_and_is_told_before(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "home" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "home" / ".cache" / "huggingface" / "token").write_text(HF)
    for name, value in {
        "HOME": tmp_path / "home",
        "HF_TOKEN": HF,
        "AWS_SECRET_ACCESS_KEY": "a",
        "MY_KEY": "b",
    }.items():
        monkeypatch.setenv(name, str(value))
    seen = f"open({str(tmp_path / 'seen')!r}, 'w')"
    spy = f"import huggingface_hub, json, os\njson.dump([dict(os.environ), huggingface_hub.get_token()], {seen})"
    (checkpoint / "README.md").write_text(CARD.replace("- loss", f"```python\n{spy}\n```\n\n- loss"))
    monkeypatch.setattr("lightvlm.hub.card.TEMPLATE", tmp_path / "card.md")
    (tmp_path / "card.md").write_text(
        "---\n{{ card_data }}\n---\n{{ training }}\n"
    )  # its own code takes half a minute
    assert run(checkpoint, "--dry-run", tmp_path / "out") == 0, capsys.readouterr().err
    environment, token = json.loads((tmp_path / "seen").read_text())
    assert token is None and environment["HOME"] != str(tmp_path / "home")
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_KEY"} & environment.keys() and "PATH" in environment
    told = capsys.readouterr().out.splitlines()[0]
    code = ", ".join(sorted(path.name for path in checkpoint.glob("*.py")))
    assert told == f"Now runs, without tokens: {code} and 1 blocks of Python in its card"


def test_code_that_writes_into_the_folder_to_be_published_is_refused(checkpoint, tmp_path, capsys):
    with (checkpoint / "configuration_lightvlm.py").open("a") as file:
        file.write("\nimport sys\nfrom pathlib import Path\nPath(sys.argv[1], 'planted.txt').write_text('x')\n")
    assert run(checkpoint, "--dry-run", tmp_path / "out") == 2
    assert "Its own code changed planted.txt in the folder to be published" in capsys.readouterr().err
