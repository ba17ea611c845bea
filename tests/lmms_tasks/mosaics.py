"""The functions of mosaics.yaml: rows of a LLaVA JSON file as an lmms-eval task."""

from lightvlm.evaluation.metrics import normalise


def doc_to_visual(doc: dict) -> list[str]:
    return [f"data/easy-vqa/images/{doc['image']}"]


def doc_to_text(doc: dict) -> str:
    return doc["conversations"][0]["value"].removeprefix("<image>\n")


def doc_to_target(doc: dict) -> str:
    return doc["conversations"][1]["value"]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return {"exact_match": float(normalise(results[0]) == normalise(doc_to_target(doc)))}
