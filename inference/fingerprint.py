"""What a checkpoint's answers depend on, as sha256: kept with answers and results, compared before they are used."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import snapshot_download

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
CONFIGURATION = (  # by name: whoever writes results into the folder does not change the checkpoint
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
CHOSEN_LATER = ("num_image_tokens", "mean_image_tokens")  # K, which stands beside each answer and result
THREADS = 32  # as for images in llava_data.py: a network disk takes milliseconds to answer


def hash_file(path: str | Path) -> str | None:
    """Return the sha256 of a file, None if there is no such file here, as for a URL."""
    if not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[str | Path]) -> dict[str, str | None]:
    """Return the sha256 of each file by its path, as `hash_file` does."""
    unique = [*dict.fromkeys(map(str, paths))]
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(unique, pool.map(hash_file, unique), strict=True))


def hash_together(paths: Iterable[Path]) -> str:
    """Return one file's sha256; of several, that of the lines which `sha256sum` prints in their folders."""
    hashes = hash_files(paths)
    if len(hashes) == 1:
        return str(*hashes.values())
    lines = "".join(f"{digest}  {Path(path).name}\n" for path, digest in hashes.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_configuration(paths: Iterable[Path]) -> str:
    """Return one sha256 of configuration files, without K, which may be chosen after it was measured."""
    found = []
    for path in paths:
        content = path.read_text(encoding="utf-8", errors="surrogateescape")
        if path.name in ("config.json", "processor_config.json"):
            fields = json.loads(content)
            content = json.dumps({name: value for name, value in fields.items() if name not in CHOSEN_LATER})
        found.append([path.name, content])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def checkpoint_folders(model_path: str | Path) -> list[Path]:
    """Return the folder of a checkpoint, in the cache if it is the Hub's, and behind an adapter's that of its base."""
    is_folder = Path(model_path).is_dir()
    folder = Path(model_path if is_folder else snapshot_download(str(model_path), local_files_only=True))
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_bytes()).get("base_model_name_or_path") if adapter.is_file() else None
    return [folder, *(checkpoint_folders(base) if base else [])]


def fingerprint(model_path: str | Path) -> dict[str, str]:
    """Return what a checkpoint's answers depend on, besides the options of a command.

    Args:
        model_path: folder, or Hub name of a checkpoint that has been loaded.

    Returns:
        `weights_sha256`, of the weight files, those of an adapter and its base included (`sha256sum
        model.safetensors`, or of several files `sha256sum *.safetensors | sha256sum`); `configuration_sha256`, of the
        files that configure model, generation, processor, tokenizer and chat template, but for K; `lightvlm`, the
        version.
    """
    folders = checkpoint_folders(model_path)
    weights = [path for folder in folders for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    configuration = [folder / name for folder in folders for name in CONFIGURATION if (folder / name).is_file()]
    return {
        "weights_sha256": hash_together(weights),
        "configuration_sha256": hash_configuration(configuration),
        "lightvlm": version("lightvlm"),
    }
