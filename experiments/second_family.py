"""Train a tiny vision-language model of a second family, with Qwen3-VL's classes, that sees mosaics.

    python experiments/second_family.py see --output-dir FOLDER --steps 200   # the encoder
    python experiments/second_family.py read --output-dir FOLDER --steps 760  # the decoder

The encoder starts as the shipped CLIP, and learns to tell shapes and places; the decoder learns on features that are
encoded once, from random subsets of them. The same command resumes each. The folder then has `log.jsonl`, and a
folder `model` that `AutoModelForImageTextToText` and `AutoProcessor` load. A picture of 336 px has 576 patches and 144
merged tokens.
"""

import argparse
import json
import math
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from lightvlm import LightVLMForConditionalGeneration
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.processing_lightvlm import expand_placeholders
from lightvlm.training.prepare_easy_vqa import DESCRIBE, PALETTE, SHAPES
from lightvlm.training.prepare_mosaics import ask, caption, draw_mosaic, load_cells, load_photographs
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.nn.utils.rnn import pad_sequence
from transformers import PaddleOCRVLProcessor, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

PATCH, MERGE, LAYERS = 14, 2, 5  # the shipped checkpoint reads the fifth layer of its encoder
CELL = PATCH * MERGE
FULL = 336
SHARD = 64
CYCLE = (168, FULL, 112, FULL, 168, FULL, 84, FULL)  # what the encoder learns from, by turns
READ_CYCLE = (FULL, 168, FULL, 112, FULL, FULL, 84, FULL)  # and the decoder
READ_SIZES = (FULL, 168, 112, 84)
SUBSETS = ((144, 144, 0.0), (36, 72, 3.0), (36, 72, 3.0), (5, 144, 1.5))  # of tokens that the decoder sees, by turns
SPECIAL = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set content = [{'type': 'text', 'text': message['content']}] if message['content'] is string"
    " else message['content'] -%}"
    "{{- 'USER: ' if message['role'] == 'user' else ' ASSISTANT: ' if message['role'] == 'assistant' else '' -}}"
    "{%- for item in content -%}"
    "{%- if item['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>\\n' -}}"
    "{%- elif item['type'] == 'text' -%}{{- item['text'] -}}{%- endif -%}{%- endfor -%}"
    "{{- eos_token if message['role'] == 'assistant' else '' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"
)


def build_processor() -> PaddleOCRVLProcessor:
    """Return a processor with the shipped tokenizer and Qwen's words around pictures, for pictures of any size.

    It is PaddleOCR-VL's, because Qwen3-VL's needs torchvision for videos; of pictures both make the same.
    """
    image_token = {"image_token": SPECIAL[1]}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SHIPPED, extra_special_tokens=image_token)
    tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL]})
    size = {"shortest_edge": 56 * 56, "longest_edge": 1008 * 1008}
    image_processor = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=size)
    return PaddleOCRVLProcessor(image_processor, tokenizer, chat_template=TEMPLATE)


def build_model(processor: PaddleOCRVLProcessor) -> Qwen3VLForConditionalGeneration:
    """Return 6.9M parameters: a vision encoder as wide as the shipped one, and a decoder with random weights."""
    vision = {
        "depth": LAYERS,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_heads": 3,
        "hidden_act": "quick_gelu",
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "out_hidden_size": 256,
        "num_position_embeddings": (FULL // PATCH) ** 2,
        "deepstack_visual_indexes": [1, 3],
    }
    text = {
        "vocab_size": 448,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "initializer_range": 1 / 16,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "bos_token_id": processor.tokenizer.bos_token_id,
        "eos_token_id": processor.tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]},
    }
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    tokens = dict(zip(names, processor.tokenizer.convert_tokens_to_ids([*SPECIAL]), strict=True))
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **tokens))


