"""With a dynamic budget every way of generating has the tokens of the same numbers asked for."""

import copy

import pytest
import torch
from tiny import IMAGES, TEXT, both, generate, make_dynamic, make_image, make_processor, mixed_batch
from transformers import GenerationConfig


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
    ],
    ids=["greedy", "without-cache", "beams", "all-beams", "samples", "static-cache", "chunked-prefill"],
)
def test_every_way_of_generating_equals_the_same_numbers_asked_for(dynamic, options):
    model, processor = dynamic
    batch, static = both(model, processor)
    output, prompt = generate(model, batch, **options), batch["input_ids"]
    copies = options.get("num_return_sequences", 1)
    assert torch.equal(output[:, : prompt.shape[1]], prompt.repeat_interleave(copies, dim=0))
    assert torch.equal(output[:, prompt.shape[1] :], generate(model, static, **options)[:, -8:])


def test_each_row_generates_as_it_does_alone(dynamic):
    model, processor = dynamic
    together = generate(model, mixed_batch(processor, "dynamic:8"))[:, -8:]
    for index, (text, images) in enumerate(zip(TEXT, IMAGES, strict=True)):
        options = {"images": [images], "num_image_tokens": "dynamic:8"} if images else {}
        assert torch.equal(
            generate(model, processor(text=[text], return_tensors="pt", **options))[0, -8:], together[index]
        )


def test_without_a_mask_padding_is_inferred_as_for_a_static_budget(dynamic):
    model, processor = dynamic
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    for budget in (9, "dynamic:8"):
        batch = mixed_batch(processor, budget)
        expected = generate(model, batch)
        del batch["attention_mask"]
        assert torch.equal(generate(model, batch), expected)


def test_generate_takes_the_positional_arguments_of_transformers(dynamic):
    model, processor = dynamic
    for budget in (9, "dynamic:8"):
        batch = mixed_batch(processor, budget)
        config = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        ids = batch.pop("input_ids")
        forbid = [lambda ids, scores: scores.index_fill(1, torch.tensor([5, 6]), -torch.inf)]
        assert torch.equal(
            model.generate(ids, config, forbid, None, **batch),
            model.generate(input_ids=ids, generation_config=config, logits_processor=forbid, **batch),
        )


def test_prompt_lookup_and_an_assistant_model_change_no_token(dynamic):
    model, processor = dynamic
    inputs = processor(
        images=make_image(), text="<image> what color?", num_image_tokens="dynamic:8", return_tensors="pt"
    )
    greedy = generate(model, inputs)
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(generate(model, inputs, assistant_model=copy.deepcopy(model)), greedy)


@pytest.mark.parametrize("as_config", [False, True], ids=["arguments", "generation-config"])
def test_lengths_count_the_prompt_as_it_was_given(dynamic, as_config):
    model, processor = dynamic
    batch = mixed_batch(processor, "dynamic:8")
    prompt = batch["input_ids"].shape[1]

    def new_tokens(**lengths):
        options = {"generation_config": GenerationConfig(**lengths)} if as_config else lengths
        return model.generate(**batch, **options).shape[1] - prompt

    assert new_tokens(max_length=prompt + 5, min_length=prompt + 5) == 5
    assert new_tokens(max_new_tokens=3, min_new_tokens=3) == 3
    model.lm_head.weight.data.zero_()  # so that, were it allowed, the answer would end at once
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    model.lm_head.bias.data[model.generation_config.eos_token_id] = 9
    assert new_tokens(max_length=prompt + 5) == 1
    assert new_tokens(max_length=prompt + 5, min_length=prompt + 3) == 4


def test_scores_come_with_the_sequences(dynamic):
    model, processor = dynamic
    batch, static = both(model, processor)
    options = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 2}
    ours, expected = generate(model, batch, **options), generate(model, static, **options)
    torch.testing.assert_close(ours.scores, expected.scores)
    torch.testing.assert_close(ours.sequences_scores, expected.sequences_scores)
    scores = model.compute_transition_scores(ours.sequences, ours.scores, ours.beam_indices)
    assert scores.shape == (3, 8) and scores.isfinite().all()


def test_streaming_hands_over_every_new_token(dynamic):
    model, processor = dynamic

    class Collector:
        chunks, ended = [], False

        def put(self, tokens):
            self.chunks = [*self.chunks, tokens]

        def end(self):
            self.ended = True

    inputs = processor(images=make_image(), text="<image> what?", num_image_tokens="dynamic:8", return_tensors="pt")
    streamer = Collector()
    output = generate(model, inputs, streamer=streamer)
    assert streamer.ended
    assert torch.cat([tokens.flatten() for tokens in streamer.chunks[1:]]).tolist() == output[0, -8:].tolist()


@pytest.mark.parametrize("option", [{"use_cache": True}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize("budget", [6, "dynamic:8"])
def test_an_image_mark_is_never_generated(option, budget):
    model, processor = make_dynamic(text="llama"), make_processor()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    model.lm_head.bias.data[model.config.image_token_id] = 1e4
    inputs = processor(images=make_image(), text="a a <image> a a", num_image_tokens=budget, return_tensors="pt")
    output = generate(model, inputs, suppress_tokens=[5], **option)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert len(new) == 8 and not {model.config.image_token_id, 5} & {*new.tolist()}
