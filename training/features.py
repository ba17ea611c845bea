"""Features of a dataset's images, encoded once for all runs and processes, on disk, and mapped into memory."""

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from lightvlm import LightVLMConfig, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.common.llava_data import load_llava
from lightvlm.views_lightvlm import Layout, lay_out
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

SHARD = 256  # images in a file: 300 MB for CLIP ViT-L/14-336
BATCH = 16


@dataclass
class ImageArguments:
    """Whose images are encoded, and with which checkpoint."""

    model_path: str = field(metadata={"help": "folder or Hub name of a trained LightVLM checkpoint"})
    data_path: list[str] = field(metadata={"help": "LLaVA JSON files; rows count that have one image"})
    image_folder: str = field(metadata={"help": "folder that its image paths are relative to"})
    skip_bad_rows: bool = field(default=False, metadata={"help": "leave out rows that cannot be used, with a warning"})
    features_dir: str | None = field(
        default=None, metadata={"help": "folder to keep encoded images in, for later runs; in the cache of datasets"}
    )
    max_images: list[int] = field(
        default_factory=lambda: [3000], metadata={"help": "take so many rows by chance, of all files or of each"}
    )


def load_rows(args: ImageArguments, seed: int) -> Dataset:
    """Rows that have one image, up to `max_images`; ValueError where there are none, or numbers do not fit files."""
    options = {"image_folder": args.image_folder, "skip_bad_rows": args.skip_bad_rows}
    files, counts = [load_llava(path, **options) for path in args.data_path], args.max_images
    if len(counts) == 1:
        files = [concatenate_datasets(files)]
    if len(counts) != len(files):
        raise ValueError(f"max_images={counts}: give one number, or one for each of {len(files)} files.")
    chosen = []
    for rows, count in zip(files, counts, strict=True):
        images = rows.with_format("arrow")["images"]
        rows = rows.select([number for number, row in enumerate(images) if len(row) == 1])
        chosen.append(rows.shuffle(seed=seed).select(range(min(count, len(rows)))))
    rows = concatenate_datasets(chosen)
    if len(rows) == 0:
        raise ValueError(
            f"None of the rows of {', '.join(args.data_path)} has one image, which the pruner learns from."
        )
    return rows


def open_images(rows: list[dict], processor: LightVLMProcessor) -> dict[str, torch.Tensor]:
    """`pixel_values`, and for images of many views `image_sizes`, of rows that have one image each."""
    inputs = processor(images=[row["images"][0] for row in rows], return_tensors="pt")
    return {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}


def name_features(model: LightVLMForConditionalGeneration, processor: LightVLMProcessor, rows: Dataset) -> str:
    """A name that changes with the encoder, its layers, how images are prepared, and the images' files."""
    digest, config = hashlib.sha256(), model.config
    for name, tensor in model.model.vision_tower.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    settings = (
        config.vision_feature_layer,
        config.prior_layer,
        config.encoder_keep,
        processor.image_processor.to_json_string(),
    )
    digest.update(repr(settings).encode())
    for images in rows.with_format("arrow")["images"].to_pylist():
        for image in images:
            stat = os.stat(image["path"]) if image["bytes"] is None else None
            digest.update(repr((image["path"], stat.st_size, stat.st_mtime_ns) if stat else image["bytes"]).encode())
    return digest.hexdigest()[:16]


