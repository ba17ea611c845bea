"""The card of a checkpoint on the Hub: front matter, use, training, results, limits."""

import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump
from lightvlm import LightVLMConfig
from lightvlm.inference.fingerprint import fingerprint

TEMPLATE = Path(__file__).with_name("card.md")
MEASURED = {"data": str, "selector": str, "num_image_tokens": (int, str), "total": int}
MEASURED |= dict.fromkeys(("accuracy", "low", "high"), (int, float))


def read_results(paths: list[str | Path]) -> list[dict]:
    """Return rows of the JSON files that `lightvlm eval --output` wrote, each with the `command` that measured it.

    Raises:
        ValueError: if a file cannot be read or is of another kind, or two rows measured the same.
    """
    rows, sources = [], {}
    for path in paths:
        try:
            report = json.loads(Path(path).read_text())
            found = [{"command": report["command"], **row} for row in report["results"]]
            wrong = {name for row in found for name, kind in MEASURED.items() if not isinstance(row[name], kind)}
            if wrong or not found:
                raise TypeError(f"wrong values of {', '.join(sorted(wrong))}" if wrong else "no results")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not what `lightvlm eval --output` writes ({error!r}): leave it out or measure again."
            ) from None
        for row in found:
            setting = (row["data"], row["selector"], row["num_image_tokens"])
            if setting in sources:
                raise ValueError(f"{path} measured {setting} as {sources[setting]} did: give one of the two.")
            sources[setting] = path
        rows += found
    return rows


def check_measured(paths: list[str | Path], checkpoint: Path, config: LightVLMConfig) -> None:
    """Raise ValueError unless result files say that they measured these weights, with all patches that are encoded.

    Args:
        paths: of files that `read_results` has read.
        checkpoint: its folder.
        config: its configuration.
    """
    own = fingerprint(checkpoint) if paths else {}
    for path in paths:
        report = json.loads(Path(path).read_text())
        if "weights_sha256" not in report:
            raise ValueError(
                f"{path} does not say which weights it measured, as older versions did not: measure again with "
                "`lightvlm eval --output`, or leave it out."
            )
        if report["weights_sha256"] != own["weights_sha256"]:
            raise ValueError(
                f"{path} measured other weights than those of {checkpoint}: measure these, or leave it out."
            )
        if report["configuration_sha256"] != own["configuration_sha256"]:
            raise ValueError(
                f"{path} measured these weights with another configuration, tokenizer or chat template than that of "
                f"{checkpoint}: measure again, or leave it out."
            )
        if (kept := report.get("encoder_keep")) != json.loads(json.dumps(config.encoder_keep)):
            raise ValueError(
                f"{path} was measured with encoder_keep {kept}, and config.json has {config.encoder_keep}: write that "
                "into it, or leave the file out."
            )


