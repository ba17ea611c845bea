"""Measure accuracy (greedy answers, exact match but for case) at several token budgets.

examples:
  lightvlm eval --data-path data/easy-vqa/test.json --image-folder data/easy-vqa/images
  lightvlm eval --data-path a.json b.json --image-folder images --selectors topk,random --num-image-tokens 144,64
"""

import argparse
import itertools
import json
import shlex
from pathlib import Path

from lightvlm.cli.common import add_model_path, budget_list, check_question_aware, load, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_path(parser)
    parser.add_argument(
        "--data-path", nargs="+", required=True, help="LLaVA JSON files; the first question of each row counts"
    )
    parser.add_argument("--image-folder", required=True, help="folder that its image paths are relative to")
    parser.add_argument(
        "--selectors", default="topk", help="one or several, comma-separated; see SELECTORS in evaluation/selectors.py"
    )
    parser.add_argument("--num-image-tokens", type=budget_list, default=[576, 144, 64, 16], help="576,144,64,16")
    parser.add_argument("--question-aware", action="store_true", help="let each question choose the tokens")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--limit", type=positive, help="only the first so many rows")
    parser.add_argument("--seed", type=int, default=0, help="for the random selector (0)")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")


def run(args: argparse.Namespace) -> None:
    from lightvlm.evaluation.accuracy import Questions, accuracy, table
    from lightvlm.evaluation.selectors import SELECTORS
    from lightvlm.training.llava_data import load_llava

    selectors = [name.strip() for name in args.selectors.split(",")]
    if unknown := set(selectors) - set(SELECTORS):
        raise ValueError(f"there is no selector {', '.join(sorted(unknown))}: choose among {', '.join(SELECTORS)}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    files = {Path(path).stem: load_llava(path, args.image_folder) for path in args.data_path}
    model, processor = load(args.model_path)
    if args.question_aware:
        check_question_aware("--question-aware", args.model_path, model)
    for budget in args.num_image_tokens:
        processor.resolve_budgets(budget, 1)
    settings = [
        (selector, budget)
        for selector, budget in itertools.product(selectors, args.num_image_tokens)
        if budget < processor.num_patches or selector == selectors[0]  # keeping all leaves nothing to select
    ]
    results = []
    for name, rows in files.items():
        questions = Questions(rows.select(range(min(args.limit or len(rows), len(rows)))), processor)
        for result in accuracy(model, questions, settings, args.question_aware, args.batch_size, args.seed):
            results.append({"data": name, **result})
    command = shlex.join(["lightvlm", *args.argv])
    print(f"\n{command}\nseed {args.seed}\n\n{table(results)}")
    if args.output:
        report = {"command": command, "seed": args.seed, "results": results}
        args.output.write_text(json.dumps(report, indent=2) + "\n")
