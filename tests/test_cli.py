"""The command line answers and builds; wrong input gets one clear sentence and exit code 2."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from huggingface_hub.utils import tqdm as hub_bar
from lightvlm import LightVLM, LightVLMModel
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm_cli.main import VERBS, main
from lightvlm_cli.options import SHIPPED as DEFAULT
from lightvlm_cli.quiet import silence_libraries
from PIL import Image
from saved import broken_images, edit_weights, save_parts
from tiny import make_image, make_model
from transformers.utils.logging import tqdm as transformers_bar


@pytest.fixture
def image(tmp_path):
    make_image().save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def infer(checkpoint, image, *options):
    return main(["infer", "--model-path", checkpoint, "--image", image, "--prompt", "what?", *options])


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    assert f"  lightvlm {verb} --" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_and_version_load_nothing_heavy(words):
    code = f"""
import sys
from lightvlm_cli.main import main
try:
    main({words})
finally:
    print({{"torch", "transformers", "PIL", "datasets", "numpy"}} & {{*sys.modules}}, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "set()") and "lightvlm" in done.stdout
    if words == ["--version"]:
        assert done.stdout == f"lightvlm {version('lightvlm')}\n"


def test_the_default_checkpoint_is_the_shipped_one():
    assert DEFAULT == SHIPPED


VERB_RUNS = {
    "infer": ["--image", "image.png", "--prompt", "what?", "--max-new-tokens", "2"],
    "infer --int8": ["--image", "image.png", "--prompt", "what?", "--max-new-tokens", "2", "--int8"],
    "show": ["--image", "image.png"],
    "build": ["--vision", "vision", "--text", "text", "--output-dir", "hub"],
    "export": ["--output", "graph.onnx"],
    "push": ["--dry-run", "hub"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VERB_RUNS)
def test_standard_error_is_empty_where_nothing_is_wrong(name, image, tmp_path):
    save_parts(tmp_path)
    command = [sys.executable, "-m", "lightvlm_cli.main", name.split()[0], *VERB_RUNS[name]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_downloads_keep_their_progress_bars(capsys):
    silence_libraries()
    assert [*transformers_bar(range(3))] == [0, 1, 2]
    assert capsys.readouterr().err == ""
    hub_bar(total=3).close()
    assert "0/3" in capsys.readouterr().err


def test_infer_encodes_and_prefills_once_for_an_answer(checkpoint, image, monkeypatch):
    calls = []
    for part, name in ((LightVLMModel, "get_image_features"), (LightVLM, "forward")):
        run = getattr(part, name)

        def spy(self, *args, name=name, run=run, **kwargs):
            calls.append(name)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(part, name, spy)
    assert infer(checkpoint, image, "--max-new-tokens", "1") == 0
    assert calls == ["get_image_features", "forward"]


def test_infer_answers_at_several_budgets(checkpoint, image, capsys):
    assert infer(checkpoint, image, "--num-image-tokens", "36,4", "--format", "json", "--max-new-tokens", "3") == 0
    full, few = json.loads(capsys.readouterr().out)
    assert (full["num_image_tokens"], few["num_image_tokens"]) == (36, 4)
    assert isinstance(full["answer"], str) and isinstance(few["answer"], str)
    assert infer(checkpoint, image, "--max-new-tokens", "3") == 0
    assert "9 of 36 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["0", "-1", "37"])
def test_budgets_outside_the_grid(checkpoint, image, budget, capsys):
    assert infer(checkpoint, image, f"--num-image-tokens={budget}") == 2
    assert "from 1 to 36" in capsys.readouterr().err


def test_the_shipped_checkpoint_decides_how_many_tokens_an_image_needs(tmp_path, capsys):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "image.png")
    assert infer(str(SHIPPED), str(tmp_path / "image.png"), "--num-image-tokens", "dynamic:64,dynamic,64") == 0
    assert re.findall(r"(\d+) of 576 tokens( \(.*\))?", output := capsys.readouterr().out)[2] == ("64", ""), output
    few, more = (int(line.split()[0]) for line in output.splitlines() if "(dynamic" in line)
    assert 2 <= few < more
    show = ["show", "--image", str(tmp_path / "image.png"), "--output", str(tmp_path / "kept.png")]
    assert main([*show, "--num-image-tokens", "dynamic:64"]) == 0
    assert f"{few} of 576 tokens" in capsys.readouterr().out


def test_a_dynamic_budget_wants_a_checkpoint_that_knows_it(checkpoint, image, capsys):
    assert infer(checkpoint, image, "--num-image-tokens=dynamic") == 2
    assert "training/budget.py" in capsys.readouterr().err
    assert infer(str(SHIPPED), image, "--num-image-tokens=dynamic:200") == 2
    assert "calibrated for means from 8 to 192" in capsys.readouterr().err


NO_BUDGET = "must be like 64, 25%, 0.25, all, dynamic or dynamic:64, got"
NO_SHARE = "must be more than 0% and at most 100% of an image's tokens, got"


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        *((text, NO_BUDGET) for text in ("many", "4.5", "4,,5", "dynamic:", "dynamic:few", "%", "4%%")),
        *((text, NO_SHARE) for text in ("0%", "150%", "0.0", "16,100.5%")),
    ],
)
def test_budgets_that_are_no_numbers(checkpoint, image, budget, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        infer(checkpoint, image, "--num-image-tokens", budget)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_share_is_one_of_a_views_patches(checkpoint, image, capsys):
    assert infer(checkpoint, image, "--num-image-tokens", "25%,0.5,1%,all", "--max-new-tokens", "1") == 0
    assert re.findall(r"(\d+) of 36 tokens", capsys.readouterr().out) == ["9", "18", "1", "36"]


def test_images_that_cannot_be_read(checkpoint, tmp_path, capsys):
    for name in broken_images(tmp_path):
        assert infer(checkpoint, str(tmp_path / name)) == 2, name
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("lightvlm infer: ") and (name in error or "thin" in error), error


@pytest.mark.parametrize(
    "file, content",
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"nonsense" * 100),
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("processor_config.json", None),
    ],
)
def test_a_broken_checkpoint(checkpoint, image, tmp_path, capsys, file, content):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    assert infer(str(folder), image) == 2
    assert capsys.readouterr().err.count("broken") >= 1


