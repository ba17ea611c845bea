"""Run mosaics.yaml in lmms-eval and compare each answer with the one that `lightvlm eval` counts, in float32."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from lightvlm.data.llava import load_llava
from lightvlm.evaluation.accuracy import Batch, Questions
from lightvlm.inference.checkpoint import SHIPPED, load
from lightvlm_cli.options import budget_list

HERE = Path(__file__).parent
DATA = Path("data/easy-vqa")


def in_lmms_eval(budget: int | str, limit: int, batch_size: int, output: Path) -> dict[int, str]:
    """Return answers by question number, of one run of the command line."""
    model_args = f"pretrained={SHIPPED},num_image_tokens={budget},dtype=float32"
    command = [sys.executable, "-m", "lmms_eval", "--model", "lightvlm", "--model_args", model_args]
    command += ["--tasks", "lightvlm_mosaics", "--include_path", str(HERE), "--batch_size", str(batch_size)]
    command += ["--limit", str(limit), "--log_samples", "--output_path", str(output), "--verbosity", "DEBUG"]
    print(*command, flush=True)  # DEBUG because other levels print an error and exit with 0
    subprocess.run(command, check=True)
    newest = max(output.rglob("*_samples_lightvlm_mosaics.jsonl"), key=lambda path: path.stat().st_mtime)
    samples = [json.loads(line) for line in newest.read_text().splitlines()]
    return {sample["doc_id"]: sample["filtered_resps"] for sample in samples}


@torch.no_grad()
def in_lightvlm_eval(questions: Questions, model, budget: int | str) -> dict[int, str]:
    """Return answers by question number, as `lightvlm eval` generates them."""
    answers = {}
    for rows in questions.batches(64):
        batch = Batch(model, questions, rows, question_aware=False)
        found, _ = batch.answer(model.config.select, budget, time_prefill=False)
        answers.update(zip(rows, map(str.strip, found), strict=True))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-image-tokens", type=budget_list, default=[64, 16, "dynamic:64"])
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output-dir", type=Path, default=Path("build/lmms"))
    args = parser.parse_args()
    model, processor = load(str(SHIPPED), "float32")
    rows = load_llava(DATA / "mosaics_test_photo_3x3.json", DATA / "images")
    questions = Questions(rows.select(range(args.limit)), processor)
    differing = 0
    for budget in args.num_image_tokens:
        theirs = in_lmms_eval(budget, args.limit, args.batch_size, args.output_dir / str(budget))
        ours = in_lightvlm_eval(questions, model, budget)
        right = [sum(answers[row] == questions.references[row] for row in ours) for answers in (theirs, ours)]
        different = [row for row in ours if theirs[row] != ours[row]]
        print(f"{budget} tokens: lmms-eval {right[0]}, lightvlm eval {right[1]} of {args.limit} right")
        for row in different:
            print(f"  question {row}: {theirs[row]!r} in lmms-eval, {ours[row]!r} in lightvlm eval")
        differing += len(different)
    sys.exit(f"{differing} answers differ" if differing else 0)


if __name__ == "__main__":
    main()
