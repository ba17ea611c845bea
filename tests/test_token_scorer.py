"""A scorer of image tokens starts as the untrained choice, learns by policy gradient, and is saved and shared."""

import json
import logging

import pytest
import torch
from hub_server import TOKEN, HubServer
from launch import launch
from lightvlm import TokenScorer, keep_distinct, prune
from lightvlm.pruning.any_model import embed_text
from lightvlm.training import pruner
from lightvlm.training.prepare_easy_vqa import llava_row
from lightvlm.training.token_scorer import PromptCollator, TokenPolicy, center_questions
from PIL import Image
from qwen import CELL, HIDDEN, SIDE, make_qwen, make_qwen_processor
from tiny import make_image
from torch.nn.functional import layer_norm

pytestmark = pytest.mark.slow  # test_prune.py guards the most of it

TOKENS = SIDE * SIDE


def learned(**options) -> TokenScorer:
    """Return a scorer whose learned terms are not zero."""
    scorer = TokenScorer(HIDDEN, **options)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter)
    return scorer.eval()


def row(*turns: str) -> dict:
    """Return what the collator takes of a row about a picture."""
    sides = ("user", "assistant") * (len(turns) // 2)
    messages = [{"role": side, "content": text} for side, text in zip(sides, turns, strict=True)]
    return {"messages": messages, "images": [make_image(len(turns), (96, 96))]}


def ask(text: str = "what color?", image: Image.Image | None = None, **options) -> dict:
    """Return the inputs of a prompt, as users make them."""
    content = [{"type": "image", "image": image or make_image(0, (96, 96))}, {"type": "text", "text": text}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True} | options
    return make_qwen_processor().apply_chat_template([{"role": "user", "content": content}], **options)


def kept(inputs: dict) -> torch.Tensor:
    return inputs["mm_encoder_outputs"]["image"].kept_indices[0]


def test_an_untrained_scorer_keeps_what_keep_distinct_keeps():
    tokens, question = torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN)
    for count in (1, 5, TOKENS - 1):
        assert torch.equal(TokenScorer(HIDDEN)(tokens, count, question), keep_distinct(tokens, count))
    assert not torch.equal(learned()(tokens, 5, question), keep_distinct(tokens, 5))


def test_one_for_tokens_of_width_4096_has_less_than_a_million_parameters():
    assert sum(parameter.numel() for parameter in TokenScorer(4096).parameters()) < 1_000_000


@pytest.mark.parametrize("options", [{}, {"question_rank": 0, "select": "topk", "scorer_hidden_size": 7}])
def test_what_is_saved_keeps_the_same_when_it_is_loaded(tmp_path, options):
    scorer, model, inputs = learned(**options, base_model="me/base"), make_qwen(), ask()
    scorer.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"pruner_config.json", "pruner.safetensors"}
    again = TokenScorer.from_pretrained(tmp_path)
    assert again.config == scorer.config and not again.training
    assert torch.equal(kept(prune(model, inputs, 0.25, pruner=again)), kept(prune(model, inputs, 0.25, pruner=scorer)))


@pytest.mark.parametrize("step", ["save_file", "json.dumps"])
def test_a_kill_while_it_is_saved_leaves_what_was_there(tmp_path, monkeypatch, step):
    learned().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def kill(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lightvlm.pruning.scorer.{step}", kill)
    with pytest.raises(KeyboardInterrupt):
        learned(scorer_hidden_size=5).save_pretrained(tmp_path)
    assert before.items() <= {file.name: file.read_bytes() for file in tmp_path.iterdir()}.items()


def test_a_folder_without_a_scorer_and_one_of_another_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no pruner_config.json: training/pruner.py writes one\.$"):
        TokenScorer.from_pretrained(tmp_path)
    learned().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "pruner_config.json").read_text())
    (tmp_path / "pruner_config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(ValueError, match="does not fit pruner_config.json"):
        TokenScorer.from_pretrained(tmp_path)


def test_a_scorer_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"of width 64 \(me/base\), and the model's have 32: give the scorer that"):
        prune(make_qwen(), ask(), 5, pruner=TokenScorer(64, base_model="me/base"))


def test_a_scorer_in_float32_chooses_for_a_model_in_bfloat16():
    inputs = prune(make_qwen().bfloat16(), ask(), 5, pruner=learned())
    assert len(kept(inputs)) == 5 and inputs["mm_encoder_outputs"]["image"].pooler_output[0].dtype == torch.bfloat16


