"""The shipped checkpoint is a small Hub folder with this code, and it answers."""

from pathlib import Path

import pytest
from lightvlm import LightVLM
from lightvlm.data.llava import load_llava
from lightvlm.evaluation.accuracy import Questions, accuracy
from lightvlm.evaluation.metrics import ExactMatch
from lightvlm.inference.checkpoint import SHIPPED, load

ROOT = Path(__file__).resolve().parents[1]


def test_it_is_small_and_all_safetensors():
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32 * 2**20
    assert {file.suffix for file in files} == {".jpg", ".json", ".jinja", ".md", ".py", ".safetensors"}


@pytest.mark.parametrize(
    "source",
    [
        "modeling_lightvlm/configuration_lightvlm.py",
        "modeling_lightvlm/modeling_lightvlm.py",
        "modeling_lightvlm/pruning_lightvlm.py",
        "modeling_lightvlm/views_lightvlm.py",
        "processing/processing_lightvlm.py",
        "processing/chat_template.jinja",
    ],
)
def test_its_code_is_this_code(source):
    shipped = SHIPPED / Path(source).name
    assert shipped.read_text() == (ROOT / source).read_text(), "make sync"


@pytest.mark.slow
def test_it_answers_easy_vqa_at_every_budget(easy_vqa_folder):
    model, processor = load(str(SHIPPED))
    questions = Questions(
        load_llava(easy_vqa_folder / "test.json", easy_vqa_folder / "images").select(range(60)), processor
    )
    results = accuracy(model, questions, [("topk", budget) for budget in (576, 144, 64, 16)], ExactMatch())
    assert all(result["accuracy"] >= 0.95 for result in results), results


def test_it_describes_an_image_in_chat(easy_vqa_folder):
    model = LightVLM.from_pretrained(SHIPPED).eval()
    rows = load_llava(easy_vqa_folder / "test_captions.json", easy_vqa_folder / "images").select(range(10))
    right = 0
    for row in rows:
        answer = model.chat(row["images"][0], "What is in this image?").split()
        _, _, color, shape, *_ = row["messages"][1]["content"].split()
        right += answer[2:4] == [color, shape]
    assert right >= 9
