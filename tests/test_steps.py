"""K is drawn for each step, whose rows, batches and processes share it."""

import itertools
import json
import math
from functools import partial

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from datasets import concatenate_datasets
from lightvlm.data.llava import load_llava
from lightvlm.training import sft
from lightvlm.training.collator import StepRows, StepSampler, StepStream, group_rows, measure_rows
from lightvlm.training.prepare_easy_vqa import llava_row
from sft_run import TOLERANCE, arguments, collator, curve, train
from tiny import NUM_PATCHES
from torch.utils.data import BatchSampler, DataLoader


def budgets(count, **options):
    """Return so many draws of K."""
    generator = torch.Generator().manual_seed(0)
    return [sft.draw_budget(arguments(**options), generator) for _ in range(count)]


def test_k_is_drawn_over_the_whole_range():
    drawn = budgets(200)
    assert min(drawn) < 6 and max(drawn) > 24 and 4 <= min(drawn) <= max(drawn) <= NUM_PATCHES
    assert set(budgets(5, full_share=1.0)) == {NUM_PATCHES}
    assert set(budgets(20, max_image_tokens=5)) == {4, 5}


def test_shares_of_the_draws_are_the_largest_and_the_smallest_k():
    drawn = budgets(2000, full_share=0.15, min_share=0.25, log_uniform_max=10)
    assert 0.12 < drawn.count(NUM_PATCHES) / 2000 < 0.18
    assert 0.23 < drawn.count(4) / 2000 < 0.40  # some of the log-uniform draws are 4 as well
    assert max(budget for budget in drawn if budget < NUM_PATCHES) == 10


def test_rows_of_a_step_share_k_and_each_epoch_has_its_own_order_and_draws():
    draw = partial(sft.draw_budget, arguments())
    first, again, second = ([*StepSampler(12, 4, draw, 0, lambda epoch=epoch: epoch)] for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(number for number, _ in first) == sorted(number for number, _ in second) == [*range(12)]
    assert all(len({budget for _, budget in first[start : start + 4]}) == 1 for start in (0, 4, 8))
    assert len({budget for _, budget in first + second}) > 2


@pytest.mark.parametrize("num_rows", [12, 13, 15, 19, 3])
def test_processes_share_k_in_the_last_step_too(num_rows):
    sampler = StepSampler(num_rows, 8, partial(sft.draw_budget, arguments()), 0, lambda: 0, multiple=4)
    first, second = (
        [*BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), num_processes=2, process_index=index)]
        for index in range(2)
    )
    assert len(first) == len(second) == math.ceil(num_rows / 4)
    rows = [pair for batches in zip(first, second, strict=True) for batch in batches for pair in batch]
    assert rows == [*sampler] and {number for number, _ in rows} == {*range(num_rows)}
    assert all(len({budget for _, budget in rows[start : start + 8]}) == 1 for start in range(0, len(rows), 8))


@pytest.fixture
def mixed_rows(data):
    """Return rows of a few to many words, most with an image and some with text alone."""
    rows = []
    for index in range(131):
        question = " ".join(["what", "color", "is", "the", "shape"][: 1 + index % 5] * (1 + index % 7))
        rows.append(llava_row(index, f"{index % 8}.png", [(question, "yes" if index % 2 else "circle é")]))
        if index % 3 == 0:
            del rows[-1]["image"]
            rows[-1]["conversations"][0]["value"] = question
    (data / "mixed.json").write_text(json.dumps(rows))
    return load_llava(data / "mixed.json", data)


def test_rows_are_measured_without_being_decoded(mixed_rows):
    lengths, images = measure_rows(mixed_rows)
    assert lengths.tolist() == [sum(len(turn["content"]) for turn in row) for row in mixed_rows["messages"]]
    assert images.tolist() == [0 if index % 3 == 0 else 1 for index in range(131)]
    chosen = mixed_rows.select(range(50, 90, 3))
    assert measure_rows(chosen)[0].tolist() == lengths[range(50, 90, 3)].tolist()


