"""The `lightvlm` command: one module for each verb, whose heavy imports wait until it runs."""

import argparse
import importlib
import sys

VERBS = {
    "infer": "ask questions about images, at one or several token budgets",
    "show": "draw which tokens of an image are kept",
    "eval": "measure accuracy of selectors at several token budgets, on LLaVA JSON files or a benchmark",
    "bench": "time each stage from image to first token, beside transformers' LLaVA, at several token budgets",
    "build": "compose a Hub folder of a vision encoder and a language model, or of a LLaVA checkpoint",
    "push": "upload a trained checkpoint to the Hub, with its card and results, once strangers can use it",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0, or 2 with the reason on standard error where the input is at fault."""
    parser = argparse.ArgumentParser(
        prog="lightvlm",
        description="Vision-language answers from a fraction of the image's tokens.",
        epilog="lightvlm VERB --help shows a verb's options and examples.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        module = importlib.import_module(f"lightvlm.cli.{verb}")
        subparser = verbs.add_parser(
            verb,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv, argparse.Namespace(argv=argv))
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"lightvlm {args.verb}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
