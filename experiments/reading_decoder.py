"""Teach a new decoder to write down texts from their patches alone, on features of `reading_encoder.py`, frozen.

    python experiments/reading_decoder.py --encoder FOLDER/encoder.pt --output-dir FOLDER --minutes 40

A lesson is "what is written?", the patches under one to four words of a row in raster order, and the words, spelled by
characters. So few tokens leave the decoder little to search through: it learns to go from patch to patch within
minutes, which it did not from whole pictures. `FOLDER/log.jsonl` has the shares of characters, and of whole words,
that are right in words, fonts and photographs of validation. The same command goes on where the last one ended.
"""

import argparse
import json
import random
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from lightvlm import LightVLM, LightVLMConfig
from lightvlm.data.files import written_beside
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.training.draw_reading import KINDS, draw
from lightvlm.training.init_decoder import END, PAD
from lightvlm.training.prepare_reading import load_sources
from lightvlm.training.reading_sheet import Sources, Text
from reading_encoder import PATCH, SIDE, Crops, Reader, draw_crop, make_optimizers, set_rate
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

QUESTION = "what is written?"
MOST = 40  # patches of a lesson
WORDS = Regex(r" ?(?:top|middle|bottom) (?:left|center|right)| ?[a-z]+| ?\d+| ?[^\s\w]+|\s")


