"""`prune`: one function for the image and video tokens of any vision-language model of transformers.

Encode, choose, and take what was not chosen out of the prompt: ids, mask, token types and labels lose columns,
position ids are those of the whole prompt (M-RoPE included), and `mm_encoder_outputs` has the kept tokens. To a causal
language model, that equals masking the dropped tokens as keys. Nothing of the model is changed.
"""

import inspect
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from lightvlm.compaction_lightvlm import Compaction, Record, count_positions
from lightvlm.pruning.choosing import Chooser, keep_distinct
from torch import Tensor
from torch.nn.functional import pad
from transformers import BatchFeature
from transformers.cache_utils import Cache

Budget = int | float | list[int | float]
PIXELS = {"image": {"pixel_values", "pixel_values_images", "image_patches"}, "video": {"pixel_values_videos"}}
TYPES = {"image": 1, "video": 2}  # of mm_token_type_ids
FIELDS = ("pooler_output", "deepstack_features", "last_hidden_state")  # the first that an encoder fills has the tokens
COUNTED_ANEW = ("exaone4_5", "hyperclovax_vision_v2")  # their `generate` drops the position ids that it is given
UNUSED = ("last_hidden_state", "hidden_states", "attentions")  # unless they are the tokens


@dataclass
class Pruning:
    """The settings of `prune`."""

    num_image_tokens: Budget | None = None
    num_video_tokens: Budget | None = None
    shared: bool = False
    pruner: Chooser = keep_distinct

    def __post_init__(self) -> None:
        if self.num_image_tokens is None and self.num_video_tokens is None:
            raise ValueError("Give the number of tokens to keep: num_image_tokens or num_video_tokens.")
        for budget in (self.num_image_tokens, self.num_video_tokens):
            if budget is not None:
                for number in budget if isinstance(budget, list | tuple) else [budget]:
                    count_kept(number, 1)


@dataclass
class Encoded:
    """The images, or the videos, of a batch of prompts.

    Args:
        output: what the model's own encoding function returned.
        tokens: (tokens, hidden) of each entry, but for those in the KV cache; an entry is an image, a video, a tile,
            or all images of a prompt.
        skipped: how many of each entry's tokens are in the cache.
        entries: their indices among all entries of the output.
        prompts: the prompt of each.
        budgets: which budget each is part of: that of an image, or of a prompt.
    """

    output: Any
    tokens: list[Tensor]
    skipped: list[int]
    entries: list[int]
    prompts: list[int]
    budgets: list[int]


def prune(
    model: Any,
    inputs: Any,
    num_image_tokens: Budget | None = None,
    *,
    num_video_tokens: Budget | None = None,
    shared: bool = False,
    pruner: Chooser = keep_distinct,
    past_key_values: Cache | None = None,
) -> BatchFeature:
    """Keep the image and video tokens that matter, and return the inputs of `generate` and `forward` for them.

    Args:
        model: any decoder-only model of transformers whose `forward` takes `mm_encoder_outputs`; it is not changed.
        inputs: what its processor returned, on the model's device, with or without `labels`; they are not changed.
        num_image_tokens: K of each image: an integer, a share of its tokens such as 0.25, or a list with one for each
            image; all tokens if None. In Idefics and SmolVLM, whose encoder returns the images of a prompt as one,
            these share a budget.
        num_video_tokens: the same for videos; K is for all frames of one together.
        shared: whether the images of a prompt share one budget, and its videos another; a list has one for each
            prompt then.
        pruner: chooses the tokens: a `TokenScorer`, or any function as in `choosing.py`.
        past_key_values: for several turns with one KV cache, which is empty in the first and is changed. Ids are those
            of the whole conversation: the last turn's before pruning, its answer in any words, what is new. Images are
            all, or the new ones; a list of budgets has one for each new image.

    Returns:
        `input_ids`, `attention_mask`, `position_ids`, `mm_encoder_outputs` and the other inputs of the pruned prompts,
        left-padded to the longest. Each encoder output has `kept_indices` of its entries, in raster order.

    Raises:
        ValueError: if the model cannot be pruned this way, or budgets, images and placeholders do not fit.
    """
    model = unwrap(model)
    check_model(model)
    settings = Pruning(num_image_tokens, num_video_tokens, shared, pruner)
    short, record = prune_prompt(model, inputs, settings, past_key_values)
    if past_key_values is not None:
        past_key_values.prompt_record = record  # type: ignore[attr-defined]
        short["past_key_values"] = past_key_values
    return BatchFeature(short)


