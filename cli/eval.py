"""Measure accuracy of selectors at several token budgets, side by side, on LLaVA JSON files or a benchmark.

Answers are greedy. With LLaVA JSON, those count that equal the expected one except for case and a full stop.

examples:
  lightvlm eval --data-path data/easy-vqa/test.json --image-folder data/easy-vqa/images
  lightvlm eval --data-path a.json b.json --image-folder images --selectors topk,random --num-image-tokens 144,64
  lightvlm eval --data-path a.json --image-folder images --selectors diverse,diverse+question --plot out.png
  lightvlm eval --data-path test_one.json --image-folder images --metric cer --group-by kind glyph_height:15,20,30
  lightvlm eval --benchmark vqav2 --data-dir data/vqav2 --num-image-tokens 576,144,64 --answers vqav2-answers
  accelerate launch --num_processes 8 -m lightvlm_cli.main eval --benchmark gqa --data-dir data/gqa
  lightvlm eval --model-path Qwen/Qwen3-VL-2B-Instruct --benchmark textvqa --data-dir data/textvqa

benchmarks, and what the folder holds:
  vqav2                v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/
  gqa                  testdev_balanced_questions.json, images/
  textvqa              TextVQA_0.5.1_val.json, train_images/
  pope                 coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, val2014/
  scienceqa            problems.json, pid_splits.json, test/

selectors:
  topk, diverse        what a checkpoint can be configured for
  k-center             alternatives to diverse,
  determinantal        which choose one patch after the other
  random, uniform      patches by chance, or on a square grid
  pool, downsample     means over a square grid's cells; the encoder on a smaller image
  max-min              the most diverse patches (DivPrune)
  merge                dominant and contextual tokens (VisionZip)
  dedup                importance, then duplicates removed (VisPruner)
  fastv                dropped in the language model after its second layer; there, and only there, "tokens" is not
                       what its first two layers see
  equal-views,         of large images: the checkpoint's own order, but a share for each view, all equal or
  thumbnail-views      as important as the thumbnail finds the tile (GlobalCom2)
  +question, +cls,     behind topk, diverse, k-center, determinantal, merge or dedup: each question chooses the tokens;
  +cls+distance        or the score is the encoder's attention alone, which is how topk+cls (FasterVLM), merge+cls and
                       dedup+cls were published; or half of it and the distance from the mean projected token

By default the checkpoint's own selector is measured, which infer runs, at 576, 144, 64 and 16 tokens, as far as images
have so many; with --encoder-keep at most at what is left. random is always there, and downsample if K is a square
number and images are one view. "where a smaller image fails" counts the questions that downsample gets wrong at the
same K, which a plainly smaller image does not answer. "yes_excess" is how much more often than right the answer to a
yes-or-no question is yes.

A model of another family is measured at all tokens, 25%, 10% and 5%, with learned, if there is a --pruner, distinct,
the untrained choice, norm, uniform and random, and on request with distance and max-min.

"--metric cer" adds the character error rate, for answers that are read from the image. --group-by measures parts of
the files apart, too, by fields of their rows.

"selection" is the time from scores to projected tokens; scoring itself is not in it. "dynamic:64" among the budgets
gives each image as many tokens as it needs, 64 on average, chosen by the checkpoint's own selector.
"""

import argparse
import itertools
import shlex
from pathlib import Path
from typing import Any

