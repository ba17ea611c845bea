"""Teach a new decoder to spell, then to answer, on features of `reading_encoder.py`, frozen.

    python experiments/reading_decoder.py --encoder FOLDER/encoder.pt --output-dir FOLDER --minutes 40
    python experiments/reading_decoder.py --encoder FOLDER/encoder.pt --output-dir FOLDER --minutes 90 --pictures 8

A lesson is "what is written?", the patches under one to four words of a row in raster order, and the words, spelled by
characters. So few tokens leave the decoder little to search through: it learns to go from patch to patch within
minutes, which it did not from whole pictures. With `--pictures`, lessons on pictures of the benchmark's kinds come to
each step: a question, the patches under what answers it and under some or all of the other texts, and others anywhere.
`FOLDER/log.jsonl` has the shares of characters, and of whole answers, that are right in words, fonts and photographs
of validation. The same command goes on where the last one ended, with another encoder too.
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
from lightvlm.training.draw_reading import KINDS, ask, draw
from lightvlm.training.init_decoder import END, PAD
from lightvlm.training.prepare_reading import load_sources
from lightvlm.training.reading_sheet import Picture, Question, Sources, Text
from reading_encoder import PATCH, SIDE, Crops, Reader, draw_crop, make_optimizers, set_rate
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

QUESTION = "what is written?"
MOST = 40  # patches of a lesson on a crop
MOST_OF_PICTURE = 200
VIEW = 336  # pixels of a picture
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


def find_runs(rows: list[tuple[int, Text]], height: int, rng: random.Random) -> list[tuple[str, str, list[int]]]:
    """Return lessons: texts of one to four words of a row that are whole, and the patches (row by row) under them."""
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
                runs.append((QUESTION, " ".join(word for word, _, _ in run), patches))
    return runs


class Pages(Crops):
    """Endless crops of a split: pixels in bytes, lessons, and the capitals' height."""

    def __iter__(self):
        rng = random.Random(self.seed)
        while True:
            image, rows, height = draw_crop(self.sources, rng)
            if runs := find_runs(rows, height, rng):
                yield torch.from_numpy(np.array(image)).movedim(-1, 0), runs, height


def is_needed(text: Text, question: Question) -> bool:
    """Return whether a text may be needed to answer: it is the answer, or asked about, or all are."""
    if question.asks in ("existence", "count", "order"):
        return True
    words = question.question.strip("?").split()
    return question.answer in text.string or any(word.strip(":") in words for word in text.string.lower().split())


