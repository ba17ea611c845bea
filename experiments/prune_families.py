"""Prune a tiny random model of every family of the installed transformers whose `forward` takes `mm_encoder_outputs`.

    PYTHONPATH=tests python experiments/prune_families.py

Prints a Markdown table: by how much, as a share of the largest logit, a pruned prompt differs from the whole one with
the dropped tokens masked (or from the kept embeddings put together by hand, for layers that know no mask), and by how
much a prompt of which all is kept differs from the model's own; and each family's limit, or why it is not pruned.
"""

from pathlib import Path

import torch
import transformers
from by_hand import NO_BEAMS, by_hand, error, stays, whole_positions
from families import FAMILIES, IMAGE, Family
from lightvlm import prune

TIMM = "its encoder needs the package timm, which is not a dependency here"
NOT_BUILT = {
    "gemma3n": TIMM,
    "fast_vlm": TIMM,
    "perception_lm": TIMM,
    "blip_2": "a Q-Former's few fixed queries are all that its language model sees",
    "instructblip": "a Q-Former's few fixed queries are all that its language model sees",
    "instructblipvideo": "a Q-Former's few fixed queries are all that its language model sees",
    "florence2": "an encoder-decoder: its forward does not take encoded images",
    "t5gemma2": "an encoder-decoder: its forward does not take encoded images",
    "pe_audio_video": "an embedding model, without answers",
    "glm_image": "draws images: its prompt's images are codes of them",
    "diffusion_gemma": "writes by diffusion, over blocks of text",
}
ATTENTION = {
    "recurrent": "layers that mix neighbors: proven against the kept embeddings, not against masks",
    "blocks": "the tokens of an image see each other: dropped ones are masked for them too",
    "images": "all images of a prompt see each other: dropped tokens are masked for them too",
    "prefix": "the whole prompt sees itself: dropped tokens are masked for it too",
}


def main() -> None:
    """Print the table."""
    transformers.logging.set_verbosity_error()
    print("| family | pruned | differs from masking, by 1e-7 | all kept, by 1e-7 | limit |\n" + "| --- " * 5 + "|")
    for name in find_families():
        print("| " + " | ".join([name.replace("_", "\\_"), *row(name)]) + " |", flush=True)


def find_families() -> list[str]:
    """Return the folders of transformers whose code has `mm_encoder_outputs`."""
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    return sorted({file.parent.name for file in files if "mm_encoder_outputs" in file.read_text("utf-8")})


def row(name: str) -> list[str]:
    """Return the cells behind a family's name."""
    if name not in FAMILIES:
        return ["not tried", "", "", NOT_BUILT.get(name, "no tiny model of it is in tests/families.py")]
    try:
        family = FAMILIES[name]()
        inputs = family.inputs((1, 2))
        identity = [dropped(family, family.inputs((1,))), dropped(family, inputs)]
        if family.clips:
            identity.append(dropped(family, family.video(2), "video"))
        return ["yes", f"{max(identity) * 1e7:.0f}", f"{all_kept(family, inputs) * 1e7:.0f}", limit(name, family)]
    except Exception as refused:  # whatever a family does is what the table tells
        return ["no", "", "", " ".join(f"{type(refused).__name__}: {refused}".split())[:160]]


@torch.no_grad()
def dropped(family: Family, inputs: dict, modality: str = "image") -> float:
    """Return how far the logits of a prompt pruned to 40 % are from the proof's."""
    short = prune(family.model, inputs, **{f"num_{modality}_tokens": 0.4})
    kept = stays(family, inputs, short, modality)
    reference = by_hand(family, inputs, kept, whole_positions(family, inputs, kept), modality)
    return error(family.model(**short).logits, reference, short["attention_mask"])


@torch.no_grad()
def all_kept(family: Family, inputs: dict) -> float:
    """Return how far the last logits of a prompt of which all is kept are from the model's own."""
    logits = family.model(**prune(family.model, inputs, 1.0)).logits
    return error(logits[:, -1], family.model(**inputs).logits[:, -1])


def limit(name: str, family: Family) -> str:
    """Return a sentence on what is not as usual, or nothing."""
    limits = [ATTENTION.get(family.attention)]
    if not family.keeps_positions:
        limits.append("generate counts positions anew: they are the pruned prompt's")
    if name in NO_BEAMS:
        limits.append("beams raise in transformers, pruned or not")
    if family.video_token == IMAGE and family.clips:
        limits.append("beams over videos raise in transformers, pruned or not")
    return "; ".join(filter(None, limits))


if __name__ == "__main__":
    main()
