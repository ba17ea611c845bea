"""The demo's page: ask about an image, choose how many of its tokens the model sees, and look at which are kept.

Visitors wait in a queue for the one model; what a visitor's session holds is a `Conversation` and nothing else.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr
from huggingface_hub import ModelCard
from lightvlm.demo.answers import Answerer, Choice, Conversation, answerer_of, read_image
from lightvlm.inference.any_model import AnyModel
from lightvlm.inference.own_model import OwnModel
from PIL import Image

MAX_FILE_SIZE = "10mb"
# Mosaics of training/prepare_mosaics.py, test split: easy-VQA's shapes (MIT), photographs of scikit-image (Falcon 9 by
# SpaceX, public domain; the cat by Stefan van der Walt, CC0).
FOLDER = Path(__file__).with_name("examples")
EXAMPLES = [
    {"text": "how many shapes are there?", "files": [str(FOLDER / "photo_3x3_6.jpg")]},
    {"text": "what color is the shape in the top center?", "files": [str(FOLDER / "photo_3x3_20.jpg")]},
    {"text": "what color is the shape in the middle right?", "files": [str(FOLDER / "flat_3x3_10.jpg")]},
]
FIXED, DYNAMIC = "fixed", "what the image needs"
K, K_MEAN = "K, tokens kept of the image", "K on average over many images"
K_SHARE = "Share of the image's tokens that is kept, in percent"
BY_QUESTION = "The question helps to choose the kept tokens"
VIEWS = "Views of a large picture that are encoded, 0 for all"
FOLLOW_UP = "Follow-up: earlier questions go into the prompt"
COMPARE = "Compare with all tokens and with a quarter"
# The address keeps the settings, so that it can be shared.
TO_ADDRESS = """(kind, number, by_question, views) => {
    const settings = new URLSearchParams({kind, number, by_question, views});
    history.replaceState(null, "", "?" + settings);
}"""
TITLE = """<h1>LightVLM</h1>
<p>Answers from a fraction of the image's tokens: the dimmed ones never reach the language model.</p>"""
MAX_INTRODUCTION = 600
INVITATION = "Choose an example, or add an image and ask about it."


def ask(
    answerer: Answerer,
    talk: Conversation,
    message: dict,
    kind: str,
    number: int,
    by_question: bool,
    views: int,
    follow_up: bool,
    compare: bool,
) -> Iterator[tuple]:
    """Answer {"text", "files"}, or say what is wrong with it: conversation, messages, an empty box and the picture.

    The names of the settings are those of the API.
    """
    text, files = message["text"].strip(), [Path(file) for file in message["files"]]
    asked, reply = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
    talk.shown, picture = [*talk.shown, asked, reply], None
    try:
        if files:
            talk.image, talk.history = read_image(files[0], answerer.asked), []
            asked["content"] = [{"path": str(files[0])}, text]
        talk.question = text
        yield talk, talk.shown, None, gr.skip()
        chosen = choice(answerer, kind, number, by_question, views, follow_up, compare)
        for reply["content"], picture in answerer.answer(talk, chosen):
            yield talk, talk.shown, None, picture or gr.skip()
    except ValueError as error:
        reply["content"] = f"⚠ {error}"
    yield talk, talk.shown, None, picture or gr.skip()


def show(
    answerer: Answerer, talk: Conversation, kind: str, number: int, by_question: bool, views: int
) -> Image.Image | dict:
    """Return the picture at another budget, before anything more is asked."""
    if talk.image is None:
        return gr.skip()
    try:
        return answerer.draw(talk, choice(answerer, kind, number, by_question, views))[0] or gr.skip()
    except ValueError as error:
        raise gr.Error(str(error)) from None


def introduce(checkpoint: str) -> str:
    """Return the first paragraph of a checkpoint's card, which says what it knows, as text; "" if there is none."""
    card = Path(checkpoint, "README.md") if Path(checkpoint).is_dir() else checkpoint  # or a name on the Hub
    try:
        text = ModelCard.load(card).text if checkpoint else ""
    except (OSError, ValueError):  # no file, not reachable, or not a card
        return ""
    paragraphs = (" ".join(each.split()) for each in text.split("\n\n"))
    first = next((each for each in paragraphs if each[:1].isalnum()), "")
    return first if len(first) <= MAX_INTRODUCTION else f"{first[:MAX_INTRODUCTION]}…"


def choice(answerer: Answerer, kind: str, number: int, by_question: bool, views: int, *also: bool) -> Choice:
    """Return the values of the page's controls; 0 views are all."""
    unit = answerer.controls().unit
    fixed = f"{number}{unit}" if unit else number
    return Choice(f"dynamic:{number}" if kind == DYNAMIC else fixed, by_question, views or None, *also)


def slider(kind: str, number: int, patches: int, means: list[int], fixed: str = K) -> gr.Slider:
    """Return the slider with the range that a kind of budget has, its value moved into it."""
    least, most = (means[0], means[-1]) if kind == DYNAMIC else (1, patches)
    label = K_MEAN if kind == DYNAMIC else fixed
    return gr.Slider(least, most, min(max(number, least), most), step=1, label=label, elem_id="number")