def make_tokenizer(sources: Sources) -> PreTrainedTokenizerFast:
    """Return a tokenizer that has the words of questions whole, and spells all others, which training may not know."""
    rng, seen = random.Random(0), Counter()
    for number in range(1400):
        picture = draw([*KINDS][number % len(KINDS)], rng, sources)
        seen.update({word for each in picture.questions for word in each.question.split()})
    words = {word.strip("?,.") for word, count in seen.items() if count >= 14}
    places = {f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")}
    whole = sorted({*words, *places, "user", "assistant"} - {""})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [END, PAD, *letters, *(start + word.replace(" ", "Ġ") for word in whole for start in ("", "Ġ"))]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(WORDS, behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)


def find_runs(rows: list[tuple[int, Text]], height: int, rng: random.Random) -> list[tuple[str, list[int]]]:
    """Return texts of one to four words of a row that are whole, and the patches (row by row) under them."""
    side, runs = SIDE // PATCH, []
    for top, text in rows:
        if top < -1 or top + height > SIDE + 1:
            continue
        spans, start = [], 0
        for word in text.string.split(" "):
            boxes = text.boxes[start : start + len(word)]
            start += len(word) + 1
            if boxes[0][0] >= -1 and boxes[-1][2] <= SIDE + 1:
                spans.append((word.lower(), max(0, boxes[0][0]) // PATCH, min(SIDE - 1, boxes[-1][2] - 1) // PATCH))
        first, last = max(0, top) // PATCH, min(SIDE - 1, top + height + 1) // PATCH
        while spans:
            count = rng.choice((1, 1, 1, 2, 3, 4))
            run, spans = spans[:count], spans[count:]
            columns = range(run[0][1], run[-1][2] + 1)
            patches = [row * side + column for row in range(first, last + 1) for column in columns]
            if len(patches) <= MOST:
                runs.append((" ".join(word for word, _, _ in run), patches))
    return runs


class Pages(Crops):
    """Endless crops of a split: pixels in bytes, what is written where, and the capitals' height."""

    def __iter__(self):
        rng = random.Random(self.seed)
        while True:
            image, rows, height = draw_crop(self.sources, rng)
            if runs := find_runs(rows, height, rng):
                yield torch.from_numpy(np.array(image)).movedim(-1, 0), runs, height


class Writer(nn.Module):
    """The shipped model with another decoder, which knows the places of patches, and a frozen encoder."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: Path, hidden: int, layers: int):
        super().__init__()
        config = LightVLMConfig.from_pretrained(SHIPPED, dtype="float32", image_token_index=len(tokenizer))
        text = config.text_config
        text.vocab_size = -(-(len(tokenizer) + 1) // 64) * 64
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, 4 * hidden, layers
        text.num_attention_heads = text.num_key_value_heads = hidden // 64
        text.initializer_range, text.dtype = hidden**-0.5, "float32"
        self.tokenizer, self.model = tokenizer, LightVLM(config)
        self.reader = Reader(self.model.model.vision_tower)
        self.reader.load_state_dict(torch.load(encoder)["reader"])
        self.reader.requires_grad_(False)

    def learning(self) -> list[tuple[str, nn.Parameter]]:
        """Return decoder, projector and embeddings of places."""
        parts = ("language_model.", "lm_head.", "multi_modal_projector.", "row_embedding.", "column_embedding.")
        return [(name, each) for name, each in self.model.named_parameters() if any(part in name for part in parts)]

    def forward(self, pixels: Tensor, lessons: list[tuple[int, str, list[int]]], top: int, left: int):
        """Return the loss, whether each character is right, and of which lesson it is.

        Args:
            pixels: (crops, 3, SIDE, SIDE), in bytes.
            lessons: crop, text and patches.
            top, left: the patch of a picture that crops begin at.
        """
        with torch.no_grad():
            features = self.reader(pixels, top, left)
        model, pruner, side = self.model.model, self.model.model.pruner, SIDE // PATCH
        crop = torch.tensor([crop for crop, _, patches in lessons for _ in patches])
        patch = torch.tensor([patch for _, _, patches in lessons for patch in patches])
        images = model.multi_modal_projector(features[crop, patch])
        images = images + pruner.row_embedding(top + patch // side) + pruner.column_embedding(left + patch % side)
        spell, embed = lambda text: torch.tensor(self.tokenizer(text).input_ids), model.get_input_embeddings()
        before, after = embed(spell("USER: ")), embed(spell(f"\n{QUESTION} ASSISTANT:"))
        prompts, labels = [], []
        for (_, text, _), tokens in zip(lessons, images.split([len(each[2]) for each in lessons]), strict=True):
            answer = spell(f" {text}{END}")
            prompts.append(torch.cat((before, tokens, after, embed(answer))))
            labels.append(torch.cat((answer.new_full((len(prompts[-1]) - len(answer),), -100), answer)))
        padded, wanted = pad_sequence(prompts, batch_first=True), pad_sequence(labels, True, -100)
        mask = pad_sequence([torch.ones(len(each), dtype=torch.long) for each in prompts], batch_first=True)
        hidden = model.language_model(inputs_embeds=padded, attention_mask=mask, use_cache=False)[0]
        is_answer = wanted[:, 1:] != -100
        logits, wanted = self.model.lm_head(hidden[:, :-1][is_answer]), wanted[:, 1:][is_answer]
        return cross_entropy(logits, wanted), logits.argmax(dim=-1) == wanted, is_answer.nonzero()[:, 0]


def to_lessons(pages: list[tuple]) -> list[tuple[int, str, list[int]]]:
    return [(crop, *run) for crop, (_, runs, _) in enumerate(pages) for run in runs]


@torch.no_grad()
def test(writer: Writer, pages: list[tuple]) -> dict[str, float]:
    """Return shares of right characters, of right texts, and of those with capitals of 20 px and more."""
    lessons = to_lessons(pages)
    _, is_right, lesson = writer(torch.stack([page[0] for page in pages]), lessons, 6, 6)
    texts = torch.ones(len(lessons)).scatter_reduce(0, lesson, is_right.float(), "amin")
    is_large = torch.tensor([pages[crop][2] >= 20 for crop, _, _ in lessons])
    return {
        "characters": is_right.float().mean().item(),
        "texts": texts.mean().item(),
        "large texts": texts[is_large].mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/reading"), help="with fonts and words")
    parser.add_argument("--wallpapers", type=Path, default=Path("data/wallpapers"))
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--crops", type=int, default=12, help="in each step")
    parser.add_argument("--lessons", type=int, default=96, help="the most of a step")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file, step = args.output_dir / "decoder.pt", 0

    torch.manual_seed(0)
    sources = load_sources("train", args.data_dir, args.wallpapers)
    writer = Writer(make_tokenizer(sources), args.encoder, args.hidden_size, args.num_layers)
    if file.exists():
        state = torch.load(file)
        writer.model.load_state_dict(state["learned"], strict=False)
        step = state["step"]
    learning = writer.learning()
    optimizers = make_optimizers(learning)
    examples = list(islice(Pages(load_sources("validation", args.data_dir, args.wallpapers), "validation"), 48))
    batches = DataLoader(Pages(sources, f"train-{step}"), args.crops, num_workers=1, collate_fn=list)
    began, rng, seen = time.monotonic(), random.Random(step), []
    for pages in batches:
        if (share := (time.monotonic() - began) / 60 / args.minutes) >= 1:
            break
        rate = args.learning_rate * min(1, (step + 1) / 50) * max(0.02, 1 - share)
        set_rate(optimizers, rate)
        lessons, free = to_lessons(pages), 24 - SIDE // PATCH
        lessons = rng.sample(lessons, min(len(lessons), args.lessons))
        pixels = torch.stack([page[0] for page in pages])
        loss, is_right, _ = writer(pixels, lessons, rng.randint(0, free), rng.randint(0, free))
        writer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([each for _, each in learning], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen.append((loss.item(), is_right.float().mean().item()))
        step += 1
        if step % 25 == 0:
            line = {"step": step, "minutes": (time.monotonic() - began) / 60}
            line |= dict(zip(("loss", "right"), np.mean(seen, axis=0).tolist(), strict=True))
            seen = []
            if step % 100 == 0:
                line["validation"] = test(writer, examples)
                save(file, writer, step)
            with (args.output_dir / "log.jsonl").open("a") as log:
                print(json.dumps(line), file=log)
    save(file, writer, step)
    print(test(writer, examples))


def save(file: Path, writer: Writer, step: int) -> None:
    with written_beside(file) as path:
        torch.save({"learned": {name: each.detach() for name, each in writer.learning()}, "step": step}, path)


if __name__ == "__main__":
    main()