def map_attention(layer: nn.Module, heads: int) -> tuple[Tensor, Tensor]:
    """Return weights and biases of queries and keys with the same products, nearly all of them in slow dimensions.

    CLIP has no rotary positions. Those of Qwen3-VL turn dimension i of a head's first half, with i of its second, the
    faster the smaller i is in its own half of these; so the strongest products go where nearly nothing turns.
    """
    size = layer.q_proj.out_features // heads
    quarter = size // 4
    speed = torch.arange(quarter).repeat(4)
    order = speed.argsort(descending=True)
    parts = []
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        queries, keys = (
            torch.cat((linear.weight[rows], linear.bias[rows, None]), dim=1).double()
            for linear in (layer.q_proj, layer.k_proj)
        )
        left, strength, right = torch.linalg.svd(queries.T @ keys)
        left, right = (vectors[:, :size] * strength[:size].sqrt() for vectors in (left, right.T))
        slots = torch.empty(2, size, len(left), dtype=left.dtype)
        slots[0, order], slots[1, order] = left.T, right.T
        parts.append(slots)
    both = torch.cat(parts, dim=1).flatten(0, 1).float()
    return both[:, :-1], both[:, -1]


@torch.no_grad()
def map_clip(clip: nn.Module, visual: Qwen3VLVisionModel, pixels: Tensor) -> None:
    """Copy CLIP's layers into Qwen3-VL's encoder. [CLS] is lost; the first norm divides as on average of `pixels`."""
    embeddings, norm = clip.embeddings, clip.pre_layrnorm
    weight, positions = embeddings.patch_embedding.weight, embeddings.position_embedding.weight[1:]
    scale = norm.weight / embeddings(pixels)[:, 1:].std(dim=-1).mean()
    weight, positions = weight - weight.mean(dim=0), positions - positions.mean(dim=1, keepdim=True)
    visual.patch_embed.proj.weight.copy_(
        (weight * scale[:, None, None, None])[:, :, None].expand(-1, -1, 2, -1, -1) / 2
    )
    visual.patch_embed.proj.bias.copy_(norm.bias)
    visual.pos_embed.weight.copy_(positions * scale)
    for old, new in zip(clip.encoder.layers, visual.blocks, strict=False):
        attention = old.self_attn
        weight, bias = map_attention(attention, visual.config.num_heads)
        new.attn.qkv.weight.copy_(torch.cat((weight, attention.v_proj.weight)))
        new.attn.qkv.bias.copy_(torch.cat((bias, attention.v_proj.bias)))
        pairs = [
            (attention.out_proj, new.attn.proj),
            (old.layer_norm1, new.norm1),
            (old.layer_norm2, new.norm2),
            (old.mlp.fc1, new.mlp.linear_fc1),
            (old.mlp.fc2, new.mlp.linear_fc2),
        ]
        for source, target in pairs:
            target.load_state_dict(source.state_dict())


