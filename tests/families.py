"""Tiny random models of the vision-language families of transformers, and prompts for them.

A model has a few dozen thousand weights, in float32 on the CPU, drawn so wide that its logits reach about 5 and
depend on the images. `FAMILIES["qwen3_vl"]()` builds one.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers
from packaging import version
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

IMAGE, VIDEO, START, END, VIDEO_START, VIDEO_END = 7, 6, 8, 9, 4, 5
VOCABULARY, HIDDEN, OTHERS = 99, 64, 60  # ids from OTHERS on stand for no text: codes of images, indicators
TILES = ((24, 48), (48, 24), (48, 48), (24, 24))  # height and width of the pictures, in turn
SHAPES = ((6, 6), (4, 6), (6, 4), (4, 4))  # the same in patches of 4 by 4 pixels
GRIDS = ((1, 8, 12), (1, 4, 8), (1, 12, 8), (1, 8, 8))  # with the number of frames


@dataclass(frozen=True)
class Family:
    """A model, and what its processor makes of pictures: the keys of `get_image_features`, `get_video_features`."""

    model: PreTrainedModel
    pixels: Callable[[list[int]], dict[str, Tensor]]  # of the number of images in each row
    clips: Callable[[int], dict[str, Tensor]] | None = None  # of the number of videos
    field: str = "pooler_output"  # what `forward` takes of the encoder's output
    attention: str = "causal"  # see `allowed`; "recurrent": layers that see their neighbors, and know no mask
    frames_apart: bool = False  # a timestamp stands before each frame of a video
    video_token: int = VIDEO
    keeps_positions: bool = True  # whether `generate` passes given position ids on

    def inputs(self, images_per_row=(1,)) -> dict[str, Tensor]:
        """Return a left-padded prompt for each row with its images, as the processor would."""
        torch.manual_seed(len(images_per_row))
        pixels = self.pixels(list(images_per_row))
        counts = iter(share(self.lengths(pixels), sum(images_per_row)))
        rows = [[[START, *[IMAGE] * next(counts), END] for _ in range(n)] for n in images_per_row]
        return self._tokens(rows, 1) | pixels

    def video(self, number: int = 1) -> dict[str, Tensor]:
        """Return a left-padded prompt for each row, with one video each."""
        torch.manual_seed(number)
        clips = self.clips(number)
        counts = share(self.lengths(clips, "video"), number)
        frames = clips["video_grid_thw"][:, 0].tolist() if self.frames_apart else [1] * number
        rows = []
        for count, n in zip(counts, frames, strict=True):
            parts = [[30 + i, START, *[self.video_token] * (count // n), END] for i in range(n)]
            rows.append([[VIDEO_START], *parts, [VIDEO_END]])
        return self._tokens(rows, 2) | clips

    def allowed(self, inputs: dict[str, Tensor], stays: Tensor) -> Tensor:
        """Return which keys each position of the whole prompt sees if those that don't stay are seen by none.

        Every position sees itself, so that no row is empty. Boolean, (batch, length, length).
        """
        length = stays.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None]
        types = inputs.get("token_type_ids", inputs.get("mm_token_type_ids"))
        if self.attention == "prefix":  # the whole prompt sees itself, up to token type 1
            seen = seen | (types == 0)[:, None]
        elif self.attention == "images":  # all image tokens of a row see each other
            seen = seen | ((types > 0)[:, :, None] & (types > 0)[:, None])
        elif self.attention == "blocks":  # the tokens of an image see each other
            image = types > 0
            block = (image & ~image.roll(1, 1)).cumsum(1).where(image, 0)
            seen = seen | ((block[:, :, None] == block[:, None]) & image[:, None])
        return seen & stays[:, None] | torch.eye(length, dtype=torch.bool)

    def encode(self, inputs: dict[str, Tensor], modality: str = "image"):
        """Return the entries of the encoder's output, (tokens, hidden) each."""
        encode = getattr(self.model.base_model, f"get_{modality}_features")
        names = inspect.signature(encode).parameters
        with torch.no_grad():
            out = encode(**{k: v for k, v in inputs.items() if k in names}, return_dict=True)[self.field]
        return out[0][1] if self.field == "deepstack_features" else out

    def lengths(self, inputs: dict[str, Tensor], modality: str = "image") -> list[int]:
        return [len(entry) for entry in self.encode(inputs, modality)]

    @property
    def types(self) -> set[str]:
        """Return the names of inputs that tell placeholders from text."""
        names = {"token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"}
        return names & set(inspect.signature(self.model.forward).parameters)

    def _tokens(self, rows: list[list[list[int]]], modality: int) -> dict[str, Tensor]:
        """Return the prompts of rows of parts, each with a question of its own length at the end."""
        rows = [[11 + i, *sum(parts, []), *range(20, 23 + 2 * i)] for i, parts in enumerate(rows)]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        types = modality * ((ids == IMAGE) | (ids == VIDEO)).int() * (self.attention != "prefix")
        return {"input_ids": ids, "attention_mask": mask} | dict.fromkeys(self.types, types)


