"""One interface to a LightVLM and to any other vision-language model, so that commands ask both by the same words."""

import hashlib
import json
import sys
from collections.abc import Callable
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from lightvlm.images_lightvlm import reading, to_rgb
from lightvlm.inference.answers import (
    clean,
    cut,
    default_new_tokens,
    generation_options,
    stop_strings,
)
from lightvlm.inference.checkpoint import load, load_other, read_type
from lightvlm.inference.fingerprint import fingerprint
from lightvlm.inference.image_graph import ImageGraph, encode_by
from lightvlm.inference.openvino_model import is_openvino, load_openvino
from lightvlm.inference.own_model import Answer, Options, OwnModel, as_seen, images_of, read_share
from lightvlm.pruning import TokenScorer, keep_distinct, prune
from lightvlm.pruning.any_model import find_placeholders
from lightvlm.pruning.choosing import Chooser
from PIL import Image
from torch.nn.functional import pad
from transformers import BatchFeature

OF_LIGHTVLM = "{} is of LightVLM checkpoints alone, and {} is a {}: leave it out{}."


def count_runs(is_placeholder: torch.Tensor) -> list[int]:
    """Return the lengths of the runs of placeholders in a prompt, (length,)."""
    run = (is_placeholder & ~pad(is_placeholder, (1, 0))[:-1]).cumsum(0)
    return run[is_placeholder].unique_consecutive(return_counts=True)[1].tolist()


def longest(inputs: BatchFeature) -> int:
    """Return the tokens of the longest prompt, without padding, which `prune` may add to a single one too."""
    return int(inputs["attention_mask"].sum(dim=1).max())


