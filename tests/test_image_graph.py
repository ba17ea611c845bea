"""With --encoder, the graph of `lightvlm export` encodes the images, and the answers stay those of PyTorch."""

import json
import shutil

import pytest
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.demo.answers import Answerer, Choice, Conversation
from lightvlm.inference.any_model import load_any
from lightvlm.inference.checkpoint import load
from lightvlm.inference.export import export_image_tokens
from lightvlm.inference.own_model import Options
from lightvlm_cli.main import main
from saved import edit_json, edit_weights
from saved_families import save_family
from served import ask, draw, post_fields, serving, user
from tiny import GRIDS, make_dynamic, make_image, make_model, make_processor, say

pytest.importorskip("onnxruntime")
QUESTIONS = ["what color?", "is there a circle in this image?", "what shape is in the top left?"]
K = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of pictures, a checkpoint of many views whose K is dynamic, and its graphs."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "pictures").mkdir()
    for index, size in enumerate([(84, 84), (60, 70), (300, 200)]):
        make_image(index, size).save(folder / f"pictures/{index}.png")
    model = make_dynamic(image_grid_pinpoints=GRIDS, score="question", num_image_tokens="dynamic")
    torch.nn.init.normal_(model.model.pruner.row_embedding.weight)
    model.save_pretrained(folder / "model")
    make_processor(num_image_tokens="dynamic", pinpoints=GRIDS).save_pretrained(folder / "model")
    for options in (
        ["k9.onnx"],
        ["k9.xml"],
        ["two.onnx", "--batch-size", "2"],
        ["k4.onnx", "--num-image-tokens", "4"],
    ):
        command = ["export", "--model-path", str(folder / "model"), "--num-image-tokens", str(K)]
        assert main([*command, "--output", str(folder / options[0]), *options[1:]]) == 0
    return folder


def infer(folder, *options):
    model = ["--model-path", str(folder / "model"), "--max-new-tokens", "5", "--max-views", "1", "--batch-size", "4"]
    return main(["infer", *model, *map(str, options)])


def lines(file):
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda line: line["row"])


@pytest.mark.parametrize("name", ["k9.onnx", "k9.xml", "two.onnx"])
def test_the_tokens_are_those_of_the_model(folder, name):
    model, processor = load(str(folder / "model"))
    asked = load_any(str(folder / "model"), encoder=folder / name)
    images = [make_image(number, size) for number, size in enumerate([(84, 84), (300, 200), (60, 70)])]
    inputs = processor(images=images, num_image_tokens=K, max_views=1, return_tensors="pt")
    with torch.no_grad():
        expected, found = (each.model.get_image_features(**inputs) for each in (model, asked.model))
    for left, right in zip(expected.pooler_output, found.pooler_output, strict=True):
        torch.testing.assert_close(right, left, atol=1e-4, rtol=1e-4)
    assert [each.tolist() for each in found.kept_indices] == [each.tolist() for each in expected.kept_indices]
    assert found.lengths == expected.lengths and found.num_image_tokens == [K] * 3


@pytest.mark.parametrize("name", ["k9.onnx", "k9.xml"])
def test_many_questions_are_answered_as_by_pytorch_at_the_graphs_own_budget(folder, tmp_path, name):
    options = ["--image", folder / "pictures", "--prompt", *QUESTIONS]
    assert infer(folder, *options, "--num-image-tokens", K, "--output", tmp_path / "torch.jsonl") == 0
    assert infer(folder, *options, "--encoder", folder / name, "--output", tmp_path / "graph.jsonl") == 0
    expected, found = (lines(tmp_path / f"{each}.jsonl") for each in ("torch", "graph"))
    assert [line["answer"] for line in found] == [line["answer"] for line in expected] and len(found) == 9
    assert [line["kept"] for line in found] == [[K]] * 9


def test_a_prompt_of_several_images_and_one_of_none(folder):
    model, processor = load(str(folder / "model"))
    asked = load_any(str(folder / "model"), encoder=folder / "k9.onnx")
    for images in ([make_image(0), make_image(1), make_image(0)], []):
        history, options = [], {"processor": processor, "num_image_tokens": K, "max_new_tokens": 8}
        expected = [model.chat(images, "what?", history, **options), model.chat(None, "why?", history, **options)]
        history, options = [], {"processor": asked.processor, "max_new_tokens": 8}
        again = [asked.model.chat(images, "what?", history, **options)]
        assert [*again, asked.model.chat(None, "why?", history, **options)] == expected


