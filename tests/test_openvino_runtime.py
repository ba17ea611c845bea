"""A folder of `lightvlm export --openvino` answers commands and clients as its checkpoint does in PyTorch."""

import json
import shutil

import pytest
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.inference.any_model import load_any
from lightvlm.inference.own_model import Options
from lightvlm_cli.main import main
from saved import edit_json, pretend_installed
from served import ask, complete, draw, post_fields, refusal, serving, stream, user
from tiny import GRIDS, make_dynamic, make_image, make_model, make_processor, say
from tokenizers.processors import TemplateProcessing

pytest.importorskip("openvino_genai")

QUESTIONS = ["what color?", "is there a circle in this image?", "what shape is in the top left?"]
SIZES = [(84, 84), (60, 70), (300, 200)]
K = 9


def save(model, processor, folder, budget):
    """Save a checkpoint, and the folder that OpenVINO runs it from."""
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    command = ["export", "--openvino", "--model-path", str(folder / "model"), "--num-image-tokens", str(budget)]
    assert main([*command, "--output-dir", str(folder / f"k{budget}".replace(":", ""))]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of pictures, a checkpoint of many views and what OpenVINO runs it from."""
    folder = tmp_path_factory.mktemp("openvino")
    (folder / "pictures").mkdir()
    for index, size in enumerate(SIZES):
        make_image(index, size).save(folder / f"pictures/{index}.png")
    model = make_dynamic(image_grid_pinpoints=GRIDS)
    torch.nn.init.normal_(model.model.pruner.row_embedding.weight)
    save(model, make_processor(pinpoints=GRIDS), folder, K)
    return folder


@pytest.fixture(scope="module")
def asked(folder):
    return load_any(str(folder / "k9"), runtime="openvino", dtype="float32")


@pytest.fixture(scope="module")
def chat(folder):
    """Return a function that answers as PyTorch does, at the folder's K."""
    model, processor = LightVLM.from_pretrained(folder / "model"), LightVLMProcessor.from_pretrained(folder / "model")

    def answer(images, question, history=None, **options):
        options = {"num_image_tokens": K, "max_views": 1, "processor": processor, "max_new_tokens": 16} | options
        return model.eval().chat(images, question, history, **options)

    return answer


def infer(folder, *options):
    command = ["infer", "--max-new-tokens", "5", "--max-views", "1", "--dtype", "float32", "--batch-size", "4"]
    return main([*command, "--model-path", *map(str, [folder, *options])])


def lines(file):
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda line: line["row"])


def test_many_questions_are_answered_as_by_pytorch_in_a_second_run_too(folder, tmp_path, capsys):
    pictures, output = ["--image", folder / "pictures"], ["--prompt", *QUESTIONS, "--output"]
    options = [*output, tmp_path / "torch.jsonl", "--num-image-tokens", K]
    assert infer(folder / "model", *pictures, *options) == 0
    options = [*output, tmp_path / "answers.jsonl", "--runtime", "openvino"]
    assert infer(folder / "k9", "--image", folder / "pictures/0.png", *options) == 0
    assert infer(folder / "k9", *pictures, *options[:-2]) == 0
    assert "9 questions answered, 3 answers by earlier runs" in capsys.readouterr().err
    expected, found = (lines(tmp_path / f"{name}.jsonl") for name in ("torch", "answers"))
    assert [line["answer"] for line in found] == [line["answer"] for line in expected]
    assert [line["kept"] for line in found] == [[K]] * len(found)


@pytest.mark.parametrize("sizes", [[(84, 84), (300, 200), (60, 70)], [(84, 84), (84, 84)], []], ids=len)
def test_several_images_none_and_several_turns(asked, chat, sizes):
    images, history = [make_image(index, size) for index, size in enumerate(sizes)], []
    first, second = chat(images, "what?", history), chat(None, "and why?", history)
    talk = [say("user", "what?", *images)]
    for expected in (first, second):
        (answer,) = asked.answer([talk], {"max_new_tokens": 16}, Options(max_views=1))
        assert answer.text == expected and answer.kept == [K] * len(images)
        talk = [*talk, say("assistant", expected), say("user", "and why?")]


