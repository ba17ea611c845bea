"""Budgets: how many tokens each image of a call keeps, resolved once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .configuration_lightvlm import LightVLMConfig
from .views_lightvlm import encoded_tokens

Counts = int | list[int] | Tensor  # one for all images, or one for each


@dataclass
class Budgets:
    """K of each image of a call.

    Args:
        limits: of each image its K, or, if that is dynamic, the largest it may be.
        means: of each image the K that dynamic budgets have on average, 0 for an image whose K is its limit; None if
            no image has a dynamic one.
    """

    limits: list[int]
    means: list[int] | None = None

    @classmethod
    def of(cls, config: LightVLMConfig, limits: Counts | None, means: Counts | None, lengths: list[int]) -> "Budgets":
        """Resolve the arguments of a call; an image that has fewer tokens than its K keeps them all.

        Args:
            config: whose K counts if a call gives none.
            limits, means: `num_image_tokens` and `mean_image_tokens` of `get_image_features`.
            lengths: tokens of each image before pruning.

        Raises:
            ValueError: if there are more or fewer numbers than images, or one is out of range.
        """
        count, largest = len(lengths), config.max_image_tokens
        if limits is None and config.num_image_tokens == "dynamic":
            limits, means = largest, config.mean_image_tokens if means is None else means
        given: Any = config.num_image_tokens if limits is None else limits
        numbers = given.tolist() if isinstance(given, Tensor) else given
        numbers = [numbers] * count if isinstance(numbers, int) else list(numbers)
        if len(numbers) != count:
            raise ValueError(f"num_image_tokens has {len(numbers)} numbers, but there are {count} images.")
        if not all(1 <= number <= largest for number in numbers):
            raise ValueError(f"num_image_tokens={numbers}: give numbers from 1 to {largest}.")
        wanted = None if means is None else torch.as_tensor(means).expand(count).tolist()
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
        means = self.means or [0] * count
        if any(limit > left and mean == 0 for limit, left, mean in zip(self.limits, most, means, strict=True)):
            raise ValueError(
                f"num_image_tokens={self.limits}: encoder_keep={config.encoder_keep} leaves {most} patches of these "
                "images, so give no larger numbers."
            )
        return Budgets([*map(min, self.limits, most)], self.means)
