"""Upload a trained checkpoint to the Hub: weights, code, processor, license, card and results, in one commit.

Nothing is uploaded before a process without this package has loaded the folder and run the code of its card. That
process has another home and nothing of the environment, so no tokens, but it can read your files. Links out of the
checkpoint's folder, tokens and paths of this machine are refused. The card takes front matter (license, base models,
data sets), introduction and training from the checkpoint's README.md.

examples:
  lightvlm push --model-path build/phi2-clip-k144 --repo-id me/phi2-clip-k144 --private
  lightvlm push --model-path build/phi2-clip-k144 --dry-run out --results gqa.json vqav2.json
  lightvlm push --model-path build/phi2-clip-k144 --repo-id me/phi2-clip-k144 --results gqa.json \\
      --hub-datasets gqa=owner/gqa-benchmark
"""

import argparse
from pathlib import Path

from lightvlm_cli.options import add_model_path


def hub_dataset(text: str) -> tuple[str, str]:
    """Parse "gqa=owner/dataset" or "gqa=owner/dataset:task"."""
    data, _, dataset = text.partition("=")
    if not data or "/" not in dataset:
        raise argparse.ArgumentTypeError(f"{text!r} is not like gqa=owner/dataset or gqa=owner/dataset:task")
    return data, dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_path(parser)
    parser.add_argument("--repo-id", help="owner/name of the repository, which is made if there is none")
    parser.add_argument("--private", action="store_true", help="make it a private one")
    parser.add_argument("--revision", help="upload to this branch, which is made if there is none")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry-run", type=Path, metavar="OUT", help="write the Hub folder here and upload nothing")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="FILE", help="files of lightvlm eval --output, of these weights"
    )
    parser.add_argument(
        "--hub-datasets",
        nargs="+",
        type=hub_dataset,
        default=[],
        metavar="DATA=OWNER/DATASET",
        help="benchmarks of the Hub that the results' data are; theirs are also written to .eval_results",
    )


def run(args: argparse.Namespace) -> None:
    if args.repo_id is None and args.dry_run is None:
        raise ValueError("give --repo-id, or --dry-run and a folder")
    if args.revision and args.create_pr:
        raise ValueError("--create-pr proposes a commit to the main branch: leave out --revision")
    if args.dry_run and args.dry_run.exists():
        raise ValueError(f"--dry-run: {args.dry_run} exists already, name a new folder")

    import tempfile

    from huggingface_hub import HfApi
    from lightvlm.hub.card import check_measured, read_results
    from lightvlm.hub.push import (
        check_files,
        check_folder,
        check_repo_id,
        describe_code,
        hub_errors,
        upload,
        write_folder,
    )
    from lightvlm.inference.checkpoint import load

    api, checkpoint = HfApi(), Path(args.model_path)
    if args.repo_id:
        check_repo_id(args.repo_id)
    check_files(checkpoint)
    results = read_results(args.results)
    if not args.dry_run:
        with hub_errors(args.repo_id):
            api.whoami()  # a wrong token fails before the long part
    model, processor = load(args.model_path, dtype="auto")  # not as this machine likes it
    check_measured(args.results, checkpoint, model.config)
    beside = args.dry_run.absolute().parent if args.dry_run else None
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".push-", dir=beside) as work:
        folder, name = Path(work, "folder"), args.repo_id or str(args.dry_run)
        write_folder(model, processor, checkpoint, folder, name, results, dict(args.hub_datasets))
        del model
        print(f"Now runs, without tokens: {describe_code(folder)}", flush=True)
        check_folder(folder, name)
        if args.dry_run:
            folder.rename(args.dry_run)
            print(f"{args.dry_run}: a Hub folder that loads and answers; nothing was uploaded")
        else:
            print(upload(folder, args.repo_id, api, args.private, args.revision, args.create_pr))
