"""Features of a dataset's images, encoded once for all runs and processes, on disk, and mapped into memory."""

import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import PIL.Image
import torch
from accelerate import PartialState
from datasets import Dataset, Image, concatenate_datasets
from filelock import FileLock
from lightvlm import LightVLMConfig, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.data.llava import load_llava
from lightvlm.views_lightvlm import Layout, lay_out, one_view
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

SHARD = 256  # images in a file: 300 MB for CLIP ViT-L/14-336
BATCH = 16
ENCODED = ("features", "prior", "places")

logger = logging.getLogger(__name__)


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
    """Return rows with one image, up to `max_images`; ValueError if there are none, or numbers do not fit files."""
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


def open_image(image: dict) -> PIL.Image.Image:
    """Return an image of a dataset, decoded; ValueError with its name if it cannot be."""
    try:
        return Image().decode_example(image)
    except Exception as error:  # each format's plugin has errors of its own
        name = image["path"] or "in bytes"
        raise ValueError(f"the image {name!r} cannot be read ({error}): mend it, or take its rows out.") from None


def open_images(images: list[dict], processor: LightVLMProcessor) -> dict[str, torch.Tensor]:
    """Return `pixel_values`, and for images of many views `image_sizes`."""
    inputs = processor(images=[open_image(image) for image in images], return_tensors="pt")
    return {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}


def name_encoder(model: LightVLMForConditionalGeneration, processor: LightVLMProcessor) -> str:
    """Return a name that changes with the encoder, its layers, and how images are prepared."""
    digest, config = hashlib.sha256(), model.config
    for name, tensor in model.model.vision_tower.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    settings = (
        config.vision_feature_layer,
        config.prior_layer,
        config.encoder_keep and (config.encoder_keep, "places"),  # files once had no places
        processor.image_processor.to_json_string(),
    )
    digest.update(repr(settings).encode())
    return digest.hexdigest()[:16]


def name_image(image: dict) -> str:
    """Return a name that changes with an image's place and file."""
    about = image["bytes"]
    if about is None:
        path = os.path.abspath(image["path"])
        stat = os.stat(path)
        about = repr((path, stat.st_size, stat.st_mtime_ns)).encode()
    return hashlib.sha256(about).hexdigest()[:16]


def checksum(shard: dict[str, torch.Tensor], names: list[str]) -> str:
    """Return the checksum of all that a file holds: the tensors, and the names of the images."""
    total = zlib.crc32(json.dumps(names).encode())
    for name in sorted(shard):
        total = zlib.crc32(shard[name].contiguous().view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def save_shard(shard: dict[str, torch.Tensor], names: list[str], folder: Path) -> None:
    """Write the features of the named images beside their file, and rename it when it is whole."""
    file = folder / f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:16]}.safetensors"
    unfinished = file.with_suffix(".part")
    save_file(shard, unfinished, {"images": json.dumps(names), "checksum": checksum(shard, names)})
    unfinished.rename(file)


