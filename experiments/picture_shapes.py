"""Measure the shipped checkpoint on one scene in pictures of many shapes, of which most have padding in their tiles.

    make data/wallpapers/ready
    python experiments/picture_shapes.py --output evaluation/results/once/picture_shapes.json

Each picture has one to nine shapes of easy-VQA, one in each ninth, which are 40 to 60 pixels large once the picture is
fitted to its grid. Number n has the same objects at the same places in each shape of picture, and one question of each
kind. `--padding black` fills the padding as LLaVA-NeXT does, in place of the picture's own edges.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
from lightvlm import LightVLMProcessor, processing_lightvlm
from lightvlm.data.files import write_json
from lightvlm.inference.answers import answer
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm.inference.fingerprint import fingerprint
from lightvlm.training.prepare_mosaics import (
    OBJECTS,
    Cell,
    ask_count,
    ask_existence,
    ask_place,
    cut_out,
    load_cells,
    places,
)
from lightvlm.training.prepare_scenes import CONTRAST, draw_background, kind_of, load_wallpapers
from PIL import Image

SIZES = [  # widths and heights; the first three have no padding, and the first is one view
    *[(336, 336), (672, 672), (1008, 1008), (518, 336), (336, 518), (400, 300), (300, 400), (500, 400), (640, 427)],
    *[(427, 640), (640, 480), (800, 600), (600, 800), (1280, 720), (720, 1280), (900, 300), (300, 900), (1500, 500)],
    *[(1200, 400), (1100, 900), (1024, 576)],
]
BATCH = 8  # pictures


def fit(size: tuple[int, int], processor: LightVLMProcessor) -> tuple[float, list[int]]:
    """Return the scale at which a picture of (width, height) is fitted to its grid, and the padding in pixels."""
    grids, (width, height) = processor.grids, size
    rows, columns = (max(1, count) for count in grids.tiles((height, width)))
    scale = min(columns * grids.view / width, rows * grids.view / height)
    return scale, [round(columns * grids.view - width * scale), round(rows * grids.view - height * scale)]


def draw(
    size: tuple[int, int], number: int, scale: float, cells: list[Cell], wallpapers: list[Image.Image]
) -> tuple[Image.Image, list[tuple[str, str]]]:
    """Return picture `number` in a size, on a plain ground or a photograph by turns, with a question of each kind."""
    canvas = draw_background(("flat", "photo")[number % 2], wallpapers, size, random.Random(number))
    rng, objects = random.Random(f"objects of {number}"), {}
    for ninth in rng.sample(range(9), rng.randint(1, 9)):
        middle = [
            (place + rng.uniform(0.35, 0.65)) * side / 3
            for place, side in zip((ninth % 3, ninth // 3), size, strict=True)
        ]
        cell, extent = rng.choice(cells), round(rng.uniform(40, 60) / scale)
        for _ in range(20):
            piece, opacity = cut_out(cell, extent)
            left, top = (round(at - side / 2) for at, side in zip(middle, piece.size, strict=True))
            behind = np.asarray(canvas.crop((left, top, left + piece.width, top + piece.height)))
            if np.abs(behind.mean(axis=(0, 1)) - piece.getpixel((0, 0))).max() > CONTRAST:
                break
            cell = rng.choice(cells)
        canvas.paste(piece, (left, top), opacity)
        objects[places(3)[ninth]] = OBJECTS[cell.label]
    asked: dict[str, tuple[str, str]] = {}
    while len(asked) < 2:  # a color and a shape
        question = ask_place(objects, rng)
        asked.setdefault(kind_of(question[0]), question)
    names = [*objects.values()]
    return canvas, [*asked.values(), ask_existence(names, rng), ask_count(names, rng)]


def measure(model, processor, size: tuple[int, int], args: argparse.Namespace, *sources) -> dict:
    """Return the accuracy in percent of each kind of question, their mean, and how often black was a wrong answer."""
    scale, padding = fit(size, processor)
    right, black = {}, 0
    for start in range(0, args.pictures, BATCH):
        talks, expected = [], []
        for number in range(start, min(start + BATCH, args.pictures)):
            image, questions = draw(size, number, scale, *sources)
            for question, reply in questions:
                content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
                talks.append([{"role": "user", "content": content}])
                expected.append((kind_of(question), reply))
        replies = answer(model, processor, talks, {"max_new_tokens": 8}, args.num_image_tokens)
        for (kind, wanted), reply in zip(expected, replies, strict=True):
            right.setdefault(kind, []).append(reply == wanted)
            black += reply == "black" and wanted != "black"
    accuracy = {kind: 100 * sum(some) / len(some) for kind, some in sorted(right.items())}
    accuracy["all"] = sum(accuracy.values()) / len(accuracy)
    return {"size": size, "tiles": processor.grids.tiles(size[::-1]), "padding": padding} | accuracy | {"black": black}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default=str(SHIPPED))
    parser.add_argument("--data-dir", type=Path, default=Path("data/easy-vqa"), help="of prepare_easy_vqa.py")
    parser.add_argument("--wallpapers", type=Path, default=Path("data/wallpapers"), help="unpacked Debian packages")
    parser.add_argument("--num-image-tokens", type=int, default=144)
    parser.add_argument("--sizes", nargs="+", default=["x".join(map(str, size)) for size in SIZES], help="of pictures")
    parser.add_argument("--pictures", type=int, default=96, help="of each shape, with four questions each")
    parser.add_argument("--padding", choices=["edge", "black"], default="edge")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    if args.padding == "black":
        processing_lightvlm.extend_edges = lambda tiles, grid, size: tiles
    model, processor = load(args.model_path, dtype="float32")
    sources = load_cells(args.data_dir, "test"), load_wallpapers(args.wallpapers, "test")
    about = {"num_image_tokens": args.num_image_tokens, "pictures": args.pictures, "padding": args.padding}
    about |= fingerprint(args.model_path)
    rows = []
    for size in (tuple(map(int, text.split("x"))) for text in args.sizes):
        started = time.time()
        rows.append(measure(model, processor, size, args, *sources))
        print(rows[-1], f"{time.time() - started:.0f} s", flush=True)
        write_json(args.output, about | {"results": rows})


if __name__ == "__main__":
    main()
