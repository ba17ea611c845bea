"""What pruned prompts have to equal, from the whole prompt: dropped tokens masked, or kept embeddings put together."""

import torch
from families import IMAGE, VIDEO, Family

NO_BEAMS = {"llama4", "fuyu"}  # transformers repeats no encoder output without pooler_output


def placeholders(inputs):
    """Return where images and videos stand in the prompts, (batch, length)."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def stays(family: Family, inputs, short, modality="image"):
    """Return which positions of the whole prompt are in the pruned one, (batch, length)."""
    lengths, kept = family.lengths(inputs, modality), short["mm_encoder_outputs"][modality].kept_indices
    flags = [torch.zeros(n, dtype=torch.bool).index_fill(0, k, True) for n, k in zip(lengths, kept, strict=True)]
    where = placeholders(inputs)
    return inputs["attention_mask"].bool() & torch.ones_like(where).masked_scatter(where, torch.cat(flags))


def whole_positions(family: Family, inputs, kept):
    """Return the position ids of the whole prompt as transformers counts them."""
    if not family.keeps_positions:  # those of the pruned prompt, since `generate` counts them anew
        return (kept.cumsum(dim=1) - 1).clamp_min(0)
    return family.model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))


def take(kept, value):
    """Return the kept positions of (..., batch, length), left-padded."""
    order = kept.int().argsort(dim=1, stable=True)[:, -int(kept.sum(dim=1).max()) :]
    return value.gather(-1, order.expand(*value.shape[:-1], -1))


def masked(family: Family, inputs, kept, positions):
    """Return the whole prompt's logits at the kept positions; nobody sees the others."""
    mask = torch.where(family.allowed(inputs, kept), 0.0, torch.finfo(torch.float32).min)[:, None]
    logits = family.model(**{**inputs, "attention_mask": mask, "position_ids": positions}, use_cache=False).logits
    return take(kept, logits.movedim(-1, 0)).movedim(0, -1)


def spliced(family: Family, inputs, kept, positions, modality="image"):
    """Return the logits of the kept embeddings alone, put together by hand: for layers that know no mask."""
    features = torch.cat([*family.encode(inputs, modality)])
    where = placeholders(inputs)[..., None]
    embeddings = family.model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(where, features)
    embeddings = take(kept, embeddings.movedim(-1, 0)).movedim(0, -1)
    short = {"attention_mask": take(kept, kept.long()), "position_ids": take(kept, positions)}
    return family.model(inputs_embeds=embeddings, **short, use_cache=False).logits


def by_hand(family: Family, inputs, kept, positions, modality="image"):
    """Return the logits that a pruned prompt has to have, (batch, kept positions, ids), left-padded."""
    if family.attention == "recurrent":
        return spliced(family, inputs, kept, positions, modality)
    return masked(family, inputs, kept, positions)


def error(logits, reference, mask=None) -> float:
    """Return the largest difference as a share of the largest logit; a token that a family never says has none."""
    length = reference.shape[1]  # a pruned prompt may have a column of padding in front
    logits, mask = logits[:, -length:], None if mask is None else mask[:, -length:]
    there = (reference > -1e30) & (torch.ones_like(reference) if mask is None else mask[..., None]).bool()
    difference = (logits - reference).where(there, 0).abs().max()
    return (difference / reference.where(there, 0).abs().max()).item()