def share_of_padding(rows, sampler):
    """Return the padding among the positions that training computes on, batches of four, two of them in a step."""
    batches = DataLoader(StepRows(rows), batch_sampler=BatchSampler(sampler, 4, False), collate_fn=collator())
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def test_rows_grouped_by_length_need_a_fraction_of_the_padding(mixed_rows):
    lengths, images = measure_rows(mixed_rows)
    group = partial(group_rows, lengths=lengths, images=images, rows_per_step=8)
    apart, grouped = (StepSampler(131, 8, lambda _: 9, 0, lambda: 0, group=each) for each in (None, group))
    assert sorted(grouped) == sorted(apart)
    assert [*grouped] == [*grouped]
    before, after = (share_of_padding(mixed_rows, sampler) for sampler in (apart, grouped))
    assert before > 0.3 and after < 0.6 * before


def test_all_rows_of_a_grouped_step_have_images_or_none_has(mixed_rows):
    lengths, images = measure_rows(mixed_rows)
    group = partial(group_rows, lengths=lengths, images=images, rows_per_step=8)
    sampler = StepSampler(131, 8, partial(sft.draw_budget, arguments()), 0, lambda: 0, multiple=8, group=group)
    steps = [[*sampler][start : start + 8] for start in range(0, len(sampler), 8)]
    with_images = [sum(images[number] for number, _ in step) for step in steps[:15]]  # 87 and 44 rows fill 10 and 5
    assert sorted(with_images) == [0] * 5 + [8] * 10
    assert with_images != sorted(with_images)
    assert all(len({budget for _, budget in step}) == 1 for step in steps)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_stream_of_two_files_has_the_same_batches_whatever_reads_it(data, num_workers):
    rows = json.loads((data / "data.json").read_text())
    for name, some in (("first", rows[:4]), ("second", rows[4:])):
        (data / f"{name}.json").write_text(json.dumps(some))
    streams = [load_llava(data / f"{name}.json", data, streaming=True) for name in ("first", "second")]
    draw = partial(sft.draw_budget, arguments())
    stream = StepStream(concatenate_datasets(streams), rows_per_step=8, rows_per_batch=4, draw=draw, seed=0)
    seen = []
    for process in (0, 1):  # of two, as accelerate makes it of a stream
        shard = IterableDatasetShard(stream, batch_size=2, num_processes=2, process_index=process)
        loader = DataLoader(shard, batch_size=2, num_workers=num_workers, collate_fn=list)
        seen.append([*itertools.islice(loader, 10)])
    steps = [
        [row for batches in seen for batch in batches[step : step + 2] for row in batch] for step in range(0, 10, 2)
    ]
    drawn = [{row["num_image_tokens"] for row in step} for step in steps]
    assert all(len(budgets) == 1 for budgets in drawn) and len(set.union(*drawn)) > 2
    numbers = [row["id"] for both in zip(*seen, strict=True) for batch in both for row in batch]
    expected = [row["id"] for row in load_llava(data / "data.json", data)]
    assert numbers == (expected * 5)[: len(numbers)]
    assert all(image.size == (84, 84) for step in steps for row in step for image in row["images"])


def test_k_changes_between_steps_of_a_stream_and_never_within_one(data, monkeypatch, logs):
    rows = json.loads((data / "data.json").read_text())
    (data / "more.json").write_text(json.dumps(rows[1:5]))
    options = {"streaming": True, "data_path": [data / "data.json", data / "more.json"], "max_length": 2048}
    options |= {"max_steps": 5, "min_image_tokens": 4, "per_device_train_batch_size": 2}
    options |= {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": True}
    runs = []
    for num_workers in (0, 2):
        train(data, monkeypatch, **options, dataloader_num_workers=num_workers)
        runs.append(curve(logs))
        logs.clear()
    kept = [kept for _, _, kept in runs[0]]
    assert len(kept) == 5 and len({*kept}) > 2 and all(each == int(each) for each in kept)
    torch.testing.assert_close(*map(torch.tensor, runs), **TOLERANCE)
