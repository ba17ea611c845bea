"""The benchmark's presets of other families, of tiny size."""

import copy

from lightvlm.benchmark.families import FAMILIES


def tiny_family(preset: str) -> dict:
    """Return the sizes of another family's preset with fewer channels and layers."""
    sizes = copy.deepcopy(FAMILIES[preset])
    vision, text = sizes["vision_config"], sizes["text_config"]
    for config in (vision, text):
        config |= {"hidden_size": 64, "intermediate_size": 96}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}
    sizes |= {"image_token_id": 1020, "video_token_id": 1021}
    if "depth" in vision:
        vision |= {"depth": 8, "num_heads": 4, "out_hidden_size": 64}
        vision |= {name: [3, 5] for name in ("deepstack_visual_indexes", "fullatt_block_indexes") if name in vision}
        text["head_dim"] = 16
        text["rope_parameters"] |= {"mrope_section": [2, 3, 3]}
        return sizes
    vision |= {"num_hidden_layers": 8, "num_attention_heads": 4}
    side = {"smolvlm2-2.2b": 84, "smolvlm-500m": 128}.get(preset, 56)
    return sizes | {"vision_config": vision | {"image_size": side}, "image_seq_length": 4}
