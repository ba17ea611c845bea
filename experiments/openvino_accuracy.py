"""Measure what folders of `lightvlm export --openvino` answer by OpenVINO GenAI, and graphs of the encoder in PyTorch.

    lightvlm export --openvino --num-image-tokens 64 --output-dir build/exact
    lightvlm export --openvino --num-image-tokens 64 --weights int8 --output-dir build/int8
    lightvlm export --num-image-tokens 64 --int8 --output build/int8.onnx
    python experiments/openvino_accuracy.py build/exact build/int8 build/int8.onnx \
        --output evaluation/results/once/openvino_accuracy.json

Answers count as in `lightvlm eval`. `same` is the share of answers that are those of the first folder or graph.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from lightvlm.data.files import write_json
from lightvlm.evaluation.accuracy import wilson_interval
from lightvlm.inference.any_model import load_any
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.inference.fingerprint import fingerprint
from lightvlm.inference.openvino_model import BACKEND
from lightvlm.inference.own_model import Options
from PIL import Image

DATA = [Path(f"data/easy-vqa/mosaics_test_{kind}_3x3.json") for kind in ("photo", "flat")]
PACKAGES = ("nncf", "onnxruntime", "openvino", "openvino-genai", "openvino-tokenizers", "torch", "transformers")


def open_folder(folder: Path) -> tuple[Callable[[Image.Image, str], str], dict]:
    """Return what answers a question about a picture by GenAI's own pipeline, and what the folder says of itself."""
    pipeline = openvino_genai.VLMPipeline(str(folder), "CPU", **BACKEND, INFERENCE_PRECISION_HINT="f32")
    options = openvino_genai.GenerationConfig(max_new_tokens=16)

    def ask(image: Image.Image, question: str) -> str:
        tensor = openvino.Tensor(np.array(image))
        return pipeline.generate(question, images=[tensor], generation_config=options).texts[0].strip()

    about = json.loads((folder / "lightvlm.json").read_text())
    return ask, {name: about[name] for name in ("num_image_tokens", "weights", "encoder", "calibration_images")}


def open_graph(path: Path) -> tuple[Callable[[Image.Image, str], str], dict]:
    """Return what answers a question by the shipped checkpoint in PyTorch, images by the graph, and what that is."""
    asked = load_any(str(SHIPPED), encoder=path, dtype="float32", device="cpu")

    def ask(image: Image.Image, question: str) -> str:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        (answer,) = asked.answer(
            [[{"role": "user", "content": content}]], {"max_new_tokens": 16}, Options(max_views=1)
        )
        return answer.text

    return ask, {"num_image_tokens": asked.default, "weights": None, "encoder": path.name}


def ask_all(ask: Callable[[Image.Image, str], str], rows: list[dict], folder: Path) -> list[str]:
    """Return the answer to the first question of each row."""
    answers = []
    for row in rows:
        question = row["conversations"][0]["value"].replace("<image>", "").strip()
        with Image.open(folder / row["image"]) as image:
            answers.append(ask(image.convert("RGB"), question))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", nargs="+", type=Path, help="folders, and .onnx files of lightvlm export")
    parser.add_argument("--data-path", nargs="+", type=Path, default=DATA, help="LLaVA JSON")
    parser.add_argument("--image-folder", type=Path, default=Path("data/easy-vqa/images"))
    parser.add_argument("--limit", type=int, default=600, help="the first so many rows of each file")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    results, first = [], {}
    for path in args.measured:
        ask, about = (open_folder if path.is_dir() else open_graph)(path)
        for data in args.data_path:
            rows = json.loads(data.read_text())[: args.limit]
            answers = ask_all(ask, rows, args.image_folder)
            expected = [row["conversations"][1]["value"].strip() for row in rows]
            correct = sum(found == right for found, right in zip(answers, expected, strict=True))
            low, high = wilson_interval(correct, len(rows))
            same = sum(found == other for found, other in zip(answers, first.setdefault(data, answers), strict=True))
            row = about | {"runtime": "OpenVINO GenAI" if path.is_dir() else "PyTorch", "data": data.stem}
            row |= {"total": len(rows), "correct": correct, "accuracy": correct / len(rows)}
            results.append(row | {"low": low, "high": high, "same": same / len(rows)})
            print(results[-1], flush=True)
            packages = {name: version(name) for name in PACKAGES}
            write_json(args.output, {**fingerprint(str(SHIPPED)), "made_with": packages, "results": results})


if __name__ == "__main__":
    main()
