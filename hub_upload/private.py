"""What must not be published with a checkpoint: files from elsewhere, tokens, and paths of this machine."""

import json
import re
from pathlib import Path

from lightvlm.images_lightvlm import reading
from PIL import Image

PICTURES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".gif": "GIF"}
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
)  # of code, so that they may have words such as /home/user
TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{36}|github_pat_\w{22,}|glpat-[\w-]{20,}"
    r"|sk-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|A(?:KI|SI)A[A-Z0-9]{16}|AIza[\w-]{35}|eyJ[\w-]{8,}\.eyJ[\w-]{8,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
HOMES = r"/home/[\w.-]+|/Users/[\w.-]+|[A-Za-z]:\\+Users\\+[\w.-]+"


def check_links(folder: Path) -> None:
    """Raise ValueError if a file is a link out of the folder, unless folder and file are of the Hub's cache."""
    root = folder.resolve()
    cache = root.parent.parent
    is_cached = root.parent.name == "snapshots" and cache.name.startswith("models--")
    places = [root, *([cache / "blobs"] if is_cached else [])]
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() and not any(file.resolve().is_relative_to(place) for place in places):
            raise ValueError(f"{file} is a link out of its folder, to {file.resolve()}: put the file itself there.")


def check_picture(path: Path) -> None:
    """Raise ValueError unless a file is a picture, and of the kind that its name says."""
    kind = PICTURES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} is no picture by its name: give one that ends in {', '.join(PICTURES)}.")
    with reading(path), Image.open(path, formats=[kind]) as image:
        image.load()


def strip_origins(path: Path) -> None:
    """Take from a JSON file the folders or names that parts were loaded from, which transformers notes in it."""

    def strip(value):
        if isinstance(value, list):
            return [*map(strip, value)]
        if isinstance(value, dict):
            return {key: strip(each) for key, each in value.items() if key not in ("_name_or_path", "name_or_path")}
        return value

    value = json.loads(path.read_text(encoding="utf-8"))
    if (stripped := strip(value)) != value:
        path.write_text(json.dumps(stripped, indent=2) + "\n", encoding="utf-8")


def check_texts(folder: Path, checkpoint: Path, name: str) -> None:
    """Raise ValueError, with file and line, if a text of a Hub folder has a token, or a path of this machine.

    Args:
        folder: to be published.
        checkpoint: that it was made of, whose own path is one of this machine's, as is the user's home.
        name: of the folder in its card; of a dry run its path, which may stand there.
    """
    own = {str(path) for path in (Path.home(), checkpoint.absolute(), checkpoint.resolve()) if len(path.parts) > 1}
    known = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.suffix.lower() in (".safetensors", *PICTURES):
            continue
        text = file.read_bytes().decode(errors="replace")
        text = text.replace(name, "") if Path(name).is_absolute() else text
        paths = known if file.name in VOCABULARIES or file.suffix == ".model" else f"{known}|{HOMES}"
        for kind, pattern in (("token", TOKENS), ("path of this machine", rf"(?<![\w.])(?:{paths})(?![\w-])")):
            if found := re.search(pattern, text):
                line = text.count("\n", 0, found.start()) + 1
                shown = found[0] if kind != "token" else f"{found[0][:7]}…"
                raise ValueError(
                    f"{file.relative_to(folder)}, line {line}, would publish a {kind}, {shown}: take it out of the "
                    f"file in {checkpoint}, or of that of --results."
                )
