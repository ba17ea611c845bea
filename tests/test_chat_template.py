"""The chat template marks the assistant's words, and what it would leave out is refused."""

import base64

import pytest
import torch
from tiny import make_image, make_processor, pixel_values, placeholders, say


def test_budget_through_the_chat_template(processor):
    messages = [{"role": "user", "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "?"}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_image_tokens": 4},
    )
    assert placeholders(processor, inputs) == [4]


def test_chat_template_marks_the_assistants_words(processor):
    text_item = {"type": "text", "text": "what?"}
    messages = [
        {"role": "user", "content": [{"type": "image"}, text_item]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]
    text = processor.apply_chat_template(messages)
    end = processor.tokenizer.eos_token
    assert text == f"USER: <image>\nwhat? ASSISTANT: yes{end}USER: sure? ASSISTANT: no{end}"
    inputs = processor.apply_chat_template(
        [
            [
                {**messages[0], "content": [{"type": "image", "image": make_image()}, messages[0]["content"][1]]},
                *messages[1:],
            ]
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    words = processor.tokenizer.decode(inputs["input_ids"][inputs["assistant_masks"].bool()])
    assert words == f" yes{end} no{end}"


@pytest.mark.parametrize(
    ("messages", "images"),
    [
        ([say("user", "?", make_image(0)), say("assistant", "yes", make_image(1)), say("user", "and <image>?")], None),
        ([{"role": "user", "content": "what is <image>?"}], [make_image()]),
        ([[say("user", "what is <image>?", make_image())], [say("user", "?")]], None),
    ],
    ids=[
        "swallows an image that the template leaves out",
        "swallows an image given beside the messages",
        "in a batch",
    ],
)
def test_an_image_mark_that_a_user_typed_is_refused(processor, messages, images):
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"images": images, "padding": True}}
    with pytest.raises(ValueError, match="A message has <image> in its text: take it out, .*sanitize_control_tokens"):
        processor.apply_chat_template(messages, **options)


def test_a_typed_image_mark_can_be_a_word_like_any_other(processor):
    messages = [say("user", "what is <image>?", make_image())]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "sanitize_control_tokens": True}
    assert placeholders(processor, processor.apply_chat_template(messages, **options)) == [9]


LOST = {
    "video": {"type": "video", "video": "a.mp4"},
    "audio": {"type": "audio", "audio": "a.wav"},
    "another name of an image": {"type": "img", "image": make_image()},
    "an image of OpenAI's responses": {"type": "input_image", "image_url": "data:"},
    "an image_url without one": {"type": "image_url", "url": "a.png"},
    "no type": {"image": make_image()},
    "text under another key": {"type": "text", "content": "look"},
    "no text": {"type": "text", "text": None},
    "a bare text": "look",
}


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize("part", LOST.values(), ids=LOST)
def test_parts_that_would_be_left_out_are_refused_with_their_place(processor, part, tokenize):
    asked = say("user", "what?")
    messages = [say("user", "?"), say("assistant", "yes"), {**asked, "content": [*asked["content"], part]}]
    for talk, place in ((messages, "Message 2, part 1,"), ([messages[:2], messages], "Message 2 of conversation 1, ")):
        with pytest.raises(ValueError, match=f'^{place}.*: give {{"type": "text", "text": ...}} or {{"type": "image"'):
            processor.apply_chat_template(talk, tokenize=tokenize, return_dict=True)


@pytest.mark.parametrize("content", [None, {"type": "text", "text": "what?"}, 7])
def test_messages_without_a_list_of_parts_are_refused(processor, content):
    with pytest.raises(ValueError, match="^Message 1 has the content .*: give a text or a list of parts"):
        processor.apply_chat_template([say("user", "?"), {"role": "user", "content": content}])


@pytest.mark.parametrize("role", ["tool", "developer", "human", None])
def test_roles_that_the_template_does_not_have_are_refused(processor, role):
    with pytest.raises(ValueError, match="message 1 has the role '.*', not system, user or assistant"):
        processor.apply_chat_template([say("user", "?"), say(role, "what?")])


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALLS = {"role": "assistant", "tool_calls": TOOLS}


def test_tools_documents_and_calls_that_the_template_does_not_read_are_refused(processor):
    talk = [say("user", "?")]
    for options in ({"tools": TOOLS}, {"documents": [{"title": "a", "text": "b"}]}):
        with pytest.raises(ValueError, match=f"template of this checkpoint reads no {[*options][0]}"):
            processor.apply_chat_template(talk, **options)
    with pytest.raises(ValueError, match="Message 1 has tool calls, which the chat template .* does not read"):
        processor.apply_chat_template([*talk, CALLS])
    assert processor.apply_chat_template(talk, tools=[], documents=None) == "USER: ?"


def test_what_the_template_of_another_checkpoint_reads_is_passed_on():
    processor = make_processor()
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}[{{ message['role'] }}]"
        "{{ message['tool_calls'] | length }}{{ message['content'] }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "?"}, CALLS, {"role": "tool", "content": "red"}]
    for options in ({"chat_template": template}, {}):
        text = processor.apply_chat_template(talk, tools=TOOLS, **options)
        assert text.startswith('[{"type"') and text.endswith("[user]0?[assistant]1[tool]0red")
        processor.chat_template = template


def test_images_are_given_under_each_of_their_names(processor, tmp_path):
    make_image().save(tmp_path / "image.png")
    path, data = str(tmp_path / "image.png"), base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    parts = [{"type": "image", name: path} for name in ("image", "path", "url")]
    parts += [{"type": "image", "base64": data}, {"type": "image", "image": make_image(), "text": None}]
    parts += [{"type": "image_url", "image_url": url} for url in ({"url": path}, f"data:image/png;base64,{data}")]
    expected = pixel_values(processor, make_image())
    for part in parts:
        talk = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
        inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected) and placeholders(processor, inputs) == [9]
