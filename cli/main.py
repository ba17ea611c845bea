"""The `lightvlm` command: one module for each verb, whose heavy imports wait until it runs.

It lies beside the package `lightvlm`, not in it, because Python would import that first. This takes seconds and cannot
be put off: `import lightvlm` registers the classes that transformers' Auto classes find from then on.
"""

import argparse
import importlib
import sys
from importlib.metadata import version

from lightvlm_cli.quiet import silence_libraries

VERBS = {
    "infer": "ask questions about images, at one or several token budgets",
    "show": "draw which tokens of an image are kept",
    "eval": "measure accuracy of selectors at several token budgets, on LLaVA JSON files or a benchmark",
    "bench": "time each stage from image to first token, beside transformers' LLaVA, at several token budgets",
    "serve": "answer OpenAI clients over HTTP, with a budget per request",
    "demo": "chat about images in a browser, and look at the tokens that are kept",
    "build": "compose a Hub folder of a vision encoder and a language model, or of a LLaVA checkpoint",
    "export": "write a model for other runtimes: torch.export, ONNX Runtime, or the whole of it for OpenVINO",
    "push": "upload a trained checkpoint to the Hub, with its card and results, once others can use it",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return 0, or 2 with the reason on standard error if the input is at fault."""
    parser = argparse.ArgumentParser(
        prog="lightvlm",
        description="Vision-language answers from a fraction of the image's tokens.",
        epilog="lightvlm VERB --help shows a verb's options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('lightvlm')}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        module = importlib.import_module(f"lightvlm_cli.{verb}")
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
    silence_libraries()
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"lightvlm {args.verb}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