def prune_prompt(
    model: Any, inputs: Any, settings: Pruning, past_key_values: Cache | None = None
) -> tuple[dict[str, Any], Record]:
    """Return the inputs of pruned prompts, as `prune` does, and what a KV cache has to remember of them."""
    given = {name: value for name, value in inputs.items() if value is not None and name != "past_key_values"}
    check_prompt(given)
    record = read_record(past_key_values, given)
    encoded = encode(model, given, settings.shared, record.whole_length)
    questions = embed_text(model, given)
    budgets = {"image": settings.num_image_tokens, "video": settings.num_video_tokens}
    kept = {
        name: choose(each, 1.0 if budgets[name] is None else budgets[name], settings.pruner, questions)
        for name, each in encoded.items()
    }
    return drop(model, given, encoded, kept, record)


def unwrap(model: Any) -> Any:
    """Return the model inside of torch.compile's, of one for several processes, and of PEFT's."""
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_model(model: Any) -> None:
    """Raise ValueError if a model cannot be pruned from outside."""
    name, takes = type(model).__name__, inspect.signature(model.forward).parameters
    if model.config.model_type == "lightvlm":
        raise ValueError("LightVLM prunes its images itself: give num_image_tokens to its processor or to `chat`.")
    if model.config.is_encoder_decoder or "mm_encoder_outputs" not in takes:
        raise ValueError(f"{name} cannot be pruned: its forward does not take encoded images (mm_encoder_outputs).")
    if "pixel_values" in takes and takes["pixel_values"].default is inspect.Parameter.empty:
        raise ValueError(f"{name} cannot be pruned: its forward asks for pixels even if images are encoded.")


def check_prompt(given: dict[str, Any]) -> None:
    """Give a prompt its mask; ValueError if there are no ids or the mask is of another shape."""
    if (ids := given.get("input_ids")) is None:
        raise ValueError("prune needs input_ids: inputs_embeds do not tell where placeholders are.")
    given.setdefault("attention_mask", torch.ones_like(ids))
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids", "labels"):
        if name in given and given[name].shape != ids.shape:
            raise ValueError(f"{name} has the shape {(*given[name].shape,)}: give one of input_ids' {(*ids.shape,)}.")
    if (positions := given.get("position_ids")) is not None and positions.shape[-1] == ids.shape[1]:
        text = positions.flatten(0, -3)[0] if positions.dim() == 3 else positions
        if ((text.diff() < 0) & (given["attention_mask"][:, :-1] > 0)).any():
            raise ValueError("position_ids start anew inside a row: give each of the packed prompts a row of its own.")


def read_record(cache: Cache | None, given: dict[str, Any]) -> Record:
    """Return what a KV cache remembers of the turns before, and crop it to the last prompt.

    The answer is read anew with the new turn: a chat template seldom writes the very ids that were generated.

    Raises:
        ValueError: if it was not filled through `prune`, or holds another conversation.
    """
    record, ids = Record.of(cache), mark_padding(given)
    if cache is not None and not record.cached:
        cache.activate_past_recording()  # sliding windows can be cropped then
    if record.compaction is None or record.shift is None:
        if record.cached:
            raise ValueError("past_key_values was not filled through prune: give the empty cache at the first turn.")
        return record
    short, whole = record.compaction.source.shape[1], record.compaction.length
    cached_rows = [len(layer.keys) for layer in cache.layers if getattr(layer, "keys", None) is not None]  # type: ignore
    if (rows := max(len(record.shift), *cached_rows)) != len(ids) or whole >= ids.shape[1]:
        raise ValueError(
            f"past_key_values holds {whole} positions of {rows} prompts, or beams, and input_ids has "
            f"the shape {(*ids.shape,)}: give the whole conversation, with the new turn."
        )
    if record.cached < short or (record.ids is not None and not torch.equal(ids[:, :whole], record.ids)):
        raise ValueError(
            "input_ids does not begin with the last prompt, as past_key_values holds it: give the conversation as it "
            "was, padding included, or an empty cache."
        )
    if record.cached > short:
        if not can_crop(cache):
            raise ValueError(
                "past_key_values cannot forget the last answer, which a chat template may write with other ids: give "
                "an empty cache at each turn if layers are recurrent, or a cache is static or made by generate."
            )
        cache.crop(short - record.cached)  # type: ignore[union-attr]
    return replace(record, cached=short)


