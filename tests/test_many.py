"""Many questions are answered in batches, as each alone would be, and a killed run goes on where it stopped."""

import io
import json
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from launch import launch
from lightvlm import LightVLM, LightVLMModel
from lightvlm.inference import many
from lightvlm.inference.own_model import OwnModel
from lightvlm_cli.main import main
from PIL import Image
from tiny import GRIDS, make_dynamic, make_image, make_processor

QUESTIONS = ["what color?", "is there a circle in this image?", "what shape is in the top left?"]


@pytest.fixture
def data(tmp_path):
    """Return six pictures of several sizes, and a checkpoint of many views with dynamic budgets."""
    (tmp_path / "pictures").mkdir()
    for index in range(6):
        size = [(84, 84), (250, 240), (100, 300)][index % 3]
        make_image(index, size).save(tmp_path / f"pictures/{index}.png")
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    make_dynamic(image_grid_pinpoints=GRIDS).save_pretrained(tmp_path / "model")
    make_processor(pinpoints=GRIDS).save_pretrained(tmp_path / "model")
    return tmp_path


def infer(data, *options):
    model = ["--model-path", str(data / "model"), "--max-new-tokens", "5", "--batch-size", "4"]
    return main(["infer", *model, *map(str, options)])


def lines(file):
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda line: line["row"])