from lightvlm_cli.options import (
    add_any_model,
    add_device,
    add_precision,
    budget_list,
    claim_device,
    layer_shares,
    loading,
    positive,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_any_model(parser)
    parser.add_argument("--data-path", nargs="+", help="LLaVA JSON files; the first question of each row counts")
    parser.add_argument("--image-folder", help="folder that their image paths are relative to")
    parser.add_argument("--benchmark", help="one of those above, instead of the two")
    parser.add_argument("--data-dir", help="folder with the benchmark's files")
    parser.add_argument(
        "--selectors", help="one or several of those above: topk,random (the checkpoint's own, which infer runs)"
    )
    parser.add_argument("--num-image-tokens", type=budget_list, help="576,25%%,dynamic:64 (see above)")
    parser.add_argument(
        "--encoder-keep",
        type=layer_shares,
        help="shares of the patches that go on through the encoder from a layer, such as 4:0.67,8:0.33 (all)",
    )
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--metric", choices=("accuracy", "cer"), default="accuracy", help="of --data-path (accuracy)")
    parser.add_argument(
        "--group-by",
        nargs="+",
        metavar="FIELD[:LIMITS]",
        default=[],
        help="also measure groups of rows apart, such as kind glyph_height:15,20,30 kind+glyph_height:20",
    )
    add_precision(parser)
    add_device(parser)
    parser.add_argument("--limit", type=positive, help="only the first so many rows")
    parser.add_argument("--seed", type=int, default=0, help="for the random selector (0)")
    parser.add_argument(
        "--answers",
        type=Path,
        help="folder to keep answers in as they come: the same command goes on from there, another checkpoint's not",
    )
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--plot", type=Path, help="also draw accuracy over tokens in this file, such as out.png")


def run(args: argparse.Namespace) -> None:
    given = [option is not None for option in (args.data_path, args.image_folder, args.benchmark, args.data_dir)]
    if given not in ([True, True, False, False], [False, False, True, True]):
        raise ValueError("give either --data-path and --image-folder, or --benchmark and --data-dir")
    if args.benchmark and (args.group_by or args.metric != "accuracy"):
        raise ValueError("a benchmark has its own metric and no groups: use --metric and --group-by with --data-path")
    check_extra()

    from accelerate import PartialState
    from lightvlm.inference.any_model import load_any

    selectors = known_names(args)
    for path in filter(None, (args.output, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    files, metric = read_files(args)
    groups = read_groups(args)
    claim_device(args)
    asked = load_any(args.model_path, **loading(args))
    args.num_image_tokens = args.num_image_tokens and [asked.resolve(budget) for budget in args.num_image_tokens]
    selectors = choose_selectors(args, selectors, asked)
    measured = what_is_measured(args, asked)
    results = []
    for name, rows in files.items():
        found = measure_file(args, name, rows, groups.get(name), metric, selectors, asked, measured)
        results += [{"data": name, **result} for result in found]
    if PartialState().is_main_process:
        report(args, asked.model, measured, results)


def check_extra() -> None:
    """Raise ValueError if what is needed to measure is not installed."""
    try:
        import lightvlm.evaluation.accuracy
        import lightvlm.evaluation.benchmarks
        import lightvlm.evaluation.plot  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"measuring needs {error.name}: pip install 'lightvlm[eval]'") from None


def known_names(args: argparse.Namespace) -> list[str]:
    """Return the selectors that are asked for, none by default; ValueError if one, or the benchmark, is unknown."""
    from lightvlm.evaluation.benchmarks import BENCHMARKS
    from lightvlm.evaluation.selectors import SCORED, SCORES, SELECTORS, SHARES
    from lightvlm.inference.checkpoint import read_type

    selectors = [name.strip() for name in args.selectors.split(",")] if args.selectors else []
    by_score = [f"{name}{score}" for name, score in itertools.product(SCORED, SCORES)]
    is_own = read_type(args.model_path) == "lightvlm"
    if is_own and (unknown := set(selectors) - {*SELECTORS, *SHARES, *by_score}):
        raise ValueError(
            f"there is no selector {', '.join(sorted(unknown))}: choose among {', '.join([*SELECTORS, *SHARES])}"
        )
    if args.benchmark and args.benchmark not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {args.benchmark}: choose among {', '.join(BENCHMARKS)}")
    return selectors


def read_files(args: argparse.Namespace) -> tuple[dict, Any]:
    """Return the rows of each file by its name, and the metric of their answers."""
    from lightvlm.data.llava import load_llava
    from lightvlm.evaluation.benchmarks import load_benchmark
    from lightvlm.evaluation.metrics import CharacterErrors, ExactMatch

    if args.benchmark:
        return load_benchmark(args.benchmark, args.data_dir)
    files = {Path(path).stem: load_llava(path, args.image_folder) for path in args.data_path}
    if len(files) < len(args.data_path):
        raise ValueError("files of --data-path are told apart by their names: rename those that have the same")
    return files, CharacterErrors() if args.metric == "cer" else ExactMatch()


def read_groups(args: argparse.Namespace) -> dict[str, dict[str, list[int]]]:
    """Return the groups of each file's rows by its name, if groups are asked for."""
    from lightvlm.evaluation.groups import group_rows

    if not args.group_by:
        return {}
    return {Path(path).stem: group_rows(path, args.group_by, args.limit) for path in args.data_path}


def dynamic_budgets(args: argparse.Namespace) -> list[str]:
    return [budget for budget in args.num_image_tokens or [] if isinstance(budget, str)]


def choose_selectors(args: argparse.Namespace, selectors: list[str], asked) -> list[str]:
    """Return the selectors to measure; ValueError if the checkpoint cannot have one, or a budget, of those asked."""
    from lightvlm.evaluation import any_accuracy
    from lightvlm.inference.checkpoint import check_question_aware
    from lightvlm.inference.own_model import OwnModel

    if not isinstance(asked, OwnModel):
        if args.encoder_keep:
            raise ValueError(asked.refusal("--encoder-keep"))
        return any_accuracy.choose_selectors(asked, selectors)
    config = asked.model.config
    if args.encoder_keep:
        checked = type(config).from_dict({**config.to_dict(), "encoder_keep": args.encoder_keep})
        config.encoder_keep = checked.encoder_keep
    selectors = selectors or [config.select]
    for name in selectors:
        if name.endswith("+question"):
            check_question_aware(name, args.model_path, asked.model)
    for budget in args.num_image_tokens or []:
        asked.processor.resolve_budgets(budget, 1)
    if dynamic_budgets(args) and config.select not in selectors:
        raise ValueError(
            f"a dynamic budget is spent by the checkpoint's own selector: add {config.select} to --selectors."
        )
    return selectors


def what_is_measured(args: argparse.Namespace, asked) -> dict:
    """Return what results depend on, with the checkpoint's fingerprint if they are written."""
    from lightvlm.inference.answer_log import on_main
    from lightvlm.inference.fingerprint import fingerprint
    from lightvlm.inference.own_model import Options, OwnModel

    measured = {"dtype": str(asked.model.dtype), "int8": args.int8}
    is_written = args.answers or args.output
    if not isinstance(asked, OwnModel):
        return measured | (on_main(asked.describe, Options()) if is_written else {})
    measured["encoder_keep"] = asked.model.config.encoder_keep
    return measured | (on_main(fingerprint, args.model_path) if is_written else {})


def measure_file(
    args: argparse.Namespace,
    name: str,
    rows,
    groups: dict[str, list[int]] | None,
    metric,
    selectors: list[str],
    asked,
    measured: dict,
) -> list[dict]:
    """Return the results of one file; ValueError, with its name, if its images cannot have a budget."""
    from lightvlm.evaluation import any_accuracy
    from lightvlm.evaluation.accuracy import MAX_NEW_TOKENS, Questions, accuracy, choose_settings
    from lightvlm.inference.answer_log import AnswerLog, on_main
    from lightvlm.inference.own_model import OwnModel

    questions = Questions(rows.select(range(min(args.limit or len(rows), len(rows)))), asked.processor, groups)
    if isinstance(asked, OwnModel):
        measure, model = accuracy, asked.model
        numbers = args.num_image_tokens and [budget for budget in args.num_image_tokens if isinstance(budget, int)]
        try:
            settings = choose_settings(questions, model.config, selectors, numbers)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        settings += [(model.config.select, budget) for budget in dynamic_budgets(args)]
    else:
        measure, model = any_accuracy.any_accuracy, asked
        settings = any_accuracy.choose_settings(asked, selectors, args.num_image_tokens)
    about = measured | {"settings": settings, "seed": args.seed, "max_new_tokens": MAX_NEW_TOKENS}
    if args.answers:
        about["questions_sha256"] = on_main(questions.digest)
    with AnswerLog(args.answers and args.answers / f"{name}.jsonl", about) as log:
        return measure(model, questions, settings, metric, args.batch_size, args.seed, log)


def report(args: argparse.Namespace, model, measured: dict, results: list[dict]) -> None:
    """Print the results as a table, and write them to the files that are asked for."""
    import torch
    from lightvlm.data.files import write_json
    from lightvlm.evaluation.accuracy import group_table, table
    from lightvlm.evaluation.plot import plot

    command = shlex.join(["lightvlm", *args.argv])
    on_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(model.dtype).removeprefix("torch.") + (" and int8" if args.int8 else "")
    timing = f"milliseconds a question, median over batches of {args.batch_size}, {dtype}, on {device}"
    print(f"\n{command}\nseed {args.seed}\nprefill and selection: {timing}\n\n{table(results)}")
    if args.group_by:
        print(f"\n{group_table(results)}")
    if args.output:
        written = {"command": command, "seed": args.seed, "timing": timing, **measured, "results": results}
        write_json(args.output, written)
    if args.plot:
        plot(results, args.plot)
