"""Encoder, pruner and projector in PyTorch, ONNX Runtime and OpenVINO: milliseconds an image, and accuracy in int8.

python -m lightvlm.evaluation.compare_runtimes speed OUT.json
python -m lightvlm.evaluation.compare_runtimes accuracy OUT.json
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.common.checkpoint import SHIPPED
from lightvlm.common.export import ImageTokens, export_image_tokens
from lightvlm.common.llava_data import load_llava
from lightvlm.evaluation.accuracy import Questions
from lightvlm.evaluation.presets import preset_config, random_model
from lightvlm.modeling_lightvlm import LightVLMImageFeatures

FOLDER = Path("build/runtimes")
REPETITIONS = 7


def onnx(path):
    session = onnxruntime.InferenceSession(path)
    return lambda pixels: session.run(None, {"pixel_values": pixels})


def vino(path, precision):
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return lambda pixels: compiled({"pixel_values": pixels})


def eager(model, budget, dtype):
    module = ImageTokens(model.to(dtype), budget).eval()

    @torch.no_grad()
    def run(pixels):
        return module(torch.from_numpy(pixels).to(dtype))

    return run


@torch.no_grad()
def speed(out):
    results, pixels = [], np.random.default_rng(0).standard_normal((1, 3, 336, 336)).astype(np.float32)
    config = preset_config("phi2-clip-l-336", 1)
    config.text_config.intermediate_size, config.text_config.num_hidden_layers = 64, 1
    for keep in (None, {8: 0.5}):
        config.encoder_keep = keep
        model = random_model(config, "cpu", torch.float32)
        for name, int8 in (("f32.onnx", False), ("int8.onnx", True), ("f32.xml", False)):
            export_image_tokens(model, FOLDER / name, 64, int8=int8)
        twin = random_model(config, "cpu", torch.bfloat16)
        quantized = random_model(config, "cpu", torch.float32)
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(quantized.model.vision_tower, Int8DynamicActivationInt8WeightConfig())
        runs = {
            "PyTorch, float32": eager(model, 64, torch.float32),
            "PyTorch, bfloat16": eager(twin, 64, torch.bfloat16),
            "PyTorch, int8 (torchao, dynamic)": eager(quantized, 64, torch.float32),
            "ONNX Runtime, float32": onnx(FOLDER / "f32.onnx"),
            "ONNX Runtime, int8": onnx(FOLDER / "int8.onnx"),
            "OpenVINO, float32": vino(FOLDER / "f32.xml", "f32"),
            "OpenVINO, bfloat16": vino(FOLDER / "f32.xml", "bf16"),
        }
        times = {name: [] for name in runs}
        for repetition in range(1 + REPETITIONS):
            for name, run in runs.items():
                start = time.perf_counter()
                run(pixels)
                if repetition:
                    times[name].append(1000 * (time.perf_counter() - start))
        sizes = {name: (FOLDER / name).stat().st_size for name in ("f32.onnx", "int8.onnx")}
        for name, values in times.items():
            results.append({"runtime": name, "encoder_keep": str(keep), "ms": float(np.median(values))})
            print(results[-1], flush=True)
        print(sizes, flush=True)
        Path(out).write_text(json.dumps({"results": results, "bytes": sizes}, indent=2) + "\n")


@torch.no_grad()
def accuracy(out):
    model = LightVLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    processor = LightVLMProcessor.from_pretrained(SHIPPED)
    rows = load_llava("data/easy-vqa/mosaics_test_photo_3x3.json", "data/easy-vqa/images").select(range(2080))
    questions, results = Questions(rows, processor), []
    for budget in (64, 16):
        for name, int8 in (("f32", False), ("int8", True)):
            path = FOLDER / f"tiny_{name}_{budget}.onnx"
            export_image_tokens(model, path, budget, int8=int8)
            run, right, kept_as = onnx(path), 0, []
            for batch in questions.batches(64):
                pixels, _, about = questions.open_images(batch)
                found = [run(each[None].numpy()) for each in pixels]
                tokens = [torch.tensor(found[index][0][0]) for index in about]
                if int8:
                    own = model.model.get_image_features(pixels, num_image_tokens=budget).kept_indices
                    kept_as += [
                        len({*kept.tolist()} & {*each[1][0].tolist()}) / budget
                        for kept, each in zip(own, found, strict=True)
                    ]
                inputs = questions.tokenize(batch, [budget] * len(batch))
                image = {"image": LightVLMImageFeatures(pooler_output=tokens)}
                output = model.generate(**inputs, mm_encoder_outputs=image, max_new_tokens=16, do_sample=False)
                texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right += sum(text.strip() == questions.references[row] for text, row in zip(texts, batch, strict=True))
            line = {"graph": name, "num_image_tokens": budget, "accuracy": right / len(rows)}
            line |= {"same_patches": float(np.mean(kept_as))} if int8 else {}
            results.append(line)
            print(line, flush=True)
            Path(out).write_text(json.dumps({"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    {"speed": speed, "accuracy": accuracy}[sys.argv[1]](sys.argv[2])
