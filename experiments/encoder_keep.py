"""Measure what dropping patches inside the encoder costs in answers, by layer and share, beside merging as many.

    python experiments/encoder_keep.py --data-path data/easy-vqa/mosaics_test_photo_3x3.json \
        --image-folder data/easy-vqa/images --keep 2:0.5 3:0.5 --output out.json

Answers are teacher-forced, as in `budgets.py`. Merging averages each dropped patch into the kept one that it is most
like, at the same layer and share.
"""

import argparse
import json
from pathlib import Path

import torch
from lightvlm import encoding_lightvlm
from lightvlm.data.features import lay_out_batch
from lightvlm.data.turns import mask_blocks, pack_turns
from lightvlm.encoding_lightvlm import attention_to_patches
from lightvlm.evaluation.budgets import load_images, paired_interval
from lightvlm.inference.checkpoint import SHIPPED, load
from torch.nn import functional
from tqdm import tqdm


def merging_states(tower, pixel_values, indices, keep, in_picture=None):
    """Return what `hidden_states_at` does, with what it drops merged into what it keeps, for CLIP."""
    state = tower.pre_layrnorm(tower.embeddings(pixel_values))
    at = torch.arange(state.shape[1] - 1).expand(len(state), -1)
    states, places, layers = {}, {}, tower.encoder.layers
    for index in range(max(indices) + 1):
        if index in keep and index < len(layers):
            count = min(keep[index], at.shape[1])
            left = attention_to_patches(tower, index, state).topk(count).indices.sort().values
            patches = state[:, 1:]
            kept = patches.gather(1, left[..., None].expand(-1, -1, patches.shape[-1]))
            similar = functional.normalize(patches, dim=-1) @ functional.normalize(kept, dim=-1).transpose(1, 2)
            into = similar.argmax(dim=-1).scatter(1, left, torch.arange(count).expand(len(left), -1))
            total = torch.zeros_like(kept).scatter_add(1, into[..., None].expand_as(patches), patches)
            number = torch.zeros(kept.shape[:2]).scatter_add(1, into, torch.ones(into.shape))
            state = torch.cat([state[:, :1], total / number[..., None]], dim=1)
            at = at.gather(1, left)
        if index in indices:
            states[index], places[index] = state, at
        if index < max(indices):
            state = layers[index](state, None)
    return states, places


def right_answers(model, processor, images, budgets) -> dict[int, list[list[float]]]:
    """Return right answers and questions of each image at each K."""
    found = {budget: [] for budget in budgets}
    backbone = model.model
    for image in tqdm(images):
        opened = processor(images=[image["path"]], return_tensors="pt")
        pixels, sizes = opened["pixel_values"], opened.get("image_sizes")
        layout = backbone.lay_out(pixels, sizes)
        views, in_picture = layout.cut(pixels)
        features, prior, left = backbone.encode(views, in_picture=in_picture)
        side = model.config.vision_config.image_size
        sizes = torch.tensor([[side, side]]) if sizes is None else sizes
        features, prior, layout = lay_out_batch(features, prior, sizes, model.config, left)
        tokens = backbone.project_all(features)
        order = backbone.pruner.rank(features, prior, None, layout, max(budgets), tokens)
        for budget in budgets:
            inputs = pack_turns([image["turns"]], processor, [budget])
            labels = inputs.pop("labels")[:, 1:]
            kept = [order[0, :budget].sort().values]
            hidden = backbone(
                **mask_blocks(inputs), mm_encoder_outputs={"image": backbone.keep(features, kept, layout)}
            )[0]
            places = (labels[0] >= 0).nonzero()[:, 0]
            wanted = labels[0, places]
            is_right = (model.lm_head(hidden[0, places]).argmax(dim=-1) == wanted).float()
            begins = torch.cat([torch.ones(1, dtype=torch.bool), places[1:] != places[:-1] + 1])
            right = torch.ones(int(begins.sum())).scatter_reduce(0, begins.cumsum(dim=0) - 1, is_right, "amin")
            found[budget].append([right.sum().item(), len(right)])
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default=str(SHIPPED))
    parser.add_argument("--data-path", nargs="+", required=True)
    parser.add_argument("--image-folder", required=True)
    parser.add_argument("--num-image-tokens", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--keep", nargs="+", default=[], help="layer:share")
    parser.add_argument("--merge", nargs="+", default=[], help="layer:share, by merging")
    parser.add_argument("--limit", type=int, help="images")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load(args.model_path, "float32")
    dropping, results = encoding_lightvlm.hidden_states_at, []
    for path in args.data_path:
        images = load_images(path, args.image_folder)[: args.limit]
        whole = None
        for name, shares in [("all", [""]), ("drop", args.keep), ("merge", args.merge)]:
            encoding_lightvlm.hidden_states_at = merging_states if name == "merge" else dropping
            for share in shares:
                pairs = [part.split(":") for part in share.split(",") if part]
                model.config.encoder_keep = {int(layer): float(part) for layer, part in pairs} or None
                budgets = [k for k in args.num_image_tokens if k <= model.config.encoded_patches]
                found = {
                    k: torch.tensor(counts) for k, counts in right_answers(model, processor, images, budgets).items()
                }
                whole = whole or found
                for k, counts in found.items():
                    difference, interval = paired_interval(counts, whole[k])
                    accuracy = (counts[:, 0].sum() / counts[:, 1].sum()).item()
                    row = {"data": Path(path).stem, "method": name, "keep": share, "num_image_tokens": k}
                    row |= {"accuracy": accuracy, "difference": difference, "interval": interval}
                    results.append(row | {"questions": int(counts[:, 1].sum())})
                    print(*row.values(), flush=True)
                args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