def test_a_scorer_moves_to_the_device_of_tokens_once_and_says_so(monkeypatch, caplog):
    scorer, moves, place = learned(), [], torch.device("meta")
    tokens = torch.empty(TOKENS, HIDDEN, device=place)
    monkeypatch.setattr("lightvlm.pruning.scorer.SELECTORS", {"diverse": lambda scores, tokens, count: scores})
    monkeypatch.setattr(TokenScorer, "_apply", lambda self, *args: moves.append(args) or move(self, *args))
    move = torch.nn.Module._apply
    with caplog.at_level(logging.WARNING, "lightvlm.pruning.scorer"):
        for _ in range(3):
            scorer(tokens, 5, torch.randn(HIDDEN))
    assert len(moves) == 1 and scorer.question_center.device == place
    assert caplog.messages == ["The pruner moves from cpu to meta, where the model's tokens are."]


@pytest.fixture
def hub(monkeypatch):
    """Return a server that this process takes for the Hub, without xet, whose protocol it does not speak."""
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


@pytest.mark.parametrize("base", ["me/base", "folder", None])
def test_what_is_pushed_is_loaded_by_its_name(hub, tmp_path, base):
    scorer = learned(base_model=base)
    assert scorer.push_to_hub("me/pruner") == f"{hub.url}/me/pruner"
    assert hub.files("me/pruner").keys() == {".gitattributes", "README.md", "pruner_config.json", "pruner.safetensors"}
    card = hub.files("me/pruner")["README.md"].decode()
    assert 'TokenScorer.from_pretrained("me/pruner")' in card and ("base_model: me/base" in card) == (
        base == "me/base"
    )
    assert "base_model: folder" not in card
    again = TokenScorer.from_pretrained("me/pruner", cache_dir=tmp_path)
    tokens, question = torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN)
    assert torch.equal(again(tokens, 5, question), scorer(tokens, 5, question))


def test_private_means_private(hub):
    learned().push_to_hub("me/secret", private=True)
    assert hub.repos["me/secret"]["private"]
    learned().push_to_hub("me/open")
    commits = hub.commits
    with pytest.raises(ValueError, match="me/open is public already"):
        learned().push_to_hub("me/open", private=True)
    assert hub.commits == commits


def test_labels_are_the_answers_of_each_turn_alone():
    processor = make_qwen_processor()
    rows = [row("what color?", "red", "what is in this image?", "a small circle"), row("what color is it?", "yes")]
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        batch = PromptCollator(processor, [0.25])(rows)
        said = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
        assert said == ["red<|im_end|>\na small circle<|im_end|>\n", "yes<|im_end|>\n"]
        is_answer = batch["labels"] != -100
        assert torch.equal(batch["labels"][is_answer], batch["input_ids"][is_answer])
        assert batch["num_image_tokens"] == 0.25
    one = [PromptCollator(processor, [4], max_turns=1)(rows[:1])["labels"] for _ in range(20)]
    assert {processor.tokenizer.decode(labels[labels != -100]) for labels in one} == {
        "red<|im_end|>\n",
        "a small circle<|im_end|>\n",
    }


def test_a_template_that_hides_answers_is_refused():
    processor = make_qwen_processor()
    processor.chat_template = processor.chat_template.replace(
        "part['text'] -}}{%- endfor -%}{{- '<|im_end|>' -}}", "''"
    )
    processor.chat_template = "{%- for message in messages -%}{{- '<|image_pad|>what?' if loop.first -}}{%- endfor -%}"
    with pytest.raises(ValueError, match="The answers are not found in the prompts"):
        PromptCollator(processor, [4])([row("what color?", "red")])


@torch.no_grad()
@pytest.mark.parametrize("budget", [3, 0.5])
def test_the_reward_is_the_mean_log_probability_of_the_answers_on_the_pruned_prompt(budget):
    model, chosen = make_qwen().float(), []

    class Watched(TokenPolicy):
        def reward(self, given, encoded, kept):
            rewards = super().reward(given, encoded, kept)
            chosen.append((kept, rewards))
            return rewards

    rows = [row("what color?", "red", "what is in this image?", "a small circle"), row("what color is it?", "yes")]
    batch = PromptCollator(make_qwen_processor(), [budget])(rows)
    with torch.enable_grad():
        outputs = Watched(model, TokenScorer(HIDDEN), num_samples=3)(**batch)
    batch.pop("num_image_tokens")
    torch.testing.assert_close(outputs["reward"], torch.stack([rewards for _, rewards in chosen]).mean())
    assert len({str(kept) for kept, _ in chosen}) == 3
    for kept_indices, rewards in chosen:
        turns = iter(kept_indices.values())
        inputs = prune(model, batch, budget, pruner=lambda tokens, count, question: next(turns))  # noqa: B023
        found = model(**{**inputs, "labels": None}).logits.log_softmax(dim=-1)[:, :-1]
        labels = inputs["labels"][:, 1:]
        for n in range(2):
            at = labels[n] != -100
            by_hand = found[n, at].gather(-1, labels[n, at, None]).clamp_min(-6).mean()
            torch.testing.assert_close(rewards[n], by_hand)