def can_crop(cache: Any) -> bool:
    """Return whether the last positions of a KV cache can be taken back; a full sliding window forgot those before."""
    windows = (layer for layer in cache.layers if getattr(layer, "is_sliding", False))
    return cache.is_croppable and all(
        layer.record_past or layer.get_seq_length() < layer.sliding_window for layer in windows
    )


def mark_padding(given: dict[str, Any]) -> Tensor:
    """Return the ids of prompts, (batch, length), -1 at padding."""
    return given["input_ids"].masked_fill(given["attention_mask"] == 0, -1)


def find_placeholders(config: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Return where the placeholders of images and of videos are, (batch, length) each."""
    ids, types, mask = given["input_ids"], given.get("mm_token_type_ids"), given["attention_mask"].bool()
    image, video = ((ids == getattr(config, f"{name}_token_id", None)) & mask for name in TYPES)
    if types is not None:  # GLM writes the frames of a video with the images' placeholder
        image, video = image & (types == TYPES["image"]), (image | video) & (types == TYPES["video"])
    return {"image": image, "video": video}


def encode(model: Any, given: dict[str, Any], shared: bool = False, start: int = 0) -> dict[str, Encoded]:
    """Run the model's own encoders, with gradients in training mode alone.

    Args:
        model: as in `prune`.
        given: inputs without None.
        shared: as in `prune`.
        start: what comes before this position is in the KV cache.

    Returns:
        The encoded images as "image", videos as "video"; neither if all are in the cache.
    """
    encoded = {}
    for modality, is_placeholder in find_placeholders(model.config, given).items():
        with torch.set_grad_enabled(model.training and torch.is_grad_enabled()):
            if some := encode_modality(model, given, modality, is_placeholder, start, shared):
                encoded[modality] = some
    return encoded


def encoder_arguments(model: Any, modality: str) -> set[str]:
    """Return the names of the inputs that a model's encoding function takes."""
    encoder = getattr(model.base_model, f"get_{modality}_features", None)
    return set(inspect.signature(encoder).parameters) if encoder else set()


def encode_modality(
    model: Any, given: dict[str, Any], modality: str, is_placeholder: Tensor, start: int, shared: bool
) -> Encoded | None:
    """Run one of a model's encoders; None if no placeholder from `start` on has to be filled."""
    rows, columns = is_placeholder.nonzero(as_tuple=True)  # in the order of the encoder's tokens
    is_new = columns >= start
    has_pixels = not PIXELS[modality].isdisjoint(given)
    if not is_new.any() and (start or not has_pixels):
        return None
    names = encoder_arguments(model, modality)
    if not names or not has_pixels:
        raise ValueError(f"The prompt has {int(is_new.sum())} {modality} placeholders, and no {modality} is given.")
    encoder = getattr(model.base_model, f"get_{modality}_features")
    output = encoder(**{name: given[name] for name in names if name in given}, return_dict=True)
    tokens = find_tokens(output)
    lengths = [len(each) for each in tokens]
    if sum(lengths) == int(is_new.sum()):
        rows, columns = rows[is_new], columns[is_new]
    elif sum(lengths) != len(rows):
        raise ValueError(f"The prompt has {len(rows)} {modality} placeholders for {sum(lengths)} tokens.")
    firsts = torch.tensor([0, *lengths[:-1]], device=rows.device).cumsum(0)
    firsts = firsts.clamp_max(len(rows) - 1)  # a last prompt without images may have an empty entry
    budgets = torch.arange(len(tokens))
    if shared:
        budgets = rows[firsts]
    elif isinstance(tokens, Tensor):  # tiles; those of one image follow each other
        budgets = (~pad(is_placeholder, (1, 0))[rows, columns]).cumsum(0)[firsts]
    skipped = torch.stack([part.sum() for part in (columns < start).split(lengths)]).tolist()
    entries = [n for n, length in enumerate(lengths) if skipped[n] < length]
    rest, prompts, budgets = [tokens[n][skipped[n] :] for n in entries], rows[firsts].tolist(), budgets.tolist()
    skipped, prompts, budgets = ([each[n] for n in entries] for each in (skipped, prompts, budgets))
    return Encoded(output, rest, skipped, entries, prompts, budgets)


def embed_text(model: Any, given: dict[str, Any]) -> Tensor:
    """Return the mean embedding of each prompt's text, (batch, hidden), without the answers that labels have."""
    image, video = find_placeholders(model.config, given).values()
    is_text = given["attention_mask"].bool() & ~image & ~video
    if "labels" in given:
        is_text = is_text & (given["labels"] == -100)
    words = model.get_input_embeddings()(given["input_ids"][is_text])  # (words, hidden): placeholders may be thousands
    sums = words.new_zeros(len(is_text), words.shape[-1]).index_add(0, is_text.nonzero()[:, 0], words)
    return sums / is_text.sum(dim=1, keepdim=True).clamp_min(1)


def choose(encoded: Encoded, budget: Budget, pruner: Chooser, questions: Tensor) -> dict[int, Tensor]:
    """Return the kept indices of each entry, by its index among the output's."""
    groups = [[n for n, other in enumerate(encoded.budgets) if other == one] for one in dict.fromkeys(encoded.budgets)]
    numbers = [*budget] if isinstance(budget, list | tuple) else [budget] * len(groups)
    if len(numbers) != len(groups):
        raise ValueError(f"{len(numbers)} budgets are given for {len(groups)} images, videos, or prompts that share.")
    kept = {}
    for number, members in zip(numbers, groups, strict=True):
        tokens = torch.cat([encoded.tokens[n] for n in members])
        count = count_kept(number, len(tokens))
        chosen = torch.arange(len(tokens), device=tokens.device)
        if count < len(tokens):
            chosen = pruner(tokens, count, questions[encoded.prompts[members[0]]]).to(tokens.device).unique()
            if len(chosen) != count or chosen[0] < 0 or chosen[-1] >= len(tokens):
                raise ValueError(
                    f"The pruner returned {chosen.tolist()} of {len(tokens)} tokens: return {count} different indices."
                )
        first = 0
        for n in members:
            last = first + len(encoded.tokens[n])
            kept[encoded.entries[n]] = chosen[(chosen >= first) & (chosen < last)] - first + encoded.skipped[n]
            first = last
    return kept


def count_kept(number: float, length: int) -> int:
    """Return how many of an image's tokens a budget keeps."""
    if isinstance(number, Real) and not isinstance(number, Integral) and 0 < number <= 1:
        return max(1, round(number * length))
    if isinstance(number, Integral) and not isinstance(number, bool) and number >= 1:
        return min(int(number), length)
    raise ValueError(f"{number!r} is no budget: give a number of tokens, 1 or more, or a share of them up to 1.0.")


def mark_kept(is_placeholder: Tensor, start: int, encoded: Encoded, kept: dict[int, Tensor]) -> Tensor:
    """Return (batch, length), False at the placeholders from `start` on whose tokens are not kept."""
    flags = [
        torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device).index_fill(0, kept[entry] - skipped, True)
        for tokens, skipped, entry in zip(encoded.tokens, encoded.skipped, encoded.entries, strict=True)
    ]
    is_new = is_placeholder & (torch.arange(is_placeholder.shape[1], device=is_placeholder.device) >= start)
    return torch.ones_like(is_placeholder).masked_scatter(is_new, torch.cat(flags).to(is_placeholder.device))