def test_a_dynamic_budget_is_decided_in_the_graph(tmp_path):
    model, processor = make_dynamic(), make_processor()
    save(model, processor, tmp_path, "dynamic:8")
    asked = load_any(str(tmp_path / "kdynamic8"), runtime="auto", dtype="float32")
    images, kept = [make_image(index) for index in range(3)], []
    for image in images:
        (answer,) = asked.answer([[say("user", "what?", image)]], {"max_new_tokens": 8}, Options())
        inputs = processor(images=[image], num_image_tokens="dynamic:8", return_tensors="pt")
        (indices,) = model.get_image_features(**inputs).kept_indices
        assert answer.kept == [len(indices)] and answer.whole == [36]
        options = {"num_image_tokens": "dynamic:8", "max_new_tokens": 8, "processor": processor}
        assert answer.text == model.chat(image, "what?", **options)
        kept += answer.kept
    (answer,) = asked.answer([[say("user", "what?", *images)]], {"max_new_tokens": 1}, Options())
    assert answer.kept == [sum(kept)] and len({*kept}) > 1


@pytest.mark.slow
def test_a_tokenizer_that_begins_prompts_and_an_encoder_that_squashes(tmp_path):
    model, processor = make_model("siglip", "llama"), make_processor("siglip")
    tokenizer = processor.tokenizer
    mark, begin = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{mark} $A", special_tokens=[(mark, begin)])
    save(model, processor, tmp_path, K)
    asked = load_any(str(tmp_path / "k9"), runtime="openvino", dtype="float32")
    for images in ([make_image(0, (200, 90))], []):
        (answer,) = asked.answer([[say("user", "what?", *images)]], {"max_new_tokens": 8}, Options())
        assert answer.text == model.chat(images, "what?", processor=processor, max_new_tokens=8)


def test_a_seed_decides_what_is_sampled_and_greedy_needs_none(asked):
    def answers(**wanted):
        torch.manual_seed(wanted.pop("seed"))
        talk = [say("user", "what?", make_image())]
        return asked.answer([talk], {"max_new_tokens": 16, **wanted}, Options())[0].text

    sampled = [answers(seed=seed, temperature=2.0) for seed in (0, 0, 1, 2)]
    assert sampled[0] == sampled[1] and len({*sampled}) > 1
    assert len({answers(seed=seed) for seed in range(3)}) == 1
    whole = answers(seed=0)
    assert answers(seed=0, until=[whole[3:5]]) == whole.partition(whole[3:5])[0].strip()


