"""Configuration of LightVLM: a LLaVA model that keeps the K image tokens that matter."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig


@strict
class LightVLMConfig(LlavaConfig):
    """A LLaVA configuration and the three choices of its token pruner: score, select, budget.

    Args:
        num_image_tokens (`int`):
            Tokens kept of an image when a call does not say otherwise, 1 to `num_patches`; by default a quarter.
        score (`str`):
            What makes a patch important. "cls": the vision encoder's own attention alone. "mlp": its logarithm plus a
            two-layer MLP of the patch features. "positional": "mlp" plus a learned row and column term, and a row and
            column embedding on the kept tokens. "question": "positional" plus, in calls that give a question, a
            low-rank product of patches and question; tokens so chosen cannot be cached for another question, each turn
            of a conversation wants them anew, and vLLM never asks for them. All are equal until trained.
        select (`str`):
            Which patches are kept. "topk": the best scores. "diverse": good scores that are unlike each other.
        prior_layer (`int`):
            The encoder layer whose attention is the score's starting point: the penultimate, as in FasterVLM (Zhang et
            al. 2024) and VisionZip (Yang et al. 2024), or -1 for the last. A SigLIP pooling head goes before it.
        scorer_hidden_size (`int`):
            Width of the scorer's MLP.
        lm_head_bias (`bool`):
            Whether the text model's output layer has a bias, as Phi's does.
    """

    model_type = "lightvlm"

    num_image_tokens: int | None = None
    score: Literal["cls", "mlp", "positional", "question"] = "positional"
    select: Literal["topk", "diverse"] = "topk"
    prior_layer: int = -2
    scorer_hidden_size: int = 512
    lm_head_bias: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.auto_map = {
            "AutoConfig": "configuration_lightvlm.LightVLMConfig",
            "AutoModel": "modeling_lightvlm.LightVLMModel",
            **dict.fromkeys(
                ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq"),
                "modeling_lightvlm.LightVLMForConditionalGeneration",
            ),
        }
        self.image_seq_length = self.num_patches
        if self.num_image_tokens is None:
            self.num_image_tokens = self.num_patches // 4
        if not 1 <= self.num_image_tokens <= self.num_patches:
            raise ValueError(
                f"num_image_tokens={self.num_image_tokens}: this vision encoder cuts an image in {self.num_patches} "
                f"patches, so give a number from 1 to {self.num_patches}."
            )

        depth = self.vision_config.num_hidden_layers
        layers = self.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        if not (-depth <= self.prior_layer < depth and all(-depth - 1 <= layer <= depth for layer in layers)):
            raise ValueError(
                f"prior_layer={self.prior_layer} or vision_feature_layer={self.vision_feature_layer} is out of range: "
                f"this vision encoder has {depth} layers."
            )

    @property
    def patches_per_side(self) -> int:
        """Rows, and columns, of the patch grid."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_patches(self) -> int:
        """Tokens of an image before pruning."""
        return self.patches_per_side**2


LightVLMConfig.register_for_auto_class()
