"""Dynamic budgets: the kappa of a mean."""

import torch
from lightvlm.pruning_lightvlm import allot_budgets


def find_kappa(complexity: torch.Tensor, mean: int, dynamic_budget: dict) -> float:
    """The kappa that gives these images a mean budget, by bisection; their complexity is (images,)."""
    low, high = -20.0, 20.0  # of its logarithm
    means = torch.full_like(complexity, mean)
    for _ in range(60):
        kappa = torch.tensor((low + high) / 2).exp().item()
        flat = dynamic_budget | {"kappas": [kappa] * len(dynamic_budget["means"])}
        too_few = allot_budgets(complexity, means, flat).float().mean() < mean
        low, high = ((low + high) / 2, high) if too_few else (low, (low + high) / 2)
    return kappa
