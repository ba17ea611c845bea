"""Measure accuracy (greedy, exact match on the first question of each row) at several token budgets.

examples:
  lightvlm eval --data-path data/easy-vqa/test.json --image-folder data/easy-vqa/images
  lightvlm eval --data-path test.json --image-folder images --selectors topk,random --num-image-tokens 144,64,16
"""

import argparse
import json
import sys
from pathlib import Path

from lightvlm.cli.checkpoint import add_model_path, budget_list, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_path(parser)
    parser.add_argument("--data-path", required=True, help="LLaVA JSON file")
    parser.add_argument("--image-folder", required=True, help="folder that its image paths are relative to")
    parser.add_argument("--selectors", type=lambda text: text.split(","), default=["topk"], help="topk,uniform,random")
    parser.add_argument("--num-image-tokens", type=budget_list, default=[576, 144, 64, 16], help="576,144,64,16")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--seed", type=int, default=0, help="for the random selector (0)")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")


def run(args: argparse.Namespace) -> None:
    from lightvlm.evaluation.accuracy import Questions, accuracy, table
    from lightvlm.pruning_lightvlm import SELECTORS
    from lightvlm.training.llava_data import load_llava
    from transformers import set_seed

    if unknown := set(args.selectors) - set(SELECTORS):
        raise ValueError(f"there is no selector {', '.join(sorted(unknown))}: choose among {', '.join(SELECTORS)}")
    model, processor = load(args.model_path)
    for budget in args.num_image_tokens:
        processor.resolve_budgets(budget, 1)
    rows = load_llava(args.data_path, args.image_folder)
    questions = Questions(rows.select(range(min(args.limit or len(rows), len(rows)))), processor)
    set_seed(args.seed)
    results = []
    for selector in args.selectors:
        for budget in args.num_image_tokens:
            results.append(accuracy(model, questions, budget, selector, args.batch_size))
    command = " ".join(["lightvlm", *sys.argv[1:]])
    print(f"\n{command}\nseed {args.seed}\n\n{table(results)}")
    if args.output:
        args.output.write_text(
            json.dumps({"command": command, "seed": args.seed, "results": results}, indent=2) + "\n"
        )
