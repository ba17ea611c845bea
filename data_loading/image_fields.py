"""Which pictures a row of data names: none that it has is left unseen without a word."""

import re
import reprlib
from typing import Any

IMAGE_FIELDS = ("image", "images")
TURN_FIELDS = ("conversations", "messages", "prompt")  # whoever reads their turns looks for pictures in these
IMAGE_PARTS = ("image", "image_url", "input_image", "video")
PICTURE = re.compile(r"\S+\.(jpe?g|png|gif|webp|bmp|tiff?|heic|avif|mp4|webm|mov)|data:image/.*", re.I | re.S)
ENDING = r"(s|_?(id|name|path|file|url|uri)s?)?_?\d*(?![a-z])"
PICTURE_KEY = re.compile(rf"(?<![a-z])(image|img|picture|pic|photo|screenshot|frame|video|pixel|base64|b64){ENDING}")
PLACE_KEY = re.compile(rf"(?<![a-z])(file|path|url|uri){ENDING}")


def image_names(row: dict) -> list[str]:
    """Return the paths and URLs of a row's pictures, in order.

    Args:
        row: of JSON, with a path, or a list of paths, under `image` or, as TRL has it, under `images`. Without either,
            or with null or an empty list, it has no picture.

    Raises:
        ValueError: if one of the two is no path, they differ, or another key looks as if it named a picture.
    """
    given = [row[field] for field in IMAGE_FIELDS if row.get(field) not in (None, [])]
    lists = [names if isinstance(names, list) else [names] for names in given]
    for name in (name for names in lists for name in names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"the image {reprlib.repr(name)} is no path: give one, or leave the key out")
    names = lists[0] if lists else []
    if any(others != names for others in lists):
        raise ValueError("image and images differ: give one of them")
    others = {key: value for key, value in row.items() if key not in IMAGE_FIELDS}
    if unread := [key for key, value in others.items() if hides_picture(key, value, names)]:
        raise ValueError(
            f"{reprlib.repr(unread[0])} looks like a picture that is not read: call it "
            f"{' or '.join(IMAGE_FIELDS)}, or leave it out"
        )
    return names


def hides_picture(key: str, value: Any, read: list[str]) -> bool:
    """Return whether a field, or an object in it, looks as if it named a picture that is not read."""
    if isinstance(value, dict):
        is_part = value.get("type") in IMAGE_PARTS
        return is_part or any(hides_picture(inner, part, read) for inner, part in value.items())
    if isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        return key not in TURN_FIELDS and any(hides_picture(key, part, read) for part in value)
    return names_picture(key, value, read)


def names_picture(key: str, value: Any, read: list[str]) -> bool:
    """Return whether a key looks as if it named a picture; beside others that are read, one of its own."""
    if value is None or value == []:
        return False
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower()
    files = [file for file in (value if isinstance(value, list) else [value]) if isinstance(file, str)]
    pictures = {file.rpartition("/")[2] for file in files if PICTURE.fullmatch(file)}
    if read:
        return bool(PICTURE_KEY.search(words) and pictures - {name.rpartition("/")[2] for name in read})
    return bool(pictures or PICTURE_KEY.search(words) or PLACE_KEY.search(words))