class Pictures:
    """Mosaics of a split, as processed pixels, with the object of each merged token (-1: none) and by place."""

    def __init__(self, data_dir: Path, split: str, processor: PaddleOCRVLProcessor, seed: int):
        self.cells, self.photographs = load_cells(data_dir, split), load_photographs(split)
        look = processor.image_processor
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (look.image_mean, look.image_std))
        self.seed = seed

    def draw(self, size: int, count: int, seed: str) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
        """Return pixels (count, 3, size, size), labels (count, merged tokens), and the objects of each picture."""
        rng = random.Random(f"{self.seed}-{size}-{seed}")
        mosaics = []
        for _ in range(count):
            variant, grid = rng.choice(("flat", "photo", "photo")), rng.choice((1, 2, 3, 3))
            mosaics.append(draw_mosaic(self.cells, self.photographs, variant, grid, rng, size))
        labels = torch.stack([label_cells(mosaic.labels) for mosaic in mosaics])
        return self.normalize([mosaic.image for mosaic in mosaics]), labels, [mosaic.objects for mosaic in mosaics]

    def normalize(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([torch.from_numpy(np.array(image)).movedim(-1, 0) for image in images])
        return (pixels / 255 - self.mean) / self.std


def label_cells(labels: np.ndarray) -> Tensor:
    """Return the object of each merged token, if it covers enough of it."""
    side = len(labels) // CELL
    cells = labels.reshape(side, CELL, side, CELL)
    return torch.from_numpy(np.where((cells >= 0).mean(axis=(1, 3)) > 0.15, cells.max(axis=(1, 3)), -1).ravel())


def blocks(grid: Tensor) -> Tensor:
    """Reorder (batch, height, width, ...) of patches: those that are merged lie together. (batch * patches, ...)"""
    batch, height, width, *rest = grid.shape
    grid = grid.reshape(batch, height // MERGE, MERGE, width // MERGE, MERGE, *rest)
    return grid.transpose(2, 3).reshape(batch * height * width, *rest)


def cut(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return patches of pictures of one size (batch, 3, size, size), as the processor does, and their grids."""
    batch, _, size, _ = pixels.shape
    side = size // PATCH
    patches = blocks(pixels.reshape(batch, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5))
    return patches[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1), torch.tensor([[1, side, side]] * batch)


class Seer(nn.Module):
    """The encoder, and heads on its merged tokens that tell color, shape, background and place."""

    def __init__(self, visual: Qwen3VLVisionModel):
        super().__init__()
        self.visual = visual
        streams = 1 + len(visual.deepstack_merger_list)
        outputs = 1 + len(PALETTE) + len(SHAPES) + 8
        self.heads = nn.ModuleList(nn.Linear(visual.config.out_hidden_size, outputs) for _ in range(streams))

    def forward(self, pixels: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the loss, and of its parts those of the last layer.

        Args:
            pixels: (batch, 3, size, size).
            labels: (batch, merged tokens).
            targets: (batch, height, width, channels), what CLIP sees at each patch.
        """
        seen = self.visual(*cut(pixels))
        targets = blocks(targets)
        losses = {"clip": mse_loss(seen.last_hidden_state, targets) / targets.var(dim=0).mean()}
        for name, features, head in zip(
            ("", "early_", "middle_"), [seen.pooler_output, *seen.deepstack_features], self.heads, strict=True
        ):
            losses |= {name + key: value for key, value in self.tell(head(features), labels).items()}
        accuracies = {key: losses.pop(key).item() for key in [*losses] if "right" in key}
        return sum(losses.values()), {key: losses[key].item() for key in ("clip", "place")} | accuracies

    def tell(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return each loss of a head, and how much is told right."""
        colors, shapes = len(PALETTE), len(SHAPES)
        background, color, shape, place = outputs.split([1, colors, shapes, 8], dim=-1)
        shown = labels.flatten() >= 0
        known = labels.flatten()[shown]
        color, shape = color[shown], shape[shown]
        return {
            "background": binary_cross_entropy_with_logits(background[:, 0], (~shown).float()),
            "color": cross_entropy(color, known // shapes),
            "shape": cross_entropy(shape, known % shapes),
            "place": 4 * mse_loss(place, waves(math.isqrt(labels.shape[1])).repeat(len(labels), 1)),
            "background_right": ((background[:, 0] > 0) != shown).float().mean(),
            "color_right": (color.argmax(dim=-1) == known // shapes).float().mean(),
            "shape_right": (shape.argmax(dim=-1) == known % shapes).float().mean(),
        }


def waves(side: int) -> Tensor:
    """Return where each of side x side merged tokens is, in two waves of each axis. (side * side, 8)"""
    at = (torch.arange(side) + 0.5) / side * math.pi
    axis = torch.stack((at.cos(), at.sin(), (2 * at).cos(), (2 * at).sin()), dim=-1)
    return torch.cat((axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)), dim=-1).flatten(0, 1)


class Run:
    """Steps of an optimizer, with a cosine schedule, that go on where an earlier process was ended."""

    def __init__(self, module: nn.Module, groups: list[dict], folder: Path, name: str, steps: int):
        self.module, self.folder, self.name, self.steps = module, folder, name, steps
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.pace)
        self.step, self.seconds, self.since, self.logs = 0, 0.0, time.time(), []
        self.file = folder / f"{name}.state"
        if self.file.exists():
            state = torch.load(self.file)
            for part in ("module", "optimizer", "schedule"):
                getattr(self, part).load_state_dict(state[part])
            self.step, self.seconds = state["step"], state["seconds"]

    def pace(self, step: int) -> float:
        warmup = 0.05 * self.steps
        return min((step + 1) / warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * min(1, step / self.steps))) / 2)

    def take(self, loss: Tensor, about: dict[str, float]) -> None:
        """Take a step, and every 25th write a line of the mean of what is known about them."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.logs.append({"loss": loss.item(), **about})
        if self.step % 25 == 0:
            self.seconds, self.since = self.seconds + time.time() - self.since, time.time()
            means = {key: round(sum(log[key] for log in self.logs) / len(self.logs), 4) for key in self.logs[0]}
            self.log({"stage": self.name, "step": self.step, "minutes": round(self.seconds / 60, 1), **means})
            self.logs = []
        if self.step % 100 == 0:
            self.save()

    def log(self, line: dict) -> None:
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        parts = {part: getattr(self, part).state_dict() for part in ("module", "optimizer", "schedule")}
        unfinished = self.file.with_suffix(".part")
        torch.save({**parts, "step": self.step, "seconds": self.seconds}, unfinished)
        unfinished.rename(self.file)


def see(args: argparse.Namespace) -> None:
    """Let the encoder learn to see as the shipped one does, and its mergers to tell what is in which place."""
    processor = build_processor()
    model = build_model(processor)
    clip = LightVLMForConditionalGeneration.from_pretrained(SHIPPED, dtype=torch.float32).model.vision_tower.eval()
    pictures = Pictures(args.data_dir, "train", processor, seed=0)
    map_clip(clip, model.model.visual, pictures.draw(FULL, 8, "norm")[0])
    seer = Seer(model.model.visual)
    mapped = {id(parameter) for name, parameter in seer.visual.named_parameters() if "merger" not in name}
    groups = [
        {"params": [each for each in seer.parameters() if id(each) in mapped], "lr": 5e-4},
        {"params": [each for each in seer.parameters() if id(each) not in mapped], "lr": 2e-3},
    ]
    run = Run(seer, groups, args.output_dir, "see", args.steps)
    while run.step < args.steps:
        size = CYCLE[run.step % len(CYCLE)]
        pixels, labels, _ = pictures.draw(size, {FULL: 8, 168: 24}.get(size, 32), f"see-{run.step}")
        with torch.no_grad():
            outputs = clip(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
            targets = outputs.hidden_states[LAYERS][:, 1:].unflatten(1, (size // PATCH, size // PATCH))
        run.take(*seer(pixels, labels, targets))
    level(model.model.visual, pictures)
    save(model, processor, args.output_dir / "encoder")


@torch.no_grad()
def level(visual: Qwen3VLVisionModel, pictures: Pictures) -> None:
    """Scale what the mergers return to a mean of 0 in each channel, and a mean square of 1."""
    seen = visual(*cut(pictures.draw(FULL, 32, "level")[0]))
    mergers = [visual.merger, *visual.deepstack_merger_list]
    for features, merger in zip([seen.pooler_output, *seen.deepstack_features], mergers, strict=True):
        scale = 1 / features.std(dim=0).square().mean().sqrt()
        change_output(merger.linear_fc2, scale * torch.eye(features.shape[1]), -scale * features.mean(dim=0))
    early = visual(*cut(pictures.draw(FULL, 32, "level")[0])).deepstack_features[0].unflatten(0, (32, -1))
    change_output(visual.deepstack_merger_list[0].linear_fc2, *amplify_places(early))


def change_output(linear: nn.Linear, matrix: Tensor, bias: Tensor) -> None:
    """Let a layer return `outputs @ matrix + bias` in place of its outputs."""
    linear.weight.copy_(matrix.T @ linear.weight)
    linear.bias.copy_(linear.bias @ matrix + bias)


def amplify_places(features: Tensor, times: float = 4.0) -> tuple[Tensor, Tensor]:
    """Return a matrix and bias that make the part of tokens that tells their place so many times larger.

    A small decoder learns to look where a place's name says only if tokens tell their own loudly. The first stream of
    deepstack does, so that merged tokens themselves, from which pruners choose, stay as they are.

    Args:
        features: (pictures, tokens, channels) of square pictures.
        times: how much larger.
    """
    tokens, places = features.flatten(0, 1), waves(math.isqrt(features.shape[1])).repeat(len(features), 1)
    read = torch.linalg.lstsq(nn.functional.pad(tokens, (0, 1), value=1.0), places).solution[:-1]  # (channels, 8)
    write = torch.linalg.lstsq(nn.functional.pad(places, (0, 1), value=1.0), tokens).solution[:-1]  # (8, channels)
    matrix = torch.eye(tokens.shape[-1]) + (times - 1) * read @ write
    matrix = matrix / (tokens @ matrix).std(dim=0).square().mean().sqrt()
    return matrix, -(tokens @ matrix).mean(dim=0)


def save(model: Qwen3VLForConditionalGeneration, processor: PaddleOCRVLProcessor, folder: Path) -> None:
    model.generation_config.update(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def encode(visual: Qwen3VLVisionModel, patches: Tensor, grids: Tensor) -> Tensor:
    """Return pictures' merged tokens in each stream, in half precision: (batch, 1 + deepstack, tokens, channels)."""
    seen = visual(patches, grids)
    streams = torch.stack([seen.pooler_output, *seen.deepstack_features])
    return streams.unflatten(1, (len(grids), -1)).transpose(0, 1).half().contiguous()


class Features:
    """Pictures of the training split that are encoded when they are first asked for, `SHARD` in a file."""

    def __init__(self, visual: Qwen3VLVisionModel, pictures: Pictures, folder: Path):
        self.visual, self.pictures, self.folder = visual, pictures, folder
        self.shards: dict[int, dict[str, Tensor]] = {}
        folder.mkdir(exist_ok=True)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return `features` (of `encode`), `labels` (pictures, tokens) and, as the bytes of JSON, `objects`."""
        file = self.folder / f"{number}.safetensors"
        if not file.exists():
            size = READ_CYCLE[number % len(READ_CYCLE)]
            pixels, labels, objects = self.pictures.draw(size, SHARD, f"read-{number}")
            features = torch.cat([encode(self.visual, *cut(some)) for some in pixels.split(8)])
            objects = torch.frombuffer(bytearray(json.dumps(objects).encode()), dtype=torch.uint8)
            unfinished = file.with_suffix(".part")
            save_file({"features": features, "labels": labels.to(torch.int8), "objects": objects}, unfinished)
            unfinished.rename(file)
        if number not in self.shards:
            self.shards[number] = load_file(file)  # maps it
        return self.shards[number]


class Reader(nn.Module):
    """The decoder, on kept tokens and packed turns, each as if it were asked alone."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, processor: PaddleOCRVLProcessor):
        super().__init__()
        self.decoder, self.lm_head = model.model.language_model, model.lm_head
        self.image_token_id = model.config.image_token_id
        self.tokenizer = processor.tokenizer
        self.before, self.behind = self.ids("USER: <|vision_start|>"), self.ids("<|vision_end|>\n")
        self.end = processor.tokenizer.eos_token_id

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def forward(self, features: Tensor, kept: Tensor, turns: list[list[tuple[str, str]]]) -> tuple[Tensor, Tensor]:
        """Return logits at answers' tokens, and these tokens.

        Args:
            features: (batch, streams, tokens, channels), all merged tokens of square pictures.
            kept: (batch, K), in raster order.
            turns: questions and answers about each picture.
        """
        side = math.isqrt(features.shape[2])
        rows = [self.lay_out(places, side, turns) for places, turns in zip(kept.tolist(), turns, strict=True)]
        ids, labels, number, positions = (
            pad_sequence([torch.tensor(row[part]) for row in rows], batch_first=True, padding_value=value)
            for part, value in enumerate((1, -100, -1, 0))
        )
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        queries, keys = number[:, None, :, None], number[:, None, None, :]
        chosen = features.float().gather(
            2, kept[:, None, :, None].expand(-1, features.shape[1], -1, features.shape[3])
        )
        is_image = ids == self.image_token_id
        embeds = self.decoder.embed_tokens(ids).masked_scatter(is_image[..., None], chosen[:, 0])
        hidden = self.decoder(
            inputs_embeds=embeds,
            attention_mask=((queries == keys) | (keys == 0)) & causal,
            position_ids=positions.permute(2, 0, 1),
            visual_pos_masks=is_image,
            deepstack_visual_embeds=[stream.flatten(0, 1) for stream in chosen[:, 1:].unbind(1)],
            use_cache=False,
        ).last_hidden_state
        is_answer = labels[:, 1:] != -100
        return self.lm_head(hidden[:, :-1][is_answer]), labels[:, 1:][is_answer]

    def lay_out(self, places: list[int], side: int, turns: list[tuple[str, str]]) -> tuple[list, list, list, list]:
        """Return ids, labels, numbers of turns (0: of all) and positions in time, height and width."""
        start, after = len(self.before), len(self.before) + side
        prompt = [*self.before, self.image_token_id, *self.behind]
        (ids,) = expand_placeholders([prompt], self.image_token_id, [len(places)])
        positions = [[at] * 3 for at in range(start)]
        positions += [[start, start + place // side, start + place % side] for place in places]
        positions += [[after + at] * 3 for at in range(len(self.behind))]
        after += len(self.behind)
        labels, number = [-100] * len(ids), [0] * len(ids)
        for turn, (question, answer) in enumerate(turns, start=1):
            asked, answered = self.ids(f"{question} ASSISTANT:"), [*self.ids(f" {answer}"), self.end]
            ids += asked + answered
            labels += [-100] * len(asked) + answered
            number += [turn] * len(asked + answered)
            positions += [[after + at] * 3 for at in range(len(asked + answered))]
        return ids, labels, number, positions


def draw_kept(labels: Tensor, low: int, high: int, bias: float) -> Tensor:
    """Return random subsets of pictures' tokens, in raster order.

    Args:
        labels: (pictures, tokens), the object of each, or -1.
        low, high: K, the same for all, is log-uniform between.
        bias: how much more often, as a logarithm of odds, a token of an object is kept.
    """
    tokens = labels.shape[1]
    count = min(tokens, round(math.exp(random.uniform(math.log(low), math.log(high)))))
    chance = bias * (labels >= 0) - torch.rand(labels.shape).log().neg().log()
    return chance.topk(count, dim=1).indices.sort(dim=1).values


@torch.no_grad()
def answer_right(reader: Reader, features: Tensor, kept: Tensor, turns: list[list[tuple[str, str]]]) -> list[bool]:
    """Return which questions are answered right, word for word to the end, as greedy generation would."""
    logits, tokens = reader(features, kept, turns)
    right = (logits.argmax(dim=-1) == tokens).tolist()
    ends = [0, *(at + 1 for at, token in enumerate(tokens.tolist()) if token == reader.end)]
    return [all(right[start:end]) for start, end in pairwise(ends)]


def load_test(data_dir: Path, name: str) -> dict[str, list[tuple[str, str]]]:
    """Return questions and answers of each picture of a test file."""
    pictures: dict[str, list[tuple[str, str]]] = {}
    for row in json.loads((data_dir / f"mosaics_test_{name}.json").read_text()):
        question, answer = (turn["value"] for turn in row["conversations"])
        pictures.setdefault(row["image"], []).append((question.removeprefix("<image>\n"), answer))
    return pictures


def encode_test(model, processor, args: argparse.Namespace, names: list[str], size: int) -> Tensor:
    """Return features of test pictures, scaled to a size as their processor does."""
    images = (Image.open(args.data_dir / "images" / name).convert("RGB") for name in names)
    scaled = (image.resize((size, size), Image.Resampling.BICUBIC) for image in images)
    inputs = (processor.image_processor(images=[image], return_tensors="pt") for image in scaled)
    return torch.cat([encode(model.model.visual, each["pixel_values"], each["image_grid_thw"]) for each in inputs])


def read(args: argparse.Namespace) -> None:
    """Let the decoder learn to answer from random subsets of merged tokens; the encoder stays as it is."""
    processor = build_processor()
    model = Qwen3VLForConditionalGeneration.from_pretrained(args.output_dir / "encoder", dtype=torch.float32)
    visual = model.model.visual.requires_grad_(False)
    pictures = Pictures(args.data_dir, "train", processor, seed=0)
    shards = Features(visual, pictures, args.output_dir / "features")
    reader = Reader(model, processor)
    run = Run(reader, [{"params": [*reader.parameters()], "lr": 1e-3}], args.output_dir, "read", args.steps)
    tests = dict([*load_test(args.data_dir, "photo_3x3").items()][:60])
    test_features = encode_test(model, processor, args, [*tests], FULL)
    while run.step < args.steps:
        random.seed(run.step)
        torch.manual_seed(run.step)
        there = min(args.shards, 24 + run.step // 16)
        shard = shards[there - 1 if run.step % 16 == 0 else random.randrange(there)]
        describe = run.step < args.captions  # from these it learns to look where a place's name says
        chosen = torch.randperm(SHARD)[: 48 if describe else 20]
        about = json.loads(shard["objects"].numpy().tobytes())
        turns = [draw_turns(about[number], 0 if describe else 8) for number in chosen.tolist()]
        if not describe:  # a quarter of the captions, which are most of the words, stay
            turns = [each if row % 4 == 0 else each[1:] for row, each in enumerate(turns)]
        labels = shard["labels"][chosen]
        kept = draw_kept(labels, 36, 72, 3.0) if describe else draw_kept(labels, *random.choice(SUBSETS))
        logits, tokens = reader(shard["features"][chosen], kept, turns)
        run.take(cross_entropy(logits, tokens), {"right": (logits.argmax(dim=-1) == tokens).float().mean().item()})
        if run.step % 50 == 0:
            every = torch.arange(test_features.shape[2]).expand(len(tests), -1)
            right = answer_right(reader, test_features, every, [*tests.values()])
            run.log({"stage": "test", "step": run.step, "photo_3x3": round(sum(right) / len(right), 4)})
        if run.step % 100 == 0:
            save(model, processor, args.output_dir / "model")
    save(model, processor, args.output_dir / "model")


def draw_turns(objects: dict[str, str], questions: int) -> list[tuple[str, str]]:
    """Return a picture's caption and questions."""
    rng = random.Random(random.random())
    return [(DESCRIBE, caption(objects, rng)), *ask(objects, [*objects.values()], questions, rng)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("see", "read"))
    parser.add_argument("--data-dir", type=Path, default=Path("data/easy-vqa"), help="of prepare_mosaics.py")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--captions", type=int, default=250, help="steps of the decoder on these alone, at first")
    parser.add_argument("--shards", type=int, default=80, help=f"of {SHARD} pictures for the decoder")
    args = parser.parse_args()
    torch.manual_seed(0)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    {"see": see, "read": read}[args.stage](args)


if __name__ == "__main__":
    main()
