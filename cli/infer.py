"""Ask questions about images, at one or several token budgets side by side.

examples:
  lightvlm infer --image photo.jpg --prompt "What is in this image?"
  lightvlm infer --image a.png b.png --prompt "what color is the shape?" --num-image-tokens 576,144,64
  lightvlm infer --image a.png --prompt "is there a circle?" --num-image-tokens 64 --format json
"""

import argparse
import itertools
import json
import statistics
import time

from lightvlm_cli.options import add_model_path, add_precision, budget_list, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_path(parser)
    parser.add_argument("--image", nargs="+", required=True, help="image files")
    parser.add_argument("--prompt", nargs="+", required=True, help="questions; each is asked about each image")
    parser.add_argument(
        "--num-image-tokens", type=budget_list, default=[None], help="K, or several: 576,144,dynamic:64"
    )
    parser.add_argument("--max-views", type=positive, help="of a large image, how many views are encoded (all)")
    parser.add_argument("--question-aware", action="store_true", help="let each question choose the tokens")
    add_precision(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    parser.add_argument("--format", choices=["text", "json"], default="text")


def ask(model, processor, image, prompt: str, num_image_tokens: int | str | None, args: argparse.Namespace) -> dict:
    """One answer, with the tokens kept and the language model's prefill time (median of 5 after a warm-up)."""
    import torch

    budget = processor.num_image_tokens if num_image_tokens is None else num_image_tokens
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
    options = {"num_image_tokens": budget, "max_views": args.max_views}
    options |= {"question": prompt} if args.question_aware else {}
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    ).to(model.device)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        features = model.get_image_features(**images)
        kept, prefill = len(features.kept_indices[0]), inputs["input_ids"]
        start = prefill[0].tolist().index(processor.image_token_id)
        surplus = int(inputs["num_image_tokens"][0]) - kept
        prefill = torch.cat([prefill[:, :start], prefill[:, start + surplus :]], dim=1)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            logits = model(prefill, mm_encoder_outputs={"image": features}, logits_to_keep=1).logits
            logits.argmax().item()  # waits for a GPU
            times.append(1000 * (time.perf_counter() - start))
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {
        "answer": answer.strip(),
        "budget": budget,
        "num_image_tokens": kept,
        "num_patches": features.lengths[0] if features.lengths else processor.num_patches,
        "prefill_ms": round(statistics.median(times[1:]), 1),
    }


def run(args: argparse.Namespace) -> None:
    from lightvlm.common.checkpoint import check_question_aware, load
    from lightvlm.processing.processing_lightvlm import open_image

    images = [(path, open_image(path)) for path in args.image]
    model, processor = load(args.model_path, args.dtype, args.int8)
    if args.question_aware:
        check_question_aware("--question-aware", args.model_path, model)
    results = []
    for (path, image), prompt, budget in itertools.product(images, args.prompt, args.num_image_tokens):
        answer = ask(model, processor, image, prompt, budget, args)
        results.append({"image": path, "prompt": prompt, **answer})
    print(json.dumps(results, indent=2) if args.format == "json" else table(results))


def table(results: list[dict]) -> str:
    """A block for each image and prompt, a line for each budget."""
    lines = []
    for (path, prompt), block in itertools.groupby(results, key=lambda result: (result["image"], result["prompt"])):
        lines.append(f"\n{path}  {prompt}")
        for result in block:
            kept = f"{result['num_image_tokens']} of {result['num_patches']} tokens"
            kept += f" ({result['budget']})" if isinstance(result["budget"], str) else ""
            lines.append(f"  {kept:>18}   prefill {result['prefill_ms']:7.1f} ms   {result['answer']}")
    return "\n".join(lines)
