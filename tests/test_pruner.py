"""Policy gradient teaches the scorer what the language model needs, and touches nothing else."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import launch
from lightvlm import LightVLM, LightVLMConfig, LightVLMProcessor
from lightvlm.data.turns import mask_blocks, pack_turns
from lightvlm.pruning_lightvlm import LightVLMImageFeatures
from lightvlm.training import pruner
from lightvlm.training.prepare_easy_vqa import llava_row
from lightvlm.views_lightvlm import one_view
from PIL import Image
from saved import lose_weights
from tiny import GRIDS, NUM_PATCHES, make_image, make_model, make_processor
from trl import TrlParser

CPU = torch.device("cpu")
LAYOUT = one_view(6, 1, CPU)


def test_probabilities_of_all_orders_sum_to_one():
    scores = torch.randn(2, 4)
    orders = torch.tensor(list(itertools.permutations(range(4))))[:, None].expand(-1, 2, -1)
    whole = pruner.order_log_probability(scores, orders, 4).exp()
    torch.testing.assert_close(whole.sum(dim=0), torch.ones(2))
    firsts = orders[:, 0, 0]
    first = torch.stack([whole[firsts == patch].sum(dim=0) for patch in range(4)], dim=-1)
    torch.testing.assert_close(first, scores.softmax(dim=-1))
    alone = pruner.order_log_probability(scores, orders, 1).exp()
    torch.testing.assert_close(alone, scores.softmax(dim=-1).T[firsts])


def test_orders_are_drawn_as_often_as_their_probability_says():
    scores = torch.tensor([[2.0, 0.0, -1.0, 1.0]])
    orders = pruner.sample_orders(scores, 20_000)
    assert (orders.sort(dim=-1).values == torch.arange(4)).all()
    share = torch.bincount(orders[:, 0, 0], minlength=4) / len(orders)
    torch.testing.assert_close(share, scores.softmax(dim=-1)[0], atol=0.015, rtol=0)


def test_the_baseline_of_a_sample_is_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])
    expected = torch.tensor([[1.0 - 4.0, -1.5], [2.0 - 3.5, -1.5], [6.0 - 1.5, 3.0]])
    torch.testing.assert_close(pruner.leave_one_out(rewards), expected)


class Planted(pruner.PolicyGradient):
    """Pays for keeping the one patch whose features carry a mark."""

    def reward(self, features, kept, inputs, layout):
        wanted = features[..., 0].argmax(dim=-1)
        return (kept == wanted[:, None]).any(dim=-1).float()


def learn(objective, batches, steps=150):
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        loss = objective(**batches())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def marked(batch: int = 32) -> dict:
    features = torch.randn(batch, NUM_PATCHES, 32)
    features[torch.arange(batch), torch.randint(NUM_PATCHES, (batch,)), 0] += 8
    prior, sizes = torch.full((batch, NUM_PATCHES), 1 / NUM_PATCHES), torch.full((batch, 2), 84)
    return {"features": features, "prior": prior, "sizes": sizes, "num_image_tokens": 2}


def test_one_informative_patch_per_image_is_found_with_near_certainty():
    objective = Planted(make_model())
    learn(objective, marked)
    batch = marked(500)
    scores = objective.model.model.pruner.score(batch["features"], batch["prior"], None, LAYOUT)
    assert (scores.argmax(dim=-1) == batch["features"][..., 0].argmax(dim=-1)).float().mean() > 0.98


class Asked(pruner.PolicyGradient):
    """Pays for keeping a patch that carries the mark of the question, one of two."""

    def reward(self, features, kept, inputs, layout):
        wanted = features[torch.arange(len(features)), :, inputs["mark"]].argmax(dim=-1)
        return (kept == wanted[:, None]).any(dim=-1).float()


def asked(batch: int = 32) -> dict:
    """Return two marked patches in each image, of which the question, one of two words, wants one."""
    inputs, mark = marked(batch), torch.randint(2, (batch,))
    places = torch.stack([torch.randperm(NUM_PATCHES)[:2] for _ in range(batch)])
    inputs["features"] = torch.randn(batch, NUM_PATCHES, 32)
    for kind in (0, 1):
        inputs["features"][torch.arange(batch), places[:, kind], kind] += 8
    return {**inputs, "num_image_tokens": 1, "mark": mark, "question_ids": torch.stack([mark + 7, mark * 0 - 1], 1)}


def test_the_question_points_at_its_patch_and_leaves_the_static_score_as_it_is():
    model = make_model(score="question")
    objective = Asked(model, question_aware=True)
    batch = asked(500)
    before = model.model.pruner.score(batch["features"], batch["prior"], None, LAYOUT)
    learn(objective, asked, steps=300)
    torch.testing.assert_close(model.model.pruner.score(batch["features"], batch["prior"], None, LAYOUT), before)
    questions = model.model.embed_questions(batch["question_ids"])
    scores = model.model.pruner.score(batch["features"], batch["prior"], questions, LAYOUT)
    wanted = batch["features"][torch.arange(500), :, batch["mark"]].argmax(dim=-1)
    assert (scores.argmax(dim=-1) == wanted).float().mean() > 0.95


@pytest.fixture
def data(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "no"}]}]
    for index in range(6):
        make_image(index).save(tmp_path / f"{index}.png")
        turns = [("what color?", "red" if index % 2 else "blue"), ("what shape?", "circle")]
        rows.append(llava_row(index, f"{index}.png", turns))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    make_model(num_image_tokens=9).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    return tmp_path


def settings(data, **options):
    return {
        "model_path": data / "model",
        "data_path": data / "data.json",
        "image_folder": data,
        "output_dir": data / "out",
        "features_dir": data / "features",
        "image_tokens": 4,
        "per_device_train_batch_size": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        **options,
    }


def train(data, monkeypatch, **options):
    command = [part for name, value in settings(data, **options).items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["pruner.py", *command])
    pruner.main()
    return LightVLM.from_pretrained(data / "out")


def changed_parts(data, model):
    before = LightVLM.from_pretrained(data / "model", score=model.config.score).state_dict()
    return {name for name, weight in model.state_dict().items() if not torch.equal(before[name], weight)}


def test_the_reward_rises_and_nothing_but_the_score_changes(data, monkeypatch):
    logs = []
    monkeypatch.setattr(pruner.PrunerTrainer, "log", lambda self, values, *rest: logs.append(values.get("reward")))
    model = train(data, monkeypatch, max_steps=120, num_samples=8)
    rewards = torch.tensor([reward for reward in logs if reward is not None])
    assert rewards[-20:].mean() > rewards[:20].mean() + 0.1
    changed = changed_parts(data, model)
    assert changed and all(".scorer." in name or "_score." in name for name in changed)
    assert LightVLMProcessor.from_pretrained(data / "out").num_image_tokens == 9
    assert {file.name for file in (data / "out").iterdir()} == {file.name for file in (data / "model").iterdir()}


def test_the_reward_is_logged_once_for_each_step_as_the_mean_over_its_batches(data, monkeypatch):
    logs, rewards, forward = [], [], pruner.PolicyGradient.forward

    def log(self, values, *rest):
        if "reward" in values:
            logs.append((self.state.global_step, values["reward"]))

    def spy(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        rewards.append(outputs["reward"])
        return outputs

    monkeypatch.setattr(pruner.PrunerTrainer, "log", log)
    monkeypatch.setattr(pruner.PolicyGradient, "forward", spy)
    train(
        data, monkeypatch, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=4, logging_steps=2
    )
    means = torch.stack(rewards).unflatten(0, (4, 3)).mean(dim=1)
    assert logs == [(1, pytest.approx(means[1].item())), (3, pytest.approx(means[3].item()))]


def test_what_all_questions_have_in_common_is_left_out_of_the_question():
    model, processor = make_model(score="question"), make_processor()
    texts = ("what color?", "what is in this image?")
    examples = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    pruner.center_questions(model, processor, examples)
    ids = torch.tensor(processor.encode_questions(list(texts), 2))
    center = model.model.pruner.question_center.weight
    torch.testing.assert_close(model.model.embed_questions(ids).mean(dim=0, keepdim=True), center)

    torch.nn.init.normal_(model.model.pruner.question_projection.weight)
    features, prior = torch.randn(1, NUM_PATCHES, 32), torch.rand(1, NUM_PATCHES)
    static = model.model.pruner.score(features, prior, None, LAYOUT)
    average = model.model.pruner.score(features, prior, center, LAYOUT)
    torch.testing.assert_close(average, static)


def test_a_question_aware_checkpoint_is_made_of_a_static_one(data, monkeypatch):
    (data / "model" / "README.md").write_text("# A card\n\n- steps: 7\n")
    model = train(data, monkeypatch, question_aware=True)
    assert model.config.score == "question"
    changed = changed_parts(data, model)
    learned = {"patch_projection", "row_key", "column_key", "question_projection", "question_center"}
    assert {name.split(".")[2] for name in changed} == learned
    card = (data / "out" / "README.md").read_text()
    assert card.startswith("# A card\n\n- steps: 7\n- pruner: the question's term of the score, by 2 steps")


def test_a_scorer_without_positions_learns_too(data, monkeypatch):
    make_model(score="mlp").save_pretrained(data / "model")
    changed = changed_parts(data, train(data, monkeypatch))
    assert changed and all(".scorer." in name for name in changed)


def test_the_reward_is_the_mean_log_probability_of_the_answers_with_the_kept_tokens():
    model, processor = make_model(), make_processor()
    objective = pruner.PolicyGradient(model, num_samples=2).train()
    assert not model.training
    features, kept = torch.randn(2, NUM_PATCHES, 32), torch.tensor([[[1, 5], [0, 7]], [[2, 30], [3, 4]]])
    ask, say = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}
    conversations = [[ask, say], [ask, {**say, "content": "a circle"}, {**ask, "content": "no?"}, say]]
    rewards = objective.reward(features, kept, pack_turns(conversations, processor, 2), one_view(6, 2, CPU))
    for sample, image in itertools.product(range(2), range(2)):
        chosen = kept[sample, image]
        tokens = model.model.multi_modal_projector(features[image, chosen])
        tokens = model.model.pruner.add_places(tokens, LAYOUT.at(chosen))
        inputs = mask_blocks(pack_turns(conversations[image : image + 1], processor, 2))
        labels = inputs.pop("labels")[0, 1:]
        images = {"image": LightVLMImageFeatures(pooler_output=[tokens])}
        found = model(**inputs, mm_encoder_outputs=images).logits[0, :-1].log_softmax(dim=-1)
        found = found[labels >= 0].gather(-1, labels[labels >= 0][:, None])
        torch.testing.assert_close(rewards[sample, image], found.clamp_min(-6).mean())


def test_the_scores_of_tiles_learn_from_images_of_many_views(data, monkeypatch):
    for index in range(0, 6, 2):
        Image.open(data / f"{index}.png").resize((250, 90 + 40 * index)).save(data / f"{index}.png")
    make_model(num_image_tokens=9, image_grid_pinpoints=GRIDS).save_pretrained(data / "model")
    make_processor(pinpoints=GRIDS).save_pretrained(data / "model")
    changed = changed_parts(data, train(data, monkeypatch, max_steps=10))
    assert "model.pruner.tile_score.weight" in changed
    assert all(".scorer." in name or "_score." in name for name in changed)


@pytest.mark.parametrize("position_ids", ["consecutive", "original"])
@torch.no_grad()
def test_the_reward_is_that_of_the_models_own_position_ids(position_ids):
    model, processor = make_model(position_ids=position_ids, text="llama"), make_processor()
    ask, say = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}
    inputs = processor(images=make_image(), num_image_tokens=5, return_tensors="pt")
    encoded = model.get_image_features(**inputs)
    packed = pack_turns([[ask, say]], processor, 5)
    kept = torch.stack(encoded.kept_indices)[None]
    (found,) = pruner.PolicyGradient(model).reward(encoded.last_hidden_state, kept, {**packed}, LAYOUT)
    # One question is a row like any other: the model counts its positions.
    logits, labels = model(input_ids=packed["input_ids"], **inputs).logits[0, :-1], packed["labels"][0, 1:]
    chosen = logits.log_softmax(dim=-1)[labels >= 0].gather(-1, labels[labels >= 0][:, None])
    torch.testing.assert_close(found[0], chosen.clamp_min(-6).mean())


@torch.no_grad()
def test_the_reward_of_many_views_is_that_of_the_model_with_these_tokens():
    model, processor = make_model(image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS)
    torch.nn.init.normal_(model.model.pruner.tile_embedding.weight)
    ask, say = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}
    inputs = processor(images=[make_image(0, (250, 240)), make_image(1)], num_image_tokens=20, return_tensors="pt")
    encoded = model.get_image_features(**inputs)
    layout = model.model.lay_out(inputs["pixel_values"], inputs["image_sizes"])
    packed = mask_blocks(pack_turns([[ask, say]] * 2, processor, 20))
    kept = torch.stack(encoded.kept_indices)[None]
    (found,) = pruner.PolicyGradient(model).reward(encoded.last_hidden_state, kept, {**packed}, layout)
    labels = packed.pop("labels")[:, 1:]
    logits = model(**packed, mm_encoder_outputs={"image": encoded}).logits[:, :-1].log_softmax(dim=-1)
    chosen = logits.gather(-1, labels.clamp_min(0)[..., None])[..., 0].clamp_min(-6) * (labels >= 0)
    torch.testing.assert_close(found, chosen.sum(dim=1) / (labels >= 0).sum(dim=1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image_tokens": NUM_PATCHES}, "from 1 to 35"),
        ({"image_tokens": 0}, "image_tokens"),
        ({"image_tokens": 0.5}, "from 1 to 35"),
        ({"num_samples": 1}, "take 2 or more"),
        ({"save_strategy": "steps"}, "leave out save_strategy: .* its end alone is saved"),
        ({"resume_from_checkpoint": True}, "leave out resume_from_checkpoint: .* its end alone is saved"),
        ({"push_to_hub": True, "save_steps": 7}, "leave out save_steps, push_to_hub"),
        ({"eval_strategy": "steps"}, "leave out eval_strategy.*: nothing is evaluated"),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "leave out .*load_best_model_at_end"),
        ({"label_smoothing_factor": 0.1}, "leave out label_smoothing_factor: .* the loss is its own"),
        ({"gradient_checkpointing": True}, "leave out gradient_checkpointing"),
        ({"neftune_noise_alpha": 5}, "leave out neftune_noise_alpha"),
        ({"train_sampling_strategy": "group_by_length"}, "leave out train_sampling_strategy"),
    ],
)
def test_impossible_arguments_are_refused(data, monkeypatch, options, reason):
    with pytest.raises(ValueError, match=reason):
        train(data, monkeypatch, **options)


def test_the_defaults_run_on_a_checkpoint_of_few_patches(data, monkeypatch):
    options = {name: data / path for name, path in (("model_path", "model"), ("data_path", "data.json"))}
    options |= {"image_folder": data, "output_dir": data / "out"}
    monkeypatch.setattr("sys.argv", ["pruner.py", *(f"--{name}={value}" for name, value in options.items())])
    pruner.main()
    assert changed_parts(data, LightVLM.from_pretrained(data / "out"))


def test_a_run_that_is_killed_while_it_writes_leaves_the_checkpoint_before(data, monkeypatch):
    train(data, monkeypatch)
    before = {file.name: file.read_bytes() for file in (data / "out").iterdir()}

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LightVLMProcessor, "save_pretrained", kill)
    with pytest.raises(KeyboardInterrupt):
        train(data, monkeypatch, max_steps=5)
    assert {file.name: file.read_bytes() for file in (data / "out").iterdir()} == before


def test_a_refusal_is_a_sentence_on_standard_error(data):
    command = [sys.executable, pruner.__file__]
    command += [f"--{name}={value}" for name, value in settings(data, save_strategy="epoch").items()]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith("pruner.py: leave out save_strategy")


def test_rows_without_an_image_are_no_lesson(data, monkeypatch):
    rows = json.loads((data / "data.json").read_text())
    (data / "data.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(ValueError, match="has one image"):
        train(data, monkeypatch)


@pytest.mark.parametrize("name", ["tiny_pruner", "tiny_views_pruner", "phi2_pruner"])
def test_every_recipe_is_possible(name):
    path = Path(pruner.__file__).parent / "configs" / f"{name}.yaml"
    required = ["--model_path=model", "--data_path=data.json", "--image_folder=.", "--output_dir=out"]
    parser = TrlParser((pruner.PrunerArguments, pruner.PrunerTrainingArguments))
    args, training_args = parser.parse_args_and_config(["--config", str(path), "--use_cpu", "true", *required])
    pruner.check(args, training_args, LightVLMConfig())


@pytest.mark.slow
def test_two_processes_teach_one_scorer(data):
    options = settings(data, max_steps=3, per_device_train_batch_size=3)
    launch("ddp", Path(pruner.__file__), [part for name, value in options.items() for part in (f"--{name}", value)])
    changed = changed_parts(data, LightVLM.from_pretrained(data / "out"))
    assert changed and all(".scorer." in name or "_score." in name for name in changed)


def test_a_checkpoint_that_lacks_weights_is_not_trained(data, monkeypatch):
    lose_weights(data / "model", "lm_head.weight")
    with pytest.raises(ValueError, match="1 missing .lm_head.weight"):
        train(data, monkeypatch)
