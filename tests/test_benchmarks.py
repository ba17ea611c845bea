"""Published files, in small, become questions with the references that their metric wants."""

import json

import pytest
from lightvlm.evaluation.benchmarks import BENCHMARKS, LETTER, SHORT, load_benchmark
from lightvlm_cli.main import main
from tiny import make_image, make_model, make_processor

COCO = "COCO_val2014_000000000042.jpg"


def write(folder, files, images):
    """Write files of JSON (of lines of it, if they are a list of rows), and images."""
    folder.mkdir()
    for name, content in files.items():
        lines = map(json.dumps, content) if isinstance(content, list) else [json.dumps(content)]
        (folder / name).write_text("\n".join(lines) + "\n")
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image().save(folder / name)


def write_vqav2(folder):
    answers = [{"answer": "net", "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]
    question = {"image_id": 42, "question": "What is this?", "question_id": 42000}
    annotation = {"question_type": "what", "answers": answers, "image_id": 42, "question_id": 42000}
    files = {
        "v2_OpenEnded_mscoco_val2014_questions.json": {"info": {}, "questions": [question]},
        "v2_mscoco_val2014_annotations.json": {"info": {}, "annotations": [annotation]},
    }
    write(folder, files, [f"val2014/{COCO}"])


def write_gqa(folder):
    question = {"semantic": [], "imageId": "n15740", "question": "Is it overcast?", "answer": "no", "isBalanced": True}
    write(folder, {"testdev_balanced_questions.json": {"201307251": question}}, ["images/n15740.jpg"])


def write_textvqa(folder):
    row = {"question": "what does it say?", "image_id": "003a8ae2ef43b901", "question_id": 34602}
    row |= {"answers": ["nokia"] * 9 + ["toshiba"], "image_width": 1024, "set_name": "val"}
    write(folder, {"TextVQA_0.5.1_val.json": {"data": [row]}}, ["train_images/003a8ae2ef43b901.jpg"])


def write_pope(folder):
    row = {"question_id": 1, "image": COCO, "text": "Is there a dog in the image?", "label": "no"}
    files = {f"coco_pope_{kind}.json": [row, row | {"question_id": 2}] for kind in ("random", "popular")}
    write(folder, {**files, "coco_pope_adversarial.json": [row]}, [f"val2014/{COCO}"])


def write_scienceqa(folder):
    row = {"question": "Which is a solid?", "choices": ["air", "rock"], "answer": 1, "hint": "", "image": "image.png"}
    problems = {"5": row, "6": row | {"hint": "Look."}, "7": row | {"image": None}, "8": row | {"split": "train"}}
    files = {"problems.json": problems, "pid_splits.json": {"train": ["8"], "test": ["5", "6", "7"]}}
    write(folder, files, ["test/5/image.png", "test/6/image.png"])


WRITE = {
    "vqav2": write_vqav2,
    "gqa": write_gqa,
    "textvqa": write_textvqa,
    "pope": write_pope,
    "scienceqa": write_scienceqa,
}
EXPECTED = {
    "vqav2": (42000, f"val2014/{COCO}", f"What is this?{SHORT}", ["net"] * 10),
    "gqa": (201307251, "images/n15740.jpg", f"Is it overcast?{SHORT}", "no"),
    "textvqa": (
        34602,
        "train_images/003a8ae2ef43b901.jpg",
        f"what does it say?{SHORT}",
        ["nokia"] * 9 + ["toshiba"],
    ),
    "pope": (1, f"val2014/{COCO}", f"Is there a dog in the image?{SHORT}", "no"),
    "scienceqa": (5, "test/5/image.png", f"Which is a solid?\nA. air\nB. rock{LETTER}", "B"),
}


@pytest.fixture(params=BENCHMARKS)
def benchmark(request, tmp_path):
    """Return a benchmark's name, and its files in small."""
    WRITE[request.param](tmp_path / "data")
    return request.param, tmp_path / "data"


def test_questions_images_and_references(benchmark):
    name, folder = benchmark
    parts, metric = load_benchmark(name, folder)
    rows = next(iter(parts.values()))
    number, image, question, reference = EXPECTED[name]
    assert rows[0]["id"] == str(number)
    assert rows[0]["messages"] == [{"role": "user", "content": question}]
    assert rows.with_format("arrow")["images"].to_pylist()[0][0]["path"] == str(folder / image)
    assert rows[0]["references"] == reference
    first = reference[0] if isinstance(reference, list) else reference
    assert metric.compute(predictions=[first] * len(rows), references=list(rows["references"]))["accuracy"] == 1


def test_each_benchmark_is_scored_by_its_own_rule(tmp_path):
    scores = {}
    for name, write_files in WRITE.items():
        write_files(tmp_path / name)
        scores[name] = load_benchmark(name, tmp_path / name)[1].score
    assert (scores["textvqa"]("Nokia.", ["nokia"] * 10), scores["vqav2"]("Nokia.", ["nokia"] * 10)) == (1, 0)
    assert (scores["gqa"]("Dog.", "dog"), scores["gqa"]("the dog", "dog")) == (1, 0)
    assert (scores["pope"]("There is not.", "no"), scores["scienceqa"]("B\nbecause", "B")) == (1, 1)


def test_pope_has_three_parts_and_scienceqa_only_test_questions_with_an_image(tmp_path):
    write_pope(tmp_path / "pope")
    parts, _ = load_benchmark("pope", tmp_path / "pope")
    assert {name: len(rows) for name, rows in parts.items()} == {
        "pope_random": 2,
        "pope_popular": 2,
        "pope_adversarial": 1,
    }
    write_scienceqa(tmp_path / "scienceqa")
    rows = load_benchmark("scienceqa", tmp_path / "scienceqa")[0]["scienceqa"]
    assert list(rows["id"]) == ["5", "6"]
    assert rows[1]["messages"][0]["content"].startswith("Context: Look.\nWhich is a solid?\nA. air")


def test_missing_files_missing_images_and_other_formats_are_named(benchmark):
    name, folder = benchmark
    image = next(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
    image.unlink()
    with pytest.raises(ValueError, match=f"(?s)with a missing image.*{image.name}"):
        load_benchmark(name, folder)
    file = next(folder.glob("*.json"))
    for content, message in (("[[]]", "not as .* publishes"), ("{", "broken")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_benchmark(name, folder)
    file.unlink()
    with pytest.raises(ValueError, match=f"has no {file.name}: unpack"):
        load_benchmark(name, folder)


def test_eval_runs_a_benchmark_in_one_command(benchmark, tmp_path, capsys):
    name, folder = benchmark
    for part in (make_model(), make_processor()):
        part.save_pretrained(tmp_path / "checkpoint")
    options = ["--model-path", str(tmp_path / "checkpoint"), "--num-image-tokens", "36,4"]
    assert main(["eval", *options, "--benchmark", name, "--data-dir", str(folder)]) == 0
    out = capsys.readouterr().out
    part = "pope_adversarial" if name == "pope" else name
    assert f"| {part} | all | 36 |" in out and f"| {part} | diverse | 4 |" in out
    assert ("yes_rate" in out) == (name == "pope")


def test_eval_wants_files_or_a_benchmark(tmp_path, capsys):
    files, benchmark = ["--data-path", "x.json", "--image-folder", "x"], ["--benchmark", "gqa", "--data-dir", "x"]
    for options in ([], files[:2], benchmark[:2], files + benchmark):
        assert main(["eval", *options]) == 2
        assert "--benchmark and --data-dir" in capsys.readouterr().err
    assert main(["eval", "--benchmark", "nonsense", "--data-dir", str(tmp_path)]) == 2
    assert "choose among vqav2, gqa" in capsys.readouterr().err
