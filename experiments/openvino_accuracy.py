"""Measure what folders of `lightvlm export --openvino` answer, by OpenVINO GenAI's own pipeline, side by side.

    lightvlm export --openvino --num-image-tokens 64 --output-dir build/exact
    lightvlm export --openvino --num-image-tokens 64 --weights int8 --output-dir build/int8
    python experiments/openvino_accuracy.py build/exact build/int8 \
        --output evaluation/results/once/openvino_accuracy.json

Answers count as in `lightvlm eval`. `same` is the share of a folder's answers that are the first folder's.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from lightvlm.data.files import write_json
from lightvlm.evaluation.accuracy import wilson_interval
from PIL import Image

DATA = [Path(f"data/easy-vqa/mosaics_test_{kind}_3x3.json") for kind in ("photo", "flat")]


def ask(pipeline: openvino_genai.VLMPipeline, rows: list[dict], folder: Path) -> list[str]:
    """Return the answer to the first question of each row."""
    options, answers = openvino_genai.GenerationConfig(max_new_tokens=16), []
    for row in rows:
        question = row["conversations"][0]["value"].replace("<image>", "").strip()
        with Image.open(folder / row["image"]) as image:
            pixels = openvino.Tensor(np.array(image.convert("RGB")))
        output = pipeline.generate(question, images=[pixels], generation_config=options)
        answers.append(output.texts[0].strip())
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="the first is what the others are compared with")
    parser.add_argument("--data-path", nargs="+", type=Path, default=DATA, help="LLaVA JSON")
    parser.add_argument("--image-folder", type=Path, default=Path("data/easy-vqa/images"))
    parser.add_argument("--limit", type=int, default=600, help="the first so many rows of each file")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    results, first = [], {}
    for path in args.data_path:
        rows = json.loads(path.read_text())[: args.limit]
        expected = [row["conversations"][1]["value"].strip() for row in rows]
        for folder in args.folders:
            pipeline = openvino_genai.VLMPipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32")
            about = json.loads((folder / "lightvlm.json").read_text())
            answers = ask(pipeline, rows, args.image_folder)
            correct = sum(found == right for found, right in zip(answers, expected, strict=True))
            low, high = wilson_interval(correct, len(rows))
            same = sum(found == other for found, other in zip(answers, first.setdefault(path, answers), strict=True))
            row = {name: about[name] for name in ("num_image_tokens", "weights", "encoder", "calibration_images")}
            row |= {"data": path.stem, "total": len(rows), "correct": correct, "accuracy": correct / len(rows)}
            results.append(row | {"low": low, "high": high, "same": same / len(rows)})
            print(results[-1], flush=True)
            packages = {"openvino-genai": openvino_genai.__version__, **about["made_with"]}
            write_json(args.output, {**about["checkpoint"], "made_with": packages, "results": results})


if __name__ == "__main__":
    main()
