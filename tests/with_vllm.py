"""The released folder answers in vLLM as it does in transformers, token by token. `make test-vllm` runs it.

Test images, all in one batch, at the checkpoint's own K and at others; a request's dynamic budget keeps all tokens.
Not a part of `make test`: vLLM needs a virtual environment of its own.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams

BUDGETS = (None, 64, 16, 576)
NEW_TOKENS = 24


def read_questions(data: Path, images: Path, count: int) -> list[tuple[Image.Image, str]]:
    """Return images and first questions of rows from all over a LLaVA file."""
    rows = json.loads(data.read_text())
    return [
        (Image.open(images / row["image"]).convert("RGB"), row["conversations"][0]["value"].replace("<image>\n", ""))
        for row in rows[:: max(1, len(rows) // count)][:count]
    ]


def ask_transformers(model, processor, image: Image.Image, prompt: str, budget: int | None) -> list[int]:
    inputs = processor(images=image, text=prompt, num_image_tokens=budget, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default="checkpoints/lightvlm-tiny")
    parser.add_argument("--data-path", type=Path, required=True)
    parser.add_argument("--image-folder", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.model_path, trust_remote_code=True)
    questions = read_questions(args.data_path, args.image_folder, args.questions)
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for _, question in questions
    ]
    engine = LLM(
        args.model_path,
        trust_remote_code=True,
        model_impl="transformers",
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        tensor_parallel_size=args.tensor_parallel_size,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    model = AutoModelForImageTextToText.from_pretrained(args.model_path, trust_remote_code=True, dtype=torch.float32)
    different = 0
    for budget in BUDGETS:
        requests = [
            {"prompt": prompt, "multi_modal_data": {"image": image}}
            | ({"mm_processor_kwargs": {"num_image_tokens": budget}} if budget else {})
            for (image, _), prompt in zip(questions, prompts, strict=True)
        ]
        for (image, question), prompt, output in zip(
            questions, prompts, engine.generate(requests, sampling), strict=True
        ):
            expected = ask_transformers(model, processor, image, prompt, budget)
            found = list(output.outputs[0].token_ids)
            if found != expected:
                different += 1
                print(f"K = {budget}, {question}: {processor.decode(found)!r} is not {processor.decode(expected)!r}")
    total = len(BUDGETS) * len(questions)
    print(f"{total - different} of {total} answers are the same, token by token")
    first, asked = requests[0], {"mm_processor_kwargs": {"num_image_tokens": "dynamic:64"}}
    (dynamic,), (whole,) = (engine.generate(request, sampling) for request in (first | asked, first))
    same = dynamic.outputs[0].token_ids == whole.outputs[0].token_ids
    print(f"dynamic:64 keeps all tokens{'' if same else ', but answers otherwise'}")
    different += not same
    raise SystemExit(different > 0)


if __name__ == "__main__":
    main()
