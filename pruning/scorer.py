"""`TokenScorer`: an adapter of under a million parameters that learned which tokens matter to one base model."""

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from lightvlm.pruning_lightvlm import QUESTION_RANK, SELECTORS, ZeroLinear, log_distance
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "pruner_config.json", "pruner.safetensors"
CARD = """---
{data}
---

# {name}

Chooses which image tokens a vision-language model sees. With its base model and `pip install lightvlm`:

```python
from lightvlm import TokenScorer, prune

inputs = prune(model, inputs, num_image_tokens=0.25, pruner=TokenScorer.from_pretrained("{name}"))
```
"""


class TokenScorer(nn.Module):
    """Scores an image's tokens and keeps the best that are unlike each other, as a pruner of `prune`.

    A score is the logarithm of the distance from the mean token, a learned term for the token, and one for how token
    and question fit. The learned terms are zero at the start: an untrained scorer keeps what `keep_distinct` keeps.

    Args:
        hidden_size: the width of the language model, and so of its image tokens.
        scorer_hidden_size: the width of the learned term's hidden layer.
        question_rank: the rank of the question's term; 0 for none.
        select: "diverse" or "topk", as in `lightvlm.pruning_lightvlm`.
        base_model: the checkpoint that it was trained for, for readers.
    """

    def __init__(
        self,
        hidden_size: int,
        scorer_hidden_size: int = 128,
        question_rank: int = QUESTION_RANK,
        select: str = "diverse",
        base_model: str | None = None,
    ) -> None:
        super().__init__()
        self.config = {
            "hidden_size": hidden_size,
            "scorer_hidden_size": scorer_hidden_size,
            "question_rank": question_rank,
            "select": select,
            "base_model": base_model,
        }
        self.scorer = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, scorer_hidden_size),
            nn.GELU(),
            ZeroLinear(scorer_hidden_size, 1),
        )
        nn.init.zeros_(self.scorer[-1].weight)
        nn.init.zeros_(self.scorer[-1].bias)
        self.token_projection = self.question_projection = None
        if question_rank:
            self.question_center = nn.Parameter(torch.zeros(hidden_size))
            self.token_projection = nn.Linear(hidden_size, question_rank, bias=False)
            self.question_projection = ZeroLinear(hidden_size, question_rank, bias=False)
            nn.init.zeros_(self.question_projection.weight)

    @property
    def reads_question(self) -> bool:
        """Return whether a question changes the scores."""
        return self.question_projection is not None

    def score(self, tokens: Tensor, question: Tensor) -> Tensor:
        """Return the importance of each token, (tokens,) in float32, up to a constant.

        Args:
            tokens: (tokens, hidden), as the language model gets them.
            question: (hidden,), the mean embedding of the prompt's text.
        """
        width = tokens.shape[-1:]
        normalized = nn.functional.layer_norm(tokens.float(), width)
        scores = log_distance(tokens) + self.scorer(normalized).squeeze(-1)
        if not self.reads_question:
            return scores
        # Embeddings have no fixed scale, and the mean of all questions distinguishes none.
        asked = nn.functional.layer_norm(question.float() - self.question_center, width)
        return scores + self.token_projection(normalized) @ self.question_projection(asked)

    @torch.no_grad()  # indices have no gradient
    def forward(self, tokens: Tensor, count: int, question: Tensor) -> Tensor:
        """Return `count` indices, in raster order, of tokens (tokens, hidden).

        Raises:
            ValueError: if the tokens have another width than the scorer was made for.
        """
        if tokens.shape[-1] != self.config["hidden_size"]:
            raise ValueError(
                f"This scorer is made for tokens of width {self.config['hidden_size']} "
                f"({self.config['base_model'] or 'an unnamed model'}), and the model's have {tokens.shape[-1]}: give "
                "the scorer that was trained for this model."
            )
        if (device := self.scorer[0].weight.device) != tokens.device:
            logger.warning("The pruner moves from %s to %s, where the model's tokens are.", device, tokens.device)
            self.to(tokens.device)
        scores = self.score(tokens, question.to(tokens.device))
        select = SELECTORS[self.config["select"]]
        return select(scores[None], tokens[None], count)[0].sort().values

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `pruner_config.json` and `pruner.safetensors` to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config, weights = folder / f"{CONFIG}.part", folder / f"{WEIGHTS}.part"
        config.write_text(json.dumps(self.config, indent=2) + "\n")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, weights)
        weights.replace(folder / WEIGHTS)
        config.replace(folder / CONFIG)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_options: Any) -> "TokenScorer":
        """Load a scorer from a folder or from a repository of the Hub.

        Args:
            name_or_path: the folder, or the repository's name.
            hub_options: for `huggingface_hub.hf_hub_download`, as `revision` and `token`.

        Raises:
            FileNotFoundError: if a folder has no scorer.
            ValueError: if configuration and weights do not fit.
        """
        if Path(name_or_path).is_dir():
            files = [Path(name_or_path) / name for name in (CONFIG, WEIGHTS)]
            if lacking := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{name_or_path} has no {lacking[0]}: training/pruner.py writes one.")
        else:
            files = [Path(hf_hub_download(str(name_or_path), name, **hub_options)) for name in (CONFIG, WEIGHTS)]
        scorer = cls(**json.loads(files[0].read_text()))
        try:
            scorer.load_state_dict(load_file(files[1]))
        except RuntimeError as error:
            raise ValueError(f"{files[1]} does not fit {CONFIG} beside it: {error}") from error
        return scorer.eval()

    def push_to_hub(self, name: str, private: bool | None = None, token: str | None = None) -> str:
        """Upload the scorer to a repository of the Hub, made if it does not exist, and return its address.

        Args:
            name: as "user/name".
            private: whether a new repository is private.
            token: of the Hub; by default the one that is logged in.
        """
        hub = HfApi(token=token)
        address = hub.create_repo(name, private=private, exist_ok=True)
        if private and not hub.model_info(name).private:
            raise ValueError(f"{name} is public already: give another name, or make it private on the Hub.")
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            base = self.config["base_model"] or ""
            base = base if "/" in base else None  # a folder's name is no repository
            data = ModelCardData(base_model=base, library_name="lightvlm", pipeline_tag="image-text-to-text")
            ModelCard(CARD.format(data=data.to_yaml(), name=name)).save(Path(folder, "README.md"))
            hub.upload_folder(repo_id=name, folder_path=folder)
        return str(address)