def test_original_positions_are_those_of_the_whole_image(tmp_path):
    model, processor = make_model(position_ids="original", image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    export_image_tokens(model, tmp_path / "graph.onnx", K, model_path=str(tmp_path))
    asked, wanted = load_any(str(tmp_path), encoder=tmp_path / "graph.onnx"), {"max_views": 1, "max_new_tokens": 8}
    image = make_image(0, (300, 200))
    assert asked.model.chat(image, "what?", processor=asked.processor, **wanted) == model.chat(
        image, "what?", processor=processor, num_image_tokens=K, **wanted
    )


def test_answers_by_another_encoder_do_not_join_a_file(folder, tmp_path, capsys):
    shutil.copy(folder / "k9.onnx", tmp_path / "same.onnx")
    options = ["--image", folder / "pictures", "--num-image-tokens", K, "--output", tmp_path / "answers.jsonl"]
    graph = [*options, "--encoder", folder / "k9.onnx"]
    assert infer(folder, *graph, "--prompt", QUESTIONS[0]) == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    for other in ([], ["--encoder", folder / "two.onnx"], ["--encoder", folder / "k9.xml"]):
        assert infer(folder, *options, *other, "--prompt", *QUESTIONS[:2]) == 2
        assert "other encoder: go on with the same" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    capsys.readouterr()
    assert infer(folder, *options, "--encoder", tmp_path / "same.onnx", "--prompt", QUESTIONS[0]) == 0
    assert "3 answers by earlier runs" in capsys.readouterr().err
    options[-1] = tmp_path / "torch.jsonl"
    assert infer(folder, *options, "--prompt", QUESTIONS[0]) == 0
    assert infer(folder, *options, "--encoder", folder / "k9.onnx", "--prompt", QUESTIONS[0]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-image-tokens", "4"], "keeps 9 tokens of each image, whatever the question, and not K = 4"),
        (["--num-image-tokens", "9,dynamic:8"], "and not a dynamic budget: ask for that without --encoder"),
        (["--question-aware"], "and not a choice by the question"),
        (["--max-views", "2"], "sees one view of an image"),
        (["--encoder", "nothing.onnx"], "nothing.onnx: give a file of `lightvlm export` that ends in .onnx or .xml"),
        (["--encoder", "model/config.json"], "ends in .onnx or .xml"),
        (["--encoder", "broken.onnx"], "broken.onnx is no graph of `lightvlm export`"),
        (["--encoder", "nobodys.onnx"], "does not say which checkpoint it was made of: export it again"),
        (["--encoder", "others.onnx"], "was made of another checkpoint than"),
    ],
)
@pytest.mark.parametrize("output", [[], ["--output", "answers.jsonl"]], ids=["text", "file"])
def test_what_the_graph_has_not_is_refused_in_one_sentence(folder, capsys, monkeypatch, options, message, output):
    monkeypatch.chdir(folder)
    (folder / "broken.onnx").write_bytes((folder / "k9.onnx").read_bytes()[:1000])
    model, _ = load(str(folder / "model"))
    if not (folder / "nobodys.onnx").exists():
        export_image_tokens(model, folder / "nobodys.onnx", K)
        shutil.copytree(folder / "model", folder / "other")
        edit_weights(folder / "other", lambda weights: {name: 2 * weight for name, weight in weights.items()})
        export_image_tokens(model, folder / "others.onnx", K, model_path=str(folder / "other"))
    command = ["--image", "pictures", "--prompt", "what?", "--encoder", "k9.onnx", *options, *output]
    assert infer(folder, *command) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    for file in folder.glob("answers.jsonl*"):
        file.unlink()


def test_a_checkpoint_that_was_trained_on_or_configured_anew_at_the_same_path_wants_another_graph(tmp_path, capsys):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    make_image().save(tmp_path / "image.png")
    graph = ["--model-path", str(tmp_path), "--num-image-tokens", str(K)]
    assert main(["export", *graph, "--output", str(tmp_path / "graph.onnx")]) == 0
    command = ["infer", *graph, "--encoder", str(tmp_path / "graph.onnx"), "--prompt", "what?"]
    command += ["--image", str(tmp_path / "image.png"), "--max-new-tokens", "1"]
    assert main(command) == 0
    edit_json(tmp_path / "config.json", encoder_keep={"1": 0.5})
    assert main(command) == 2 and "with other encoder_keep: export it again" in capsys.readouterr().err
    edit_json(tmp_path / "config.json", encoder_keep=None)
    edit_weights(tmp_path, lambda weights: {name: 1.01 * weight for name, weight in weights.items()})
    assert main(command) == 2 and "with other weights: export it again" in capsys.readouterr().err


def test_another_familys_checkpoint_has_no_such_graph(folder, tmp_path):
    with pytest.raises(ValueError, match="--encoder is of LightVLM checkpoints alone"):
        load_any(save_family("qwen3_vl", tmp_path / "qwen"), encoder=folder / "k9.onnx")


def test_bf16_is_for_other_programs(tmp_path):
    model = make_model().bfloat16()
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    export_image_tokens(model, tmp_path / "graph.xml", K, model_path=str(tmp_path))
    with pytest.raises(ValueError, match="takes pixels of type bf16: export it with --dtype float32"):
        load_any(str(tmp_path), encoder=tmp_path / "graph.xml")


def test_clients_are_answered_as_by_chat_and_told_what_the_graph_has_not(folder):
    model, processor = LightVLM.from_pretrained(folder / "model"), LightVLMProcessor.from_pretrained(folder / "model")
    asked = load_any(str(folder / "model"), encoder=folder / "k9.onnx")
    with serving(asked, name="lightvlm-tiny") as client:
        for image in (draw(1), draw(2)):
            expected = model.eval().chat(image, "what?", num_image_tokens=K, processor=processor, max_new_tokens=16)
            assert ask(client, [user("what?", image)], max_tokens=16) == expected
        status, message = post_fields(client, num_image_tokens=4)
        assert status == 400 and "keeps 9 tokens" in message
        status, message = post_fields(client, messages=[user("what?", make_image(0, (190, 180)))], stream=True)
        assert status == 400 and "sees one view of an image" in message


def test_the_demo_has_the_graphs_budget_alone(folder):
    asked = load_any(str(folder / "model"), encoder=folder / "k9.onnx")
    answerer = Answerer(asked.model, asked.processor)
    controls = answerer.controls()
    assert controls.is_fixed and (controls.most, controls.number, controls.means) == (K, K, [])
    *_, (answer, picture) = answerer.answer(Conversation(make_image(), "what?"), Choice(K))
    assert f"{K} of 36 tokens" in answer and "all tokens" not in answer and picture is not None
    with pytest.raises(ValueError, match="and not K = 4"):
        [*answerer.answer(Conversation(make_image(), "what?"), Choice(4))]
    (other,) = asked.answer([[say("user", "what?", make_image())]], {"max_new_tokens": 256}, Options())
    assert answer.startswith(other.text)
