"""Time and memory of each part that reads LLaVA's 665,000 rows before training starts, each part in a process of its own.

    python -m lightvlm.evaluation.scale --rows 665000 --folder build/scale

The rows are as long as LLaVA-1.5's, one in sixteen has no image, and images are a few files.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SHARED = """
import time, torch
from lightvlm.common.llava_data import load_llava
from lightvlm.training import sft
from lightvlm.training.collator import StepSampler, group_rows, measure_rows
from functools import partial
"""
PARTS = {
    "imports alone": SHARED,
    "load_llava, the first run": SHARED + "rows = load_llava(path, folder)",
    "load_llava, the second run": SHARED + "rows = load_llava(path, folder)",
    "the second run, and the first row of an epoch in random order": SHARED
    + "rows = load_llava(path, folder)\n"
    + "rows[next(iter(StepSampler(len(rows), 128, lambda _: 64, 0, lambda: 0)))[0]]",
    "the second run, and the first row of an epoch grouped by length": SHARED
    + "rows = load_llava(path, folder)\nlengths, images = measure_rows(rows)\n"
    + "group = partial(group_rows, lengths=lengths, images=images, rows_per_step=128)\n"
    + "rows[next(iter(StepSampler(len(rows), 128, lambda _: 64, 0, lambda: 0, group=group)))[0]]",
    "the second run, and 4,000 rows for pruner.py": SHARED
    + "from lightvlm.training.features import ImageArguments, load_rows\n"
    + "load_rows(ImageArguments('', [path], folder, max_images=[4000]), 0)",
    "a stream, and its first row": SHARED + "next(iter(load_llava(path, folder, streaming=True)))",
}


def write_rows(folder: Path, count: int) -> None:
    """A LLaVA JSON file, with sixteen images."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(16):
        Image.new("RGB", (640, 480), (index * 15, 90, 90)).save(folder / f"{index}.jpg")
    words = ["what", "is", "in", "this", "picture", "and", "where", "does", "it", "stand"]
    with open(folder / "rows.json", "w") as file:
        for number in range(count):
            turns = []
            for turn in range(1 + number % 5):
                question = " ".join(words[: 3 + (number + turn) % 8])
                answer = " ".join(words * (1 + (number * 7 + turn) % 9))
                turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            row = {"id": str(number), "conversations": turns}
            if number % 16:
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
                row["image"] = f"{number % 16}.jpg"
            file.write("[" if number == 0 else ",\n")
            json.dump(row, file)
        file.write("]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=665_000)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    write_rows(args.folder, args.rows)
    path = args.folder / "rows.json"
    print(f"{path.stat().st_size / 1e6:.0f} MB")
    given = f"path, folder = {str(path)!r}, {str(args.folder)!r}\n"
    ends = "\nimport resource; print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    for name, code in PARTS.items():
        start = time.perf_counter()
        output = subprocess.run(
            [sys.executable, "-c", given + code + ends], check=True, capture_output=True, text=True
        )
        peak = output.stdout.rsplit("peak", 1)[1].strip()
        print(f"{name:65} {time.perf_counter() - start:7.1f} s {peak:>6} MB", flush=True)


if __name__ == "__main__":
    main()