class EncodedImages(TorchDataset):
    """What `encode_rows` returns: items are read from Arrow and from mapped files each time that they are asked for.

    Args:
        rows: with `messages`.
        files: of `encode_shard`, with `SHARD` images each.
    """

    def __init__(self, rows: Dataset, files: list[Path]):
        self.conversations = rows.select_columns("messages")
        self.shards = [load_file(file) for file in files]  # maps the files: nothing is read yet
        self.columns: dict[str, torch.Tensor] = {}  # what else is known of each image

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict:
        if index >= len(self):
            raise IndexError(f"There are {len(self)} images.")
        shard, at = self.shards[index // SHARD], index % SHARD
        start, end = int(shard["ends"][at - 1]) if at else 0, int(shard["ends"][at])
        return {
            **self.conversations[index],
            "features": shard["features"][start:end],
            "prior": shard["prior"][start:end],
            "size": shard["sizes"][at].tolist(),
            **{name: column[index] for name, column in self.columns.items()},
        }


class SplitTurns(TorchDataset):
    """Encoded images as one example for each question."""

    def __init__(self, examples: EncodedImages):
        self.examples = examples
        counts = torch.tensor([len(row["messages"]) // 2 for row in examples.conversations])
        self.ends = counts.cumsum(dim=0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict:
        image = int(torch.searchsorted(self.ends, index, right=True))
        example = self.examples[image]
        start = 2 * (index - int(self.ends[image - 1]) if image else index)
        return {**example, "messages": example["messages"][start : start + 2]}


@torch.no_grad()
def encode_shard(
    model: LightVLMForConditionalGeneration, batches: Iterable[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The tensors of a file: `features` (views, patches, dim), `prior` (views, patches), and of each image where its
    views end and its height and width, in a batch without many views those of a view."""
    parts = {"features": [], "prior": [], "views": [], "sizes": []}
    for batch in batches:
        pixels, sizes = batch["pixel_values"], batch.get("image_sizes")
        layout = model.model.lay_out(pixels, sizes)
        views = [1] * len(pixels) if layout is None else layout.views
        if layout is not None:
            pixels = layout.cut(pixels)
        in_picture = layout and layout.in_picture(model.config.num_patches)
        features, prior = model.model.encode(pixels, in_picture=in_picture)
        parts["features"].append(features.cpu().bfloat16())
        parts["prior"].append(prior.cpu())
        parts["views"].append(torch.tensor(views))
        view = model.config.vision_config.image_size
        parts["sizes"].append(torch.full((len(views), 2), view) if sizes is None else sizes.cpu().long())
    shard = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return {**shard, "ends": shard.pop("views").cumsum(dim=0)}


def encode_rows(
    model: LightVLMForConditionalGeneration,
    processor: LightVLMProcessor,
    rows: Dataset,
    num_workers: int = 0,
    folder: str | Path | None = None,
) -> EncodedImages:
    """Encode the images that no earlier run did, each by one of the processes, and wait for all.

    Args:
        model, processor: of the checkpoint.
        rows: of `load_llava`, with one image each.
        num_workers: processes that open images.
        folder: for the features, in a folder named after encoder and images; by default beside the cache of
            `datasets`. A run that was interrupted goes on with the first missing file.

    Returns:
        For each row its `messages`, and `features` (views, patches, dim) in bf16, `prior` (views, patches) and `size`
        (height, width) of its image, as the image processor saw it.
    """
    state = PartialState()
    folder = Path(folder or Path(datasets.config.HF_DATASETS_CACHE, "lightvlm"), name_features(model, processor, rows))
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(rows), SHARD)
    files = [folder / f"{start:08d}-of-{len(rows):08d}.safetensors" for start in starts]
    mine = list(zip(starts, files, strict=True))[state.process_index :: state.num_processes]
    missing = [(start, file) for start, file in mine if not file.exists()]
    shards = [range(start, min(start + SHARD, len(rows))) for start, _ in missing]
    batches = [shard[first : first + BATCH] for shard in shards for first in range(0, len(shard), BATCH)]
    loader = DataLoader(
        rows, batch_sampler=batches, collate_fn=partial(open_images, processor=processor), num_workers=num_workers
    )
    progress = iter(tqdm(loader, "Encoding images", disable=not batches))
    for shard, (_, file) in zip(shards, missing, strict=True):
        encoded = encode_shard(model, islice(progress, math.ceil(len(shard) / BATCH)))
        unfinished = file.with_suffix(".part")
        save_file(encoded, unfinished)
        unfinished.rename(file)
    state.wait_for_everyone()
    return EncodedImages(rows, files)


def stack_features(examples: list[dict], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """`features` (views, patches, dim), `prior` (views, patches) and `sizes` (images, 2) of a batch of examples."""
    stacked = {
        "features": torch.cat([example["features"] for example in examples]),
        "prior": torch.cat([example["prior"] for example in examples]),
        "sizes": torch.tensor([example["size"] for example in examples]),
    }
    return {name: values.to(device) for name, values in stacked.items()}


def lay_out_batch(
    features: torch.Tensor, prior: torch.Tensor, sizes: torch.Tensor, config: LightVLMConfig
) -> tuple[torch.Tensor, torch.Tensor, Layout | None]:
    """Of `stack_features`'s batch: features (images, tokens, dim) in float32, prior (images, tokens), and the layout.

    The layout is None for a checkpoint that sees one view, whose tokens are its patches.
    """
    if config.image_grid_pinpoints is None:
        return features.float(), prior, None
    layout = lay_out([(int(height), int(width)) for height, width in sizes], config, features.device)
    return layout.gather(features).float(), layout.gather(prior), layout