def share(lengths: list[int], number: int) -> list[int]:
    """Return the number of tokens of each image or video; an entry is one of them, a part of one, or a row of them."""
    if len(lengths) < number:
        return [sum(lengths) // number] * number
    each = len(lengths) // number
    return [sum(lengths[i * each : (i + 1) * each]) for i in range(number)]


def build(kind: str, text: dict, vision: dict, **settings) -> PreTrainedModel:
    """Return a model of a configuration's `model_type`."""
    parts = {name: part for name, part in (("text_config", text), ("vision_config", vision)) if part}
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    config = AutoConfig.for_model(kind, **parts, **tokens | settings)
    return seeded(AutoModelForImageTextToText.from_config(config))


def seeded(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    for weight in model.float().eval().parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, *range(OTHERS, VOCABULARY)]  # as a trained model would
    return model


def text(kind: str | None = None, **settings) -> dict:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return sizes | ({"model_type": kind} if kind else {}) | settings


def tower(kind: str | None = None, **settings) -> dict:
    """Return the configuration of an encoder of squares of 24 pixels, 36 patches."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
    }
    return sizes | ({"model_type": kind} if kind else {}) | settings


def merging(**settings) -> dict:
    """Return the configuration of an encoder of any size of picture that merges two by two patches."""
    sizes = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
    return sizes | {"out_hidden_size": HIDDEN} | settings


def mrope(sections=(4, 2, 2), **settings) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope | settings}


def moe(**settings) -> dict:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} | settings


def latent(**settings) -> dict:
    """Return what a text configuration with latent attention and experts needs besides."""
    heads = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    indexer = {"index_topk": 512, "index_head_dim": 16, "index_n_heads": 2}  # of the families that have one
    return heads | experts | indexer | {"num_key_value_heads": 4} | settings


def squares(images_per_row: list[int], size: int = 24) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(sum(images_per_row), 3, size, size)}


def sized(images_per_row: list[int], sizes=tuple((4 * h, 4 * w) for h, w in SHAPES)) -> dict[str, Tensor]:
    """Return padded pictures of several sizes."""
    return squares(images_per_row) | {"image_sizes": turn(sizes, sum(images_per_row))}


def tiled(images_per_row: list[int]) -> dict[str, Tensor]:
    """Return pictures in tiles: the whole and up to four parts."""
    pixels = torch.randn(sum(images_per_row), 5, 3, 24, 24)
    return {"pixel_values": pixels, "image_sizes": turn(TILES, sum(images_per_row))}


def by_row(images_per_row: list[int]) -> dict[str, Tensor]:
    """Return (rows, most images, 3, 24, 24); black pictures fill up the rows of fewer images."""
    pixels = torch.randn(len(images_per_row), max(images_per_row), 3, 24, 24)
    for row, number in enumerate(images_per_row):
        pixels[row, number:] = 0
    return {"pixel_values": pixels}


def native(images_per_row: list[int], width: int = 96) -> dict[str, Tensor]:
    """Return the patches of all pictures, one after the other, each of its own grid."""
    grids = turn(GRIDS, sum(images_per_row))
    return {"pixel_values": torch.randn(int(grids.prod(-1).sum()), width), "image_grid_thw": grids}


def native_clips(number: int, width: int = 96, grids=((3, 4, 8), (2, 8, 4))) -> dict[str, Tensor]:
    grids = turn(grids, number)
    return {"pixel_values_videos": torch.randn(int(grids.prod(-1).sum()), width), "video_grid_thw": grids}


def native_pictures(images_per_row: list[int]) -> dict[str, Tensor]:
    out = native(images_per_row, 48)
    return out | {"pixel_values": out["pixel_values"].view(-1, 3, 4, 4)}


def frames(number: int) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.randn(number, 4, 3, 24, 24)}


def turn(values, number: int) -> Tensor:
    return torch.tensor([values[i % len(values)] for i in range(number)])


small_patches = partial(native, width=48)  # pictures have no second frame
small_clips = partial(native_clips, width=48)


def llava(kind: str = "llava", **settings) -> Family:
    return Family(build(kind, text("llama"), tower("clip_vision_model"), **settings), squares)


def llava_next(kind: str = "llava_next", clips=None, vision: dict | None = None) -> Family:
    pinpoints = [[24, 48], [48, 24], [48, 48]]
    model = build(kind, text("llama"), vision or tower("clip_vision_model"), image_grid_pinpoints=pinpoints)
    return Family(model, tiled, clips)


def llava_onevision() -> Family:
    family = llava_next("llava_onevision", frames, tower("siglip_vision_model", vision_use_head=False))
    return replace(family, pixels=lambda rows: tiled(rows) | {"batch_num_images": torch.tensor(rows)})


def video_llava() -> Family:
    tokens = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    return Family(build("video_llava", text("llama"), tower("clip_vision_model"), **tokens), squares, frames)


def with_tower(kind: str, text_kind: str, vision_kind: str | None = "siglip_vision_model", **settings) -> Family:
    """Return a family of pictures of one size, an encoder and a projector."""
    vision = tower(vision_kind, **({"vision_use_head": False} if vision_kind else {}))
    return Family(build(kind, text(text_kind), vision, **settings), squares)


def internvl(kind: str = "internvl", text_kind: str = "qwen2") -> Family:
    vision = tower(image_size=[24, 24], patch_size=[4, 4])
    return Family(build(kind, text(text_kind), vision, image_seq_length=9), squares)


def idefics3(kind: str = "idefics3") -> Family:
    return Family(build(kind, text("llama"), tower(), scale_factor=2), by_row)


def idefics2() -> Family:
    resampler = {"resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 16}
    resampler["num_key_value_heads"] = 2
    return Family(build("idefics2", text("mistral"), tower(), perceiver_config=resampler), by_row)


def granite_docling() -> Family:
    scales = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
    vision = tower(out_hidden_size=HIDDEN, scale_factor=2, deepstack_visual_indexes=[0, 1])
    model = build("granite_docling", text(**scales, attention_multiplier=0.25), vision)

    def pixels(rows):
        return by_row(rows) | {"pixel_attention_mask": torch.arange(max(rows)) < torch.tensor(rows)[:, None]}

    return Family(model, pixels)


def mistral3(kind: str = "mistral3", text_kind: str | None = "mistral", **text_settings) -> Family:
    vision = tower("pixtral", head_dim=16)
    return Family(build(kind, text(text_kind, **text_settings), vision, spatial_merge_size=2), sized)


def lfm2_vl() -> Family:
    layers = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}
    vision = tower("siglip2_vision_model", num_patches=36, vision_use_head=False)
    model = build("lfm2_vl", text("lfm2", **layers), vision, downsample_factor=2)

    def pixels(rows):
        shapes = turn(SHAPES, sum(rows))
        mask = (torch.arange(36) < shapes.prod(-1, keepdim=True)).long()
        return {
            "pixel_values": torch.randn(sum(rows), 36, 48),
            "spatial_shapes": shapes,
            "pixel_attention_mask": mask,
        }

    return Family(model, pixels, attention="recurrent")


def lfm3_vl() -> Family:
    vision = tower(num_key_value_heads=2, layer_types=["conv", "full_attention", "full_attention"])
    model = build("lfm3_vl", text("lfm3", layer_types=["conv", "full_attention"]), vision)
    return Family(model, native, native_clips, attention="recurrent")


def gemma3() -> Family:
    model = build("gemma3", text("gemma3_text", sliding_window=512), tower(), mm_tokens_per_image=9)
    return Family(model, squares, attention="blocks")


def paligemma() -> Family:
    family = with_tower("paligemma", "gemma", projection_dim=HIDDEN)
    return replace(family, attention="prefix")


def gemma4(kind: str = "gemma4", width: int = 48, attention: str = "causal", **vision) -> Family:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512}
    layers |= {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 64}
    model = build(kind, text(**layers), tower(**sizes | vision), audio_config=None)

    def pixels(rows):
        places = torch.full((sum(rows), 36, 2), -1)
        for place, (height, columns) in zip(places, turn(SHAPES, sum(rows)).tolist(), strict=True):
            place[: height * columns] = torch.cartesian_prod(torch.arange(height), torch.arange(columns)).flip(-1)
        return {"pixel_values": torch.rand(sum(rows), 36, width), "image_position_ids": places}

    return Family(model, pixels, attention=attention)


def gemma4_unified() -> Family:
    vision = {"mm_embed_dim": HIDDEN, "mm_posemb_size": 64, "output_proj_dims": HIDDEN}
    return gemma4("gemma4_unified", 192, "blocks", **vision)


def qwen(kind: str, attention: str = "causal", vision: dict | None = None, **text_settings) -> Family:
    tokens = {"vision_start_token_id": START, "vision_end_token_id": END}
    vision = vision or merging(num_position_embeddings=256, deepstack_visual_indexes=[0, 1])
    model = build(kind, text(**mrope() | text_settings), vision, **tokens)
    apart = not kind.startswith("qwen2")
    return Family(model, native, native_clips, attention=attention, frames_apart=apart)


def qwen2_vl() -> Family:
    return qwen("qwen2_vl", vision=merging(embed_dim=32, hidden_size=HIDDEN, mlp_ratio=2))


def qwen2_5_vl() -> Family:
    return qwen("qwen2_5_vl", vision=merging(window_size=16, fullatt_block_indexes=[2]))


def linear() -> dict:
    heads = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    layers = {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    return heads | layers | mrope(partial_rotary_factor=1.0, mrope_interleaved=True)


def qwen3_5(kind: str = "qwen3_5", **experts) -> Family:
    vision = merging(num_position_embeddings=256)
    return qwen(kind, "recurrent", vision, **linear() | experts)


def qwen4_exp() -> Family:
    grams = {"ngram_vocab_size_base": 64, "heads_per_ngram": 2, "split_ngram_parts": 1}
    grams |= {"make_ngram_vocab_size_divisible_by": 8, "hc_lowrank": 8}
    indexer = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    indexer |= {"indexer_budget": 512, "indexer_compress_ratio": 2}
    return qwen3_5("qwen4_exp", **moe(shared_expert_intermediate_size=32) | grams | indexer)


def minicpm(kind: str) -> Family:
    model = build(kind, text("qwen3_5_text") | linear(), tower(insert_layer_id=1), insert_layer_id=1, image_size=24)

    def pixels(rows):
        sizes = turn(((8, 8), (4, 8), (8, 12), (4, 4)), sum(rows))
        return {"pixel_values": torch.randn(1, 3, 4, 4 * int(sizes.prod(-1).sum())), "target_sizes": sizes}

    return Family(model, pixels, attention="recurrent")


def omni(name: str, **vision) -> Family:
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    audio |= {"num_mel_bins": 16, "output_dim": HIDDEN, "downsample_hidden_size": 8}
    tokens = {"vision_start_token_id": START, "audio_token_id": 3, "audio_start_token_id": 10}
    for suffix in ("id", "index"):
        tokens |= {f"image_token_{suffix}": IMAGE, f"video_token_{suffix}": VIDEO}
    parts = {"text_config": text(**mrope() | moe()), "vision_config": merging(**vision), "audio_config": audio}
    config = getattr(transformers, f"{name}Config")(**parts, **tokens)
    model = seeded(getattr(transformers, f"{name}ForConditionalGeneration")(config))

    def clips(number):
        return native_clips(number) | {"video_second_per_grid": torch.ones(number)}

    return Family(model, native, clips)


def cosmos3_edge() -> Family:
    tokens = {"vision_start_token_id": START, "vision_end_token_id": END, "projector_hidden_size": HIDDEN}
    model = build("cosmos3_edge", text(**mrope()), tower(num_patches=36), **tokens)
    return Family(model, small_patches, small_clips, frames_apart=True)


def cohere_compass() -> Family:
    layers = ["sliding_attention", "full_attention"]
    rope = dict.fromkeys(layers, mrope()["rope_parameters"])
    return qwen("cohere_compass", layer_types=layers, rope_parameters=rope)


def hunyuan_vl() -> Family:
    vision = tower(out_hidden_size=HIDDEN, max_image_size=64, text_hidden_size=HIDDEN)
    return Family(build("hunyuan_vl", text(**mrope((2, 2, 2, 2))), vision), small_patches)


def paddleocr_vl() -> Family:
    tokens = {"vision_start_token_id": START, "vision_end_token_id": END}
    return Family(build("paddleocr_vl", text(**mrope()), tower(), **tokens), native_pictures)


GLM_TOKENS = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}


def glm(kind: str = "glm4v", attention: str = "causal", vision: dict | None = None, **text_settings) -> Family:
    text_config = text(**mrope(partial_rotary_factor=1.0) | text_settings)
    model = build(kind, text_config, merging(image_size=24) | (vision or {}), **GLM_TOKENS)
    return Family(model, native, native_clips, attention=attention, frames_apart=True, video_token=IMAGE)


def glm4v_moe() -> Family:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return glm("glm4v_moe", **experts, n_group=1, topk_group=1, first_k_dense_replace=1)


def glm5_next() -> Family:
    mixed = latent(q_lora_rank=16, qk_rope_head_dim=0, qk_nope_head_dim=16, head_dim=0)
    mixed |= {"linear_head_dim": 16, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    return glm("glm5_next", "recurrent", {"projection_intermediate_size": 48}, **mixed)


def ernie4_5_vl_moe() -> Family:
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [32, 32], "moe_num_shared_experts": 1}
    vision = merging()
    del vision["out_hidden_size"]
    model = build("ernie4_5_vl_moe", text(**mrope((3, 3, 2)), **experts), vision, **GLM_TOKENS)
    return Family(model, small_patches, partial(small_clips, grids=((4, 4, 8), (2, 8, 4))))


def exaone4_5(kind: str = "exaone4_5", text_kind: str = "exaone4", **vision) -> Family:
    vision = merging(window_size=16, fullatt_block_indexes=[2], **vision)
    return Family(build(kind, text(text_kind), vision), native, native_clips, keeps_positions=False)


def video_llama_3() -> Family:
    def pixels(rows):
        return small_patches(rows) | {"image_merge_sizes": turn((2, 1), sum(rows))}

    def clips(number):
        return small_clips(number) | {"video_merge_sizes": turn((2,), number)}

    return Family(build("video_llama_3", text("qwen2"), tower()), pixels, clips)


def sam(**settings) -> dict:
    sizes = {"output_channels": 16, "window_size": 3, "global_attn_indexes": [2], "mlp_dim": 48, "image_size": 64}
    return tower(**sizes | settings)


def got_ocr2() -> Family:
    return Family(build("got_ocr2", text("qwen2"), sam(), image_seq_length=16), partial(squares, size=64))


def deepseek_ocr2() -> Family:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    layers = {"mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": 4}
    encoder = text("deepseek_ocr2_encoder", hidden_size=32)
    vision = {"sam_config": sam(downsample_channels=[32, 32]), "encoder_config": encoder}
    return Family(build("deepseek_ocr2", text(**experts | layers), vision), partial(squares, size=64))


def deepseek_vl_hybrid() -> Family:
    high = sam(model_type="sam_vision_model")
    family = with_tower("deepseek_vl_hybrid", "llama", high_res_vision_config=high)

    def pixels(rows):
        return squares(rows) | {"high_res_pixel_values": squares(rows, 64)["pixel_values"]}

    return replace(family, pixels=pixels)


def janus() -> Family:
    codes = {"embed_dim": 8, "num_embeddings": 32, "base_channels": 32, "channel_multiplier": [1, 1]}
    codes |= {"num_patches": 6, "projection_dim": HIDDEN, "image_token_embed_dim": HIDDEN}
    vision = tower(projection_dim=HIDDEN, num_image_tokens=36)
    return Family(build("janus", text("llama"), vision, vq_config=codes), squares)


def chameleon() -> Family:
    codes = {"embed_dim": 8, "num_embeddings": 32, "base_channels": 32, "channel_multiplier": [1, 1, 1]}
    codes |= {"num_res_blocks": 1, "resolution": 24, "attn_resolutions": []}
    names = ["IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(i)) + "Z" for i in range(32)]
    words = {"<image>": IMAGE} | {name: OTHERS + i for i, name in enumerate(names)}
    return Family(build("chameleon", {}, {}, **text(), vq_config=codes, vocabulary_map=words), squares)


def emu3() -> Family:
    codes = {"codebook_size": 32, "embed_dim": 8, "latent_channels": 8, "base_channels": 32}
    codes |= {"channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32}
    names = ["<|extra_200|>", *(f"<|visual token {i:06}|>" for i in range(32))]
    words = {"<image>": IMAGE} | {name: OTHERS + i for i, name in enumerate(names)}
    codes["num_attention_heads"] = 2
    model = build("emu3", text("emu3_text_model"), {}, vq_config=codes, vocabulary_map=words)
    return Family(model, partial(sized, sizes=((24, 24),)))


def ovis2() -> Family:
    indicators = {"visual_indicator_token_ids": [START, END, VIDEO_START, VIDEO_END, 3], "hidden_size": HIDDEN}
    vision = tower(vocab_size=40, hidden_stride=2)
    return Family(build("ovis2", text("qwen2"), vision, **indicators, vocab_size=VOCABULARY), squares)


def aria() -> Family:
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    queries = {"projector_patch_to_query_dict": {36: 9}}
    return Family(build("aria", text("aria_text", **experts), tower("idefics3_vision"), **queries), squares)


def llama4() -> Family:
    sizes = {"vision_output_dim": HIDDEN, "projector_input_dim": HIDDEN, "projector_output_dim": HIDDEN}
    experts = {"num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": 512}
    model = build("llama4", text(**experts), tower(**sizes, intermediate_size=128, pixel_shuffle_ratio=0.5))
    return Family(model, squares, field="last_hidden_state")


def fuyu() -> Family:
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "patch_size": 4, "num_hidden_layers": 2}
    model = build("fuyu", text("persimmon"), {}, **sizes, num_attention_heads=4, intermediate_size=96)
    return Family(model, lambda rows: {"pixel_values": torch.randn(sum(rows), 36, 48)}, field="last_hidden_state")


def molmo2() -> Family:
    adapter = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    adapter |= {"intermediate_size": 48, "text_hidden_size": HIDDEN, "vision_feature_layer": [-1, -2]}
    vision = tower(head_dim=16, num_key_value_heads=2, num_position_embeddings=36, image_size=[24, 24])
    tokens = {"video_token_id": IMAGE, "image_patch_id": IMAGE}
    model = build("molmo2", text(additional_vocab_size=8), vision, adapter_config=adapter, **tokens)

    def pixels(rows):
        n = sum(rows)
        pooling = torch.arange(36 * n).view(n, 3, 2, 3, 2).transpose(2, 3).reshape(9 * n, 4)
        grids = turn(((3, 3, 0, 0),), n)
        return {"pixel_values": torch.randn(n, 36, 48), "image_token_pooling": pooling, "image_grids": grids}

    return Family(model, pixels, attention="images")


def kimi_k25() -> Family:
    vision = tower(pos_emb_height=16, pos_emb_width=16)
    settings = {"projection_hidden_size": 32, "vision_start_token_id": START, "vision_end_token_id": END}
    experts = latent(q_lora_rank=16, n_group=1, topk_group=1, first_k_dense_replace=1)
    return Family(build("kimi_k25", text("deepseek_v3", **experts), vision, **settings), native_pictures)


def granite4_vision() -> Family:
    layers = {"deepstack_layer_map": [[-1, 0], [-2, 1]], "spatial_target_layers": [1], "downsample_rate": "1/2"}
    former = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "cross_attention_frequency": 1}
    settings = {"image_seq_length": 9, "vision_feature_select_strategy": "full", "qformer_config": former}
    pinpoints = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]]}
    vision = tower("siglip_vision_model", hidden_size=64)
    model = build("granite4_vision", text("granite4_vision_text"), vision, **layers, **settings, **pinpoints)
    return Family(model, tiled, field="deepstack_features")


def muse_glimmer() -> Family:
    vision = tower(pos_emb_height=8, pos_emb_width=8, max_position_embeddings=64)
    sizes = {"out_hidden_size": 128, "projector_hidden_size": 48}
    return Family(build("muse_glimmer", text(), vision, **sizes), native, native_clips)


def muse_spark() -> Family:
    audio = {"patch_sizes": [2] * 4, "hidden_sizes": [8] * 4, "depths": [1] * 4, "out_hidden_size": HIDDEN}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_hidden_size": 32}
    sizes = {"out_hidden_size": 128, "projector_hidden_size": 48}
    vision = tower(pos_emb_height=8, pos_emb_width=8, max_position_embeddings=64)
    return Family(build("muse_spark", text(**experts), vision, **sizes, audio_config=audio), native, native_clips)


def minimax_m3_vl() -> Family:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 48}
    experts |= {"shared_intermediate_size": 48, "index_n_heads": 2, "index_head_dim": 16, "rotary_dim": 16}
    return Family(build("minimax_m3_vl", text(**experts), tower()), native, native_clips)


def step3p7() -> Family:
    experts = {"num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    experts |= {"share_expert_dim": 32, "mlp_layer_types": ["dense", "sparse"]}
    layers = {"sliding_window": 512, "layer_types": ["full_attention"] * 2}
    vision = tower(mlp_ratio=2.0, max_position_embeddings=144, image_size=48)
    return Family(build("step3p7", text(**experts | layers), vision), partial(squares, size=48))


def relative() -> dict:
    """Return a text configuration with convolutions, and relative positions counted between keys."""
    heads = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return text(**heads, **experts, sliding_window_size=512, rel_extent=64)


def inkling() -> Family:
    vision = {"text_hidden_size": HIDDEN, "patch_size": 8, "hidden_size": 32}
    audio = {"audio_config": {"n_mel_bins": 8, "mel_vocab_size": 8, "text_hidden_size": HIDDEN}, "audio_token_id": 3}
    layers = {"n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    model = build("inkling_mm_model", relative() | layers, vision, **audio)
    return Family(model, lambda rows: {"pixel_values": torch.randn(12 * sum(rows), 2, 8, 8, 3)}, attention="recurrent")


def inkling2() -> Family:
    layers = {"unpadded_vocab_size": VOCABULARY, "n_layers_per_attn_res_block": 1}
    vision = tower(posemb_grid_size=8, projection_hidden_dim=48, text_hidden_size=HIDDEN)

    def pixels(rows):
        grids = turn(((1, 4, 6), (1, 2, 4)), sum(rows))
        return {"pixel_values": torch.randn(int(grids.prod(-1).sum()), 8, 8, 3), "image_grid_thw": grids}

    return Family(build("inkling2", relative() | layers, vision), pixels, attention="recurrent")


def dots3_note() -> Family:
    audio = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    audio |= {"feature_size": 16, "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": HIDDEN}
    experts = {"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    layers = {"mlp_layer_types": ["dense", "sparse", "dense"], "adapter_in_dim": 32, "adapter_out_dim": HIDDEN}
    heads = latent(q_lora_rank=16, shared_experts_intermediate_size=32, head_dim=16)
    model = build("dots3_note", text(**heads), tower(**experts | layers), audio_config=audio, audio_token_id=3)
    return Family(model, small_patches, small_clips)


def unlimited_ocr() -> Family:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    layers = {"mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": 4, "sliding_window": 512}
    vision = {"sam_config": sam(downsample_channels=[32, 32]), "encoder_config": tower(image_size=16)}
    return Family(build("unlimited_ocr", text(**experts | layers), vision), partial(squares, size=64))


FAMILIES: dict[str, Callable[[], Family]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_next_video": partial(llava_next, "llava_next_video", frames),
    "llava_onevision": llava_onevision,
    "video_llava": video_llava,
    "vipllava": partial(llava, "vipllava", vision_feature_layers=[-1, -2]),
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": partial(qwen, "qwen3_vl"),
    "qwen3_vl_moe": partial(qwen, "qwen3_vl_moe", **moe()),
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": partial(qwen3_5, "qwen3_5_moe", **moe(shared_expert_intermediate_size=32)),
    "qwen2_5_omni": partial(omni, "Qwen2_5OmniThinker", window_size=16, fullatt_block_indexes=[2]),
    "qwen3_omni_moe": partial(
        omni, "Qwen3OmniMoeThinker", num_position_embeddings=256, deepstack_visual_indexes=[0, 1]
    ),
    "internvl": internvl,
    "smolvlm": partial(idefics3, "smolvlm"),
    "idefics2": idefics2,
    "idefics3": idefics3,
    "granite_docling": granite_docling,
    "granite4_vision": granite4_vision,
    "mistral3": mistral3,
    "lighton_ocr": partial(mistral3, "lighton_ocr", "qwen3"),
    "lfm2_vl": lfm2_vl,
    "aya_vision": partial(with_tower, "aya_vision", "cohere2", downsample_factor=2),
    "cohere2_vision": partial(
        with_tower, "cohere2_vision", "cohere2", downsample_factor=2, alignment_intermediate_size=64
    ),
    "gemma3": gemma3,
    "gemma4": gemma4,
    "gemma4_unified": gemma4_unified,
    "paligemma": paligemma,
    "glm4v": glm,
    "glm4v_moe": glm4v_moe,
    "glm46v": partial(glm, "glm46v"),
    "glm_ocr": partial(glm, "glm_ocr"),
    "paddleocr_vl": paddleocr_vl,
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "exaone4_5": partial(exaone4_5, num_key_value_heads=1),
    "hyperclovax_vision_v2": partial(exaone4_5, "hyperclovax_vision_v2", "hyperclovax"),
    "hunyuan_vl": hunyuan_vl,
    "video_llama_3": video_llama_3,
    "llama4": llama4,
    "ovis2": ovis2,
    "aria": aria,
    "molmo2": molmo2,
    "kimi_k25": kimi_k25,
    "deepseek_vl": partial(with_tower, "deepseek_vl", "llama"),
    "deepseek_vl_hybrid": deepseek_vl_hybrid,
    "deepseek_ocr2": deepseek_ocr2,
    "got_ocr2": got_ocr2,
    "qianfan_ocr": partial(internvl, "qianfan_ocr", "qwen3"),
    "minicpmv4_6": partial(minicpm, "minicpmv4_6"),
    "minicpmv4_7": partial(minicpm, "minicpmv4_7"),
    "minicpm_ocr": partial(minicpm, "minicpm_ocr"),
    "janus": janus,
    "chameleon": chameleon,
    "emu3": emu3,
    "fuyu": fuyu,
    "cosmos3_omni": partial(qwen, "cosmos3_omni"),
    "cosmos3_edge": cosmos3_edge,
    "cohere_compass": cohere_compass,
    "muse_glimmer": muse_glimmer,
    "muse_spark": muse_spark,
    "minimax_m3_vl": minimax_m3_vl,
    "mistral_large4": partial(mistral3, "mistral_large4", None, **latent()),
    "step3p7": step3p7,
    "lfm3_vl": lfm3_vl,
    "glm5_next": glm5_next,
    "qwen4_exp": qwen4_exp,
    "inkling": inkling,
    "inkling2": inkling2,
    "dots3_note": dots3_note,
    "unlimited_ocr": unlimited_ocr,
}
if version.parse(transformers.__version__) >= version.parse("5.24"):
    del FAMILIES["llama4"]  # its own forward raises there if there are images
WITH_VIDEO = [
    *("llava_next_video", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    *("qwen3_5", "qwen3_5_moe", "qwen2_5_omni", "qwen3_omni_moe", "glm4v", "glm4v_moe", "glm46v", "glm_ocr"),
    *("ernie4_5_vl_moe", "exaone4_5", "hyperclovax_vision_v2", "video_llama_3", "cosmos3_omni", "cosmos3_edge"),
    *("cohere_compass", "muse_glimmer", "muse_spark", "minimax_m3_vl", "lfm3_vl", "glm5_next", "qwen4_exp"),
    "dots3_note",
]