class AnyModel:
    """A model of another family, whose image tokens `prune` takes away.

    Without K in a call all tokens are kept.

    Args:
        model: in evaluation mode, of a class that `prune` can do.
        processor: the checkpoint's, with an image processor, a tokenizer and a chat template.
        model_path: where it was loaded from.
        pruner: chooses the tokens.
    """

    default = "100%"

    def __init__(self, model: Any, processor: Any, model_path: str = "", pruner: Chooser = keep_distinct):
        self.model, self.processor, self.model_path, self.pruner = model, processor, model_path, pruner
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def resolve(self, budget: Any) -> Any:
        """Return K of a command's budget, or of each in a list: a number, or a share as a text, unlike any number."""
        if isinstance(budget, list):
            return [self.resolve(each) for each in budget]
        if budget is None or budget == "all":
            return self.default
        if (share := read_share(budget)) is not None:
            return f"{100 * share:.10g}%"
        if isinstance(budget, str) and budget.startswith("dynamic"):
            raise ValueError(self.refusal(f"the budget {budget}", ", or give a number or a share such as 25%"))
        if type(budget) is not int or budget < 1:
            raise ValueError(
                f"{budget!r} is no budget: give a number of tokens, 1 or more, a share such as 25%, or all."
            )
        return budget

    def refusal(self, what: str, cure: str = "") -> str:
        """Return the sentence that says what only a LightVLM can do."""
        return OF_LIGHTVLM.format(what, self.model_path, self.model.config.model_type, cure)

    def check(self, options: Options, question_aware: str = "--question-aware") -> None:
        """Raise ValueError, with the option's name, if another family cannot do what the options ask for."""
        if options.max_views is not None:
            raise ValueError(self.refusal("--max-views"))
        if options.question_aware:
            cure = "; a pruner that was trained with questions reads them anyway"
            raise ValueError(self.refusal(question_aware, cure))

    def check_question(self, option: str) -> None:
        """Raise ValueError, with the option's name, if the question has no say in which tokens are kept."""
        if getattr(self.pruner, "question_projection", None) is None:
            raise ValueError(f"{option} needs a --pruner that was trained with questions: without one, leave it out.")

    def check_largest(self, options: Options) -> None:
        """Do nothing: an image with fewer tokens than K keeps all."""

    def size_class(self, size: tuple[int, int]) -> int:
        """Return what images (height, width) of a batch should have in common: about as many pixels."""
        return prod(size).bit_length()

    def prepare(self, image: Image.Image, name: str) -> Image.Image:
        """Return an image as it may be used for several prompts, upright RGB."""
        with reading(name):
            return to_rgb(image)

    longest_side = None

    @property
    def positions(self) -> int:
        """Return how many tokens the language model reads."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def check_images(self, num_image_tokens: Any, images: int) -> None:
        """Raise ValueError if a list of K is not as long as there are images."""
        if isinstance(num_image_tokens, list) and len(num_image_tokens) != images:
            raise ValueError(f"num_image_tokens has {len(num_image_tokens)} numbers, but there are {images} images.")

    def prompt_length(self, messages: list[dict], num_image_tokens: Any) -> int:
        """Return about how many positions a prompt has after pruning; `generate` knows it."""
        inputs, images = self.read([messages]), len(images_of(messages))
        (row,) = find_placeholders(self.model.config, inputs)["image"].cpu()
        runs, total = count_runs(row), int(row.sum())
        budgets = (
            num_image_tokens if isinstance(num_image_tokens, list) else [num_image_tokens] * max(len(runs), images)
        )
        shares = [read_share(budget) for budget in budgets]
        kept = sum(
            b if share is None else share * total / len(budgets) for b, share in zip(budgets, shares, strict=True)
        )
        return row.numel() - total + min(total, round(kept))

    def check_positions(self, length: int, new_tokens: int) -> None:
        """Raise ValueError if so many prompt tokens and so many new ones are more than the language model reads."""
        if length + new_tokens > self.positions:
            raise ValueError(
                f"{length} tokens and {new_tokens} new ones are more than the {self.positions} that the model reads: "
                "give a shorter text, fewer images or tokens of each, or ask for fewer new ones."
            )

    def template_options(self, num_image_tokens: Any) -> dict[str, Any]:
        """Return what `apply_chat_template` takes for K: nothing."""
        return {}

    def generate(
        self, num_image_tokens: Any, note: Callable[[list[int], int], Any], messages: list[dict], /, **inputs: Any
    ) -> torch.Tensor:
        """Prune one prompt, run the model's own `generate`, and return sequences that begin with the prompt as given.

        Args:
            num_image_tokens: K.
            note: called before the first new token with the tokens of each image, or of all if a family writes text
                between an image's tokens, and how many more placeholders the prompt has.
            messages: that the inputs were made of.
            inputs: of `generate`.
        """
        names = ("streamer", "generation_config", "tokenizer", "stopping_criteria", "max_new_tokens", "do_sample")
        options = {name: inputs.pop(name) for name in names if name in inputs}
        given = BatchFeature(inputs).to(self.model.device, dtype=self.model.dtype)
        short = self.prune(given, num_image_tokens)
        length = short["input_ids"].shape[1]
        limit = options.get("max_new_tokens") or getattr(options.get("generation_config"), "max_new_tokens", None)
        self.check_positions(longest(short), limit or 1)
        rows = [find_placeholders(self.model.config, each)["image"][0].cpu() for each in (short, given)]
        runs = [count_runs(row) for row in rows]
        kept = runs[0] if len(runs[0]) == len(runs[1]) else [int(rows[0].sum())]
        note(kept, int(rows[1].sum() - rows[0].sum()))
        sequences = self.model.generate(**short, **options)
        return torch.cat([given["input_ids"], sequences[:, length:]], dim=1)

    def check_length(self, text_length: int, images: list[Image.Image], wanted: dict, options: Options) -> None:
        """Do nothing: `answer` checks the length, which is known once images are read."""

    def read(self, conversations: list[list[dict]]) -> BatchFeature:
        """Return the inputs of prompts, left-padded, on the model's device.

        Raises:
            ValueError: if a text has a placeholder, or the chat template refuses a role or an order of roles.
        """
        mark = getattr(self.processor, "image_token", None)
        texts = (part.get("text") or "" for talk in conversations for message in talk for part in message["content"])
        if mark and any(mark in text for text in texts):
            raise ValueError(
                f'A message has {mark} in its text: take it out, and give images as parts of type "image".'
            )
        try:
            inputs = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        except TemplateError as error:
            raise ValueError(f"The chat template cannot be applied: {error}") from error
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def prune(self, inputs: BatchFeature, num_image_tokens: Any) -> BatchFeature:
        """Return the inputs of `generate` with K tokens of each image."""
        if isinstance(num_image_tokens, list):
            budget = [read_share(each) or each for each in num_image_tokens]
        else:
            budget = read_share(num_image_tokens) or num_image_tokens
        return prune(self.model, inputs, budget, pruner=self.pruner)

    def count(
        self, inputs: BatchFeature, short: BatchFeature, conversations: list[list[dict]]
    ) -> list[tuple[list[int], list[int]]]:
        """Return of each prompt's images how many tokens are kept, and how many there were."""
        rows = [find_placeholders(self.model.config, each)["image"].cpu() for each in (short, inputs)]
        counts = []
        for kept, whole, talk in zip(*rows, conversations, strict=True):
            runs = count_runs(kept), count_runs(whole)
            is_clear = len(runs[0]) == len(runs[1]) == len(images_of(talk))
            counts.append(runs if is_clear else ([int(kept.sum())], [int(whole.sum())]))
        return counts

    @torch.no_grad()
    def count_kept(self, messages: list[dict], num_image_tokens: Any) -> tuple[int, int]:
        """Return how many tokens a prompt's images keep together, and how many they have."""
        inputs = self.read([messages])
        short = self.prune(inputs, num_image_tokens)
        kept, whole = (int(find_placeholders(self.model.config, each)["image"].sum()) for each in (short, inputs))
        return kept, whole

    @torch.no_grad()
    def look(
        self, image: Image.Image, num_image_tokens: int | str, question: str = ""
    ) -> tuple[Image.Image, tuple[int, int], list[int]]:
        """Return an image as the model sees it, the rows and columns of its tokens, and the indices of those kept.

        Raises:
            ValueError: if its tokens are no grid, as those of tiles and rows with marks at their end.
        """
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = self.read([[{"role": "user", "content": content}]])
        total = int(find_placeholders(self.model.config, inputs)["image"].sum())
        kept = self.prune(inputs, num_image_tokens)["mm_encoder_outputs"]["image"].kept_indices
        grid = find_grid(self.model.config, inputs, total) if len(kept) == 1 else None
        if grid is None:
            raise ValueError(
                f"{self.model_path} is a {self.model.config.model_type}, which cuts this image into tiles or rows "
                "with marks: tokens are drawn of models that read an image as one grid, such as Qwen3-VL's family."
            )
        pixels = inputs["pixel_values"]
        if pixels.shape[-3:-2] == (3,) and prod(pixels.shape[:-3]) == 1 and "pixel_attention_mask" not in inputs:
            return Image.fromarray(as_seen(pixels.flatten(0, -4)[0], self.processor)), grid, kept[0].tolist()
        cell = max(8, round(max(image.size) / max(grid)))
        return image.resize((grid[1] * cell, grid[0] * cell)), grid, kept[0].tolist()

    @torch.no_grad()
    def answer(self, conversations: list[list[dict]], wanted: dict, options: Options) -> list[Answer]:
        """Return an answer to each conversation of a batch.

        Args:
            conversations: messages of chat templates, with any number of images each.
            wanted: `generation_kwargs` of lmms-eval's tasks.
            options: of which K counts.

        Raises:
            ValueError: if a conversation holds video or audio, or prompt and answer are too long.
        """
        conversations = [clean(talk, getattr(self.processor, "image_token", "<image>")) for talk in conversations]
        inputs = self.read(conversations)
        short = self.prune(inputs, options.num_image_tokens)
        generation, stops = generation_options(wanted, default_new_tokens(self.model)), stop_strings(wanted)
        self.check_positions(longest(short), generation["max_new_tokens"])
        stopping = {"stop_strings": stops, "tokenizer": self.processor.tokenizer} if stops else {}
        output = self.model.generate(**short, **generation, **stopping)
        texts = self.processor.batch_decode(output[:, short["input_ids"].shape[1] :], skip_special_tokens=True)
        counts = self.count(inputs, short, conversations)
        return [Answer(cut(text, stops), *count) for text, count in zip(texts, counts, strict=True)]

    def describe(self, options: Options) -> dict[str, Any]:
        """Return what answers depend on, besides the questions, K and generation."""
        return fingerprint(self.model_path) | {"pruner_sha256": hash_chooser(self.pruner)}


