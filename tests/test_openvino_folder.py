"""What `lightvlm export --openvino` writes, and what it refuses in one sentence."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from lightvlm import LightVLMConfig, LightVLMProcessor
from lightvlm.inference.fingerprint import fingerprint
from lightvlm.inference.openvino_model import BACKEND, VERSIONS
from lightvlm_cli.main import main
from PIL import Image
from saved import pretend_installed, run_apart
from tiny import GRIDS, NUM_PATCHES, make_dynamic, make_image, make_model, make_processor, text_config
from transformers import MistralConfig

pytest.importorskip("openvino_genai")

import openvino  # noqa: E402
import openvino_genai  # noqa: E402
from lightvlm.inference.openvino_export import export_openvino  # noqa: E402

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def export(checkpoint, folder, *options):
    return main(["export", "--openvino", "--model-path", checkpoint, "--output-dir", str(folder), *options])


def refusal(capsys, checkpoint, folder, *options):
    """Return why a checkpoint is not exported; nothing is written then."""
    capsys.readouterr()
    before = {*folder.parent.iterdir()}
    assert export(checkpoint, folder, *options) == 2
    assert {*folder.parent.iterdir()} == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture
def make_checkpoint(tmp_path):
    """Return a function that saves a model and processor, by default the tiny ones."""

    def save(model=None, processor=None):
        folder = tmp_path / "checkpoint"
        (model or make_model()).save_pretrained(folder)
        (processor or make_processor()).save_pretrained(folder)
        return str(folder)

    return save


def test_the_command_says_what_it_wrote(checkpoint, tmp_path, capsys):
    capsys.readouterr()
    assert export(checkpoint, tmp_path / "new" / "folder", "--num-image-tokens", "25%") == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"{tmp_path / 'new' / 'folder'}: ") and "K = 9" in output.out and not output.err
    assert [*(tmp_path / "new").iterdir()] == [tmp_path / "new" / "folder"]
    assert "one view" not in output.out  # which the checkpoint's images always are


def test_a_folder_tells_what_it_was_made_of(checkpoint, tmp_path):
    folder = tmp_path / "folder"
    assert export(checkpoint, folder, "--num-image-tokens", "all") == 0
    about = json.loads((folder / "lightvlm.json").read_text())
    found = (about["num_image_tokens"], about["max_image_tokens"], about["num_patches"], about["views"])
    assert found == (NUM_PATCHES, NUM_PATCHES, NUM_PATCHES, 1)
    assert about["checkpoint"] == fingerprint(checkpoint)
    assert about["made_with"]["openvino"] == openvino.__version__.split("-")[0]
    assert (about["weights"], about["encoder"]) == (None, "float32")


def test_a_folder_has_the_checkpoints_own_processor(checkpoint, tmp_path):
    folder = tmp_path / "folder"
    assert export(checkpoint, folder) == 0
    processor, own = (LightVLMProcessor.from_pretrained(each) for each in (folder / "checkpoint", checkpoint))
    config, expected = (LightVLMConfig.from_pretrained(each) for each in (folder / "checkpoint", checkpoint))
    assert all(
        getattr(config, name) == getattr(expected, name) for name in ("num_image_tokens", "score", "position_ids")
    )
    found, expected = (
        each(images=make_image(), text="<image> what?", num_image_tokens=4, return_tensors="pt")
        for each in (processor, own)
    )
    assert all(found[name].equal(expected[name]) for name in expected)
    assert not [*folder.rglob("*.py")] and not [*folder.rglob("*.safetensors")]


def test_it_says_that_large_images_are_one_view(make_checkpoint, tmp_path, capsys):
    checkpoint = make_checkpoint(make_model(image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS))
    assert export(checkpoint, tmp_path / "folder", "--num-image-tokens", "all") == 0
    assert f"K = {NUM_PATCHES}, " in (output := capsys.readouterr().out) and "one view" in output


def test_nothing_is_reported_to_the_makers_of_the_tools(checkpoint, tmp_path, monkeypatch):
    sender, reports = pytest.importorskip("openvino_telemetry.utils.sender"), []
    monkeypatch.setattr(sender.TelemetrySender, "send", lambda *report: reports.append(report))
    monkeypatch.setenv("CI", "false")  # there they are quiet by themselves
    assert export(checkpoint, tmp_path / "folder", "--num-image-tokens", "9", "--weights", "int8") == 0
    graph = ["--num-image-tokens", "9", "--output", str(tmp_path / "graph.xml")]
    assert main(["export", "--model-path", checkpoint, *graph]) == 0
    assert not reports


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_with_pictures_the_encoder_is_of_int8_too(checkpoint, tmp_path, weights):
    (tmp_path / "pictures").mkdir()
    for seed in range(4):
        make_image(seed, (100, 84)).save(tmp_path / "pictures" / f"{seed}.png")
    options = ("--num-image-tokens", "9", "--weights", weights)
    pictures = ("--calibration-images", str(tmp_path / "pictures"))
    for name, more in (("without", ()), ("with", pictures)):
        folder = ("--model-path", checkpoint, "--output-dir", tmp_path / name)
        run_apart("export", "--openvino", *folder, *options, *more)
    about = [json.loads((tmp_path / name / "lightvlm.json").read_text()) for name in ("without", "with")]
    assert [each["encoder"] for each in about] == ["float32", "int8"]
    assert [each["calibration_images"] for each in about] == [0, 4] and "nncf" in about[0]["made_with"]
    compiled = openvino.compile_model(tmp_path / "with" / "openvino_vision_embeddings_model.xml", "CPU")
    names = {
        operation.get_type_name()
        for operation in openvino.Core()
        .read_model(tmp_path / "with" / "openvino_vision_embeddings_model.xml")
        .get_ops()
    }
    assert "FakeQuantize" in names
    assert compiled(np.zeros((1, 3, 84, 84), np.float32))[0].shape == (1, 9, 32)
    config = openvino_genai.GenerationConfig(max_new_tokens=2)
    pipeline, picture = (
        openvino_genai.VLMPipeline(str(tmp_path / "with"), "CPU", **BACKEND),
        openvino.Tensor(np.array(make_image())),
    )
    assert pipeline.generate("what?", images=[picture], generation_config=config).texts


REFUSED = {
    "original": (lambda: make_model(position_ids="original"), make_processor, "counts positions consecutively"),
    "newline": (
        lambda: make_model(image_grid_pinpoints=GRIDS, image_newline=True),
        lambda: make_processor(pinpoints=GRIDS, image_newline=True),
        "several views of every image",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_stock_pipeline_would_answer_otherwise_is_refused(name, make_checkpoint, tmp_path, capsys):
    model, processor, message = REFUSED[name]
    assert message in refusal(capsys, make_checkpoint(model(), processor()), tmp_path / "folder")


def test_a_sliding_window_is_refused(tmp_path):
    processor = make_processor()
    shared = text_config("llama", processor.tokenizer).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = MistralConfig(**{name: shared[name] for name in names}, num_key_value_heads=2, sliding_window=8)
    with pytest.raises(ValueError, match="this mistral do not all attend"):
        export_openvino(make_model(text_config=text, lm_head_bias=False), processor, tmp_path / "folder", 9)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "change",
    [{"resample": Image.Resampling.NEAREST}, {"do_rescale": False}, {"image_std": [1, 1, 1], "do_normalize": False}],
)
def test_pixels_that_the_pipeline_would_not_make_are_refused(change, tmp_path):
    processor = make_processor()
    for name, value in change.items():
        setattr(processor.image_processor, name, value)
    with pytest.raises(ValueError, match="bicubic"):
        export_openvino(make_model(), processor, tmp_path / "folder", 9)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-image-tokens", "37"], "from 1 to 36"),
        (["--num-image-tokens", "0"], "from 1 to 36"),
        (["--num-image-tokens", "dynamic:8"], "cannot tell"),
        (["--int8"], "--weights in place of --int8"),
        (["--dtype", "bfloat16"], "in place of --int8 and --dtype"),
        (["--batch-size", "2"], "no --batch-size"),
        (["--calibration-images", "nowhere", "--weights", "int8"], "nowhere"),
        (["--calibration-images", "nowhere"], "give weights too"),
    ],
)
def test_options_that_make_no_sense_are_refused(checkpoint, tmp_path, capsys, options, message):
    assert message in refusal(capsys, checkpoint, tmp_path / "folder", *options)


def test_a_mean_that_was_not_calibrated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="calibrated for means from 2 to 30"):
        export_openvino(make_dynamic(), make_processor(), tmp_path / "folder", "dynamic:36")


def test_what_encoder_keep_dropped_cannot_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match="from 1 to 18"):
        export_openvino(make_model(encoder_keep={1: 0.5}), make_processor(), tmp_path / "folder", 19)


@pytest.mark.parametrize("options", [["--output", "a.onnx", "--output-dir", "b"], []])
def test_one_place_is_written_to(checkpoint, capsys, options):
    with pytest.raises(SystemExit):
        main(["export", "--model-path", checkpoint, *options])
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--openvino", "--output", "a.xml"], ["--output-dir", "b"], ["--output", "a.onnx", "--weights", "int8"]],
)
def test_openvino_and_its_options_go_together(checkpoint, capsys, options, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--model-path", checkpoint, *options]) == 2
    assert "--openvino" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_folder_is_not_exported_again(checkpoint, tmp_path, capsys):
    assert export(checkpoint, tmp_path / "folder") == 0
    assert "folder was exported for OpenVINO already" in refusal(capsys, str(tmp_path / "folder"), tmp_path / "other")


def test_files_in_the_folder_are_not_lost(checkpoint, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    assert "is there already" in refusal(capsys, checkpoint, tmp_path / "folder")
    assert (tmp_path / "folder" / "mine.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def fill_the_disk(graph, path, **options):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(openvino, "save_model", fill_the_disk)
    assert export(checkpoint, tmp_path / "folder") == 2
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("package", ["nncf", "openvino", "openvino-tokenizers"])
@pytest.mark.parametrize("found", ["2.9.0", None])
def test_a_package_that_is_missing_or_too_old_is_named(checkpoint, tmp_path, capsys, monkeypatch, package, found):
    pretend_installed(monkeypatch, package, found)
    message = f'needs {package}>={VERSIONS[package]}: pip install --upgrade "lightvlm[edge]"'
    assert message in refusal(capsys, checkpoint, tmp_path / "folder", "--weights", "int8")


def test_what_is_needed_is_the_extra_of_the_package():
    (extra,) = re.findall(r"^edge = (.+)$", PYPROJECT.read_text(), flags=re.MULTILINE)
    assert json.loads(extra) == [f"{package}>={oldest}" for package, oldest in VERSIONS.items()]