def write_questions(data, rows):
    (data / "questions.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


@pytest.mark.parametrize("budget", ["9", "dynamic:8"])
def test_answers_are_those_of_each_question_alone(data, budget, capsys):
    options = ["--image", data / "pictures", "--prompt", *QUESTIONS, "--num-image-tokens", budget]
    assert infer(data, *options, "--output", data / "answers.jsonl") == 0
    answers = lines(data / "answers.jsonl")
    assert len(answers) == 18
    capsys.readouterr()
    assert infer(data, *options, "--format", "json") == 0
    alone = json.loads(capsys.readouterr().out)
    for line, one in zip(answers, alone, strict=True):
        assert line["image"] == [one["image"]] and line["question"] == one["prompt"]
        assert line["answer"].strip() == one["answer"]


@pytest.mark.parametrize("budget", ["9", "dynamic:8"])
def test_a_picture_is_opened_and_encoded_once_for_all_its_questions(data, monkeypatch, budget):
    encoded, opened = [], []
    encode, open_named = LightVLMModel.get_image_features, many.open_named

    def count(self, pixel_values, *args, **kwargs):
        encoded.append(len(pixel_values))
        return encode(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(LightVLMModel, "get_image_features", count)
    monkeypatch.setattr(many, "open_named", lambda names: opened.extend(names) or open_named(names))
    asked = ["--prompt", *QUESTIONS, "--num-image-tokens", budget, "--batch-size", 6]
    assert infer(data, "--image", data / "pictures", *asked, "--output", data / "answers.jsonl") == 0
    assert (sum(encoded), len(opened), len(lines(data / "answers.jsonl"))) == (6, 6, 18)


def test_files_folders_patterns_and_standard_input_name_images(data, monkeypatch):
    folder = data / "pictures"
    every = [str(folder / f"{index}.png") for index in range(6)]
    assert many.expand_images([str(folder)]) == every
    assert many.expand_images([str(folder / "[01].png"), every[5]]) == [every[0], every[1], every[5]]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{every[2]}\n\nhttps://a.b/c.png\n"))
    assert many.expand_images(["-"]) == [every[2], "https://a.b/c.png"]
    (data / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        many.expand_images([str(data / "empty")])


def test_bad_rows_are_named_by_line_and_the_others_answered(data, capsys):
    (data / "pictures/2.png").write_bytes((data / "pictures/2.png").read_bytes()[:200])
    Image.new("RGB", (5000, 1)).save(data / "pictures/thin.png")
    good = {"image": "0.png", "question": "what?"}
    rows = [
        good,
        "",
        "{",
        {"image": "9.png", "question": "what?"},
        '{"question": "half an emoji \\ud83d", "image": "0.png"}',
        {"conversations": ["x"]},
        "[" * 100_000,
        {"image_path": "0.png", "question": "what?"},
        {**good, "image": "2.png"},
        {**good, "image": "thin.png"},
        {**good, "question": "what? " * 1000},
        {"question": "who are you?"},
    ]
    write_questions(data, rows)
    options = ["--input", data / "questions.jsonl", "--image-folder", data / "pictures"]
    assert infer(data, *options, "--output", data / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert "9 of 11 rows could not be answered" in error
    for words in (
        "line 3: it is no JSON",
        "9.png' is missing",
        "line 5: a text has half a character",
        "line 6: the turn 'x' is neither",
        "line 7: its brackets are nested too deeply",
        "line 8: 'image_path' looks like a picture that is not read: call it image or images",
        "2.png cannot be read",
        "line 10: ",
        "thin.png of 5000 x 1 pixels is too long and thin",
        "line 11: ",
        "more than the model reads",
    ):
        assert words in error, words
    assert [(line["row"], line["question"]) for line in lines(data / "out.jsonl")] == [
        (0, "what?"),
        (10, "who are you?"),
    ]


@pytest.fixture
def site(data):
    """Return the address of the folder of pictures."""
    handler = partial(QuietHandler, directory=data / "pictures")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_url_without_a_picture_is_told_with_its_status(data, site, capsys):
    names = [f"{site}/0.png", f"{site}/9.png", f"{site}/notes.txt", "0.png"]
    write_questions(data, [{"image": name, "question": "what?"} for name in names])
    options = ["--input", data / "questions.jsonl", "--image-folder", data / "pictures"]
    assert infer(data, *options, "--output", data / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert f"line 2: {site}/9.png cannot be read as an image: status 404 File not found" in error
    assert f"line 3: {site}/notes.txt cannot be read as an image: its format is unknown" in error
    by_url, by_path = lines(data / "out.jsonl")
    assert (by_url["row"], by_path["row"]) == (0, 3) and by_url["answer"] == by_path["answer"]
    assert infer(data, "--image", f"{site}/9.png", "--prompt", "what?") == 2
    assert f"{site}/9.png cannot be read as an image: status 404" in capsys.readouterr().err


def test_each_turn_of_a_row_is_answered_with_those_before_it(data):
    turns = [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "where?"},
        {"from": "gpt", "value": "left"},
        {"from": "human", "value": "is there a circle?"},
    ]
    rows = [{"id": "a", "image": f"{index}.png", "conversations": turns} for index in range(2)]
    write_questions(data, rows)
    options = [
        "--input",
        data / "questions.jsonl",
        "--image-folder",
        data / "pictures",
        "--output",
        data / "out.jsonl",
    ]
    assert infer(data, *options) == 0
    found = sorted(lines(data / "out.jsonl"), key=lambda line: (line["row"], line["turn"]))
    asked = [
        (row, turn, words) for row in range(2) for turn, words in enumerate(["what?", "where?", "is there a circle?"])
    ]
    assert [(line["row"], line["turn"], line["question"]) for line in found] == asked
    model, processor = LightVLM.from_pretrained(data / "model").eval(), make_processor(pinpoints=GRIDS)
    history = []
    for line, answer in zip(found[:3], ["red", "left", ""], strict=True):
        image = str(data / "pictures/0.png") if not history else None
        assert line["answer"] == model.chat(image, line["question"], history, processor=processor, max_new_tokens=5)
        history[-1] = {"role": "assistant", "content": [{"type": "text", "text": answer}]}

    before = (data / "out.jsonl").read_text()
    assert infer(data, *options) == 0 and (data / "out.jsonl").read_text() == before
    turns[1]["value"] = "blue"
    write_questions(data, rows)
    assert infer(data, *options) == 2  # these are answers to other conversations


def test_a_picture_that_cannot_have_k_is_named_and_the_others_answered(data, capsys):
    make_dynamic(image_grid_pinpoints=GRIDS, encoder_keep={1: 0.5}).save_pretrained(data / "model")
    options = ["--image", data / "pictures", "--prompt", "what?", "--output", data / "out.jsonl", "--batch-size", 32]
    assert infer(data, *options, "--num-image-tokens", "30") == 2
    error = capsys.readouterr().err
    assert "2 of 6 rows could not be answered" in error and error.count("leaves [18] patches") == 2
    assert "question 1: " in error and "question 4: " in error
    assert [line["row"] for line in lines(data / "out.jsonl")] == [1, 2, 4, 5]


def test_options_that_no_picture_can_have_end_the_run_at_once(data, monkeypatch, capsys):
    options = ["--image", data / "pictures", "--prompt", *QUESTIONS, "--output", data / "out.jsonl"]
    asked, answer = [], OwnModel.answer
    monkeypatch.setattr(OwnModel, "answer", lambda *args: asked.extend(args[1]) or answer(*args))
    assert infer(data, *options, "--num-image-tokens", "dynamic:31") == 2
    assert "calibrated for means from 2 to 30" in capsys.readouterr().err and len(asked) <= 4
    assert infer(data, *options, "--num-image-tokens", "361") == 2
    assert "from 1 to 360" in capsys.readouterr().err


def test_fewer_tokens_than_k_are_told(data, capsys):
    options = ["--image", data / "pictures", "--prompt", "what?", "--num-image-tokens", "100"]
    assert infer(data, *options, "--output", data / "out.jsonl") == 0
    assert "K = 100 is more tokens than some images have, such as" in (error := capsys.readouterr().err)
    assert "0.png with 36: they keep all" in error
    assert [line["kept"] for line in lines(data / "out.jsonl")][:3] == [[36], [100], [100]]
    assert infer(data, *options[:1], data / "pictures/0.png", *options[2:]) == 0
    assert "36 of 36 tokens, K = 100" in capsys.readouterr().out
    assert infer(data, *options[:-1], "36", "--output", data / "less.jsonl") == 0
    assert (
        infer(data, *options[:-1], "9,36,dynamic:4", "--output", data / "less.jsonl") == 0
    )  # 36 are answered already
    assert "more tokens than" not in capsys.readouterr().err


def test_progress_is_told_where_there_is_no_terminal(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(many.time, "monotonic", lambda: clock[0])
    with many.Progress(400) as bar, many.Progress(400, is_shown=False) as hidden:
        for seconds in (10, 20, 29, 31, 61, 70):
            clock[0] = seconds
            bar.update(50)
            hidden.update(50)
    assert capsys.readouterr().err.splitlines() == [
        "200 of 400 answers, 1 minutes left",
        "250 of 400 answers, 1 minutes left",
    ]


def test_a_killed_run_goes_on_without_asking_twice(data, monkeypatch, capsys):
    options = ["--image", data / "pictures", "--prompt", *QUESTIONS, "--output", data / "answers.jsonl"]
    asked, answer = [], OwnModel.answer

    def until_killed(self, conversations, *rest):
        asked.extend(conversations)
        if len(asked) > 8:
            raise KeyboardInterrupt
        return answer(self, conversations, *rest)

    monkeypatch.setattr(OwnModel, "answer", until_killed)
    with pytest.raises(KeyboardInterrupt):
        infer(data, *options)
    first = (data / "answers.jsonl").read_text()
    assert first.count("\n") == 8
    (data / "answers.jsonl").write_text(first + '{"row": 17, "id"')  # a line that was cut off

    asked.clear()
    monkeypatch.setattr(OwnModel, "answer", lambda *args: asked.extend(args[1]) or answer(*args))
    assert infer(data, *options) == 0
    assert len(asked) == 10 and (data / "answers.jsonl").read_text().startswith(first)
    assert [line["row"] for line in lines(data / "answers.jsonl")] == [*range(18)]
    asked.clear()
    assert infer(data, *options) == 0 and not asked
    assert infer(data, *options, "--num-image-tokens", "4,9") == 0 and len(asked) == 36

    assert infer(data, "--image", data / "pictures", "--prompt", "else?", "--output", data / "answers.jsonl") == 2
    assert "answers to other questions" in capsys.readouterr().err
    assert infer(data, *options[:-1], data / "pictures/notes.txt") == 2
    assert "is no file of answers" in capsys.readouterr().err
    assert (data / "pictures/notes.txt").read_text() == "no picture"


@pytest.fixture
def answered(data, capsys):
    """Return options that were run, with an answer about each picture in the output."""
    options = ["--image", data / "pictures", "--prompt", "what?", "--output", data / "answers.jsonl"]
    assert infer(data, *options) == 0
    assert "answers.jsonl: 6 questions answered\n" in capsys.readouterr().err
    return options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--max-new-tokens", "6"], "max_new_tokens 5 instead of 6"),
        (["--max-views", "1"], "max_views None instead of 1"),
        (["--num-beams", "2"], "num_beams 1 instead of 2"),
        (["--dtype", "bfloat16"], "dtype torch.float32 instead of torch.bfloat16"),
        (["--temperature", "0.5"], "do_sample False instead of True, temperature None instead of 0.5"),
        (
            ["--temperature", "0.5", "--top-p", "0.9", "--seed", "1"],
            "top_p None instead of 0.9, seed None instead of 1",
        ),
    ],
)
def test_answers_of_other_options_are_refused(data, answered, capsys, change, message):
    before = (data / "answers.jsonl").read_bytes()
    assert infer(data, *answered, *change) == 2
    error = capsys.readouterr().err
    assert message in error and "choose another file for answers, or remove it" in error
    assert (data / "answers.jsonl").read_bytes() == before


def test_answers_of_question_aware_selection_are_not_those_without(data, capsys):
    make_dynamic(image_grid_pinpoints=GRIDS, score="question").save_pretrained(data / "model")
    options = ["--image", data / "pictures", "--prompt", "what?", "--output", data / "answers.jsonl"]
    assert infer(data, *options, "--question-aware") == 0
    assert infer(data, *options) == 2
    assert "question_aware True instead of False" in capsys.readouterr().err


def test_answers_of_another_checkpoint_are_refused_at_the_same_path_too(data, answered, capsys):
    before = (data / "answers.jsonl").read_bytes()
    shutil.copytree(data / "model", data / "other")
    assert infer(data, *answered, "--model-path", data / "other") == 0  # the same weights in another folder
    assert "6 questions answered, 6 answers by earlier runs" in capsys.readouterr().err
    other = make_dynamic(image_grid_pinpoints=GRIDS)
    other.lm_head.weight.data.neg_()
    other.save_pretrained(data / "other")
    assert infer(data, *answered, "--model-path", data / "other") == 2
    assert "was answered with other weights: go on with the same" in capsys.readouterr().err
    shutil.copy(data / "other/model.safetensors", data / "model")
    assert infer(data, *answered) == 2
    assert "was answered with other weights: go on with the same" in capsys.readouterr().err
    assert (data / "answers.jsonl").read_bytes() == before


def test_a_picture_that_has_changed_under_its_name_is_told_and_one_that_was_only_written_again_is_not(
    data, answered, capsys
):
    picture, before = data / "pictures/3.png", (data / "answers.jsonl").read_bytes()
    os.utime(picture, (1, 1))
    (data / "pictures/5.png").rename(data / "5.png")
    assert infer(data, *answered) == 0
    make_image(9, (84, 84)).save(picture)
    assert infer(data, *answered) == 2
    assert "3.png is not the image that" in capsys.readouterr().err
    assert (data / "answers.jsonl").read_bytes() == before


def test_separators_of_unicode_in_a_question_stop_no_second_run(data, capsys):
    write_questions(data, [{"image": "0.png", "question": "what\u2028is\x85it?"}])
    options = ["--input", data / "questions.jsonl", "--image-folder", data / "pictures"]
    for _ in range(2):
        assert infer(data, *options, "--output", data / "out.jsonl") == 0, capsys.readouterr().err
    assert [line["question"] for line in lines(data / "out.jsonl")] == ["what\u2028is\x85it?"]


def test_an_output_of_an_older_version_is_refused(data, answered, capsys):
    (data / "answers.jsonl.about.json").unlink()
    before = (data / "answers.jsonl").read_bytes()
    assert infer(data, *answered) == 2
    assert "lost answers.jsonl.about.json, which says what they depend on: choose another" in capsys.readouterr().err
    assert (data / "answers.jsonl").read_bytes() == before


def test_sampled_answers_are_those_of_the_seed_whatever_was_answered_before(data):
    options = ["--image", data / "pictures", "--prompt", "what?", "--temperature", "5"]
    for name, seed in (("a.jsonl", 1), ("b.jsonl", 1), ("c.jsonl", 2)):
        assert infer(data, *options, "--seed", seed, "--output", data / name) == 0
        if name == "b.jsonl":  # killed after the first of two batches
            (data / name).write_text("".join((data / name).read_text().splitlines(keepends=True)[:4]))
            assert infer(data, *options, "--seed", seed, "--output", data / name) == 0
    first, again, other = ([line["answer"] for line in lines(data / f"{name}.jsonl")] for name in "abc")
    assert first == again != other


@pytest.mark.slow
def test_processes_share_the_questions_and_write_each_answer_once(data):
    write_questions(data, [{"image": f"{row % 6}.png", "question": QUESTIONS[row % 3]} for row in range(18)])
    options = ["--model-path", data / "model", "--max-new-tokens", "5", "--batch-size", "2"]
    options += ["--input", data / "questions.jsonl", "--image-folder", data / "pictures"]
    assert main(["infer", *map(str, options), "--output", str(data / "one.jsonl")]) == 0
    launch("ddp", "-m", ["lightvlm_cli.main", "infer", *options, "--output", data / "two.jsonl"])
    assert lines(data / "two.jsonl") == lines(data / "one.jsonl")
    assert not [*data.glob("two.jsonl.part*")]
    text = (data / "two.jsonl").read_text().splitlines(keepends=True)
    (data / "two.jsonl").write_text("".join(text[:5]))
    (data / "two.jsonl.part1").write_text("".join(text[9:11]) + text[11][:20])  # as after a kill
    launch("ddp", "-m", ["lightvlm_cli.main", "infer", *options, "--output", data / "two.jsonl"])
    assert lines(data / "two.jsonl") == lines(data / "one.jsonl")
    assert (data / "two.jsonl").read_text().startswith("".join(text[:5] + text[9:11]))


def test_pictures_of_as_many_views_are_answered_together(data):
    own = OwnModel(None, make_processor(pinpoints=GRIDS))
    asks = [many.Ask(row, row, [str(data / f"pictures/{row % 6}.png")], "what?") for row in range(12)]
    batches = [*many.in_batches(asks, 4, own)]
    sizes = [{Image.open(ask.images[0]).size for ask in batch} for batch in batches]
    assert [len(batch) for batch in batches] == [4, 4, 4] and all(len(size) == 1 for size in sizes)


def test_a_long_question_pads_no_short_ones(data):
    own = OwnModel(None, make_processor(pinpoints=GRIDS))
    words = ["what? " * 100 if row in (3, 8) else QUESTIONS[row % 3] for row in range(12)]
    asks = [many.Ask(row, row, [str(data / f"pictures/{row % 2 * 3}.png")], text) for row, text in enumerate(words)]
    batches = [sorted(ask.row for ask in batch) for batch in many.in_batches(asks, 32, own)]
    assert sorted(map(len, batches)) == [2, 10] and [3, 8] in batches
    assert sorted(row for batch in batches for row in batch) == [*range(12)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --image and --prompt, or --input"),
        (["--image", "a.png"], "give either"),
        (["--image", "", "--prompt", "b"], "the image '' is no path"),
        (["--input", "a.jsonl"], "--input needs --output"),
        (["--image", "a.png", "--prompt", "b", "--temperature", "-1"], "--temperature is 0 or more"),
        (["--image", "a.png", "--prompt", "b", "--top-p", "2"], "--top-p more than 0"),
        (["--image", "a.png", "--prompt", "b", "--top-p", "0"], "--top-p more than 0"),
        (["--image", "a.png", "--prompt", "b", "--top-p", "0.9"], "--top-p needs sampling"),
        (["--image", "pictures/0.png", "--prompt", "b " * 600], "more than the model reads"),
        (["--image", "a.png", "--prompt", "b"], "a.png cannot be read"),
        (["--input", "a.jsonl", "--output", "b.jsonl"], "a.jsonl"),
        (["--image", "pictures", "--prompt", "b", "--device", "nonsense"], "--device nonsense: PyTorch finds none"),
    ],
)
def test_impossible_options_are_refused(data, monkeypatch, options, message, capsys):
    monkeypatch.chdir(data)
    assert infer(data, *options) == 2
    assert message in capsys.readouterr().err


def test_sampling_follows_the_seed(data, capsys):
    options = ["--image", data / "pictures/0.png", "--prompt", *QUESTIONS, "--format", "json", "--temperature", "5"]
    found = []
    for seed in (1, 1, 2):
        assert infer(data, *options, "--seed", seed) == 0
        found.append([line["answer"] for line in json.loads(capsys.readouterr().out)])
    assert found[0] == found[1] != found[2]