def find_grid(config: Any, inputs: BatchFeature, total: int) -> tuple[int, int] | None:
    """Return the rows and columns of an image's tokens in raster order; None if they are no grid.

    Args:
        config: the model's.
        inputs: of a prompt with one image, as its processor returned them.
        total: tokens of the image.
    """
    vision, side = config.vision_config, isqrt(total)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", 1)
    sizes = {
        "image_grid_thw": merge,  # of patches, after the number of frames
        "spatial_shapes": getattr(config, "downsample_factor", 1),  # of patches
        "image_sizes": merge * getattr(vision, "patch_size", 1) if isinstance(merge, int) else 1,  # of pixels
    }
    grids = [tuple(int(n) // sizes[name] for n in inputs[name][0][-2:]) for name in sizes if name in inputs]
    grids = grids or [(side, side)]
    return next((grid for grid in grids if prod(grid) == total), None)


def hash_chooser(pruner: Chooser) -> str:
    """Return the sha256 of a scorer's configuration and weights; of another function its name."""
    if not isinstance(pruner, TokenScorer):
        return pruner.__name__
    digest = hashlib.sha256(json.dumps(pruner.config).encode())
    for name, weight in sorted(pruner.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_pruner(name_or_path: str, model: Any, model_path: str) -> TokenScorer:
    """Return a scorer; ValueError if there is none, or it was made for tokens of another width."""
    try:
        scorer = TokenScorer.from_pretrained(name_or_path)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name_or_path} is not a folder or Hub repository with a pruner, pruner_config.json and "
            f"pruner.safetensors: {error}"
        ) from error
    width = model.get_input_embeddings().weight.shape[-1]
    if scorer.config["hidden_size"] != width:
        raise ValueError(
            f"{name_or_path} was trained for tokens of width {scorer.config['hidden_size']}, and those of "
            f"{model_path} have {width}: give the pruner that was trained for this model."
        )
    return scorer


def load_any(
    model_path: str,
    pruner: str | Path | None = None,
    encoder: str | Path | None = None,
    runtime: str = "pytorch",
    **options: Any,
) -> OwnModel | AnyModel:
    """Return a checkpoint of any family, in evaluation mode.

    Args:
        model_path: folder or Hub name.
        pruner: folder or Hub name of a `TokenScorer` for a model of another family than LightVLM.
        encoder: .onnx or .xml of `lightvlm export`, which encodes a LightVLM's images.
        runtime: "pytorch"; "openvino" for a folder of `lightvlm export --openvino`; "auto" for what the folder is.
        options: of `lightvlm.inference.load`.

    Raises:
        ValueError: as by `load`; or if the model sees no images, or cannot be pruned, or pruner or encoder don't fit.
    """
    if is_openvino(model_path):
        if runtime == "pytorch":
            raise ValueError(f"{model_path} is for OpenVINO, which `lightvlm infer` and `lightvlm serve` run.")
        return load_openvino(model_path, pruner=pruner, encoder=encoder, **options)
    if runtime == "openvino":
        raise ValueError(
            f"{model_path} is no folder of `lightvlm export --openvino`: make one of it, or leave out --runtime."
        )
    if read_type(model_path) == "lightvlm":
        if pruner is not None:
            raise ValueError(f"{model_path} is a LightVLM, which has its own pruner: leave out --pruner.")
        model, processor = load(model_path, **options)
        if encoder is not None:
            encode_by(ImageGraph(encoder, model, model_path), model, processor)
        return OwnModel(model, processor, model_path)
    if encoder is not None:
        raise ValueError(f"--encoder is of LightVLM checkpoints alone, and {model_path} is another: leave it out.")
    model, processor = load_other(model_path, **options)
    chooser = keep_distinct if pruner is None else load_pruner(str(pruner), model, model_path)
    return AnyModel(model, processor, model_path, chooser)
