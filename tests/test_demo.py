"""The demo answers, shows what it kept and how long it took, and says so when something is wrong with a question."""

import re
import shutil
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from lightvlm.demo.answers import MAX_QUESTION, MAX_TURNS, Answerer, AnyAnswerer, Choice, Conversation, TimedStreamer
from lightvlm.demo.app import DYNAMIC, EXAMPLES, FIXED, ask, build, from_address, introduce, launch, show, slider
from lightvlm.inference.any_model import load_any
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.inference.own_model import Options
from lightvlm_cli.main import main
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from saved import broken_images
from saved_families import save_family
from tiny import GRIDS, make_dynamic, make_image, make_model, make_processor, make_tokenizer, text_config

LINE = r"\*(\d+) of 36 tokens · first token after \d+ ms( \(all tokens: \d+ ms\))?\*$"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [f"--{flag}" for flag in ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync")]


@pytest.fixture(scope="module")
def answerer():
    model = make_dynamic(score="question")
    torch.nn.init.normal_(model.model.pruner.question_projection.weight)
    model.generation_config.max_new_tokens = 8
    return Answerer(model, make_processor())


@pytest.fixture(scope="module")
def url(answerer):
    page = launch(answerer.asked, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


@pytest.fixture
def path(tmp_path):
    make_image().save(tmp_path / "image.png")
    return tmp_path / "image.png"


def last(answerer, talk, text, path=None, kind=FIXED, number=9, by_question=False, **options):
    """Return the last words and picture of an answer."""
    message = {"text": text, "files": [str(path)] if path else []}
    views, follow_up, compare = (options.get(name, 0) for name in ("views", "follow_up", "compare"))
    *_, (same, shown, _, picture) = ask(answerer, talk, message, kind, number, by_question, views, follow_up, compare)
    assert same is talk and shown is talk.shown
    return shown[-1]["content"], picture


def test_an_answer_is_that_of_chat_with_its_tokens_and_times(answerer, path):
    *growing, (answer, picture) = answerer.answer(Conversation(make_image(), "what color?"), Choice(9))
    expected = answerer.model.chat(path, "what color?", num_image_tokens=9, processor=answerer.processor)
    words, line = answer.rsplit("\n\n", 1)
    assert words == expected and growing[-1][0].strip() == expected and len(growing) > 1
    assert re.fullmatch(LINE, line).groups()[0] == "9" and "all tokens" in line
    assert isinstance(picture, Image.Image)


@pytest.mark.parametrize(("family", "whole", "is_drawn"), [("qwen3_vl", 9, True), ("smolvlm", 20, False)])
def test_another_familys_answer_is_that_of_a_share_of_its_tokens(family, whole, is_drawn, path, tmp_path):
    asked = load_any(save_family(family, tmp_path / family))
    answerer, talk = AnyAnswerer(asked), Conversation()
    (box,) = (block for block in build(answerer).blocks.values() if getattr(block, "elem_id", "") == "number")
    assert (box.minimum, box.maximum, box.value) == (1, 100, 25) and "percent" in box.label
    answer, picture = last(answerer, talk, "what color?", path, number=50)
    words, line = answer.rsplit("\n\n", 1)
    content = [{"type": "image", "image": make_image()}, {"type": "text", "text": "what color?"}]
    options = Options("50%")
    (expected,) = asked.answer([[{"role": "user", "content": content}]], {"max_new_tokens": 256}, options)
    assert words.strip() == expected.text
    assert f"{sum(expected.kept)} of {whole} tokens" in line and "all tokens: " in line
    assert isinstance(picture, Image.Image) == is_drawn
    assert last(answerer, talk, "is it red?", number=50, follow_up=True)[0] and len(talk.history) == 4


def test_the_time_is_that_of_the_first_token(processor):
    streamer = TimedStreamer(processor.tokenizer, skip_prompt=True)
    streamer.put(torch.tensor([[1, 2, 3]]))
    assert streamer.first_token is None
    streamer.put(torch.tensor([4]))
    first = streamer.first_token
    streamer.put(torch.tensor([5]))
    assert first is not None and streamer.first_token == first


def test_all_tokens_are_compared_with_nothing(answerer, path):
    answer, _ = last(answerer, Conversation(), "what?", path, number=36)
    assert re.search(LINE, answer).groups() == ("36", None)


def test_a_dynamic_budget_is_the_images_own(answerer, path):
    answer, _ = last(answerer, Conversation(), "what?", path, DYNAMIC, 8)
    inputs = answerer.processor(images=[make_image()], num_image_tokens="dynamic:8", return_tensors="pt")
    (kept,) = answerer.model.get_image_features(**inputs).kept_indices
    assert re.search(LINE, answer)[1] == str(len(kept))


def test_a_comparison_has_the_answers_at_three_budgets(answerer, path):
    answer, _ = last(answerer, Conversation(), "what color?", path, number=9, compare=True)
    rows = re.findall(r"^\| (\d+) \| (.*) \| \d+ ms \|$", answer, flags=re.MULTILINE)
    assert [int(budget) for budget, _ in rows] == [2, 9, 36]
    for budget, words in rows:
        expected = answerer.model.chat(path, "what color?", num_image_tokens=int(budget), processor=answerer.processor)
        assert words == " ".join(expected.split()).replace("|", "\\|")
    assert answer.startswith(
        answerer.model.chat(path, "what color?", num_image_tokens=9, processor=answerer.processor)
    )


@pytest.mark.slow
def test_of_a_large_picture_fewer_views_may_be_encoded(tmp_path, monkeypatch):
    model = make_model(image_grid_pinpoints=GRIDS)
    answerer = Answerer(model, make_processor(pinpoints=GRIDS))
    make_image(size=(252, 252)).save(tmp_path / "large.png")
    encoded, encode = [], model.model.encode

    def count(pixels, *options):
        encoded.append(len(pixels))
        return encode(pixels, *options)

    monkeypatch.setattr(model.model, "encode", count)
    views = next(block for block in build(answerer).blocks.values() if getattr(block, "elem_id", "") == "views")
    assert (views.visible, views.maximum) == (True, 10)
    assert last(answerer, Conversation(), "what?", tmp_path / "large.png", views=0)[0].startswith("⚠") is False
    assert max(encoded) == 10
    encoded.clear()
    answer, _ = last(answerer, Conversation(), "what?", tmp_path / "large.png", views=3, compare=True)
    assert "9 of 108 tokens" in answer and "| 36 |" in answer  # three views of 36
    assert max(encoded) <= 3


@pytest.fixture
def answerer_of_views():
    """Return the answerer of a model which cuts large pictures into views of 36 tokens, and has 200 positions."""
    text = text_config("phi", make_tokenizer(), max_position_embeddings=200)
    model = make_model(image_grid_pinpoints=GRIDS, text_config=text)
    model.generation_config.max_new_tokens = 4
    return Answerer(model, make_processor(pinpoints=GRIDS))


def test_what_is_beyond_the_decoders_positions_is_not_tried_and_said(answerer_of_views, tmp_path, monkeypatch):
    make_image(size=(252, 252)).save(tmp_path / "large.png")
    lengths, chat = [], answerer_of_views.model.chat
    monkeypatch.setattr(
        answerer_of_views.model, "chat", lambda *a, **k: lengths.append(k["num_image_tokens"]) or chat(*a, **k)
    )
    talk = Conversation()
    answer, _ = last(answerer_of_views, talk, "what?", tmp_path / "large.png", number=9)
    assert "9 of 360 tokens" in answer and answer.endswith(" (all 360 are more than the model's 200 positions)*")
    assert lengths == [9]
    refused, _ = last(answerer_of_views, talk, "what?", number=199)
    assert refused.startswith("⚠ Image and questions are more than the model's 200 positions: lower K")
    assert "positions" not in last(answerer_of_views, talk, "what?", number=180)[0].partition("(")[0]
    answer, _ = last(answerer_of_views, talk, "what? " * 80, number=9, compare=True)
    assert answer.endswith("| 36 | more than the model's 200 positions |  |") and "| 9 | " in answer


def test_a_picture_is_read_once_and_kept_no_larger_than_its_views(answerer_of_views, answerer, tmp_path):
    Image.effect_noise((3000, 2000), 50).save(tmp_path / "large.png")
    for each, longest in ((answerer_of_views, 252), (answerer, 126)):
        talk = Conversation()
        assert not last(each, talk, "what?", tmp_path / "large.png")[0].startswith("⚠")
        assert max(talk.image.size) == longest
    (tmp_path / "large.png").unlink()  # as Gradio does after a day
    assert not last(answerer, talk, "and now?")[0].startswith("⚠")


CARD = """---
license: mit
---
# toy

![a badge](https://example.org/badge.svg)

It knows <b>squares</b>,
and nothing else.

More.
"""


def test_the_page_says_what_the_checkpoint_knows(answerer, tmp_path, monkeypatch):
    assert "easy-VQA" in introduce(str(SHIPPED)) and "nothing else" in introduce(str(SHIPPED))
    assert introduce("") == introduce(str(tmp_path)) == introduce(str(tmp_path / "gone")) == ""
    (tmp_path / "README.md").write_text(CARD)
    monkeypatch.setattr(answerer.model.config, "name_or_path", str(tmp_path))
    title = next(block for block in build(answerer).blocks.values() if getattr(block, "elem_id", "") == "title")
    assert "<p>It knows &lt;b&gt;squares&lt;/b&gt;, and nothing else.</p>" in title.value
    (tmp_path / "README.md").write_text("word " * 1000)
    assert len(introduce(str(tmp_path))) < 700


def test_the_parameters_of_the_api_have_names(url):
    settings = ["kind", "number", "by_question", "views"]
    described = Client(url, verbose=False, analytics_enabled=False).view_api(return_format="dict")["named_endpoints"]
    named = {name: [each["parameter_name"] for each in end["parameters"]] for name, end in described.items()}
    assert named == {"/ask": ["message", *settings, "follow_up", "compare"], "/show": settings}


def test_the_address_names_the_settings():
    def settings(**query):
        kind, number, by_question, views = from_address(query, 36, [2, 8, 30], FIXED, 9, False, 0)
        return kind, number.value, by_question, views

    assert settings() == (FIXED, 9, False, 0)
    assert settings(kind=DYNAMIC, number="99", by_question="true", views="3") == (DYNAMIC, 30, True, 3)
    assert settings(kind="<b>", number="-4", by_question="maybe", views="x") == (FIXED, 9, False, 0)


def test_the_slider_moves_into_the_calibrated_range():
    moved = slider(DYNAMIC, 36, 36, [2, 8, 30])
    assert (moved.minimum, moved.maximum, moved.value) == (2, 30, 30)
    moved = slider(FIXED, 30, 36, [2, 8, 30])
    assert (moved.minimum, moved.maximum, moved.value) == (1, 36, 30)


def test_controls_are_those_that_the_checkpoint_knows(answerer, monkeypatch):
    def controls(kinds, what):
        return [getattr(block, what) for block in build(answerer).blocks.values() if isinstance(block, kinds)]

    assert controls((gr.Radio, gr.Slider), "value") == [FIXED, 9, 0]
    assert controls((gr.Radio, gr.Checkbox, gr.Slider), "visible") == [True, True, True, False, True, True]
    monkeypatch.setattr(answerer.model.config, "num_image_tokens", "dynamic")
    monkeypatch.setattr(answerer.model.config, "mean_image_tokens", 8)
    assert controls((gr.Radio, gr.Slider), "value") == [DYNAMIC, 8, 0]
    monkeypatch.setattr(answerer.model.config, "num_image_tokens", 9)
    monkeypatch.setattr(answerer.model.config, "dynamic_budget", None)
    monkeypatch.setattr(answerer.model.config, "score", "positional")
    assert controls((gr.Radio, gr.Checkbox), "visible") == [False, False, True, True]


def test_the_picture_follows_budget_and_question(answerer, path):
    talk = Conversation()
    _, first = last(answerer, talk, "what?", path)
    pixels = [
        np.asarray(first),
        *(np.asarray(show(answerer, talk, FIXED, n, q, 0)) for n, q in [(9, False), (4, False)]),
    ]
    assert (pixels[0] == pixels[1]).all() and (pixels[1] != pixels[2]).any()
    asked = [np.asarray(last(answerer, talk, text, by_question=True)[1]) for text in ("what color?", "yes no in the")]
    assert (asked[0] != asked[1]).any()


def test_questions_stand_alone_unless_they_follow_up(answerer, path):
    talk = Conversation()
    for follow_up, messages in ((False, 2), (False, 2), (True, 4), (True, 6), (False, 2)):
        last(answerer, talk, "what?", None if talk.image else path, follow_up=follow_up)
        assert len(talk.history) == messages
    last(answerer, talk, "and this?", path, follow_up=True)
    assert len(talk.history) == 2, "a new image begins a new conversation"


@pytest.mark.parametrize(
    "text, number, history, cure",
    [
        ("", 9, 0, "Write a question"),
        ("a" * (MAX_QUESTION + 1), 9, 0, f"at most {MAX_QUESTION}"),
        ("what?", 99, 0, "from 1 to 36"),
        ("what?", 9, 2 * MAX_TURNS, "untick"),
    ],
)
def test_questions_that_cannot_be_answered(answerer, text, number, history, cure):
    talk = Conversation(make_image(), history=[{}] * history)
    assert cure in last(answerer, talk, text, number=number, follow_up=True)[0]
    assert len(talk.history) == history


def test_a_question_wants_an_image(answerer):
    assert "Which image?" in last(answerer, Conversation(), "what?")[0]
    assert show(answerer, Conversation(), FIXED, 9, False, 0) == gr.skip()


def test_bad_files_are_refused_and_the_image_before_stays(answerer, path, tmp_path):
    talk = Conversation()
    last(answerer, talk, "what?", path)
    names = broken_images(tmp_path)
    Image.new("1", (6000, 5000)).save(tmp_path / "large.png")
    for name in [*names, "large.png"]:
        answer, _ = last(answerer, talk, "what?", tmp_path / name)
        assert answer.startswith("⚠ ") and (name in answer or "thin" in answer), name
        assert str(tmp_path) not in answer
    assert "6000 x 5000" in answer
    assert "9 of 36" in last(answerer, talk, "what?", path)[0]


def test_a_visitor_who_leaves_stops_the_model(answerer, monkeypatch):
    calls = []
    monkeypatch.setattr(answerer.model.generation_config, "max_new_tokens", 400)
    monkeypatch.setattr(answerer.model.generation_config, "min_new_tokens", 400)
    hook = answerer.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    answer = answerer.answer(Conversation(make_image(), "what?"), Choice(9))
    next(answer)
    answer.close()
    answerer.worker.submit(hook.remove).result()
    assert 1 <= len(calls) < 400


def test_visitors_at_the_same_time_share_nothing(url, path):
    clients = [Client(url, verbose=False, analytics_enabled=False, download_files=False) for _ in range(2)]
    asked = {"text": "what?", "files": [handle_file(path)]}, {"text": "what?", "files": []}
    jobs = [
        client.submit(message, FIXED, 9, False, 0, False, False, api_name="/ask")
        for client, message in zip(clients, asked, strict=True)
    ]
    (one, _, picture), (other, _, _) = (job.result(timeout=60) for job in jobs)
    assert "9 of 36 tokens" in one[-1]["content"][0]["text"] and picture["url"].startswith(url)
    assert len(other) == 2 and "Which image?" in other[-1]["content"][0]["text"]
    one, _, _ = clients[0].predict(
        {"text": "and now?", "files": []}, FIXED, 4, False, 0, False, False, api_name="/ask"
    )
    assert len(one) == 4 and "4 of 36 tokens" in one[-1]["content"][0]["text"]


def test_files_of_more_than_ten_megabytes_are_not_taken(url, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(11 * 2**20))
    with open(tmp_path / "large.png", "rb") as file:
        assert httpx.post(f"{url}gradio_api/upload", files={"files": file}).status_code == 413


def test_examples_are_there_and_small():
    sizes = [Path(example["files"][0]).stat().st_size for example in EXAMPLES]
    assert all(0 < size < 60_000 for size in sizes)


def test_the_command_serves_this_machine_alone_unless_told_otherwise(url, monkeypatch, capsys):
    served = {}
    monkeypatch.setattr("lightvlm.inference.checkpoint.load", lambda path, **options: ("model", "processor"))
    monkeypatch.setattr(
        "lightvlm.demo.app.launch", lambda asked, host, port, share: served.update(host=host, share=share)
    )
    assert main(["demo"]) == 0 and served == {"host": "127.0.0.1", "share": False}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2 and "lightvlm[demo]" in capsys.readouterr().err


def test_a_port_that_is_taken(answerer, url):
    with pytest.raises(OSError, match="port"):
        launch(answerer.asked, "127.0.0.1", int(url.rsplit(":")[-1].strip("/")))


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.mark.slow
def test_in_a_browser(url, path, tmp_path, browser):
    """Upload, ask, change K, see the picture change; a bad file; an example; and nothing is asked of another host."""
    page = browser.new_page()
    asked_of = set()
    page.on("request", lambda request: asked_of.add(re.match(r"\w+:(//127\.0\.0\.1)?", request.url)[0]))
    page.goto(url)
    kept, chat, box = page.locator("#kept img"), page.locator("#chat"), page.locator("#question textarea")
    expect(page.get_by_role("heading", name="LightVLM")).to_be_visible(timeout=20_000)
    expect(kept).to_have_count(0)

    page.locator("#question input[type=file]").set_input_files(path)
    box.fill("what color is the shape?")
    box.press("Enter")
    expect(chat).to_contain_text(
        re.compile(r"9 of 36 tokens · first token after \d+ ms \(all tokens: \d+ ms\)"), timeout=20_000
    )
    before = kept.get_attribute("src")
    page.locator("#number input[type=number]").fill("4")
    page.locator("#number input[type=number]").press("Enter")
    expect(kept).not_to_have_attribute("src", before, timeout=20_000)
    expect(page).to_have_url(re.compile(r"\?kind=fixed&number=4&by_question=false&views=0$"))
    page.goto(page.url.replace("number=4", "number=6"))
    expect(page.locator("#number input[type=number]")).to_have_value("6", timeout=20_000)
    page.locator("#number input[type=number]").fill("4")
    page.locator("#number input[type=number]").press("Enter")
    page.locator("#question input[type=file]").set_input_files(path)

    box.fill("and now?")
    box.press("Enter")
    expect(chat).to_contain_text("4 of 36 tokens", timeout=20_000)
    (tmp_path / "bad.png").write_bytes(b"no image")
    page.locator("#question input[type=file]").set_input_files(tmp_path / "bad.png")
    box.fill("and this?")
    box.press("Enter")
    expect(chat).to_contain_text("bad.png cannot be read as an image", timeout=20_000)
    page.locator("#examples img").first.click()
    expect(chat).to_contain_text(EXAMPLES[0]["text"], timeout=20_000)
    expect(page.get_by_text("all tokens:")).to_have_count(2, timeout=20_000)
    page.locator("#compare input").check()
    box.fill("and this?")
    box.press("Enter")
    expect(chat.locator("table tr")).to_have_count(4, timeout=20_000)
    page.get_by_role("button", name="Clear").click()
    expect(kept).to_have_count(0)
    assert asked_of <= {"http://127.0.0.1", "blob:", "data:"}
