"""Models of other families are asked by the same commands and words as a LightVLM."""

import json
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from lightvlm import TokenScorer, prune
from lightvlm.inference.any_model import AnyModel, load_any
from lightvlm.inference.own_model import Options
from lightvlm_cli.main import main
from PIL import Image
from saved import edit_json
from saved_families import FAMILIES, save_family
from tiny import make_image, make_tokenizer, text_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

WANTED = {"max_new_tokens": 5}


def slow_but(name, names):
    """Return parameters of which one alone is fast."""
    return [each if each == name else pytest.param(each, marks=pytest.mark.slow) for each in names]


@pytest.fixture(scope="module", params=slow_but("qwen3_vl", FAMILIES))
def family(request, tmp_path_factory):
    """Return the folder of a checkpoint of each family."""
    return save_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_family("qwen3_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate([(84, 56), (100, 100), (30, 60)]):
        make_image(index, size).save(folder / f"{index}.png")
    return folder


def talk(question, *images):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


TALKS = [
    talk("what color?", make_image(0, (84, 56))),
    talk("is it red?", make_image(1, (100, 100)), make_image(2, (30, 60))),
]


def infer(folder, pictures, *options):
    asked = ["--image", pictures, "--prompt", "what color?", "is there a circle?", "--max-new-tokens", 5]
    return main(["infer", "--model-path", str(folder), *map(str, [*asked, *options])])


def lines(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda line: (line["row"], str(line["num_image_tokens"])))


def test_all_tokens_answer_as_the_base_model_does(family):
    asked = load_any(family)
    model, processor = AutoModelForImageTextToText.from_pretrained(family), AutoProcessor.from_pretrained(family)
    for conversation in TALKS:
        inputs = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        output = model.generate(**inputs, **WANTED, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        (answer,) = asked.answer([conversation], WANTED, Options(asked.resolve(None)))
        assert answer.text == processor.batch_decode(output, skip_special_tokens=True)[0].strip()
        assert answer.kept == answer.whole


@pytest.mark.parametrize("budget", [None, "50%", 2])
def test_a_batch_is_answered_as_each_is_alone(family, budget):
    asked = load_any(family)
    options = Options(asked.resolve(budget))
    alone = [asked.answer([each], WANTED, options)[0] for each in TALKS]
    assert asked.answer(TALKS, WANTED, options) == alone


def test_tokens_of_each_image_are_counted(qwen):
    asked = load_any(qwen)
    counts = [(each.kept, each.whole) for each in asked.answer(TALKS, WANTED, Options(asked.resolve(0.5)))]
    assert counts == [([3], [6]), ([8, 1], [16, 2])]
    (first, second) = asked.answer(TALKS, WANTED, Options(3))
    assert (first.kept, second.kept) == ([3], [3, 2])  # an image with fewer tokens keeps all


def test_a_number_is_never_a_share(qwen):
    asked = load_any(qwen)
    budgets = [asked.resolve(budget) for budget in (1, 1.0, "100%", None, "all", 0.07, "12.5%")]
    assert budgets == [1, "100%", "100%", "100%", "100%", "7%", "12.5%"]
    for wrong in (0, -1, True, 1.5, 0.0, "150%", "0%", "some", "dynamic:64"):
        with pytest.raises(ValueError, match="give|of LightVLM checkpoints alone"):
            asked.resolve(wrong)


def test_infer_answers_one_picture_and_a_folder_alike(family, pictures, tmp_path, capsys):
    budgets = ["--num-image-tokens", "100%,50%,2"]
    assert infer(family, pictures, *budgets, "--format", "json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert infer(family, pictures, *budgets, "--output", tmp_path / "out.jsonl", "--batch-size", 4) == 0
    found = {
        (line["image"][0], line["question"], line["num_image_tokens"]): line for line in lines(tmp_path / "out.jsonl")
    }
    assert len(found) == len(alone) == 3 * 2 * 3
    for one in alone:
        line = found[one["image"], one["prompt"], one["budget"]]
        assert (line["answer"], line["kept"]) == (one["answer"], [one["num_image_tokens"]])


def test_a_second_run_goes_on_and_another_pruner_is_refused(qwen, pictures, tmp_path, monkeypatch, capsys):
    asked, answer = [], AnyModel.answer
    monkeypatch.setattr(AnyModel, "answer", lambda *args: asked.extend(args[1]) or answer(*args))
    run = ["--num-image-tokens", "50%", "--output", tmp_path / "out.jsonl"]
    assert infer(qwen, pictures, *run) == 0 and len(asked) == 6
    text = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").write_text("".join(text.splitlines(keepends=True)[:4]))
    asked.clear()
    assert infer(qwen, pictures, *run) == 0 and len(asked) == 2
    assert infer(qwen, pictures, "--num-image-tokens", "0.5,1", *run[2:]) == 0 and len(asked) == 8  # one token each
    assert {len(lines(tmp_path / "out.jsonl"))} == {12}

    scorer = TokenScorer(32, 8)
    scorer.save_pretrained(tmp_path / "pruner")
    assert infer(qwen, pictures, *run, "--pruner", tmp_path / "pruner") == 2
    assert "other pruner" in (error := capsys.readouterr().err) or "pruner_sha256 keep_distinct" in error
    learned = [*run[:2], "--output", tmp_path / "learned.jsonl", "--pruner", tmp_path / "pruner"]
    assert infer(qwen, pictures, *learned) == 0
    torch.nn.init.normal_(scorer.scorer[-1].weight)
    scorer.save_pretrained(tmp_path / "pruner")  # other weights at the same path
    assert infer(qwen, pictures, *learned) == 2
    assert "was answered with other pruner" in capsys.readouterr().err


def test_a_pruner_chooses_the_tokens(qwen, tmp_path):
    scorer = TokenScorer(32, 8, select="topk")
    torch.nn.init.normal_(scorer.scorer[-1].weight, std=100)
    scorer.save_pretrained(tmp_path)
    options = Options("20%")
    learned, plain = (load_any(qwen, pruner).answer(TALKS, WANTED, options) for pruner in (tmp_path, None))
    assert [each.kept for each in learned] == [each.kept for each in plain] and learned != plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-image-tokens", "dynamic:8"], "is of LightVLM checkpoints alone, and .* is a qwen3_vl: leave it out"),
        (["--num-image-tokens", "64,dynamic"], "or give a number or a share such as 25%"),
        (["--num-image-tokens", "0"], "0 is no budget: give a number of tokens"),
        (["--max-views", "2"], "--max-views is of LightVLM checkpoints alone"),
        (["--question-aware"], "a pruner that was trained with questions reads them anyway"),
        (["--int8"], "--int8 is made for LightVLM checkpoints"),
        (["--pruner", "missing"], "missing is not a folder or Hub repository with a pruner"),
        (["--pruner", "wide"], "wide was trained for tokens of width 48, and those of .* have 32"),
        (["--max-new-tokens", "600"], "more than the 512 that the model reads"),
    ],
)
def test_what_another_family_cannot_do_is_one_sentence(
    qwen, pictures, tmp_path, monkeypatch, options, message, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    TokenScorer(48, 8).save_pretrained("wide")
    assert infer(qwen, pictures, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("lightvlm infer: ") and re.search(message, line)


def test_checkpoints_that_cannot_be_pruned_are_refused(qwen, pictures, tmp_path, capsys):
    config = text_config("llama", make_tokenizer())
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "text")
    assert infer(tmp_path / "text", pictures) == 2
    assert "is a llama checkpoint, which sees no images: give a vision-language model" in capsys.readouterr().err
    (tmp_path / "blip").mkdir()
    (tmp_path / "blip/config.json").write_text('{"model_type": "blip"}')
    assert infer(tmp_path / "blip", pictures) == 2
    assert "takes no encoded images (mm_encoder_outputs) and so cannot be pruned" in capsys.readouterr().err
    assert main(["infer", "--image", str(pictures / "0.png"), "--prompt", "what?", "--pruner", "some"]) == 2
    assert "is a LightVLM, which has its own pruner: leave out --pruner" in capsys.readouterr().err


@pytest.fixture
def questions(pictures, tmp_path):
    """Return rows of which a base model answers the first two of three as they say."""
    asked = ["what color?", "is there a circle?", "what shape?"]
    rows = [
        {"id": row, "image": f"{row}.png", "conversations": [{"from": "human", "value": f"<image>\n{text}"}]}
        for row, text in enumerate(asked)
    ]

    def write(answers):
        for row, answer in zip(rows, answers, strict=True):
            row["conversations"][1:] = [{"from": "gpt", "value": answer}]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return ["--data-path", str(tmp_path / "rows.json"), "--image-folder", str(pictures)]

    return write


def test_eval_measures_untrained_ways_beside_all_tokens(qwen, questions, pictures, tmp_path, capsys):
    asked, long = load_any(qwen), {"max_new_tokens": 64}
    images = [asked.prepare(Image.open(pictures / f"{row}.png"), "") for row in range(3)]
    asked_about = zip(("what color?", "is there a circle?", "what shape?"), images, strict=True)
    talks = [talk(*each) for each in asked_about]
    whole = [answer.text for answer in asked.answer(talks, long, Options("100%"))]
    data = questions([*whole[:2], "no"])
    run = [
        "eval",
        "--model-path",
        qwen,
        *data,
        "--answers",
        str(tmp_path / "log"),
        "--output",
        str(tmp_path / "o.json"),
    ]
    assert main(run) == 0
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    assert [(row["selector"], row["num_image_tokens"]) for row in results] == [
        ("all", "100%"),
        *((name, budget) for name in ("distinct", "norm", "uniform", "random") for budget in ("25%", "10%", "5%")),
    ]
    assert results[0]["accuracy"] == pytest.approx(2 / 3) and results[0]["tokens"] == pytest.approx((6 + 16 + 2) / 3)
    assert results[1]["tokens"] == pytest.approx((2 + 4 + 1) / 3)
    text = (tmp_path / "log/rows.jsonl").read_text()
    assert main(run) == 0 and (tmp_path / "log/rows.jsonl").read_text() == text  # nothing is asked again
    answers = json.loads(text.splitlines()[0])["answers"]
    distinct = [answer.text for answer in asked.answer(talks, long, Options("25%"))]
    assert [answer.strip() for answer in answers[1]] == distinct
    capsys.readouterr()
    assert main([*run, "--selectors", "topk"]) == 2
    assert "there is no selector topk of another family's tokens: choose among distinct" in capsys.readouterr().err
    assert main([*run, "--selectors", "random"]) == 2 and "was answered with other settings" in capsys.readouterr().err


def test_eval_measures_a_learned_pruner(qwen, questions, tmp_path):
    TokenScorer(32, 8).save_pretrained(tmp_path / "pruner")
    run = ["eval", "--model-path", qwen, *questions(["yes"] * 3), "--num-image-tokens", "50%,3"]
    run += ["--pruner", str(tmp_path / "pruner"), "--selectors", "learned,distinct,max-min,distance"]
    assert main([*run, "--output", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png")]) == 0
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    assert [row["selector"] for row in results[::2]] == ["learned", "distinct", "max-min", "distance", "random"]
    assert (tmp_path / "o.png").is_file()


def show(folder, image, output, *options):
    paths = ["--model-path", str(folder), "--image", str(image), "--output", str(output)]
    return main(["show", *paths, *options])


@pytest.mark.parametrize(("name", "size", "grid"), [("qwen3_vl", (84, 56), (2, 3)), ("llava", (80, 50), (4, 4))])
def test_show_draws_the_tokens_that_answers_are_given_from(name, size, grid, tmp_path, capsys):
    folder = save_family(name, tmp_path / "model")
    make_image(4, size).save(tmp_path / "image.png")
    assert show(folder, tmp_path / "image.png", tmp_path / "whole.png") == 0
    assert show(folder, tmp_path / "image.png", tmp_path / "kept.png", "--num-image-tokens", "50%") == 0
    total = grid[0] * grid[1]
    assert f"{total // 2} of {total} tokens" in capsys.readouterr().out
    whole, kept = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("whole", "kept"))
    rows, columns = whole.shape[0] // grid[0], whole.shape[1] // grid[1]
    assert whole.shape[0] % grid[0] == whole.shape[1] % grid[1] == 0
    asked = load_any(folder)
    inputs = asked.read([talk("", asked.prepare(Image.open(tmp_path / "image.png"), ""))])
    (indices,) = prune(asked.model, inputs, 0.5)["mm_encoder_outputs"]["image"].kept_indices
    same = (whole == kept).all(axis=-1).reshape(grid[0], rows, grid[1], columns)
    shown = [place for place in range(total) if same[place // grid[1], :2, place % grid[1], -8:].all()]
    assert shown == indices.tolist()  # compared in a corner, since the label hides another


def test_show_refuses_tiles_and_a_question_that_nothing_reads(pictures, tmp_path, capsys):
    folder = save_family("smolvlm", tmp_path / "model")
    assert show(folder, pictures / "1.png", tmp_path / "kept.png", "--num-image-tokens", "50%") == 2
    assert "smolvlm, which cuts this image into" in capsys.readouterr().err and not (tmp_path / "kept.png").exists()
    assert show(folder, pictures / "1.png", tmp_path / "kept.png", "--prompt", "what?") == 2
    assert "--prompt needs a --pruner that was trained with questions" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="with torchvision it loads")
@pytest.mark.parametrize("video", [{}, {"video_processor_type": "Qwen3VLVideoProcessor"}])
def test_a_processor_that_needs_torchvision_says_so(tmp_path, video):
    save_family("qwen3_vl", tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    edit_json(tmp_path / "processor_config.json", processor_class="Qwen3VLProcessor")  # as published ones say
    with pytest.raises(ValueError, match="its processor needs torchvision: pip install torchvision"):
        load_any(str(tmp_path))
