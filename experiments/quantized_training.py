"""Measure memory and time of LoRA training steps over a base in bf16, int8 and four bits; each in its own process.

python experiments/quantized_training.py --output evaluation/results/once/quantized_lora.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.benchmark.presets import preset_config, random_model
from lightvlm.benchmark.speed import peak_memory_bytes, reset_peak_memory
from lightvlm.benchmark.training_speed import STEP, make_batch, run_step
from lightvlm.data.files import write_json
from lightvlm.inference.checkpoint import SHIPPED
from lightvlm.inference.compilation import int8_config, nf4_config
from lightvlm.training.collator import LightVLMCollator
from lightvlm.training.sft import LightVLMArguments, LightVLMTrainer, freeze_all_but, make_lora_config
from trl import SFTConfig

BASES = ("bf16", "int8", "nf4")


def measure(base: str, folder: str) -> dict:
    """Return bytes of the weights and at the peak, and milliseconds of the third step."""
    quantization = {"bf16": None, "int8": int8_config(), "nf4": nf4_config(torch.bfloat16)}[base]
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    empty = peak_memory_bytes(cpu)
    model = LightVLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    weights = model.get_memory_footprint()
    arguments = LightVLMArguments(folder, [], num_image_tokens=64, lora_r=128)
    freeze_all_but(model, arguments.full_parts)
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            scratch, bf16=True, use_cpu=True, max_length=None, report_to="none", remove_unused_columns=False
        )
        trainer = LightVLMTrainer(
            arguments,
            model=model,
            args=settings,
            data_collator=LightVLMCollator(LightVLMProcessor.from_pretrained(SHIPPED)),
            train_dataset=Dataset.from_list([{"messages": [], "images": []}]),
            processing_class=LightVLMProcessor.from_pretrained(SHIPPED),
            peft_config=make_lora_config(model, arguments),
        )
    trainer.create_optimizer()
    trainer.accelerator.prepare_model(trainer.model)
    model = trainer.accelerator.unwrap_model(trainer.model)
    samples = [run_step(trainer, make_batch(model, 1, 128, 64)) for _ in range(3)]
    peak = samples[-1]["peak_memory_bytes"] - empty
    return {"base": base, "weights": weights, "peak": peak, "step_ms": samples[-1][STEP]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="phi2-clip-l-336")
    parser.add_argument("--layers", type=int, default=8, help="of the language model")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--base", choices=BASES, help="measure this one alone, of the model in --folder")
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.base:
        print(json.dumps(measure(args.base, args.folder)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(preset_config(args.preset, args.layers), "cpu", torch.bfloat16)
        model.save_pretrained(folder)
        del model
        for base in BASES:
            command = [sys.executable, __file__, "--base", base, "--folder", folder]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(found.stdout.splitlines()[-1]))
            print(results[-1], flush=True)
    write_json(args.output, {"results": results})


if __name__ == "__main__":
    main()
