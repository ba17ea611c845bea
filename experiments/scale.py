"""Measure time and memory of reading 665,000 rows, as LLaVA has, before training; each part in its own process.

    python experiments/scale.py --rows 665000 --folder build/scale

The rows are as long as LLaVA-1.5's, one in sixteen has no image, and images are a few files.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SHARED = """
import json, re, resource, time
from functools import partial
from lightvlm.data.llava import load_llava
from lightvlm.training import sft
from lightvlm.training.collator import StepSampler, group_rows, measure_rows
from lightvlm.data.features import ImageArguments, load_rows
start = time.perf_counter()
"""
READ = "rows = load_llava(path, folder)\n"
FIRST = "rows[next(iter(StepSampler(len(rows), 128, lambda _: 64, 0, lambda: 0{})))[0]]"
GROUP = """lengths, images = measure_rows(rows)
group = partial(group_rows, lengths=lengths, images=images, rows_per_step=128)
"""
PARTS = {
    "imports alone": "",
    "load_llava, the first run": READ,
    "load_llava, a later run": READ,
    "a later run and its first row, in random order": READ + FIRST.format(""),
    "a later run and its first row, grouped by length": READ + GROUP + FIRST.format(", group=group"),
    "4,000 rows for pruner.py": "load_rows(ImageArguments('', [path], folder, max_images=[4000]), 0)",
    "a stream and its first row": "next(iter(load_llava(path, folder, streaming=True)))",
}
REPORT = """
seconds = time.perf_counter() - start
status = open("/proc/self/status").read()
own, mapped = (int(re.search(f"{name}:\\s+(\\d+)", status)[1]) // 1024 for name in ("RssAnon", "RssFile"))
print("found", f"{seconds:8.1f} s {own:6} MB of its own {mapped:6} MB of mapped files")
"""


def write_rows(folder: Path, count: int) -> None:
    """Write a LLaVA JSON file of so many rows, and its sixteen images."""
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
    for name, code in PARTS.items():
        command = [sys.executable, "-c", given + SHARED + code + REPORT]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        print(f"{name:50}{output.stdout.rsplit('found', 1)[1].rstrip()}", flush=True)


if __name__ == "__main__":
    main()