def choose_patches(picture: Picture, question: Question, distraction: float, rng: random.Random) -> list[int]:
    """Return patches under texts that are needed and this share of the others, and up to 100 others anywhere."""
    side, kept = VIEW // PATCH, set()
    for text in picture.texts:
        if is_needed(text, question) or rng.random() < distraction:
            left, top, right, bottom = text.bounds()
            columns = range(max(0, left) // PATCH, min(VIEW - 1, right - 1) // PATCH + 1)
            kept |= {
                row * side + column
                for row in range(max(0, top) // PATCH, min(VIEW - 1, bottom) // PATCH + 1)
                for column in columns
            }
    others = rng.sample(range(side * side), rng.randint(0, 100))
    return sorted(kept | {*others[: max(0, MOST_OF_PICTURE - len(kept))]})


class Pictures(IterableDataset):
    """Endless pictures of the benchmark's kinds: pixels in bytes, lessons, and the capitals' height.

    Args:
        sources: of a split.
        seed: decides.
        distraction: the share of other texts that are shown, by default any.
    """

    def __init__(self, sources: Sources, seed: str, distraction: float | None = None):
        self.sources, self.seed, self.distraction = sources, seed, distraction

    def __iter__(self):
        rng = random.Random(self.seed)
        while True:
            picture, lessons = draw(rng.choice([*KINDS]), rng, self.sources), []
            for question in ask(picture, 4, rng):
                share = rng.random() if self.distraction is None else self.distraction
                patches = choose_patches(picture, question, share, rng)
                lessons.append((question.question, question.answer.lower(), patches))
            lessons = [lesson for lesson in lessons if len(lesson[2]) <= MOST_OF_PICTURE]
            if lessons:
                yield torch.from_numpy(np.array(picture.image)).movedim(-1, 0), lessons, picture.glyph_height


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

    def forward(self, pixels: Tensor, lessons: list[tuple[int, str, str, list[int]]], top: int, left: int):
        """Return the loss, whether each character is right, and of which lesson it is.

        Args:
            pixels: (pictures, 3, side, side), in bytes.
            lessons: number of the picture, question, answer and patches.
            top, left: the patch of a whole picture that these begin at.
        """
        with torch.no_grad():
            features = self.reader(pixels, top, left)
        model, pruner, side = self.model.model, self.model.model.pruner, pixels.shape[-1] // PATCH
        crop = torch.tensor([crop for crop, *_, patches in lessons for _ in patches])
        patch = torch.tensor([patch for *_, patches in lessons for patch in patches])
        images = model.multi_modal_projector(features[crop, patch])
        images = images + pruner.row_embedding(top + patch // side) + pruner.column_embedding(left + patch % side)
        spell, embed = lambda text: torch.tensor(self.tokenizer(text).input_ids), model.get_input_embeddings()
        before, prompts, labels = embed(spell("USER: ")), [], []
        shown = images.split([len(patches) for *_, patches in lessons])
        for (_, question, text, _), tokens in zip(lessons, shown, strict=True):
            answer = spell(f" {text}{END}")
            prompts.append(torch.cat((before, tokens, embed(spell(f"\n{question} ASSISTANT:")), embed(answer))))
            labels.append(torch.cat((answer.new_full((len(prompts[-1]) - len(answer),), -100), answer)))
        padded, wanted = pad_sequence(prompts, batch_first=True), pad_sequence(labels, True, -100)
        mask = pad_sequence([torch.ones(len(each), dtype=torch.long) for each in prompts], batch_first=True)
        hidden = model.language_model(inputs_embeds=padded, attention_mask=mask, use_cache=False)[0]
        is_answer = wanted[:, 1:] != -100
        logits, wanted = self.model.lm_head(hidden[:, :-1][is_answer]), wanted[:, 1:][is_answer]
        return cross_entropy(logits, wanted), logits.argmax(dim=-1) == wanted, is_answer.nonzero()[:, 0]


def to_lessons(pages: list[tuple]) -> tuple[Tensor, list[tuple[int, str, str, list[int]]]]:
    lessons = [(crop, *lesson) for crop, (_, lessons, _) in enumerate(pages) for lesson in lessons]
    return torch.stack([page[0] for page in pages]), lessons


@torch.no_grad()
def test(writer: Writer, pages: list[tuple], corner: int) -> dict[str, float]:
    """Return shares of right characters, of right answers, and of those with capitals of 20 px and more."""
    told, texts, is_large = [], [], []
    for start in range(0, len(pages), 16):
        pixels, lessons = to_lessons(pages[start : start + 16])
        _, is_right, lesson = writer(pixels, lessons, corner, corner)
        told.append(is_right.float())
        texts.append(torch.ones(len(lessons)).scatter_reduce(0, lesson, told[-1], "amin"))
        is_large.append(torch.tensor([pages[start + picture][2] >= 20 for picture, *_ in lessons]))
    answers, large = torch.cat(texts), torch.cat(is_large)
    return {
        "characters": torch.cat(told).mean().item(),
        "answers": answers.mean().item(),
        "large answers": answers[large].mean().item(),
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
    parser.add_argument("--lessons", type=int, default=96, help="on crops, the most of a step")
    parser.add_argument("--pictures", type=int, default=0, help="in each step")
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
    unseen = load_sources("validation", args.data_dir, args.wallpapers)
    examples = list(islice(Pages(unseen, "validation"), 48))
    pictures = list(islice(Pictures(unseen, "validation", 1), 96)) if args.pictures else []
    batches = iter(DataLoader(Pages(sources, f"train-{step}"), args.crops, num_workers=1, collate_fn=list))
    if args.pictures:
        drawn = iter(DataLoader(Pictures(sources, f"{step}"), args.pictures, num_workers=1, collate_fn=list))
    began, rng, seen = time.monotonic(), random.Random(step), []
    for pages in batches:
        if (share := (time.monotonic() - began) / 60 / args.minutes) >= 1:
            break
        rate = args.learning_rate * min(1, (step + 1) / 50) * max(0.02, 1 - share)
        set_rate(optimizers, rate)
        (pixels, lessons), free = to_lessons(pages), (VIEW - SIDE) // PATCH
        lessons = rng.sample(lessons, min(len(lessons), args.lessons))
        writer.zero_grad()
        loss, is_right, _ = writer(pixels, lessons, rng.randint(0, free), rng.randint(0, free))
        loss.backward()
        values = {"loss": loss.item(), "right": is_right.float().mean().item()}
        if args.pictures:
            loss, is_right, _ = writer(*to_lessons(next(drawn)), 0, 0)
            loss.backward()
            values |= {"loss of pictures": loss.item(), "right of pictures": is_right.float().mean().item()}
        nn.utils.clip_grad_norm_([each for _, each in learning], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen.append(values)
        step += 1
        if step % 25 == 0:
            line = {"step": step, "minutes": (time.monotonic() - began) / 60}
            line |= {name: np.mean([each[name] for each in seen]) for name in values}
            seen = []
            if step % 100 == 0:
                line["validation"] = test(writer, examples, 6)
                if pictures:
                    line["validation of pictures"] = test(writer, pictures, 0)
                save(file, writer, step)
            with (args.output_dir / "log.jsonl").open("a") as log:
                print(json.dumps(line), file=log)
    save(file, writer, step)
    print(test(writer, examples, 6), test(writer, pictures, 0) if pictures else "")


def save(file: Path, writer: Writer, step: int) -> None:
    with written_beside(file) as path:
        torch.save({"learned": {name: each.detach() for name, each in writer.learning()}, "step": step}, path)


if __name__ == "__main__":
    main()
