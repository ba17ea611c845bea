"""Chat: one call from a picture and a question to an answer."""

from typing import Any

import torch
from transformers import AutoProcessor, GenerationMixin, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.generation.streamers import BaseStreamer

from .budgets_lightvlm import to_device
from .configuration_lightvlm import LightVLMConfig

HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


def prompt_length(inputs: Any, config: LightVLMConfig) -> int:
    """Return the positions of one prompt of the processor, of dynamic budgets as many as are left on average.

    With original position ids they are as many as if nothing was dropped.
    """
    length, written = inputs["input_ids"].shape[1], [int(number) for number in inputs.get("num_image_tokens", ())]
    if config.position_ids == "original":
        sizes = [(int(height), int(width)) for height, width in inputs.get("image_sizes", ())]
        whole = [config.grids.count_tokens(size) for size in sizes] or [config.num_patches] * len(written)
        return length - sum(written) + sum(whole)
    means = inputs.get("mean_image_tokens", ())
    return length - sum(max(0, largest - int(mean)) for largest, mean in zip(written, means, strict=False) if mean)


class Chat(PreTrainedModel, GenerationMixin):
    """Put before transformers' classes among the bases of a model that generates."""

    config: LightVLMConfig
    _hub_options: dict[str, Any] = {}  # the options of `from_pretrained` that locate the files

    @torch.no_grad()
    def chat(
        self,
        image: Any,
        question: str,
        history: list[dict[str, Any]] | None = None,
        num_image_tokens: int | str | list[int | str] | None = None,
        max_views: int | None = None,
        question_aware: bool = False,
        streamer: BaseStreamer | None = None,
        processor: Any = None,
        **generate_kwargs: Any,
    ) -> str:
        """Answer a question about an image.

        Args:
            image: a `PIL.Image`, a path or a URL, or a list of them; None for a question about an earlier image.
            question: the user's words.
            history: messages so far. The question and its answer are appended once the answer is complete.
            num_image_tokens: K, "dynamic" or "dynamic:64", or a list with one for each image of the conversation; the
                default's if None.
            max_views: of a large image, how many views are encoded; all if None.
            question_aware: whether the kept tokens depend on the question, for a pruner with `score="question"`.
            streamer: a transformers streamer that receives the answer while it is generated.
            processor: a `LightVLMProcessor`; by default the one saved beside the weights.
            generate_kwargs: for `generate`; by default 256 new tokens, or the generation configuration's number.

        Raises:
            ValueError: if there is no processor beside the weights, it refuses the image or K, the language model has
                fewer positions than prompt and answer need, or more than one answer is requested.
        """
        if generate_kwargs.get("return_dict_in_generate") or generate_kwargs.get("num_return_sequences", 1) > 1:
            raise ValueError("chat returns one answer, as text: call generate for more.")
        if processor is None:
            processor = self.processor_beside_weights()
            if num_image_tokens is None:  # the processor's own default is that of its file, not of this configuration
                default, mean = self.config.num_image_tokens, self.config.mean_image_tokens
                num_image_tokens = f"dynamic:{mean}" if default == "dynamic" else default
        images = [] if image is None else image if isinstance(image, list) else [image]
        content = [{"type": "image", "image": each} for each in images]
        asked = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        options = {} if num_image_tokens is None else {"num_image_tokens": num_image_tokens}
        if max_views is not None:
            options["max_views"] = max_views
        if question_aware:
            options["question"] = question
        prompt = processor.apply_chat_template(
            [*(history or []), asked],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        inputs = to_device(prompt, self.device)
        length = prompt_length(inputs, self.config)
        if not generate_kwargs.keys() & {"max_new_tokens", "max_length", "generation_config"}:
            left = self.config.text_config.max_position_embeddings - length
            generate_kwargs["max_new_tokens"] = max(1, min(self.generation_config.max_new_tokens or 256, left))
        self.config.check_length(length, generate_kwargs.get("max_new_tokens") or 1)
        output = self.generate(**inputs, streamer=streamer, **generate_kwargs)  # type: ignore[misc]
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        if history is not None:
            history += [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained`; `chat` takes its processor from the same revision and place."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        return loaded

    def processor_beside_weights(self) -> Any:
        """Return the processor of the folder or repository that this model was loaded from, loaded once."""
        if not hasattr(self, "_processor"):
            place = self.config.name_or_path
            if not place:
                raise ValueError("This model was not loaded from a checkpoint: give chat a processor.")
            source: Any = AutoProcessor
            module = type(self).__module__
            if module.startswith("transformers_modules."):
                # Only the commit in this module's name was trusted with running code: no other commit's may run.
                code = {"code_revision": module.split(".")[-2], **self._hub_options}
                source = get_class_from_dynamic_module("processing_lightvlm.LightVLMProcessor", place, **code)
            self._processor = source.from_pretrained(
                place, config=self.config, trust_remote_code=False, **self._hub_options
            )
            if type(self._processor).__name__ != "LightVLMProcessor":
                raise ValueError("The processor beside the weights is not LightVLM's: `lightvlm build` makes one.")
        return self._processor