def read_names(file: Path) -> list[str]:
    """Return the names of a file's images; none if it is cut off, or not one of `save_shard`."""
    try:
        with safe_open(file, "pt") as shard:
            return json.loads(shard.metadata()["images"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return []


def is_whole(file: Path) -> bool:
    """Return whether a file holds what `save_shard` wrote; reading it takes a second for each gigabyte or two."""
    if not (names := read_names(file)):
        return False
    with safe_open(file, "pt") as shard:
        return shard.metadata().get("checksum") == checksum(load_file(file), names)


def find_images(folder: Path) -> dict[str, tuple[Path, int]]:
    """Return the file of each encoded image, by name, and its place in it."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: (file, at) for file in files for at, name in enumerate(read_names(file))}


def tidy(folder: Path, wanted: Collection[str]) -> None:
    """Remove what a run that was killed left unfinished, and harmed files, if images of theirs are wanted."""
    for unfinished in folder.glob("*.part"):
        unfinished.unlink()
    names = {file: read_names(file) for file in folder.glob("*.safetensors")}
    files = [file for file, known in names.items() if not known or not {*known}.isdisjoint(wanted)]
    with ThreadPoolExecutor() as pool:
        whole = [*pool.map(is_whole, files)]
    for file in (file for file, is_good in zip(files, whole, strict=True) if not is_good):
        logger.warning(f"{file} is harmed: it is removed, and what is wanted of its images is encoded again.")
        file.unlink()


class EncodedImages(TorchDataset):
    """What `encode_rows` returns: items are read from Arrow and from mapped files each time that they are asked for.

    Args:
        rows: with `messages`.
        places: of each row's image the file, of `save_shard`, and its place in it.
    """

    def __init__(self, rows: Dataset, places: list[tuple[Path, int]]):
        self.conversations = rows.select_columns("messages")
        numbers = {file: number for number, file in enumerate(dict.fromkeys(file for file, _ in places))}
        self.shards = [load_file(file) for file in numbers]  # maps the files: nothing is read yet
        self.places = torch.tensor([(numbers[file], at) for file, at in places])
        self.columns: dict[str, torch.Tensor] = {}  # what else is known of each image

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict:
        if index >= len(self):
            raise IndexError(f"There are {len(self)} images.")
        number, at = self.places[index].tolist()
        shard = self.shards[number]
        start, end = int(shard["ends"][at - 1]) if at else 0, int(shard["ends"][at])
        return {
            **self.conversations[index],
            **{name: shard[name][start:end] for name in ENCODED if name in shard},
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
    """Return the tensors of a file of features.

    They are `features` (views, left, dim) and `prior` (views, left) of the patches that the encoder left, which ones
    these are, `places` (views, left), if it dropped any, and of each image where its views end and its height and
    width, in a batch without many views those of a view.
    """
    parts = {"features": [], "prior": [], "places": [], "views": [], "sizes": []}
    for batch in batches:
        pixels, sizes = batch["pixel_values"], batch.get("image_sizes")
        layout = model.model.lay_out(pixels, sizes)
        views, in_picture = layout.cut(pixels)
        encoded = model.model.encode(views, in_picture=in_picture)
        for name, values in zip(("features", "prior", "places"), encoded, strict=True):
            parts[name].append(values.cpu().bfloat16() if name == "features" else values.cpu())
        parts["views"].append(torch.tensor(layout.views))
        view = model.config.vision_config.image_size
        parts["sizes"].append(torch.full((len(layout.views), 2), view) if sizes is None else sizes.cpu().long())
    shard = {name: torch.cat(tensors) for name, tensors in parts.items()}
    if shard["places"].shape[1] == model.config.num_patches:
        del shard["places"]
    return {**shard, "ends": shard.pop("views").cumsum(dim=0)}


def encode_shards(
    model: LightVLMForConditionalGeneration,
    processor: LightVLMProcessor,
    shards: list[dict[str, dict]],
    num_workers: int,
    folder: Path,
) -> None:
    """Write a file for each group of images by name."""
    images = [list(shard.values()) for shard in shards]
    batches = [shard[start : start + BATCH] for shard in images for start in range(0, len(shard), BATCH)]
    loader = DataLoader(
        batches, batch_size=None, collate_fn=partial(open_images, processor=processor), num_workers=num_workers
    )
    progress = iter(tqdm(loader, "Encoding images", disable=not batches))
    for shard in shards:
        encoded = encode_shard(model, islice(progress, math.ceil(len(shard) / BATCH)))
        save_shard(encoded, list(shard), folder)


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
        folder: for the features, in a folder named after the encoder; by default beside the cache of `datasets`. A run
            reads what others encoded, whichever images and in whatever order; one that was interrupted goes on.

    Returns:
        For each row its `messages`, and of its image `features` (views, left, dim) in bf16, `prior` (views, left),
        `places` (views, left) if the encoder drops patches, and `size` (height, width), as the image processor saw it.

    Raises:
        ValueError: if an image cannot be read.
    """
    state = PartialState()
    folder = Path(folder or Path(datasets.config.HF_DATASETS_CACHE, "lightvlm"), name_encoder(model, processor))
    folder.mkdir(parents=True, exist_ok=True)
    images = [image for (image,) in rows.with_format("arrow")["images"].to_pylist()]
    names = [name_image(image) for image in images]
    by_name = dict(zip(names, images, strict=True))
    with FileLock(folder / "lock") if state.is_main_process else nullcontext():  # another run waits until all is done
        if state.is_main_process:
            tidy(folder, by_name.keys())
        state.wait_for_everyone()
        encoded = find_images(folder)
        missing = [name for name in by_name if name not in encoded]
        state.wait_for_everyone()  # all have found the same, so they share the rest in the same way
        shards = [missing[start : start + SHARD] for start in range(0, len(missing), SHARD)]
        mine = shards[state.process_index :: state.num_processes]
        encode_shards(
            model, processor, [{name: by_name[name] for name in shard} for shard in mine], num_workers, folder
        )
        state.wait_for_everyone()
    places = find_images(folder)
    return EncodedImages(rows, [places[name] for name in names])


def stack_features(examples: list[dict], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Return a batch's `features`, `prior` and `places` of `encode_shard`, and `sizes` (images, 2)."""
    stacked = {name: torch.cat([example[name] for example in examples]) for name in ENCODED if name in examples[0]}
    stacked["sizes"] = torch.tensor([example["size"] for example in examples])
    return {name: values.to(device) for name, values in stacked.items()}


def lay_out_batch(
    features: torch.Tensor,
    prior: torch.Tensor,
    sizes: torch.Tensor,
    config: LightVLMConfig,
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Layout]:
    """Lay out `stack_features`'s batch: float32 features (images, tokens, dim), prior (images, tokens), and layout."""
    if config.image_grid_pinpoints is None:
        layout = one_view(config.patches_per_side, len(sizes), features.device)
    else:
        layout = lay_out([(int(height), int(width)) for height, width in sizes], config, features.device)
    if places is None:  # all of them
        places = torch.arange(layout.patches, device=features.device).expand(len(features), -1)
    features, prior, layout = layout.place(places, features, prior)
    return features.float(), prior, layout
