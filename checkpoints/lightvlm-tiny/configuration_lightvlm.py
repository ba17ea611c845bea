"""Configuration of LightVLM: a LLaVA model that keeps the K image tokens that matter."""

from typing import TYPE_CHECKING, Any, Literal

from transformers.utils.versions import require_version

# Before all imports that older versions lack; some versions would load the model and give wrong answers.
require_version("transformers>=5.18", "LightVLM's code needs it: pip install --upgrade transformers")

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, PreTrainedConfig

from .grids_lightvlm import Grids


@strict
class LightVLMConfig(LlavaConfig):
    """A LLaVA configuration and the three choices of its token pruner: score, select, budget.

    Args:
        num_image_tokens (`int` or "dynamic"):
            Tokens kept of an image if a call does not pass another number, 1 to `num_patches`; by default a quarter.
            "dynamic": as many as the image needs, on average `mean_image_tokens` over many images.
        mean_image_tokens (`int`):
            The average of "dynamic" if a call does not pass one; by default 160 of 576.
        dynamic_budget (`dict`):
            The calibration by `training/budget.py`: `means` and their `kappas`, `exponent`, `minimum` and `maximum` of
            `allot_budgets`, and the `data`, `images` and `delta` it was made with. None: "dynamic" is not available.
        score (`str`):
            What makes a patch important. "cls": the vision encoder's own attention alone. "mlp": its logarithm plus a
            two-layer MLP of the patch features. "positional": "mlp" plus a learned row and column term, and a row and
            column embedding on the kept tokens. "question": "positional" plus, in calls with a question, a low-rank
            product of patches and question; such tokens cannot be reused for another question, and vLLM passes none.
        select (`str`):
            Which patches are kept. "topk": the best scores. "diverse": good scores unlike any better one.
        position_ids (`str`):
            Positions of the kept tokens. "consecutive": as if the dropped ones had never been, for checkpoints trained
            with few tokens. "original": those that they have among all patches, and the text continues after all
            patches, for LLaVA checkpoints as they are. vLLM always counts consecutively.
        prior (`str`):
            What the score starts from. "attention": the logarithm of the encoder's. "attention+distance": half of that
            logarithm, and of all learned terms, plus the logarithm of a projected patch's distance from the mean one.
            "diverse" then compares projected patches. How many tokens "dynamic" gives does not depend on it.
        prior_layer (`int`):
            The encoder layer whose attention the score starts from: the penultimate, as in FasterVLM (Zhang et al.
            2024) and VisionZip (Yang et al. 2024), or -1 for the last. A SigLIP pooling head takes precedence.
        encoder_keep (`dict[int, float]`):
            Shares of all patches that go on through the encoder: `{2: 0.5}` keeps, in front of its third layer, the
            half with the most attention there, as many in each image. The others have no features, and K is at most
            what is left. May be changed on a loaded model. None: all patches.
        scorer_hidden_size (`int`):
            Width of the scorer's MLP.
        lm_head_bias (`bool`):
            Whether the text model's output layer has a bias, as Phi's does.
        image_grid_pinpoints (`list[list[int]]`):
            As in LLaVA-NeXT: the (height, width) that large images are fitted to and cut into tiles, each of the size
            that the encoder sees. An image that fits best to a single tile is one view, but a thumbnail and a tile
            with `image_newline`. None: each image is one view.
        image_newline (`bool`):
            Whether a learned token ends each row of the joined tiles, as in LLaVA-NeXT. It is the first to be dropped.
    """

    model_type = "lightvlm"
    if TYPE_CHECKING:  # LLaVA accepts dicts and converts them
        vision_config: PreTrainedConfig
        text_config: PreTrainedConfig

    num_image_tokens: int | str | None = None
    mean_image_tokens: int | None = None
    dynamic_budget: dict[str, Any] | None = None
    score: Literal["cls", "mlp", "positional", "question"] = "positional"
    select: Literal["topk", "diverse"] = "diverse"
    position_ids: Literal["consecutive", "original"] = "consecutive"
    prior: Literal["attention", "attention+distance"] = "attention"
    prior_layer: int = -2
    encoder_keep: dict[Any, float | int] | None = None
    scorer_hidden_size: int = 512
    lm_head_bias: bool = False
    image_grid_pinpoints: list[list[int]] | None = None
    image_newline: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
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
        if self.mean_image_tokens is None:
            self.mean_image_tokens = max(1, round(self.num_patches * 160 / 576))
        view = self.vision_config.image_size
        for sides in self.image_grid_pinpoints or []:
            if not all(side >= view and side % view == 0 for side in sides):
                raise ValueError(f"image_grid_pinpoints has {sides}: give multiples of {view}, the size of a view.")
        is_dynamic = self.num_image_tokens == "dynamic"
        if is_dynamic and self.dynamic_budget is None:
            raise ValueError('num_image_tokens="dynamic" needs a dynamic_budget, which training/budget.py finds.')
        for name in ("mean_image_tokens",) if is_dynamic else ("num_image_tokens", "mean_image_tokens"):
            budget = getattr(self, name)
            if not (isinstance(budget, int) and 1 <= budget <= self.max_image_tokens):
                raise ValueError(
                    f"{name}={budget!r}: an image has at most {self.max_image_tokens} tokens here, so give a number "
                    f"from 1 to {self.max_image_tokens}."
                )

        depth = self.vision_config.num_hidden_layers
        self.encoder_keep = self.encoder_keep and self.checked_encoder_keep()
        layers = self.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        if not (-depth <= self.prior_layer < depth and all(-depth - 1 <= layer <= depth for layer in layers)):
            raise ValueError(
                f"prior_layer={self.prior_layer} or vision_feature_layer={self.vision_feature_layer} is out of range: "
                f"this vision encoder has {depth} layers."
            )

    @property
    def patches_per_side(self) -> int:
        """Return the rows, and columns, of the patch grid."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_patches(self) -> int:
        """Return the number of patches of a view, and so of the tokens of an image of one view before pruning."""
        return self.patches_per_side**2

    def checked_encoder_keep(self) -> dict[int, float]:
        """Return `encoder_keep` with numbers as keys; ValueError if it makes no sense, as it may on a loaded model."""
        depth = self.vision_config.num_hidden_layers
        # JSON makes text of numbers.
        keep = dict(sorted((int(layer), share) for layer, share in (self.encoder_keep or {}).items()))
        shares = [1.0, *keep.values()]
        if not all(0 <= layer < depth for layer in keep) or not all(
            0 < after <= before for before, after in zip(shares, shares[1:], strict=False)
        ):
            raise ValueError(
                f"encoder_keep={self.encoder_keep}: give layers from 0 to {depth - 1}, each with a share of the "
                "patches, more than 0 and no more than the layers before it have."
            )
        return keep

    @property
    def encoder_counts(self) -> dict[int, int]:
        """Return how many patches of a view go on from a layer of the encoder, by its index."""
        shares = self.checked_encoder_keep()
        return {layer: max(1, round(share * self.num_patches)) for layer, share in shares.items()}

    @property
    def encoded_patches(self) -> int:
        """Return the number of patches of a view that have features."""
        return min(self.encoder_counts.values(), default=self.num_patches)

    @property
    def grids(self) -> Grids:
        """Return how large images are cut into views."""
        view, pinpoints = self.vision_config.image_size, self.image_grid_pinpoints or []
        return Grids(pinpoints, view, self.patches_per_side, self.image_newline)

    @property
    def max_image_tokens(self) -> int:
        """Return the number of tokens, before pruning, of the largest image that `image_grid_pinpoints` allow."""
        return self.grids.max_tokens

    def check_length(self, length: int, new_tokens: int) -> None:
        """Raise ValueError if so many prompt tokens and so many new ones are more than the language model reads."""
        positions = self.text_config.max_position_embeddings
        if length + new_tokens > positions:
            raise ValueError(
                f"{length} tokens and {new_tokens} new ones: {length + new_tokens - positions} more than the model "
                "reads. Give a shorter text, or fewer images, or fewer tokens of each, or ask for fewer new ones."
            )


LightVLMConfig.register_for_auto_class()
