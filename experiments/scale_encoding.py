"""Measure time and memory of encoding images once, and of reading their features in batches afterwards.

    accelerate launch --num_processes 2 --cpu --mixed_precision no experiments/scale_encoding.py \\
        --model-path checkpoints/lightvlm-tiny --data-path build/scale/rows.json \\
        --image-folder build/scale --images 20000 --folder build/features

Rows of `scale.py`, whose images are sixteen files; each row is encoded as if it had its own.
"""

import argparse
import random
import re
import time
from pathlib import Path

from accelerate import PartialState
from lightvlm.data.features import ImageArguments, encode_rows, load_rows, stack_features
from lightvlm.inference.checkpoint import load


def own_memory() -> int:
    """Return the megabytes of this process that are no mapped files."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--image-folder", required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--folder", required=True)
    args = parser.parse_args()
    state = PartialState(cpu=True)
    model, processor = load(args.model_path, "float32")
    rows = load_rows(ImageArguments("", [args.data_path], args.image_folder, max_images=[args.images]), 0)
    before = own_memory()
    state.wait_for_everyone()
    start = time.perf_counter()
    examples = encode_rows(model, processor, rows, 0, args.folder)
    seconds, encoded = time.perf_counter() - start, own_memory()
    for _ in range(200):
        stack_features([examples[index] for index in random.sample(range(len(examples)), 32)])
    if state.is_main_process:
        print(
            f"{args.images} images, {state.num_processes} processes: {seconds:.1f} s; own memory {before} MB before, "
            f"{encoded} after, {own_memory()} after 200 batches; {len(examples)} examples"
        )


if __name__ == "__main__":
    main()