def read_card(checkpoint: Path) -> tuple[ModelCardData, str, str]:
    """Return the front matter, introduction and training of a checkpoint's README.md, as training/sft.py writes it.

    Raises:
        ValueError: if it lacks what only the checkpoint's author can know.
    """
    path = checkpoint / "README.md"
    try:
        card = ModelCard.load(path)
    except Exception as error:  # of which yaml has its own
        raise ValueError(f"{path} is no card that can be read; training/sft.py writes one: {error}") from None
    intro = re.search(r"^# .*\n((?:(?!#|```).*\n)*)", card.text, re.MULTILINE)
    training = re.search(r"^## Training\n(.*?)(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL)
    if not (training and training[1].strip()):
        raise ValueError(f"{path} does not say how the weights were trained: write it under `## Training`.")
    if not card.data.get("license"):
        raise ValueError(f"{path} names no license of the weights: add one to its front matter, as `license: mit`.")
    return card.data, intro[1].strip() if intro else "", training[1].strip()


def own_examples(data: ModelCardData) -> list[str]:
    """Return images of the widget that are the checkpoint's own files, and not addresses."""
    examples = [example for example in data.get("widget") or [] if isinstance(example, dict)]
    sources = [example.get("src") for example in examples]
    return [source for source in sources if source and isinstance(source, str) and "://" not in source]


def is_own(row: dict, config: LightVLMConfig) -> bool:
    """Return whether tokens were kept as the checkpoint itself does it, and not by another method."""
    return row["selector"] in ("all", config.select, f"{config.select}+question")


def describe(row: dict) -> str:
    """Return what a row was measured with: "diverse, 64 tokens"."""
    budget = row["num_image_tokens"]
    return f"{row['selector']}, {budget}" + (" tokens" if isinstance(budget, int) else "")


def table(rows: list[dict]) -> str:
    """Return Markdown: a line for each setting, a column for each file of questions."""
    totals = {row["data"]: max(other["total"] for other in rows if other["data"] == row["data"]) for row in rows}
    selectors = list(dict.fromkeys(row["selector"] for row in rows))
    cells = {}

    def place(row: dict) -> tuple:
        budget = row["num_image_tokens"]
        return selectors.index(row["selector"]), -budget if isinstance(budget, int) else 0

    for row in sorted(rows, key=place):
        cell = f"{100 * row['accuracy']:.2f} ({100 * row['low']:.2f} – {100 * row['high']:.2f})"
        if isinstance(row["num_image_tokens"], str) and "tokens" in row:
            cell += f" with {row['tokens']:.1f}"
        if row["total"] < totals[row["data"]]:
            cell += f", {row['total']:,} questions"
        cells.setdefault(describe(row), {})[row["data"]] = cell
    lines = [f"| | {' | '.join(f'{data}, {total:,} questions' for data, total in totals.items())} |"]
    lines.append("| --- |" + " ---: |" * len(totals))
    lines += [f"| {name} | {' | '.join(found.get(data, '') for data in totals)} |" for name, found in cells.items()]
    return "\n".join(lines)


def make_card(
    checkpoint: Path, config: LightVLMConfig, name: str, results: list[dict], datasets: dict[str, str]
) -> ModelCard:
    """Return the card, with what its author wrote in the checkpoint's README.md.

    Args:
        checkpoint: its folder.
        config: its configuration.
        name: what to load it by: a Hub name, or a folder.
        results: of `read_results`.
        datasets: the Hub's name of the `data` in the results, if they have one.

    Raises:
        ValueError: as `read_card`.
    """
    data, intro, training = read_card(checkpoint)
    own = [row for row in results if is_own(row, config)]
    others = [row for row in results if not is_own(row, config)]
    means = (config.dynamic_budget or {}).get("means")
    title = Path(name).name
    path = rf"(?<![\w./-]){re.escape(str(checkpoint.resolve()))}/?(?![\w./-])"  # to commands; others have `name`
    data.model_name = title if own else None
    data.pipeline_tag, data.library_name = "image-text-to-text", "transformers"
    data.tags = list(dict.fromkeys([*(data.tags or []), "lightvlm", "token-pruning", "custom_code"]))
    data.eval_results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=datasets.get(row["data"], row["data"]).partition(":")[0],
            dataset_name=row["data"],
            metric_type="accuracy",
            metric_name=f"accuracy, {describe(row)}",
            metric_value=round(row["accuracy"], 4),
        )
        for row in own
    ] or None
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        title=title,
        intro=intro,
        training=training,
        config=config,
        few=max(1, config.num_patches // 9),
        mean=means[len(means) // 2] if means else None,
        results=results,
        commands=dict.fromkeys(re.sub(path, lambda _: name, row["command"]) for row in results),
        own_table=table(own) if own else "",
        other_table=table(others) if others else "",
    )


def eval_results(results: list[dict], config: LightVLMConfig, datasets: dict[str, str]) -> dict[str, str]:
    """Return the YAML of `.eval_results/`, by file name: the checkpoint's own results on the Hub's benchmarks.

    Args:
        results: of `read_results`.
        config: the checkpoint's.
        datasets: "owner/dataset" or "owner/dataset:task" of some of the `data` in the results.

    Raises:
        ValueError: if the results have nothing of one of them.
    """
    files = {}
    for data, dataset in datasets.items():
        identity, _, task = dataset.partition(":")
        entries = [
            EvalResultEntry(identity, task or "default", round(row["accuracy"], 4), notes=describe(row))
            for row in results
            if row["data"] == data and is_own(row, config)
        ]
        if not entries:
            known = ", ".join(dict.fromkeys(row["data"] for row in results if is_own(row, config)))
            raise ValueError(f"The results have nothing of the checkpoint's own about {data}, but of: {known or '-'}.")
        files[f"{data}.yaml"] = yaml_dump(eval_result_entries_to_yaml(entries))
    return files
