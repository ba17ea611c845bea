"""Budgets: how many tokens each image of a call keeps, resolved once."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .configuration_lightvlm import LightVLMConfig
from .views_lightvlm import encoded_tokens

Counts = int | list[int] | Tensor  # one for all images, or one for each
HOST_INPUTS = ("num_image_tokens", "mean_image_tokens", "image_sizes")  # of which shapes on the device depend


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move what the processor returned to a device, but not the numbers that the host reads, and would wait for."""
    numbers = {name: inputs[name].tolist() for name in HOST_INPUTS if name in inputs}
    moved = inputs.to(device)
    moved.update(numbers)
    return moved


@dataclass
class Budgets:
    """K of each image of a call.

    Args:
        limits: of each image its K, or, if that is dynamic, the largest it may be.
        means: of each image the K that its dynamic budget has on average, None for an image whose K is its limit; an
            empty list if no budget is dynamic.
    """

    limits: list[int]
    means: list[int | None] = field(default_factory=list)

    @classmethod
    def of(cls, config: LightVLMConfig, limits: Counts | None, means: Counts | None, lengths: list[int]) -> "Budgets":
        """Resolve the arguments of a call; an image that has fewer tokens than its K keeps them all.

        Args:
            config: whose K counts if a call gives none.
            limits, means: `num_image_tokens` and `mean_image_tokens` of `get_image_features`; a mean of 0 is the
                processor's for a budget that is not dynamic.
            lengths: tokens of each image before pruning.

        Raises:
            ValueError: if there are more or fewer numbers than images, or one is out of range.
        """
        if limits is None and config.num_image_tokens == "dynamic":
            limits, means = config.max_image_tokens, config.mean_image_tokens if means is None else means
        count = len(lengths)
        given: Any = config.num_image_tokens if limits is None else limits
        numbers = given.tolist() if isinstance(given, Tensor) else given
        numbers = [numbers] * count if isinstance(numbers, int) else list(numbers)
        if len(numbers) != count:
            raise ValueError(f"num_image_tokens has {len(numbers)} numbers, but there are {count} images.")
        if min(numbers) < 1 or max(numbers) > max(lengths) and max(numbers) > config.max_image_tokens:
            raise ValueError(f"num_image_tokens={numbers}: give numbers from 1 to {config.max_image_tokens}.")
        wanted = [] if means is None else torch.as_tensor(means).expand(count).tolist()
        wanted = [mean if mean > 0 else None for mean in wanted] if any(wanted) else []
        return cls([*map(min, numbers, lengths)], wanted)

    def limited_to_encoded(self, config: LightVLMConfig, image_sizes: Any = None, max_views: Any = None) -> "Budgets":
        """Return budgets of at most the patches that are sure to have features with `config.encoder_keep`.

        Args:
            config: of the model.
            image_sizes, max_views: as in `get_image_features`.

        Raises:
            ValueError: if a K that is not dynamic is larger.
        """
        if not config.encoder_keep or config.encoded_patches == config.num_patches:
            return self
        count, most = len(self.limits), [config.encoded_patches] * len(self.limits)
        if image_sizes is not None:
            sizes = torch.as_tensor(image_sizes).tolist()
            views = [None] * count if max_views is None else torch.as_tensor(max_views).tolist()
            most = [encoded_tokens((*size,), config, number) for size, number in zip(sizes, views, strict=True)]
        means = self.means or [None] * count
        if any(limit > left and mean is None for limit, left, mean in zip(self.limits, most, means, strict=True)):
            raise ValueError(
                f"num_image_tokens={self.limits}: encoder_keep={config.encoder_keep} leaves {most} patches of these "
                "images, so give no larger numbers."
            )
        return Budgets([*map(min, self.limits, most)], self.means)