def test_answers_of_another_folder_or_runtime_do_not_join_a_file(folder, tmp_path, capsys):
    output = ["--image", folder / "pictures", "--prompt", "what?", "--output", tmp_path / "answers.jsonl"]
    assert infer(folder / "k9", *output) == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    shutil.copytree(folder / "k9", tmp_path / "k9")
    (tmp_path / "k9/openvino_language_model.bin").write_bytes((folder / "k9/openvino_language_model.bin").read_bytes())
    edit_json(tmp_path / "k9/generation_config.json", max_new_tokens=3)
    for other in (tmp_path / "k9", folder / "model"):
        assert infer(other, *output, "--num-image-tokens", K) == 2
        assert "was answered with" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    shutil.copytree(folder / "k9", tmp_path / "moved")
    assert infer(tmp_path / "moved", *output) == 0
    assert "3 answers by earlier runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-image-tokens", "4"], "num_image_tokens=4: the graphs of k9 keep 9 of each image"),
        (["--num-image-tokens", "9,dynamic:8"], "num_image_tokens=dynamic:8: the graphs of k9 keep 9"),
        (["--question-aware"], "--question-aware: the question has no say in the graphs of k9: leave it out"),
        (["--max-views", "2"], "see one view of an image"),
        (["--num-beams", "2"], "OpenVINO has no num_beams=2"),
        (["--int8"], "--int8 is PyTorch's, and k9 is for OpenVINO: export the folder with --weights int8"),
        (["--dtype", "float16"], "OpenVINO computes in float32 or bfloat16"),
        (["--device", "cuda"], "OpenVINO cannot run k9 on CUDA"),
        (["--attn-implementation", "eager"], "--attn-implementation is PyTorch's"),
        (["--encoder", "graph.onnx"], "--encoder is PyTorch's, and k9 is for OpenVINO: leave it out"),
        (["--runtime", "pytorch"], "k9 is for OpenVINO, which `lightvlm infer` and `lightvlm serve` run"),
        (["--runtime", "openvino", "--model-path", "model"], "model is no folder of `lightvlm export --openvino`"),
        (["--model-path", "torn"], "torn lacks openvino_vision_embeddings_model.bin: export it again"),
        (["--model-path", "broken"], "OpenVINO cannot run broken on CPU"),
        (["--model-path", "bare"], "bare lacks checkpoint/config.json, checkpoint/generation_config.json"),
        (["--model-path", "half"], "half/lightvlm.json is damaged: export the folder again"),
        (["--model-path", "newer"], "newer is of format 2, and this version reads 1: export it again"),
        (["--prompt", "what is <ov_genai_image_0>?"], "has <ov_genai_ in its text"),
    ],
)
@pytest.mark.parametrize("output", [[], ["--output", "answers.jsonl"]], ids=["text", "file"])
def test_what_cannot_be_done_is_refused_in_one_sentence(folder, capsys, monkeypatch, options, message, output):
    monkeypatch.chdir(folder)
    if not (folder / "torn").exists():
        for name in ("torn", "broken", "bare", "half", "newer"):
            shutil.copytree(folder / "k9", folder / name)
        (folder / "torn/openvino_vision_embeddings_model.bin").unlink()
        (folder / "broken/openvino_language_model.xml").write_text("<net>")
        shutil.rmtree(folder / "bare/checkpoint")
        (folder / "half/lightvlm.json").write_text('{"format": 1, "num_image')
        edit_json(folder / "newer/lightvlm.json", format=2)
    assert infer("k9", "--image", "pictures/2.png", "--prompt", "what?", *output, *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") <= 2
    for file in folder.glob("answers.jsonl*"):
        file.unlink()


@pytest.mark.parametrize("found", ["2026.1.0.0", None])
def test_an_openvino_that_is_missing_or_too_old_is_named(folder, capsys, monkeypatch, found):
    pretend_installed(monkeypatch, "openvino-genai", found)
    assert infer(folder / "k9", "--image", folder / "pictures/0.png", "--prompt", "what?") == 2
    assert 'needs openvino-genai>=2026.4.1: pip install --upgrade "lightvlm[edge]"' in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["demo", "show"])
def test_verbs_that_need_pytorch_say_so(folder, capsys, verb):
    options = ["--image", str(folder / "pictures/0.png"), "--output", "x.png"] if verb == "show" else []
    assert main([verb, "--model-path", str(folder / "k9"), *options]) == 2
    assert "is for OpenVINO, which `lightvlm infer` and `lightvlm serve` run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def client(asked):
    asked.max_views = 1
    with serving(asked) as client:
        yield client


@pytest.mark.parametrize("images", [[draw(1)], [draw(1), make_image(0, (150, 200))], []], ids=len)
def test_clients_are_answered_as_by_chat_streamed_or_not(client, chat, images):
    messages, expected = [user("what?", *images)], chat(images, "what?")
    completion = complete(client, messages, max_tokens=16)
    assert completion.choices[0].message.content == expected
    assert getattr(completion.usage, "num_image_tokens", []) == [K] * len(images)
    pieces = stream(client, messages, max_tokens=16)
    assert "".join(pieces) == expected and len(pieces) > 1
    *_, last = complete(client, messages, max_tokens=16, stream=True, stream_options={"include_usage": True})
    assert last.usage == completion.usage


def test_a_client_is_told_what_the_folder_has_not(client, asked):
    status, message = post_fields(client, num_image_tokens=4)
    assert status == 400 and "keep 9 of each image" in message
    status, message = refusal(client, [user("a <ov_genai_image_0>?", draw(1))], stream=True)
    assert status == 400 and "has <ov_genai_ in its text" in message
    asked.max_views = None
    status, message = refusal(client, [user("what?", make_image(0, (190, 180)))], stream=True)
    assert status == 400 and "see one view of an image" in message
    asked.max_views = 1
    assert ask(client, [user("what?", draw(1))], max_tokens=4)
