"""One function, `expand_placeholders`, writes as many placeholders as an image has tokens."""

import ast
from pathlib import Path

import pytest
import torch
from lightvlm import processing_lightvlm
from lightvlm.benchmark import speed, training_speed
from lightvlm.data import turns
from lightvlm.inference import answers
from lightvlm.processing_lightvlm import expand_placeholders
from lightvlm.training import collator
from tiny import make_image, make_model, make_processor, placeholders

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("prompts", "placeholder", "expanded"),
    [
        (["<i>a<i>", "b", "<i>"], "<i>", ["<i><i>a<i>", "b", "<i><i><i>"]),
        ([[7, 1, 7], [2], [7]], 7, [[7, 7, 1, 7], [2], [7, 7, 7]]),
    ],
)
def test_each_placeholder_becomes_as_many_as_its_image_has_tokens(prompts, placeholder, expanded):
    assert expand_placeholders(prompts, placeholder, [2, 1, 3]) == expanded
    assert expand_placeholders(prompts[1:2], placeholder, []) == prompts[1:2]


@pytest.mark.parametrize("counts", [[], [2], [2, 1, 3]])
@pytest.mark.parametrize(("prompts", "placeholder"), [(["<i>a", "<i>"], "<i>"), ([[7, 1], [7]], 7)])
def test_as_many_images_as_placeholders_are_expected(prompts, placeholder, counts):
    with pytest.raises(ValueError, match=f"^2 image placeholders in the prompts, but {len(counts)} images: write one"):
        expand_placeholders(prompts, placeholder, counts)


def write_by_turns(model, processor):
    ask = {"role": "user", "content": "what?"}
    return turns.pack_turns([[ask, {"role": "assistant", "content": [{"type": "text", "text": "no"}]}]], processor, 9)


def write_beside_text(model, processor):
    return collator.add_blank_image({"input_ids": torch.zeros(1, 4, dtype=torch.long)}, processor)


WRITERS = {
    processing_lightvlm: lambda model, processor: processor(
        images=make_image(), text="<image> a", return_tensors="pt"
    ),
    turns: write_by_turns,
    answers: lambda model, processor: answers.tokenize(["<image> a"], [9], processor),
    collator: write_beside_text,
    speed: lambda model, processor: speed.Trial(model, None, None, 1, 1, 4, 2).text(9),
    training_speed: lambda model, processor: training_speed.make_batch(model, 1, 4, 9),
}


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_one_function_writes_all_placeholders(writer, monkeypatch):
    model, processor = make_model(), make_processor()
    assert placeholders(processor, WRITERS[writer](model, processor)) == [9]

    def expand_by_one_more(prompts, placeholder, counts):
        return expand_placeholders(prompts, placeholder, [count + 1 for count in counts])

    monkeypatch.setattr(writer, "expand_placeholders", expand_by_one_more)
    assert placeholders(processor, WRITERS[writer](model, processor)) == [10]


def repeated(node: ast.AST) -> list[ast.AST]:
    """Return what a piece of code repeats, by * or by torch.full."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [part for side in (node.left, node.right) for part in getattr(side, "elts", [side])]
    return node.args if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.full" else []


def test_no_other_code_repeats_a_placeholder():
    sources = [source for source in ROOT.glob("*/*.py") if source.parent.name != "tests"]
    assert len(sources) > 60
    names = ("image_token", "image_token_id", "image_token_index", "placeholder", "mark")
    for source in sources:
        parts = [part for node in ast.walk(ast.parse(source.read_text())) for part in repeated(node)]
        assert not [part for part in parts if ast.unparse(part).split(".")[-1] in names], source.name
