"""Ask questions about images: at several token budgets side by side, or many, in batches, to a file.

With --output answers are written as they come, one JSON object a line, and the same command goes on after a kill. They
are in the order in which they were given, prompts of like length together: `row` is the number in the input, from 0.
Rows and images that cannot be read are reported at the end, by their lines in the file, and the others are answered.

rows of --input, in JSON lines or a JSON list:
  {"image": "a.png", "question": "what color is it?"}
  {"id": 7, "images": ["a.png", "https://some.site/b.png"], "text": "which of them is red?"}
  {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nwhat?"}, {"from": "gpt", "value": "red"}]}
  {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]}]}
Pictures are read under image and images, questions under question, prompt, text, conversations and messages. Each
question of several turns has its own line of answers, with its number, from 0, under `turn`; the turns before it, with
the row's own answers, are its history. A row without a picture is text alone; one whose picture has another name, such
as image_path, is refused.

FILE.about.json, beside the output, has the sha256 of weights and configuration, and the options that decide.
The output is refused if that is missing, if checkpoint or an option is another, or if images have changed since, which
cannot be told of URLs: name another output, or remove it. FILE.lock, which may stay, is held while a run writes.
Under `accelerate launch` processes share the questions; what the others answer is in FILE.part1 and so on, and joins
the output at the end, or when the next run begins.

examples:
  lightvlm infer --image photo.jpg --prompt "What is in this image?"
  lightvlm infer --image a.png b.png --prompt "what color is the shape?" --num-image-tokens 576,144,64
  lightvlm infer --image photos "more/*.jpg" --prompt "is there a circle?" --num-image-tokens 64 --output answers.jsonl
  lightvlm infer --input questions.jsonl --image-folder images --output answers.jsonl --batch-size 64
  accelerate launch --num_processes 8 -m lightvlm_cli.main infer --input questions.jsonl --output answers.jsonl
  find photos -name "*.png" | lightvlm infer --image - --prompt "is there a circle?" --output answers.jsonl
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from lightvlm_cli.options import (
    add_any_model,
    add_device,
    add_encoder,
    add_precision,
    add_runtime,
    budget_list,
    claim_device,
    loading,
    positive,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_any_model(parser)
    add_encoder(parser)
    add_runtime(parser)
    parser.add_argument("--image", nargs="+", help="files, folders, patterns, URLs; - for a list of them on stdin")
    parser.add_argument("--prompt", nargs="+", help="questions; each is asked about each image")
    parser.add_argument(
        "--input", help="rows as above, .jsonl or a JSON list, in place of the two; - for JSON lines on stdin"
    )
    parser.add_argument("--image-folder", help="folder that --input's image paths are relative to")
    parser.add_argument("--output", type=Path, help="write answers to this file of JSON lines, in batches")
    parser.add_argument("--batch-size", type=positive, default=32, help="questions at a time, with --output (32)")
    parser.add_argument(
        "--num-image-tokens", type=budget_list, default=[None], help="K, a share, or several: 576,25%%,dynamic:64"
    )
    parser.add_argument("--max-views", type=positive, help="of a large image, how many views are encoded (all)")
    parser.add_argument("--question-aware", action="store_true", help="let each question choose the tokens")
    add_precision(parser)
    add_device(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy (0)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest words of this share")
    parser.add_argument("--num-beams", type=positive, default=1, help="of beam search (1)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="without --output (text)")


def generation(args: argparse.Namespace) -> dict:
    """Return arguments for `generate`."""
    options = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams, "do_sample": args.temperature > 0}
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    return options | (sampling if options["do_sample"] else {})


def ask(asked, image, prompt: str, budget: int | str | None, args: argparse.Namespace) -> dict:
    """Return one answer, and how many tokens of the image it was given from."""
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
    (answer,) = asked.answer([messages], generation(args), options(args, budget))
    return {
        "answer": answer.text,
        "budget": asked.default if budget is None else budget,
        "num_image_tokens": answer.kept[0],
        "num_patches": answer.whole[0],
    }


def options(args: argparse.Namespace, budget: int | str | None):
    """Return how images are read at a K."""
    from lightvlm.inference.own_model import Options

    return Options(budget, args.max_views, args.question_aware)


def run(args: argparse.Namespace) -> None:
    if bool(args.input) == bool(args.image and args.prompt) or bool(args.image) != bool(args.prompt):
        raise ValueError("give either --image and --prompt, or --input")
    if args.input and not args.output:
        raise ValueError("--input needs --output, a file for the answers")
    if args.temperature < 0 or not (args.top_p is None or 0 < args.top_p <= 1):
        raise ValueError("--temperature is 0 or more, and --top-p more than 0 and at most 1")
    if args.top_p and not args.temperature:
        raise ValueError("--top-p needs sampling: give --temperature too, such as 1")

    from lightvlm.inference.answer_log import on_main
    from lightvlm.inference.any_model import load_any
    from lightvlm.inference.many import expand_images, open_named
    from transformers import set_seed

    claim_device(args)
    names = on_main(expand_images, args.image) if args.image else []
    images = [] if args.output else list(zip(names, open_named(names), strict=True))
    asked = load_any(args.model_path, **loading(args))
    budgets = [asked.resolve(budget) for budget in args.num_image_tokens]
    for budget in budgets:
        asked.check(options(args, budget))
    set_seed(args.seed)
    if args.output:
        write_answers(args, asked, names, budgets)
        return
    results = []
    for (path, image), prompt, budget in itertools.product(images, args.prompt, budgets):
        answer = ask(asked, image, prompt, budget, args)
        results.append({"image": path, "prompt": prompt, **answer})
    print(json.dumps(results, indent=2) if args.format == "json" else table(results))


def decisive(args: argparse.Namespace, asked) -> dict:
    """Return what answers depend on, besides the questions and K, which stand beside each answer."""
    chosen = generation(args)
    chosen |= {"seed": args.seed} if chosen["do_sample"] else {}
    about = {"dtype": str(asked.model.dtype), "int8": args.int8, **chosen}
    return asked.describe(options(args, None)) | about


def write_answers(args: argparse.Namespace, asked, names: list[str], budgets: list[int | str | None]) -> None:
    """Answer everything into the output file; ValueError, at the end, with what could not be answered."""
    from lightvlm.inference.answer_log import AnswerLog, on_main
    from lightvlm.inference.asks import Ask, read_asks
    from lightvlm.inference.many import answer_all

    if args.input:
        asks, refused = on_main(read_asks, args.input, args.image_folder)
    else:
        pairs = enumerate(itertools.product(names, args.prompt))
        asks, refused = [Ask(row, row, [name], prompt, line=row + 1) for row, (name, prompt) in pairs], {}
    errors = {}
    with AnswerLog(args.output, on_main(decisive, args, asked)) as log:
        unique = [*dict.fromkeys(budgets)]
        for budget in unique[1:]:  # before the first answers; the first is told as soon
            asked.check_largest(options(args, budget))
        for budget in unique:
            found = answer_all(asked, asks, log, options(args, budget), args.batch_size, generation(args), args.seed)
            errors = found | errors  # the first of a row
            tell_fewer(args.output, [ask for ask in asks if ask.row not in found], budget)
    if not log.state.is_main_process:
        return
    lines = {ask.row: ask.line for ask in asks}
    refused |= {lines[row]: error for row, error in errors.items()}
    if refused:
        raise ValueError(report(args, refused, len({*refused, *lines.values()})))
    before = f", {len(log.earlier)} answers by earlier runs" if log.earlier else ""
    print(f"{args.output}: {len(asks)} questions answered{before}", file=sys.stderr)


def tell_fewer(output: Path, asks: list, budget: int | str | None) -> None:
    """Say on standard error which image, if any, has fewer tokens than the fixed K that it was asked about with."""
    fewer = [(ask, ask.kept) for ask in asks if type(budget) is int and ask.kept and min(ask.kept) < budget]
    if fewer:
        ask, kept = fewer[0]
        name = ask.images[kept.index(min(kept))]
        print(
            f"{output}: K = {budget} is more tokens than some images have, such as {name} with {min(kept)}: they keep "
            "all, and `kept` says how many",
            file=sys.stderr,
        )


def report(args: argparse.Namespace, errors: dict[int, Exception], total: int) -> str:
    """Return how many rows could not be answered, and the first ten, by lines in the file or places in its list."""
    place = ("line" if args.input == "-" or args.input.endswith(".jsonl") else "item") if args.input else "question"
    lines = [f"{place} {line}: {error!s:.300}" for line, error in sorted(errors.items())]
    lines = lines[:10] + ([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])
    return "\n  ".join(
        [f"{len(errors)} of {total} rows could not be answered; the others are in {args.output}", *lines]
    )


def table(results: list[dict]) -> str:
    """Return a block for each image and prompt, a line for each budget."""
    lines = []
    for (path, prompt), block in itertools.groupby(results, key=lambda result: (result["image"], result["prompt"])):
        lines.append(f"\n{path}  {prompt}")
        for result in block:
            kept = f"{result['num_image_tokens']} of {result['num_patches']} tokens"
            budget = result["budget"]
            kept += f" ({budget})" if isinstance(budget, str) else ""
            kept += f", K = {budget}" if isinstance(budget, int) and budget > result["num_image_tokens"] else ""
            lines.append(f"  {kept:>18}   {result['answer']}")
    return "\n".join(lines)