def from_address(
    named: Mapping[str, str],
    patches: int,
    means: list[int],
    kind: str,
    number: int,
    by_question: bool,
    views: int,
    fixed: str = K,
) -> tuple:
    """Return the settings that the page's address names, and otherwise, or if it names them badly, the page's own."""
    if named.get("kind") in ([FIXED, DYNAMIC] if means else [FIXED]):
        kind = named["kind"]
    number, views = (
        int(named[name]) if named.get(name, "").isdecimal() else own
        for name, own in (("number", number), ("views", views))
    )
    by_question = {"true": True, "false": False}.get(named.get("by_question"), by_question)
    return kind, slider(kind, number, patches, means, fixed), by_question, views


def build(answerer: Answerer) -> gr.Blocks:
    """Lay out the page, and connect events with what they call."""
    controls, config = answerer.controls(), answerer.model.config
    patches, means, most_views = controls.most, controls.means, controls.most_views
    default = (DYNAMIC if controls.is_dynamic else FIXED), controls.number
    fixed = K_SHARE if controls.unit else K
    with gr.Blocks(title="LightVLM", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(f"{TITLE}<p>{escape(introduce(config.name_or_path))}</p>", elem_id="title")
        talk = gr.State(Conversation())
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    label="Conversation",
                    show_label=False,
                    height=440,
                    buttons=[],
                    allow_file_downloads=False,
                    placeholder=INVITATION,
                    elem_id="chat",
                )
                box = gr.MultimodalTextbox(
                    show_label=False,
                    file_types=["image"],
                    placeholder="Ask about an image",
                    label="Question",
                    elem_id="question",
                )
                examples = gr.Dataset(
                    components=[gr.Image(render=False)],
                    samples=[each["files"] for each in EXAMPLES],
                    type="index",
                    label="Examples",
                    elem_id="examples",
                )
            with gr.Column(scale=2, min_width=320):
                picture = gr.Image(
                    label="Tokens that are kept",
                    show_label=False,
                    interactive=False,
                    buttons=[],
                    height=360,
                    elem_id="kept",
                )
                with gr.Group():
                    kind = gr.Radio(
                        [FIXED, DYNAMIC],
                        value=default[0],
                        label="Tokens of an image",
                        visible=bool(means),
                        elem_id="kind",
                    )
                    number = slider(*default, patches, means, fixed)
                    number.interactive = not controls.is_fixed
                    by_question = gr.Checkbox(label=BY_QUESTION, visible=controls.hears_questions)
                    views = gr.Slider(0, most_views, 0, step=1, label=VIEWS, visible=most_views > 1, elem_id="views")
                    follow_up = gr.Checkbox(label=FOLLOW_UP)
                    compare = gr.Checkbox(label=COMPARE, visible=not controls.is_fixed, elem_id="compare")
        budget, alone = [kind, number, by_question, views], {"concurrency_id": "model", "concurrency_limit": 1}
        asking = {
            "fn": partial(ask, answerer),
            "inputs": [talk, box, *budget, follow_up, compare],
            "outputs": [talk, chat, box, picture],
        }
        sent = box.submit(**asking, **alone, api_name="ask")
        chosen = examples.click(lambda index: EXAMPLES[index], examples, box, api_visibility="private")
        tried = chosen.then(**asking, **alone, api_visibility="private")
        cleared = {"outputs": [talk, picture], "cancels": [sent, tried], "api_visibility": "private"}
        chat.clear(lambda: (Conversation(), None), None, **cleared)
        kind.change(
            lambda kind, n: slider(kind, n, patches, means, fixed), budget[:2], number, api_visibility="private"
        )
        gr.on(
            [change.change for change in budget],
            partial(show, answerer),
            [talk, *budget],
            picture,
            **alone,
            trigger_mode="always_last",
            show_progress="hidden",
            api_name="show",
        )
        gr.on([change.change for change in budget], None, budget, js=TO_ADDRESS, api_visibility="private")

        def read_address(kind, number, by_question, views, request: gr.Request):  # a partial gets no request
            return from_address(request.query_params, patches, means, kind, number, by_question, views, fixed)

        page.load(read_address, budget, budget, api_visibility="private")
    return page


def launch(asked: OwnModel | AnyModel, host: str, port: int | None, **options) -> gr.Blocks:
    """Serve the demo; `options` are those of `gr.Blocks.launch`.

    Args:
        asked: the model.
        host: address to listen on.
        port: None for the first free one from 7860 on.

    Raises:
        OSError: if the port is taken.
    """
    page = build(answerer_of(asked)).queue(max_size=32)
    page.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_FILE_SIZE,
        theme=gr.themes.Default(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css_paths=[Path(__file__).with_name("style.css")],
        footer_links=[],
        allowed_paths=[str(FOLDER)],
        **options,
    )
    return page