def name_tokens(output: Any) -> str:
    """Return the field of an encoder's output that has the tokens."""
    return next(name for name in FIELDS if output.get(name) is not None)


def find_tokens(output: Any) -> Any:
    """Return the tokens that an encoder hands to the language model: (tokens, hidden) of each entry."""
    tokens = output[name_tokens(output)]
    while not isinstance(tokens[0], Tensor):  # of several layers the first; Granite tells each with its number
        tokens = tokens[0] if isinstance(tokens[0], list | tuple) else tokens[1]
    return tokens


def take_kept(encoded: Encoded, kept: dict[int, Tensor]) -> Any:
    """Return an encoder's output with the kept tokens alone, in the container that the family's `forward` expects."""

    def take(value: Any) -> Any:
        if isinstance(value, int):
            return value
        if not isinstance(value, Tensor) and not any(isinstance(each, Tensor) for each in value):
            return type(value)(take(layer) for layer in value)
        rows = [value[entry][indices] for entry, indices in kept.items()]
        if isinstance(value, Tensor):
            return torch.cat(rows)[:, None]  # an entry for each token, which `generate` counts to repeat it for beams
        return rows

    output = encoded.output
    unused = {*UNUSED} - {name_tokens(output)}  # as None: timm's last_hidden_state has no default
    used = {name: value for name, value in output.items() if name not in unused}
    used = {name: take(value) if name in FIELDS else value for name, value in used.items()}
    short = type(output)(**used, **dict.fromkeys(unused & output.keys()))
    short.kept_indices = [*kept.values()]
    return short


