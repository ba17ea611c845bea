"""The shipped checkpoint is a small Hub folder with this code, and it answers."""

from pathlib import Path

import pytest
from lightvlm import LightVLM
from lightvlm.data.llava import load_llava
from lightvlm.evaluation.accuracy import Questions, accuracy
from lightvlm.evaluation.metrics import ExactMatch
from lightvlm.inference.checkpoint import SHIPPED, load, load_to_train
from saved import lose_weights
from tiny import make_model

ROOT = Path(__file__).resolve().parents[1]


def test_it_is_small_and_all_safetensors():
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32 * 2**20
    assert {file.suffix for file in files} == {".jpg", ".json", ".jinja", ".md", ".py", ".safetensors"}


def test_its_code_is_this_code():
    sources = [*ROOT.glob("modeling_lightvlm/*_lightvlm.py"), *ROOT.glob("processing/*_lightvlm.py")]
    sources.append(ROOT / "processing" / "chat_template.jinja")
    code = {file.name: file.read_text() for file in SHIPPED.iterdir() if file.suffix in (".py", ".jinja")}
    assert code == {source.name: source.read_text() for source in sources}, "make sync"


def test_code_that_travels_is_short():
    lengths = {file.name: len(file.read_text().splitlines()) for file in SHIPPED.glob("*.py")}
    assert lengths.pop("modeling_lightvlm.py") <= 500 and max(lengths.values()) <= 400, lengths


@pytest.mark.parametrize(
    ("lost", "new", "is_trained"),
    [("lm_head.weight", "$^", False), ("pruner.scorer", r"pruner\.row", False), ("pruner.row", r"pruner\.row", True)],
)
def test_nothing_is_trained_of_a_checkpoint_that_lacks_weights(tmp_path, lost, new, is_trained):
    make_model().save_pretrained(tmp_path)
    lose_weights(tmp_path, lost)
    if is_trained:
        assert load_to_train(str(tmp_path), new).config.num_image_tokens == 9
        return
    with pytest.raises(ValueError, match=f"missing .*{lost}"):
        load_to_train(str(tmp_path), new)


@pytest.mark.slow
def test_it_answers_easy_vqa_at_every_budget(easy_vqa_folder):
    model, processor = load(str(SHIPPED))
    questions = Questions(
        load_llava(easy_vqa_folder / "test.json", easy_vqa_folder / "images").select(range(60)), processor
    )
    results = accuracy(model, questions, [("topk", budget) for budget in (576, 144, 64, 16)], ExactMatch())
    assert all(result["accuracy"] >= 0.95 for result in results), results


@pytest.mark.slow
def test_it_describes_an_image_in_chat(easy_vqa_folder):
    model = LightVLM.from_pretrained(SHIPPED).eval()
    rows = load_llava(easy_vqa_folder / "test_captions.json", easy_vqa_folder / "images").select(range(10))
    right = 0
    for row in rows:
        answer = model.chat(row["images"][0], "What is in this image?").split()
        _, _, color, shape, *_ = row["messages"][1]["content"].split()
        right += answer[2:4] == [color, shape]
    assert right >= 9
