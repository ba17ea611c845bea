"""Memory and time of LoRA training steps over a base in bf16, int8 and four bits, on 8 layers of Phi-2's width.

python -m lightvlm.evaluation.quantized_training OUT.json
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.common.checkpoint import SHIPPED
from lightvlm.common.inference import int8_config, nf4_config
from lightvlm.evaluation.speed import peak_memory_bytes, reset_peak_memory
from lightvlm.evaluation.training_speed import STEP, make_batch, run_step
from lightvlm.training.collator import LightVLMCollator
from lightvlm.training.sft import LightVLMArguments, LightVLMTrainer, freeze_all_but, make_lora_config
from trl import SFTConfig

MODEL = "build/phi8"


def measure(base):
    quantization = {"bf16": None, "int8": int8_config(), "nf4": nf4_config(torch.bfloat16)}[base]
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    empty = peak_memory_bytes(cpu)
    model = LightVLM.from_pretrained(MODEL, dtype=torch.bfloat16, quantization_config=quantization)
    weights = model.get_memory_footprint()
    arguments = LightVLMArguments(MODEL, [], num_image_tokens=64, lora_r=128)
    freeze_all_but(model, arguments.full_parts)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder, bf16=True, use_cpu=True, max_length=None, report_to="none", remove_unused_columns=False
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
    print(json.dumps({"base": base, "weights": weights, "peak": peak, "step_ms": samples[-1][STEP]}))


def main(out):
    results = []
    for base in ("bf16", "int8", "nf4"):
        command = [sys.executable, "-m", "lightvlm.evaluation.quantized_training", "--base", base]
        results.append(
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        )
        print(results[-1], flush=True)
    Path(out).write_text(json.dumps({"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    measure(sys.argv[2]) if sys.argv[1] == "--base" else main(sys.argv[1])
