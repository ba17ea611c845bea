"""Questions about images, read from the rows of a file; a row that cannot be read is an error of its own."""

import json
import reprlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightvlm.data.image_fields import image_names
from lightvlm.data.llava import IMAGE_MARK, attempt, find_image, read_rows

QUESTION_KEYS = ("question", "prompt", "text")
TURN_KEYS = ("conversations", "messages", "prompt")
PART_KEYS = ("image", "path", "url", "image_url")  # of an image part, any of them may have its path or URL
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Ask:
    """A question about images, which are paths or URLs, with its place in the input.

    Args:
        row: its number in the input, from 0, blank lines not counted.
        id: the row's own, or its number.
        images: of all messages up to the question, in order.
        question: the last message.
        history: messages before it, whose image parts stand for the first of the images.
        turn: number of the question in its row, from 0.
        line: what errors call it: the line in the file, the place in the list, or the question's number, from 1.
        kept: at a fixed K, tokens of each image, of which a small one may have fewer; known once they are opened.
    """

    row: int
    id: str | int
    images: list[str]
    question: str
    history: list[dict] = field(default_factory=list)
    turn: int = 0
    line: int = 0
    kept: list[int] | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Return what tells it from all other questions of the input."""
        return self.row, self.turn

    def messages(self, images: Iterable = ()) -> list[dict]:
        """Return the conversation for a chat template; with images, in order, in its image parts."""
        rest = [{"type": "image"}] * (len(self.images) - sum(map(count_images, self.history)))
        asked = {"role": "user", "content": [*rest, text_part(self.question)]}
        opened = iter(images)
        return [
            {**message, "content": [fill(part, opened) for part in message["content"]]}
            for message in [*self.history, asked]
        ]

    def about(self) -> dict:
        """Return what a line of answers says of it; `history` only if there is one."""
        about = {"row": self.row, "turn": self.turn, "id": self.id, "image": self.images, "question": self.question}
        return about | ({"history": self.history} if self.history else {})


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def count_images(message: dict) -> int:
    return sum(part["type"] == "image" for part in message["content"])


def fill(part: dict, images: Iterator) -> dict:
    """Return a part of a message; an image part with the next of the images, if there is one."""
    return part | {"image": image} if part["type"] == "image" and (image := next(images, None)) else part


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def read_asks(path: str, image_folder: str | Path | None = None) -> tuple[list[Ask], dict[int, Exception]]:
    """Return the questions of a file, and the errors of unreadable rows, by line or place in the list from 1.

    Args:
        path: JSON lines (.jsonl, or - for standard input) or a JSON list, of rows with `image` or `images` (a path, a
            URL or a list; see `image_names`), and what is asked: a text under one of `QUESTION_KEYS`, or turns under
            one of `TURN_KEYS`, LLaVA's `{from: human | gpt, value}` or `{role: user | assistant | system, content}`,
            content a text or a list of text and image parts. Of turns each question is one, with the turns before it,
            the row's own answers among them, as its history. `question_id` or `id` names the row.
        image_folder: what paths are relative to; the working directory if None.
    """
    asks, errors = [], {}
    for row, (line, content) in enumerate(numbered_rows(path)):
        found = attempt(to_asks, row, line, content, image_folder)
        if isinstance(found, Exception):
            errors[line] = found
        else:
            asks += found
    return asks, errors


def numbered_rows(path: str) -> Iterator[tuple[int, Any]]:
    """Yield rows with their lines, or places in a list, from 1; an error in place of a line that is no JSON."""
    if path == "-":
        yield from parse_lines(sys.stdin.buffer)
    elif Path(path).suffix == ".jsonl":
        with open(path, "rb") as file:
            yield from parse_lines(file)
    else:
        try:
            yield from enumerate(read_rows(path), start=1)
        except RecursionError:
            raise ValueError(f"{path} cannot be read: its brackets are nested too deeply") from None


def parse_lines(file: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """Return what each line of JSON lines holds, or its error, with its number from 1; blank lines are counted."""
    return ((number, attempt(parse, line)) for number, line in enumerate(file, start=1) if line.strip())


def parse(line: bytes) -> Any:
    """Return what a line of JSON holds; ValueError if it is none."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def to_asks(number: int, line: int, row: Any, image_folder: str | Path | None) -> list[Ask]:
    """Return the questions of a row, whose files exist; ValueError or OSError if it has none."""
    if isinstance(row, Exception):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"{reprlib.repr(row)} is no object")
    turns = to_turns(row)
    place_images(turns, image_names(row))
    row_id = next((row[key] for key in ("question_id", "id") if row.get(key) is not None), number)
    if not isinstance(row_id, int | float | str):
        raise ValueError(f"the id {reprlib.repr(row_id)} is neither a number nor a text")
    asks, images, history = [], [], []
    for turn in turns:
        images = [*images, *(locate(name, image_folder) for name in turn.images)]
        if turn.role == "user":
            asks.append(Ask(number, row_id, images, turn.text, [*history], len(asks), line))
        history.append(turn.message())
    try:
        json.dumps([ask.about() for ask in asks], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text has half a character, a lone surrogate") from None
    return asks


@dataclass
class Turn:
    """What one side says: `images` are paths or URLs, None if the row's next picture is meant."""

    role: str
    text: str
    images: list

    def message(self) -> dict:
        """Return it as a message of a chat template, with marks for its images."""
        return {"role": self.role, "content": [{"type": "image"}] * len(self.images) + [text_part(self.text)]}


def to_turns(row: dict) -> list[Turn]:
    """Return a row's turns, from the system's or the first question to the last question; ValueError without one."""
    given = next((row[key] for key in TURN_KEYS if isinstance(row.get(key), list)), None)
    if given is None:
        question = next((row[key] for key in QUESTION_KEYS if row.get(key) is not None), None)
        if not isinstance(question, str):
            raise ValueError(
                f"no question: it is looked for as a text under {', '.join(QUESTION_KEYS)}, or as a list of turns "
                f"under {', '.join(TURN_KEYS)}"
            )
        given = [{"role": "user", "content": question}]
    turns = [to_turn(turn) for turn in given]
    while turns and turns[-1].role != "user":
        turns.pop()  # the row's own last answer
    if len(turns) > 1 and turns[0].role == "assistant":
        turns.pop(0)  # as in training, where it is an answer to nothing
    said = [turn.role for turn in turns if turn.role != "system"]
    if said != ["user", "assistant"] * (len(said) // 2) + ["user"]:
        raise ValueError("no question, or two turns of one side in a row")
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("a system message that is not the first")
    if not all(turn.text for turn in turns):
        raise ValueError("no question: a turn has no text")
    return turns


def to_turn(turn: Any) -> Turn:
    """Return a turn of LLaVA's or of a chat template's form; image marks in its text stand for images."""
    fields = turn if isinstance(turn, dict) else {}
    role, content = fields.get("from", fields.get("role")), fields.get("value", fields.get("content"))
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str | list):
        raise ValueError(
            f"the turn {reprlib.repr(turn)} is neither {{from: human | gpt, value}} nor {{role, content}}"
        )
    texts, images = [], image_names({key: value for key, value in fields.items() if key not in ("value", "content")})
    for part in [text_part(content)] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].replace(IMAGE_MARK, ""))
            images += [None] * part["text"].count(IMAGE_MARK)
        elif kind in ("image", "image_url"):
            name = next((part[key] for key in PART_KEYS if part.get(key) is not None), None)
            images += image_names({"image": name.get("url", "") if isinstance(name, dict) else name}) or [None]
        else:
            raise ValueError(f"the part {reprlib.repr(part)} is neither a text nor an image")
    if images and ROLES[role] != "user":
        raise ValueError(f"an image in a turn of the {ROLES[role]}: only the user shows images")
    return Turn(ROLES[role], "".join(texts).strip(), images)


def place_images(turns: list[Turn], names: list[str]) -> None:
    """Give a row's pictures to the marks for them, or without marks all to the first question.

    Raises:
        ValueError: if there are more or fewer marks than pictures.
    """
    marks, rest = sum(turn.images.count(None) for turn in turns), iter(names)
    if not marks:
        first = next(turn for turn in turns if turn.role == "user")
        first.images = [*names, *first.images]
    elif marks != len(names):
        raise ValueError(f"{marks} images are meant in the turns, but {len(names)} are named under image or images")
    for turn in turns:
        turn.images = [next(rest) if name is None else name for name in turn.images]


def locate(name: str, image_folder: str | Path | None) -> str:
    """Return the path of a file, in the folder if one is given, or a URL; OSError if there is no such file."""
    if is_url(name):
        return name
    if name.startswith("data:"):
        raise ValueError("an image as a data URI: save it to a file, and give its path")
    if image_folder is not None:
        return find_image(name, image_folder)
    if not Path(name).is_file():
        raise FileNotFoundError(f"{name!r} is missing")
    return name