def drop(
    model: Any, given: dict[str, Any], encoded: dict[str, Encoded], kept: dict[str, dict[int, Tensor]], record: Record
) -> tuple[dict[str, Any], Record]:
    """Return inputs without the placeholders whose tokens are not kept, and what a KV cache has to remember.

    Args:
        model: as in `prune`.
        given: inputs without None, with a mask.
        encoded: of `encode`.
        kept: for each modality, the kept indices of each entry, as `choose` returns them.
        record: what the cache remembers so far.
    """
    places, start = find_placeholders(model.config, given), record.whole_length
    is_kept, outputs, used, entries = given["attention_mask"].bool(), {}, {"position_ids"}, {}
    for modality in places:
        used |= encoder_arguments(model, modality)
        if some := encoded.get(modality):
            is_kept = is_kept & mark_kept(places[modality], start, some, kept[modality])
            outputs[modality] = take_kept(some, kept[modality])
            entries[f"{modality}_grid_thw"] = some.entries
    grids = {name: given[name][entries[name]] for name in entries if name in given}
    if model.config.model_type in COUNTED_ANEW:
        positions = count_positions(is_kept[:, start:])
    else:
        positions = whole_positions(model, given | grids, places, start)
    short, record = shorten(given, is_kept, positions, record)
    rest = {name: value for name, value in given.items() if name not in used and name not in short}
    return {**rest, **short, **({"mm_encoder_outputs": outputs} if outputs else {})}, record


def whole_positions(model: Any, given: dict[str, Any], places: dict[str, Tensor], start: int) -> Tensor:
    """Return the family's position ids before pruning, from `start` on: (batch, length), or (3, batch, length)."""
    ids, mask = given["input_ids"][:, start:], given["attention_mask"][:, start:]
    count = getattr(model.base_model, "get_rope_index", None)
    if count is None:
        return count_positions(mask)
    types = sum(places[name][:, start:] * number for name, number in TYPES.items())
    arguments = {**given, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    arguments["second_per_grids"] = given.get("video_second_per_grid")  # as Qwen Omni's processor names it
    names = inspect.signature(count).parameters
    return count(**{name: arguments[name] for name in names if name in arguments})[0]


def shorten(
    given: dict[str, Any], is_kept: Tensor, positions: Tensor, record: Record
) -> tuple[dict[str, Tensor], Record]:
    """Return all inputs of the prompt's length without dropped positions, and the record of which these are.

    Args:
        given: the inputs, of which those as long as the ids are shortened.
        is_kept: (batch, length), False at padding and at what is dropped.
        positions: (..., batch, new length) of what is not in the cache, counted from 0.
        record: what the cache remembers.
    """
    ids, start = given["input_ids"], record.whole_length
    # One column of padding in front: without any, and without a cache, transformers takes jumps in position ids for
    # the borders of packed sequences. M-RoPE has the text's positions in a row of their own.
    later = Compaction.without(~is_kept[:, start:], padding=int(positions.dim() == 2 and not start))
    whole = record.followed_by(later)
    compaction = whole.compaction
    names = [name for name, value in given.items() if isinstance(value, Tensor) and value.shape == ids.shape]
    short = {name: compaction.shorten(given[name], -100 if name == "labels" else 0) for name in names}
    if "labels" in short:  # in a row alone nothing predicts the first position, and padding should not
        short["labels"] = short["labels"].masked_fill(short["attention_mask"].cumsum(dim=1) <= 1, -100)
    behind = record.add_shift(short["attention_mask"][:, : record.cached].sum(dim=1, keepdim=True))
    following = positions.movedim(-2, 0).flatten(1).amax(dim=1)[:, None] + 1
    positions = later.shorten(positions, 0)
    if not (positions[..., -1] == following[:, 0] - 1).all():
        raise ValueError("A prompt ends in text: put a word behind its last image or video.")
    positions = pad(positions + behind, (record.cached, 0))  # of what is cached they are not read
    if len(positions) == 3 and positions.dim() == 3:  # `generate` counts the text's in a row of their own
        positions = torch.cat([count_positions(short["attention_mask"])[None], positions])
    shift = behind + following - short["attention_mask"].sum(dim=1, keepdim=True)
    return {**short, "position_ids": positions}, replace(
        whole, shift=shift, before=replace(record, before=None), ids=mark_padding(given)
    )