def paint(places: list[int], colors: list[tuple[int, int, int]]) -> Image.Image:
    """Return gray noise in which some merged tokens have a color."""
    picture = (
        make_image(0, (SIDE * CELL, SIDE * CELL)).convert("L").point(lambda value: 96 + value // 4).convert("RGB")
    )
    for place, color in zip(places, colors, strict=True):
        picture.paste(
            color, (place % SIDE * CELL, place // SIDE * CELL, (place % SIDE + 1) * CELL, (place // SIDE + 1) * CELL)
        )
    return picture


class Planted(TokenPolicy):
    """Pays for keeping the token that is wanted."""

    def reward(self, given, encoded, kept):
        return torch.stack([(kept[n] == place).any().float() for n, place in enumerate(given["wanted"])])


RED, BLUE = (220, 30, 30), (30, 30, 220)
WORDS = ("red", "circle")


def plant(number: int, wants: int | None = None) -> dict:
    """Return a batch of pictures with a red and a blue token, of which the question, or `wants`, wants one."""
    generator, rows, wanted = torch.Generator().manual_seed(number), [], []
    for _ in range(8):
        places = torch.randperm(TOKENS, generator=generator)[:2].tolist()
        mark = int(torch.randint(2, (), generator=generator)) if wants is None else wants
        messages = [{"role": "user", "content": f"is there a {WORDS[mark]}?"}, {"role": "assistant", "content": "yes"}]
        rows.append({"messages": messages, "images": [paint(places, [RED, BLUE])]})
        wanted.append(places[mark])
    return {**PromptCollator(make_qwen_processor(), [1])(rows), "wanted": torch.tensor(wanted)}


def learn(policy: TokenPolicy, batches: list[dict], steps: int) -> list[float]:
    optimizer = torch.optim.Adam([each for each in policy.parameters() if each.requires_grad], lr=1e-2)
    rewards = []
    for step in range(steps):
        outputs = policy(**batches[step % len(batches)])
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        rewards.append(outputs["reward"].item())
    return rewards


def found(policy: TokenPolicy, batch: dict) -> float:
    """Return how often the one token that is kept is the one that is wanted."""
    inputs = {name: value for name, value in batch.items() if name not in ("num_image_tokens", "wanted")}
    indices = prune(policy.model, inputs, 1, pruner=policy.scorer)["mm_encoder_outputs"]["image"].kept_indices
    return (torch.cat(indices) == batch["wanted"]).float().mean().item()


def test_the_kind_of_token_that_answers_need_is_learned():
    policy = Planted(make_qwen(), TokenScorer(HIDDEN, question_rank=0), num_samples=8)
    held_out = plant(100, wants=0)
    before = found(policy, held_out)
    rewards = learn(policy, [plant(number, wants=0) for number in range(8)], steps=40)
    assert sum(rewards[-10:]) / 10 > sum(rewards[:5]) / 5 + 0.4
    assert found(policy, held_out) > max(0.9, before + 0.3)
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_two_questions_about_an_image_keep_other_tokens():
    model, scorer = make_qwen(), TokenScorer(HIDDEN)
    policy, batches = Planted(model, scorer, num_samples=8), [plant(number) for number in range(8)]
    for batch in batches:
        scorer.question_center.data += embed_text(model, batch).mean(dim=0).detach() / len(batches)
    learn(policy, batches, steps=60)
    assert found(policy, plant(100)) > 0.9
    blind = Planted(model, TokenScorer(HIDDEN, question_rank=0), num_samples=8)
    learn(blind, batches, steps=30)
    assert found(blind, plant(100)) < 0.8
    picture = paint([7, 28], [RED, BLUE])
    for word, place in zip(WORDS, (7, 28), strict=True):
        inputs = ask(f"is there a {word}?", picture)
        assert kept(prune(model, inputs, 1, pruner=scorer)).tolist() == [place]


def test_an_average_question_changes_no_score():
    model, scorer, texts = make_qwen(), learned(), ("what color?", "what is in this image?")
    policy, collator = TokenPolicy(model, scorer), PromptCollator(make_qwen_processor(), [4])
    center_questions(policy, collator, [row(text, "yes") for text in texts])
    inputs = [collator([row(text, "no")]) for text in texts]
    means = torch.stack([embed_text(model, {**each})[0] for each in inputs])
    torch.testing.assert_close(scorer.question_center.detach(), means.mean(dim=0).detach())
    tokens = layer_norm(torch.randn(5, HIDDEN), (HIDDEN,))
    static = TokenScorer(HIDDEN, question_rank=0)
    static.load_state_dict({name: value for name, value in scorer.state_dict().items() if name.startswith("scorer.")})
    torch.testing.assert_close(scorer.score(tokens, scorer.question_center), static.score(tokens, means[0]))


@pytest.fixture
def data(tmp_path):
    rows = []
    for index in range(6):
        make_image(index, (96, 64 if index % 3 else 96)).save(tmp_path / f"{index}.png")
        turns = [("what color?", "red" if index % 2 else "a circle"), ("what is in this image?", "a small circle")]
        rows.append(llava_row(index, f"{index}.png", turns))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    make_qwen().save_pretrained(tmp_path / "base")
    make_qwen_processor().save_pretrained(tmp_path / "base")
    return tmp_path


def command(data, **options) -> list[str]:
    settings = {
        "model_path": data / "base",
        "data_path": data / "data.json",
        "image_folder": data,
        "output_dir": data / "out",
        "image_tokens": [0.1, 5],
        "per_device_train_batch_size": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        **options,
    }
    parts = []
    for name, value in settings.items():
        parts += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return parts


def teach(data, monkeypatch, **options) -> TokenScorer:
    monkeypatch.setattr("sys.argv", ["pruner.py", *command(data, **options)])
    pruner.main()
    return TokenScorer.from_pretrained(data / "out")


def test_the_command_teaches_a_scorer_and_leaves_the_model_as_it_is(data, monkeypatch, capsys):
    logs, before = [], {file.name: file.read_bytes() for file in (data / "base").iterdir()}
    monkeypatch.setattr(pruner.PrunerTrainer, "log", lambda self, values, *rest: logs.append(values.get("reward")))
    scorer = teach(data, monkeypatch, max_steps=30, num_samples=8)
    rewards = torch.tensor([reward for reward in logs if reward is not None])
    assert len(rewards) == 30 and rewards[-10:].mean() > rewards[:10].mean() + 0.05
    assert scorer.config["base_model"] == "base" and scorer.config["question_rank"] == 0
    assert {file.name for file in (data / "out").iterdir()} == {"pruner_config.json", "pruner.safetensors"}
    assert {file.name: file.read_bytes() for file in (data / "base").iterdir()} == before
    assert "by 30 steps of policy gradient on data.json, K of [0.1, 5]" in capsys.readouterr().out
    assert not torch.equal(scorer.scorer[-1].weight, torch.zeros_like(scorer.scorer[-1].weight))


def test_the_command_teaches_the_question_too(data, monkeypatch):
    scorer = teach(data, monkeypatch, question_aware=True, per_device_train_batch_size=2)
    assert scorer.question_center.abs().max() > 0 and scorer.question_projection.weight.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image_tokens": [100]}, r"image_tokens=100: no image of a batch has more, so give fewer, or shares"),
        ({"image_tokens": [0]}, "0 is no budget"),
        ({"image_tokens": [1.5]}, "1.5 is no budget"),
        ({"num_samples": 1}, "take 2 or more"),
        ({"features_dir": "features"}, "leave out features_dir"),
        ({"save_strategy": "steps"}, "leave out save_strategy"),
        ({"gradient_checkpointing": True}, "leave out gradient_checkpointing"),
    ],
)
def test_impossible_arguments_are_refused(data, monkeypatch, options, reason):
    with pytest.raises(ValueError, match=reason):
        teach(data, monkeypatch, **options)
    assert not (data / "out" / "pruner.safetensors").exists()


def test_a_folder_with_files_is_not_written_to(data, monkeypatch):
    with pytest.raises(ValueError, match="base has files already: move them away, or give another --output_dir"):
        teach(data, monkeypatch, output_dir=data / "base")


@pytest.mark.slow
def test_two_processes_teach_one_scorer(data):
    launch("ddp", pruner.__file__, command(data, question_aware=True, per_device_train_batch_size=3))
    assert TokenScorer.from_pretrained(data / "out").question_projection.weight.abs().max() > 0
