"""What is pushed loads and answers without the package; a checkpoint that does not is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi
from lightvlm import LightVLM
from lightvlm.hub import push
from lightvlm.hub.build import save
from lightvlm.hub.push import upload, write_folder
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.inference.compilation import int8_config
from lightvlm.inference.fingerprint import fingerprint
from lightvlm_cli.main import main
from saved import CARD, PUBLISHED, row
from tiny import make_image, make_model, make_processor


@pytest.fixture
def checkpoint(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "checkpoint")


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
    assert hub.files("me/toy").keys() == PUBLISHED | {".gitattributes", ".eval_results/gqa.yaml"}
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
    assert {file.name for file in out.iterdir()} == PUBLISHED
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
    assert {file.name for file in (tmp_path / "hub").iterdir()} == PUBLISHED | {"example.png"}
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


@pytest.mark.slow
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


def test_the_shipped_checkpoint_has_what_a_card_needs():
    from lightvlm.hub.card import read_card

    data, intro, training = read_card(SHIPPED)
    assert data.license == "mit" and "nothing else" in " ".join(intro.split())
    assert "On easy-VQA and mosaics of it" in training