@pytest.mark.parametrize("field", [{"score": "nonsense"}, {"num_image_tokens": "many"}, {"prior_layer": 99}])
def test_a_checkpoint_with_a_wrong_configuration(checkpoint, image, tmp_path, capsys, field):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | field))
    assert infer(str(folder), image) == 2
    assert next(iter(field)) in capsys.readouterr().err


def test_a_missing_checkpoint(image, tmp_path, capsys):
    assert infer(str(tmp_path / "nowhere"), image) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_checkpoint_of_another_kind(image, tmp_path, capsys):
    make_model().model.language_model.save_pretrained(tmp_path)
    assert infer(str(tmp_path), image) == 2
    assert "is a phi checkpoint, which sees no images: give a vision-language model" in capsys.readouterr().err
    assert main(["export", "--model-path", str(tmp_path), "--output", str(tmp_path / "graph.pt2")]) == 2
    assert "lightvlm build" in capsys.readouterr().err


@pytest.mark.parametrize("field", [{"scorer_hidden_size": 17}, {"score": "cls"}])
def test_a_checkpoint_whose_pruner_does_not_fit(checkpoint, image, tmp_path, capsys, field):
    folder = shutil.copytree(checkpoint, tmp_path / "misfit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | field))
    assert infer(str(folder), image) == 2
    assert "model.pruner." in capsys.readouterr().err


HEAD = "language_model.lm_head.weight"  # as it is saved


def test_a_checkpoint_whose_weights_are_no_numbers(checkpoint, image, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    edit_weights(folder, lambda weights: weights | {HEAD: weights[HEAD] / 0})
    assert infer(str(folder), image) == 2
    assert "infinite: lm_head.weight (of 1)" in capsys.readouterr().err


def test_build_composes_two_parts(tmp_path, image, capsys):
    vision, text = save_parts(tmp_path)
    assert main(["build", "--vision", vision, "--text", text, "--output-dir", str(tmp_path / "hub")]) == 0
    assert "in the pruner" in capsys.readouterr().out
    assert infer(str(tmp_path / "hub"), image, "--max-new-tokens", "2") == 0


def test_build_refuses_parts_of_the_wrong_kind(tmp_path, capsys):
    vision, text = save_parts(tmp_path)
    wrong = [["--vision", text, "--text", text], ["--vision", vision, "--text", vision], ["--llava", text]]
    for options in [*wrong, ["--vision", vision, "--text", text, "--prior-layer", "99"]]:
        assert main(["build", *options, "--output-dir", str(tmp_path / "hub")]) == 2, options
        assert not (tmp_path / "hub").exists()


def test_build_needs_two_parts_or_a_llava(capsys, tmp_path):
    for options in ([], ["--vision", "x"], ["--vision", "x", "--text", "y", "--llava", "z"]):
        assert main(["build", *options, "--output-dir", str(tmp_path)]) == 2
        assert "--llava" in capsys.readouterr().err


@pytest.mark.parametrize("capability, dtype", [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_weights_are_of_the_checkpoints_dtype_unless_the_cpu_is_slow_at_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert load(SHIPPED)[0].dtype == dtype
    assert load(SHIPPED, "float16")[0].dtype == torch.float16
