"""No file from elsewhere, no token and no path of the machine is published, and code runs without tokens."""

import json
import shutil

import pytest
from lightvlm import LightVLM
from lightvlm.hub.push import write_folder
from lightvlm_cli.main import main
from saved import CARD, PUBLISHED, row
from tiny import make_image, make_processor


@pytest.fixture
def checkpoint(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "checkpoint")


def run(checkpoint, *options):
    return main(["push", "--model-path", str(checkpoint), *map(str, options)])


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
    assert {file.name for file in (tmp_path / "out").iterdir()} == PUBLISHED


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_code_that_writes_into_the_folder_to_be_published_is_refused(checkpoint, tmp_path, capsys):
    with (checkpoint / "configuration_lightvlm.py").open("a") as file:
        file.write("\nimport sys\nfrom pathlib import Path\nPath(sys.argv[1], 'planted.txt').write_text('x')\n")
    assert run(checkpoint, "--dry-run", tmp_path / "out") == 2
    assert "Its own code changed planted.txt in the folder to be published" in capsys.readouterr().err
