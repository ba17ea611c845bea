"""LightVLM in lmms-eval, which finds it by its entry point of group `lmms_eval.models` in pyproject.toml.

lmms-eval --model lightvlm --model_args pretrained=FOLDER,num_image_tokens=64 --tasks pope --batch_size 16
lmms-eval --model lightvlm --model_args pretrained=Qwen/Qwen3-VL-2B-Instruct,num_image_tokens=0.25 --tasks pope
"""

import torch
from accelerate import Accelerator
from lightvlm.inference.answers import batches
from lightvlm.inference.any_model import load_any
from lightvlm.inference.own_model import Options
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm


def manifest() -> ModelManifest:
    """Return what lmms-eval registers."""
    return ModelManifest("lightvlm", chat_class_path=f"{__name__}.{LMMSModel.__name__}")


class LMMSModel(lmms):
    """A checkpoint that answers the generation tasks of lmms-eval, in batches, on text and images.

    lmms-eval itself shares questions out among the processes of `torchrun`, and keeps the cache of `--use_cache`.

    Args:
        pretrained: folder or Hub name of a LightVLM checkpoint, or of a model of another family.
        num_image_tokens: K of every image, a share of its tokens such as 0.25 or "25%", "all", or, of a LightVLM,
            "dynamic" or "dynamic:64"; if None the checkpoint's default, which is all of another family's.
        question_aware: whether each question chooses the tokens of a LightVLM.
        dtype: "float32", "bfloat16" or "float16"; by default as `lightvlm eval` chooses it.
        device: such as "cpu"; by default this process's GPU if there is one.
        batch_size: questions at a time.
        pruner: folder or Hub name of a `TokenScorer` for a model of another family.

    Raises:
        ValueError: if the checkpoint cannot be loaded, or cannot do what the other arguments ask for.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_image_tokens: int | float | str | None = None,
        question_aware: bool = False,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        pruner: str | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype}: give float32, bfloat16 or float16.")
        self.accelerator = Accelerator()  # before the model is loaded: it makes this process's GPU the current one
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.asked = load_any(pretrained, pruner, dtype=dtype)
        self.model, self.processor = self.asked.model, self.asked.processor
        self.options = Options(self.asked.resolve(num_image_tokens), question_aware=question_aware)
        self.asked.check(self.options, "question_aware")
        self.device = torch.device(device or self.model.device)
        self.model.to(self.device)
        self.batch_size = int(batch_size)

    def conversation(self, request: Instance) -> list[dict]:
        """Return a request's messages, with its images."""
        _, to_messages, _, number, task, split = request.args
        return ChatMessages(messages=to_messages(self.task_dict[task][split][number])).to_hf_messages()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return answers in the order of the requests."""
        answers = [""] * len(requests)
        wanted = [request.args[2] for request in requests]
        for batch in tqdm(batches(wanted, self.batch_size), desc="Batches", disable=self.rank != 0):
            conversations = [self.conversation(requests[number]) for number in batch]
            found = self.asked.answer(conversations, wanted[batch[0]], self.options)
            for number, answer in zip(batch, found, strict=True):
                answers[number] = answer.text
        return answers

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError("LightVLM generates answers: choose a task with `output_type: generate_until`.")

    generate_until_multi_round = loglikelihood
