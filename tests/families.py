"""Tiny random models of vision-language families of transformers, and prompts for them: a few dozen thousand weights."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

IMAGE, VIDEO, START, END, VIDEO_START, VIDEO_END = 7, 6, 8, 9, 4, 5
VOCABULARY, HIDDEN = 99, 64
GRIDS = ((1, 8, 12), (1, 4, 8), (1, 12, 8), (1, 8, 8))  # (frames, rows, columns) of patches of the images, in turn
SIZES = ((24, 48), (48, 24), (48, 48), (24, 24))  # the same in pixels, for families of tiles


@dataclass(frozen=True)
class Family:
    """A model, and what its processor makes: `pixels(images_per_row)` has the keys of `get_image_features`."""

    model: PreTrainedModel
    pixels: Callable[[list[int]], dict[str, Tensor]]
    clips: Callable[[int], dict[str, Tensor]] | None = None
    frames_apart: bool = False  # a timestamp before each frame's placeholders
    video_token: int = VIDEO
    field: str = "pooler_output"  # what `forward` takes from the encoder's output
    attention: str = "causal"  # or "blocks": an image's tokens see each other; "prefix": so does the whole prompt
    one_row: bool = False  # no batches
    limit: str = ""  # why dropping is not the same as masking; empty if it is

    def inputs(self, images_per_row=(1,)) -> dict[str, Tensor]:
        """Return a left-padded prompt for each row, with its images; seeded."""
        torch.manual_seed(len(images_per_row))
        pixels = self.pixels(list(images_per_row))
        encode = self.model.base_model.get_image_features
        counts = iter(self._count(encode, pixels, sum(images_per_row)))
        rows = [[[START, *[IMAGE] * next(counts), END] for _ in range(n)] for n in images_per_row]
        return self._tokens(rows, 1) | pixels

    def video(self, num_videos: int = 1) -> dict[str, Tensor]:
        """Return a left-padded prompt for each row, each with one video."""
        torch.manual_seed(num_videos)
        clips = self.clips(num_videos)
        counts = self._count(self.model.base_model.get_video_features, clips, num_videos)
        frames = clips["video_grid_thw"][:, 0].tolist() if self.frames_apart else [1] * num_videos
        rows = [
            [[30 + i, START, *[self.video_token] * (n // t), END] for i in range(t)] for n, t in zip(counts, frames, strict=True)
        ]
        return self._tokens(rows, 2) | clips

    def _count(self, encode, arguments, number: int) -> list[int]:
        """Return the number of tokens of each image; entries of `pooler_output` are images, or tiles of them."""
        names = inspect.signature(encode).parameters
        with torch.no_grad():
            out = encode(**{k: v for k, v in arguments.items() if k in names}, return_dict=True)
        out = out.deepstack_features[0][1] if self.field == "deepstack_features" else out[self.field]
        lengths = [len(entry) for entry in out]
        if len(lengths) % number:  # an entry is a row of images
            return [sum(lengths) // number] * number
        each = len(lengths) // number
        return [sum(lengths[i * each : (i + 1) * each]) for i in range(number)]

    def _tokens(self, rows: list[list[list[int]]], modality: int) -> dict[str, Tensor]:
        rows = [
            [11 + i] + [token for image in row for token in image] + list(range(20, 23 + 2 * i))
            for i, row in enumerate(rows)
        ]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        types = modality * ((ids == IMAGE) | (ids == VIDEO)).int()
        tokens = {"input_ids": ids, "attention_mask": torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])}
        accepted = inspect.signature(self.model.forward).parameters
        names = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
        if self.attention == "prefix":
            types = torch.zeros_like(types)
        return tokens | {name: types for name in names if name in accepted}


def build(kind: str, text: dict, vision: dict, **settings) -> PreTrainedModel:
    """Return a model of random weights, drawn so wide that its logits reach about 5 and depend on the images."""
    settings = {"image_token_id": IMAGE, "video_token_id": VIDEO} | settings
    parts = {name: part for name, part in (("text_config", text), ("vision_config", vision)) if part}
    config = AutoConfig.for_model(kind, **parts, **settings)
    torch.manual_seed(0)
    return seeded(AutoModelForImageTextToText.from_config(config))


def seeded(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with weights drawn so wide that its logits reach about 5 and depend on the images."""
    torch.manual_seed(0)
    model = model.float().eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, *range(90, VOCABULARY)]  # a trained model says none
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
    """Return the configuration of an encoder of pictures of 24 by 24 pixels, 36 patches."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
    }
    return sizes | ({"model_type": kind} if kind else {}) | settings


def mrope(**settings) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]} | settings
    return {"rope_parameters": rope}


def squares(images_per_row: list[int], *tiles: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(sum(images_per_row), *tiles, 3, 24, 24)}


def sized(images_per_row: list[int], *tiles: int, sizes=SIZES) -> dict[str, Tensor]:
    n = sum(images_per_row)
    sizes = torch.tensor([sizes[i % len(sizes)] for i in range(n)])
    return squares(images_per_row, *tiles) | {"image_sizes": sizes}


def by_row(images_per_row: list[int]) -> dict[str, Tensor]:
    """Return (rows, most images, 3, 24, 24); pictures of zeros fill up the rows of fewer images."""
    pixels = torch.randn(len(images_per_row), max(images_per_row), 3, 24, 24)
    for row, n in enumerate(images_per_row):
        pixels[row, n:] = 0
    return {"pixel_values": pixels}


def frames(number: int) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.randn(number, 4, 3, 24, 24)}


def native(images_per_row: list[int], width: int = 96, grids=GRIDS) -> dict[str, Tensor]:
    grids = torch.tensor([grids[i % len(grids)] for i in range(sum(images_per_row))])
    return {"pixel_values": torch.randn(int(grids.prod(-1).sum()), width), "image_grid_thw": grids}


def native_clips(number: int, width: int = 96, grids=((3, 4, 8), (2, 8, 4))) -> dict[str, Tensor]:
    grids = torch.tensor(grids[:number])
    return {"pixel_values_videos": torch.randn(int(grids.prod(-1).sum()), width), "video_grid_thw": grids}


def conv_patches(images_per_row: list[int]) -> dict[str, Tensor]:
    x = native(images_per_row, 48)
    return x | {"pixel_values": x["pixel_values"].view(-1, 3, 4, 4)}


def conv_clips(number: int) -> dict[str, Tensor]:
    x = native_clips(number, 48)
    return x | {"pixel_values_videos": x["pixel_values_videos"].view(-1, 3, 4, 4)}


def qwen(kind: str, text_settings: dict, **vision) -> Family:
    sizes = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
    tokens = {"vision_start_token_id": START, "vision_end_token_id": END}
    model = build(kind, text(**mrope() | text_settings), sizes | {"out_hidden_size": HIDDEN} | vision, **tokens)
    return Family(model, native, native_clips, frames_apart=kind.startswith("qwen3"))


def qwen_text(**settings) -> dict:
    return text(**mrope()) | settings


def qwen2_vl() -> Family:
    return qwen("qwen2_vl", {}, embed_dim=32, hidden_size=HIDDEN, mlp_ratio=2)


def qwen2_5_vl() -> Family:
    return qwen("qwen2_5_vl", {}, window_size=16, fullatt_block_indexes=[2])


def qwen3_vl() -> Family:
    return qwen("qwen3_vl", {}, num_position_embeddings=256, deepstack_visual_indexes=[0, 1])


def qwen3_vl_moe() -> Family:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return qwen("qwen3_vl_moe", experts, num_position_embeddings=256, deepstack_visual_indexes=[0, 1])


def qwen3_5(kind: str = "qwen3_5", **experts) -> Family:
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    rope = mrope(partial_rotary_factor=1.0, mrope_interleaved=True)
    layers = {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    return qwen(kind, linear | layers | rope | experts, num_position_embeddings=256)


def llava(kind: str = "llava", **settings) -> Family:
    return Family(build(kind, text("llama"), tower("clip_vision_model"), **settings), squares)


def llava_next(kind: str = "llava_next", vision=None, **settings) -> Family:
    pinpoints = [[24, 48], [48, 24], [48, 48]]
    vision = vision or tower("clip_vision_model")
    model = build(kind, text("llama"), vision, image_grid_pinpoints=pinpoints, **settings)
    return Family(model, lambda rows: sized(rows, 5), None if kind == "llava_next" else frames)


def llava_onevision() -> Family:
    family = llava_next("llava_onevision", tower("siglip_vision_model", vision_use_head=False))

    def pixels(rows):
        return sized(rows, 5) | {"batch_num_images": torch.tensor(rows)}

    return Family(family.model, pixels, family.clips)


def video_llava() -> Family:
    vision = tower("clip_vision_model")
    return Family(build("video_llava", text("llama"), vision, image_token_index=IMAGE, video_token_index=VIDEO), squares, frames)


def vipllava() -> Family:
    return llava("vipllava", vision_feature_layers=[-1, -2])


def internvl(kind: str = "internvl", **settings) -> Family:
    vision = tower() | {"image_size": [24, 24], "patch_size": [4, 4]}
    return Family(build(kind, text("qwen2"), vision, image_seq_length=9, **settings), squares)


def idefics3(kind: str = "idefics3") -> Family:
    return Family(build(kind, text("llama"), tower(), scale_factor=2), by_row)


def idefics2() -> Family:
    resampler = {"resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 16, "num_key_value_heads": 2}
    return Family(build("idefics2", text("mistral"), tower(), perceiver_config=resampler), by_row)


def mistral3(kind: str = "mistral3") -> Family:
    sizes = ((24, 24), (16, 24), (24, 16), (16, 16))
    model = build(kind, text("mistral"), tower("pixtral", head_dim=16), spatial_merge_size=2)
    return Family(model, lambda rows: sized(rows, sizes=sizes))


def lfm2_vl() -> Family:
    vision = tower("siglip2_vision_model", num_patches=36, vision_use_head=False)
    layers = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}
    model = build("lfm2_vl", text("lfm2", **layers), vision, downsample_factor=2)
    shapes = ((6, 6), (4, 6), (6, 4), (4, 4))

    def pixels(rows):
        shape = torch.tensor([shapes[i % 4] for i in range(sum(rows))])
        there = torch.arange(36) < shape.prod(-1, keepdim=True)
        return {"pixel_values": torch.randn(sum(rows), 36, 48), "spatial_shapes": shape, "pixel_attention_mask": there.long()}

    return Family(model, pixels, limit="short convolutions mix neighbors")


def aya_vision(kind: str = "aya_vision") -> Family:
    return Family(build(kind, text("cohere2"), tower("siglip_vision_model", vision_use_head=False), downsample_factor=2), squares)


def gemma3() -> Family:
    model = build("gemma3", text("gemma3_text", sliding_window=512), tower(), mm_tokens_per_image=9)
    return Family(model, squares, attention="blocks")


def paligemma() -> Family:
    model = build("paligemma", text("gemma"), tower(vision_use_head=False), projection_dim=HIDDEN)
    return Family(model, squares, attention="prefix")


def glm4v(kind: str = "glm4v", **settings) -> Family:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "image_size": 24}
    tokens = {"image_start_token_id": START, "image_end_token_id": END, "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END}
    model = build(kind, text(**mrope(partial_rotary_factor=1.0)) | settings, vision | {"out_hidden_size": HIDDEN}, **tokens)
    return Family(model, native, native_clips, frames_apart=True, video_token=IMAGE)


def glm_moe(kind: str = "glm4v_moe") -> Family:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    return glm4v(kind, **experts)


def smolvlm() -> Family:
    return idefics3("smolvlm")



def glm46v() -> Family:
    return glm4v("glm46v")


def glm_ocr() -> Family:
    return glm4v("glm_ocr")


def qwen3_5_moe() -> Family:
    return qwen3_5("qwen3_5_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)


def exaone4_5() -> Family:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_key_value_heads": 1, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [2], "out_hidden_size": HIDDEN}
    return Family(build("exaone4_5", text("exaone4"), vision), native, native_clips)


def hyperclovax_vision_v2() -> Family:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [2], "out_hidden_size": HIDDEN}
    return Family(build("hyperclovax_vision_v2", text("hyperclovax"), vision), native, native_clips)


def video_llama_3() -> Family:
    def pixels(rows):
        return native(rows, 48) | {"image_merge_sizes": torch.tensor([1 + i % 2 for i in range(sum(rows))])}

    def clips(n):
        return native_clips(n, 48) | {"video_merge_sizes": torch.tensor([2] * n)}

    return Family(build("video_llama_3", text("qwen2"), tower()), pixels, clips)


def paddleocr_vl() -> Family:
    tokens = {"vision_start_token_id": START, "vision_end_token_id": END}
    return Family(build("paddleocr_vl", text(**mrope()), tower(), **tokens), conv_patches)


def ernie4_5_vl_moe() -> Family:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
    tokens = {"image_start_token_id": START, "image_end_token_id": END, "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [32, 32], "moe_num_shared_experts": 1}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}}
    return Family(build("ernie4_5_vl_moe", text(**rope) | experts, vision, **tokens), lambda rows: native(rows, 48), lambda n: native_clips(n, 48, ((4, 4, 8), (2, 8, 4))))


def lighton_ocr() -> Family:
    sizes = ((24, 24), (16, 24), (24, 16), (16, 16))
    model = build("lighton_ocr", text("qwen3"), tower("pixtral", head_dim=16), spatial_merge_size=2)
    return Family(model, lambda rows: sized(rows, sizes=sizes))


def got_ocr2() -> Family:
    vision = tower(output_channels=16, window_size=3, global_attn_indexes=[2], mlp_dim=48) | {"image_size": 64}
    return Family(build("got_ocr2", text("qwen2"), vision, image_seq_length=16), lambda rows: {"pixel_values": torch.randn(sum(rows), 3, 64, 64)})


def deepseek_vl() -> Family:
    return Family(build("deepseek_vl", text("llama"), tower("siglip_vision_model")), squares)


def deepseek_vl_hybrid() -> Family:
    high = tower("sam_vision_model", output_channels=16, window_size=3, global_attn_indexes=[2], mlp_dim=48) | {"image_size": 64}
    model = build("deepseek_vl_hybrid", text("llama"), tower("siglip_vision_model"), high_res_vision_config=high)
    return Family(model, lambda rows: squares(rows) | {"high_res_pixel_values": torch.randn(sum(rows), 3, 64, 64)})


def janus() -> Family:
    vq = {"embed_dim": 8, "num_embeddings": 32, "base_channels": 32, "channel_multiplier": [1, 1], "num_patches": 6, "projection_dim": HIDDEN, "image_token_embed_dim": HIDDEN}
    return Family(build("janus", text("llama"), tower(projection_dim=HIDDEN, num_image_tokens=36), vq_config=vq), squares)


def ovis2() -> Family:
    vision = tower(vocab_size=40, hidden_stride=2)
    return Family(build("ovis2", text("qwen2"), vision, visual_indicator_token_ids=[90, 91, 92, 93, 94], vocab_size=VOCABULARY, hidden_size=HIDDEN), squares)


def aria() -> Family:
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return Family(build("aria", text("aria_text", **experts), tower("idefics3_vision"), projector_patch_to_query_dict={36: 9}), squares)


def llama4() -> Family:
    vision = tower(intermediate_size=128, vision_output_dim=HIDDEN, projector_input_dim=HIDDEN, projector_output_dim=HIDDEN, pixel_shuffle_ratio=0.5)
    experts = {"num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": 512}
    return Family(build("llama4", text(**experts), vision), squares, field="last_hidden_state")


def gemma4(kind: str = "gemma4", width: int = 48, **vision) -> Family:
    vision = tower(num_key_value_heads=2, head_dim=16, pooling_kernel_size=2, position_embedding_size=64) | vision
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
    model = build(kind, text(**layers), vision, audio_config=None)
    shapes = ((6, 6), (4, 6), (6, 4), (4, 4))

    def pixels(rows):
        places = torch.full((sum(rows), 36, 2), -1)
        for i in range(sum(rows)):
            rows_, columns = shapes[i % 4]
            places[i, : rows_ * columns] = torch.cartesian_prod(torch.arange(rows_), torch.arange(columns)).flip(-1)
        return {"pixel_values": torch.rand(sum(rows), 36, width), "image_position_ids": places}

    return Family(model, pixels)


def kimi_k25() -> Family:
    vision = tower(pos_emb_height=16, pos_emb_width=16)
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8}
    return Family(build("kimi_k25", text("deepseek_v3", **moe), vision, projection_hidden_size=32, vision_start_token_id=START, vision_end_token_id=END), conv_patches, conv_clips)


def granite4_vision() -> Family:
    qformer = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "cross_attention_frequency": 1}
    model = build("granite4_vision", text("granite4_vision_text"), tower("siglip_vision_model", hidden_size=64), qformer_config=qformer, image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]], downsample_rate="1/2", deepstack_layer_map=[[-1, 0], [-2, 1]], spatial_target_layers=[1], image_seq_length=9, vision_feature_select_strategy="full")
    return Family(model, lambda rows: sized(rows, 5), field="deepstack_features")


def florence2() -> Family:
    vision = {"depths": [1, 1, 1, 1], "patch_stride": [2, 2, 2, 2], "embed_dim": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "num_groups": [1, 1, 2, 2], "window_size": 3, "projection_dim": HIDDEN, "drop_path_rate": 0.0}
    bart = {"model_type": "bart", "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return Family(build("florence2", bart, vision), lambda rows: {"pixel_values": torch.randn(sum(rows), 3, 48, 48)})


def fuyu() -> Family:
    model = build("fuyu", text("persimmon"), {}, hidden_size=HIDDEN, vocab_size=VOCABULARY, patch_size=4, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    return Family(model, lambda rows: {"pixel_values": torch.randn(sum(rows), 36, 48)}, field="last_hidden_state")


def cosmos3_omni() -> Family:
    family = qwen("cosmos3_omni", {}, num_position_embeddings=256, deepstack_visual_indexes=[0, 1])
    return replace(family, frames_apart=True)


def cosmos3_edge() -> Family:
    vision = tower(num_patches=36)
    model = build("cosmos3_edge", text(**mrope()), vision, vision_start_token_id=START, vision_end_token_id=END, projector_hidden_size=HIDDEN)
    return Family(model, lambda rows: native(rows, 48), lambda n: native_clips(n, 48), frames_apart=True)


def cohere_compass() -> Family:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": HIDDEN, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
    rope = {"mrope_section": [4, 2, 2], "rope_type": "default", "rope_theta": 10000.0}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
    model = build("cohere_compass", text(**layers), vision, vision_start_token_id=START, vision_end_token_id=END)
    return Family(model, native, native_clips, frames_apart=True)


def hunyuan_vl() -> Family:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}}
    vision = tower(out_hidden_size=HIDDEN, max_image_size=64, text_hidden_size=HIDDEN)
    return Family(build("hunyuan_vl", text(**rope), vision), lambda rows: native(rows, 48))


def molmo2() -> Family:
    vision = tower(head_dim=16, num_key_value_heads=2, num_position_embeddings=36, image_size=[24, 24])
    adapter = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "text_hidden_size": HIDDEN, "vision_feature_layer": [-1, -2]}
    model = build("molmo2", text(additional_vocab_size=8), vision, adapter_config=adapter, video_token_id=IMAGE, image_patch_id=IMAGE)

    def pixels(rows):
        n = sum(rows)
        pooling = torch.arange(36 * n).view(n, 3, 2, 3, 2).transpose(2, 3).reshape(9 * n, 4)
        return {"pixel_values": torch.randn(n, 36, 48), "image_token_pooling": pooling, "image_grids": torch.tensor([[3, 3, 0, 0]] * n)}

    return Family(model, pixels, attention="images")


def minicpm(kind: str = "minicpmv4_6") -> Family:
    text_config = qwen3_5().model.config.text_config.to_dict()
    vision = tower(insert_layer_id=1)
    model = build(kind, text_config, vision, insert_layer_id=1, image_size=24)
    shapes = ((4, 8), (8, 4), (8, 8), (4, 4))

    def pixels(rows):
        sizes = torch.tensor([shapes[i % 4] for i in range(sum(rows))])
        return {"pixel_values": torch.randn(1, 3, 4, 4 * int(sizes.prod(-1).sum())), "target_sizes": sizes}

    return Family(model, pixels, limit="linear attention")


def gemma4_unified() -> Family:
    return gemma4("gemma4_unified", 192, mm_embed_dim=HIDDEN, mm_posemb_size=64, output_proj_dims=HIDDEN)


def emu3() -> Family:
    vq = {"codebook_size": 32, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32, "num_attention_heads": 2}
    vocabulary = {"<image>": IMAGE, "<|extra_200|>": 60} | {f"<|visual token {i:06}|>": 61 + i for i in range(32)}
    model = build("emu3", text("emu3_text_model"), {}, vq_config=vq, vocabulary_map=vocabulary)
    return Family(model, lambda rows: sized(rows, sizes=((24, 24),)))


def chameleon() -> Family:
    vq = {"embed_dim": 8, "num_embeddings": 32, "base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "resolution": 24, "attn_resolutions": []}
    vocabulary = {"<image>": IMAGE} | {f"IMGIMG{c}Z": 60 + i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef")}
    return Family(build("chameleon", {}, {}, **text(), vq_config=vq, vocabulary_map=vocabulary), squares)


def blip_2() -> Family:
    qformer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "encoder_hidden_size": 32}
    opt = {"model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": HIDDEN, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Family(build("blip-2", opt, tower(), qformer_config=qformer, num_query_tokens=8, image_token_index=IMAGE), squares)


def qianfan_ocr() -> Family:
    vision = tower() | {"image_size": [24, 24], "patch_size": [4, 4]}
    return Family(build("qianfan_ocr", text("qwen3"), vision, image_seq_length=9), squares)


def muse_glimmer() -> Family:
    vision = tower(pos_emb_height=8, pos_emb_width=8, max_position_embeddings=64)
    return Family(build("muse_glimmer", text(), vision, out_hidden_size=128, projector_hidden_size=48), native, native_clips)


def minimax_m3_vl() -> Family:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 48, "shared_intermediate_size": 48}
    return Family(build("minimax_m3_vl", text(**experts, index_n_heads=2, index_head_dim=16, rotary_dim=16), tower()), native, native_clips)


def lfm3_vl() -> Family:
    return Family(build("lfm3_vl", text("lfm3", layer_types=["conv", "full_attention"]), tower(num_key_value_heads=2, layer_types=["conv", "full_attention", "full_attention"])), native, native_clips)


def omni(model_class, config_class, **vision) -> Family:
    sizes = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": HIDDEN}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 16, "output_dim": HIDDEN, "downsample_hidden_size": 8}
    tokens = {"image_token_index": IMAGE, "video_token_index": VIDEO, "image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 3, "audio_token_index": 3, "vision_start_token_id": START, "audio_start_token_id": 10}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = config_class(text_config=text(**mrope()) | experts, vision_config=sizes | vision, audio_config=audio, **tokens)
    return Family(seeded(model_class(config)), native, lambda n: native_clips(n) | {"video_second_per_grid": torch.ones(n)})


def qwen2_5_omni() -> Family:
    return omni(transformers.Qwen2_5OmniThinkerForConditionalGeneration, transformers.Qwen2_5OmniThinkerConfig, window_size=16, fullatt_block_indexes=[2])


def qwen3_omni_moe() -> Family:
    return omni(transformers.Qwen3OmniMoeThinkerForConditionalGeneration, transformers.Qwen3OmniMoeThinkerConfig, num_position_embeddings=256, deepstack_visual_indexes=[0, 1])


def step3p7() -> Family:
    vision = tower(mlp_ratio=2.0, max_position_embeddings=36)
    moe = {"sliding_window": 512, "layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense", "sparse"], "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "share_expert_dim": 32, "num_local_experts": 4}
    return Family(build("step3p7", text(**moe), vision), squares)


def granite_docling() -> Family:
    vision = tower(out_hidden_size=HIDDEN, scale_factor=2, deepstack_visual_indexes=[0, 1])
    scales = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.25}
    model = build("granite_docling", text(**scales), vision)

    def pixels(rows):
        there = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
        return by_row(rows) | {"pixel_attention_mask": there}

    return Family(model, pixels)


def muse_spark() -> Family:
    vision = tower(pos_emb_height=8, pos_emb_width=8, max_position_embeddings=64)
    audio = {"patch_sizes": [2, 2, 2, 2], "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_hidden_size": HIDDEN}
    moe = {"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_hidden_size": 32}
    return Family(build("muse_spark", text(**moe), vision, out_hidden_size=128, projector_hidden_size=48, audio_config=audio), native, native_clips)


def mistral_large4() -> Family:
    sizes = ((24, 24), (16, 24), (24, 16), (16, 16))
    mla = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4, "index_topk": 512, "index_head_dim": 16, "index_n_heads": 2}
    model = build("mistral_large4", text(**mla), tower("pixtral", head_dim=16), spatial_merge_size=2)
    return Family(model, lambda rows: sized(rows, sizes=sizes))


def glm5_next() -> Family:
    mla = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 0, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 0, "index_topk": 512, "index_head_dim": 16, "index_n_heads": 2, "linear_head_dim": 16, "linear_num_heads": 4, "num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "image_size": 24, "out_hidden_size": HIDDEN, "projection_intermediate_size": 48}
    return Family(build("glm5_next", text(**mla), vision, image_start_token_id=START, image_end_token_id=END, video_start_token_id=VIDEO_START, video_end_token_id=VIDEO_END), native, native_clips)


def qwen4_exp() -> Family:
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "hc_lowrank": 8, "ngram_vocab_size_base": 64, "heads_per_ngram": 2, "split_ngram_parts": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 512, "indexer_compress_ratio": 2, "make_ngram_vocab_size_divisible_by": 8}
    return qwen("qwen4_exp", linear | mrope(partial_rotary_factor=1.0, mrope_interleaved=True), num_position_embeddings=256)


def deepseek_ocr2() -> Family:
    sam = tower(output_channels=16, window_size=3, global_attn_indexes=[2], mlp_dim=48, downsample_channels=[32, 32]) | {"image_size": 64}
    encoder = text("deepseek_ocr2_encoder") | {"hidden_size": 32}
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": 4}
    return Family(build("deepseek_ocr2", text(**moe), {"sam_config": sam, "encoder_config": encoder}), lambda rows: {"pixel_values": torch.randn(sum(rows), 3, 64, 64)})


def minicpm_ocr() -> Family:
    return minicpm("minicpm_ocr")


def minicpmv4_7() -> Family:
    return minicpm("minicpmv4_7")


FAMILIES: dict[str, Callable[[], Family]] = {
    f.__name__: f
    for f in (
        llava, llava_next, llava_onevision, video_llava, vipllava,
        qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, internvl, smolvlm, idefics2, idefics3, mistral3, lfm2_vl, aya_vision,
        gemma3, paligemma, glm4v, glm46v, glm_ocr, qwen3_5_moe, exaone4_5, hyperclovax_vision_v2, video_llama_3, paddleocr_vl,
        ernie4_5_vl_moe, lighton_ocr, got_ocr2, deepseek_vl, deepseek_vl_hybrid, janus, ovis2, aria, llama4, gemma4, kimi_k25, granite4_vision, florence2, fuyu,
 cosmos3_omni, cosmos3_edge, cohere_compass, hunyuan_vl, molmo2, gemma4_unified, emu3, chameleon, blip_2, qianfan_ocr, muse_glimmer, minimax_m3_vl, lfm3_vl, qwen2_5_omni, qwen3_omni_moe, step3p7, granite_docling, muse_spark, mistral_large4, glm5_next, qwen4_exp, deepseek_ocr2, minicpm_ocr, minicpmv4_7
    )
} | {"minicpmv4_6": minicpm, "llava_next_video": partial(llava_next, "llava_next_video"), "cohere2_vision": partial(aya_vision, "cohere2_vision"), "glm4v_moe": glm_moe}
