"""A folder of `lightvlm export --openvino` as commands ask it: OpenVINO GenAI's `VLMPipeline` answers."""

import json
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightvlm import LightVLMConfig, LightVLMProcessor
from lightvlm.inference.answers import clean, cut, default_new_tokens, generation_options, stop_strings
from lightvlm.inference.checkpoint import FLOAT32_ONLY
from lightvlm.inference.fingerprint import hash_together
from lightvlm.inference.own_model import Answer, Options, OwnModel, as_seen, images_of
from PIL import Image
from torch import nn
from transformers import GenerationConfig
from transformers.utils.versions import require_version

# The extra `edge`: what is tested. Before 2026.1 GenAI resizes pictures otherwise than Pillow.
VERSIONS = {"nncf": "3.4", "openvino": "2026.4.1", "openvino-genai": "2026.4.1", "openvino-tokenizers": "2026.4.1"}
# GenAI's default, paged attention, reads strides beyond their end in `ModelRunner::forward` (valgrind, 2026.4.1), and
# copies to wherever these lead.
BACKEND = {"ATTENTION_BACKEND": "SDPA"}
ABOUT = "lightvlm.json"  # which folders of `lightvlm export --openvino` have
FORMAT = 1  # of that file and its folder
PARTS = ("vision_embeddings_model", "text_embeddings_model", "language_model", "tokenizer", "detokenizer")
OWN = ("config", "generation_config", "processor_config", "tokenizer", "tokenizer_config")  # of the checkpoint
FILES = (
    *(f"openvino_{part}.{suffix}" for part in PARTS for suffix in ("xml", "bin")),
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    *(f"checkpoint/{name}" for name in (*(f"{name}.json" for name in OWN), "chat_template.jinja")),
)
READ = (".xml", ".bin", ".json", ".jinja")
HINTS = {"float32": "f32", "bfloat16": "bf16"}
TAG = "<ov_genai_"  # how GenAI's own tags of images and videos begin


def is_openvino(model_path: str) -> bool:
    """Return whether this is a folder of `lightvlm export --openvino`."""
    return (Path(model_path) / ABOUT).is_file()


def read_about(folder: Path) -> dict[str, Any]:
    """Return what a folder says of itself; ValueError if it lacks a file, or another version wrote it."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        found = about["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / ABOUT} is damaged: export the folder again.") from None
    if found != FORMAT:
        raise ValueError(f"{folder} is of format {found}, and this version reads {FORMAT}: export it again.")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: export it again.")
    return about


class Stand(nn.Module):
    """What is asked of a model besides answers; it is called before each new token, so that hooks may end an answer.

    Args:
        config, generation_config: the checkpoint's.
        dtype: of products.
    """

    device = torch.device("cpu")

    def __init__(self, config: LightVLMConfig, generation_config: GenerationConfig, dtype: torch.dtype):
        super().__init__()
        self.config, self.generation_config, self.dtype = config, generation_config, dtype
        self.model = None

    def forward(self) -> None:
        """Do nothing."""


def check_versions(what: object, *packages: str) -> None:
    """Raise ValueError if one of the packages of `VERSIONS`, which `what` needs, is missing or too old."""
    for needed in (f"{package}>={VERSIONS[package]}" for package in packages):
        try:
            require_version(needed)
        except ImportError:
            raise ValueError(f'{what} needs {needed}: pip install --upgrade "lightvlm[edge]"') from None


def open_pipeline(folder: Path, device: str, dtype: str):
    """Return GenAI's pipeline; ValueError if a package is missing or too old, or the folder is broken."""
    check_versions(folder, "openvino-genai")
    import openvino_genai

    options = {"INFERENCE_PRECISION_HINT": HINTS[dtype], **BACKEND}
    if device == "CPU":
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    try:
        return openvino_genai.VLMPipeline(folder, device, **options)
    except RuntimeError as error:  # in many lines
        raise ValueError(f"OpenVINO cannot run {folder} on {device}: {' '.join(str(error).split()):.300}") from error


def choose_dtype(dtype: str | None) -> str:
    """Return the type of products: bf16 if the CPU has units for it; ValueError for one that OpenVINO lacks."""
    if dtype not in (None, *HINTS):
        raise ValueError(f"--dtype {dtype}: OpenVINO computes in float32 or bfloat16.")
    return dtype or ("float32" if torch.backends.cpu.get_cpu_capability() in FLOAT32_ONLY else "bfloat16")


def translate(options: GenerationConfig, stops: list[str], pipeline: Any) -> Any:
    """Return GenAI's configuration of the same generation; ValueError for what it does not do, or otherwise.

    Args:
        options: of transformers.
        stops: texts before which an answer ends.
        pipeline: GenAI's.
    """
    config = pipeline.get_generation_config()
    for name, value in (("num_beams", 1), ("repetition_penalty", 1)):
        if (getattr(options, name) or value) != value:
            raise ValueError(f"OpenVINO has no {name}={getattr(options, name)} as PyTorch has: leave it out.")
    config.apply_chat_template, config.max_new_tokens = False, options.max_new_tokens
    config.do_sample, config.stop_strings = bool(options.do_sample), set(stops)
    if options.do_sample:
        config.rng_seed = int(torch.randint(2**31, ()))  # so it follows PyTorch's seed
        config.temperature = 1.0 if options.temperature is None else options.temperature
        config.top_p = 1.0 if options.top_p is None else options.top_p
        if top_k := (50 if options.top_k is None else options.top_k):  # transformers' own default
            config.top_k = top_k
    return config


def make_collector(tell: Callable[[int], Any]):
    """Return a streamer of GenAI's with the `tokens` of an answer, and the `error` that ended it, or None."""
    import openvino_genai

    class Collector(openvino_genai.StreamerBase):
        def __init__(self):
            super().__init__()
            self.tokens, self.error = [], None

        def write(self, token: int | list[int]):
            try:
                for each in token if isinstance(token, list) else [token]:
                    self.tokens.append(each)
                    tell(each)
            except Exception as error:  # which would end the process in C++
                self.error = error
                return openvino_genai.StreamingStatus.CANCEL
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Collector()


class OpenVINOModel(OwnModel):
    """The folder, with the checkpoint's own processor and chat template, and the graph's K.

    Args:
        folder: of `lightvlm export --openvino`.
        dtype: "float32", "bfloat16", or None for the faster that the CPU has.
        device: OpenVINO's name of it, such as "cpu" or "gpu"; the CPU if None.

    Raises:
        ValueError: if the folder is broken, or OpenVINO GenAI is missing or too old, or lacks device or type.
    """

    def __init__(self, folder: str | Path, dtype: str | None = None, device: str | None = None):
        self.folder, self.model_path = Path(folder), str(folder)
        self.about, dtype = read_about(self.folder), choose_dtype(dtype)
        self.pipeline = open_pipeline(self.folder, (device or "cpu").upper(), dtype)
        checkpoint = self.folder / "checkpoint"
        config = LightVLMConfig.from_pretrained(checkpoint)
        self.processor = LightVLMProcessor.from_pretrained(checkpoint)
        self.processor.num_image_tokens = self.about["num_image_tokens"]
        self.model = Stand(config, GenerationConfig.from_pretrained(checkpoint), getattr(torch, dtype))

    def check(self, options: Options, question_aware: str = "--question-aware") -> None:
        """Raise ValueError, with the option's name, if the graphs cannot do what the options ask for."""
        if options.question_aware:
            raise ValueError(
                f"{question_aware}: the question has no say in the graphs of {self.folder}: leave it out."
            )
        self.check_images(options.num_image_tokens, 1)

    def check_images(self, num_image_tokens: Any, images: int) -> None:
        """Raise ValueError if so many images cannot have K, or a list of K."""
        wanted, own = (self.processor.resolve_budgets(each, images) for each in (num_image_tokens, None))
        if wanted != own:
            raise ValueError(
                f"num_image_tokens={num_image_tokens}: the graphs of {self.folder} keep "
                f"{self.about['num_image_tokens']} of each image; for others, export another folder."
            )

    def check_views(self, images: list[Image.Image], max_views: int | None = None) -> None:
        """Raise ValueError if one of the images is cut into more views than one."""
        if max_views != 1 and any(self.size_class((image.height, image.width)) > 1 for image in images):
            raise ValueError(
                f"The graphs of {self.folder} see one view of an image, and a large one would be cut into several: "
                "read it as one by --max-views 1, or make it smaller."
            )

    def check_largest(self, options: Options) -> None:
        """Do nothing: `check` knows the graphs' K."""

    def write_prompt(self, messages: list[dict]) -> str:
        """Return the prompt as the chat template writes it; ValueError if GenAI would read another one."""
        mark = self.processor.image_token
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        if TAG in prompt:
            raise ValueError(f"A message has {TAG} in its text, which OpenVINO would take for an image: take it out.")
        if not prompt.count(mark) == prompt.count(f"{mark}\n") == len(images_of(messages)):
            raise ValueError(
                f"OpenVINO ends each image by a new line, and the chat template of {self.folder} does not."
            )
        return prompt

    def prompt_length(self, messages: list[dict], num_image_tokens: Any) -> int:
        """Return how many positions a prompt has at most; ValueError if GenAI would read another one."""
        self.write_prompt(messages)
        return super().prompt_length(messages, num_image_tokens)

    def see(self, image: Image.Image, max_views: int | None) -> np.ndarray:
        """Return what the encoder sees, (height, width, 3) of 8 bits, which GenAI does not resize any more."""
        self.check_views([image], max_views)
        limits = {} if max_views is None else {"max_views": max_views}
        pixels = self.processor(images=[image], text=self.processor.image_token, return_tensors="pt", **limits)
        views = pixels["pixel_values"]
        return as_seen(views[0, 0] if views.dim() == 5 else views[0], self.processor)

    def run(
        self, messages: list[dict], config: Any, max_views: int | None = None, tell: Callable[[int], Any] = bool
    ) -> tuple[list[int], list[int]]:
        """Return the tokens of an answer, and those kept of each image, or, if K is dynamic, of all together.

        Args:
            messages: with opened images.
            config: GenAI's.
            max_views: of the call.
            tell: called with each new token; what it raises ends the answer.

        Raises:
            ValueError: as `write_prompt` and `see`, or if prompt and answer are too long.
        """
        import openvino

        prompt, images = self.write_prompt(messages), images_of(messages)
        tensors = [openvino.Tensor(np.ascontiguousarray(self.see(image, max_views)[None])) for image in images]
        length = len(self.processor.tokenizer(prompt)["input_ids"]) - len(images)
        self.model.config.check_length(length + len(images), 1)
        collector = make_collector(lambda token: (self.model(), tell(token)))
        mark = self.processor.image_token  # behind which GenAI writes the new line
        result = self.pipeline.generate(
            prompt.replace(f"{mark}\n", mark), images=tensors, generation_config=config, streamer=collector
        )
        if collector.error:
            raise collector.error
        kept, budget = result.perf_metrics.get_num_input_tokens() - length, self.about["num_image_tokens"]
        if isinstance(budget, str) and len(images) > 1:
            return collector.tokens, [kept]
        counts = [kept] if isinstance(budget, str) else [budget] * len(images)
        if sum(counts[: len(images)]) != kept:
            raise RuntimeError(f"OpenVINO read {kept + length} tokens of a prompt of {length + sum(counts)}.")
        return collector.tokens, counts[: len(images)]

    def generate(
        self, num_image_tokens: Any, note: Callable[[list[int], int], Any], messages: list[dict], /, **inputs: Any
    ) -> torch.Tensor:
        """Answer messages as `OwnModel.generate` does; of the inputs, what the processor made is not read."""
        streamer, options = inputs.get("streamer"), inputs["generation_config"]
        put = streamer.put if streamer else lambda ids: None
        put(inputs["input_ids"])
        config = translate(options, options.stop_strings or [], self.pipeline)
        new, kept = self.run(messages, config, self.max_views, lambda token: put(torch.tensor([token])))
        if kept:
            note(kept, int(sum(inputs["num_image_tokens"])) - sum(kept))
        if streamer:
            streamer.end()
        return torch.cat([inputs["input_ids"], torch.tensor([new], dtype=torch.long)], dim=1)

    def answer(self, conversations: list[list[dict]], wanted: dict, options: Options) -> list[Answer]:
        """Return an answer to each conversation, one after the other, as `OwnModel.answer` does."""
        self.check(options)
        stops, generation = stop_strings(wanted), deepcopy(self.model.generation_config)
        generation.update(**generation_options(wanted, default_new_tokens(self.model)))
        answers = []
        for talk in conversations:
            talk = clean(talk, self.processor.image_token)
            config = translate(generation, stops, self.pipeline)
            new, kept = self.run(talk, config, options.max_views)
            text = self.processor.decode(new, skip_special_tokens=True)
            whole = [self.processor.count_tokens((image.height, image.width)) for image in images_of(talk)]
            answers.append(Answer(cut(text, stops), kept, whole if len(kept) == len(whole) else [sum(whole)]))
        return answers

    def describe(self, options: Options) -> dict[str, Any]:
        """Return what answers depend on, besides the questions, K and generation."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.suffix in READ)
        return {
            "openvino_sha256": hash_together(files),
            "num_image_tokens": self.about["num_image_tokens"],
            "max_views": options.max_views,
            "lightvlm": version("lightvlm"),
            "openvino": version("openvino"),
        }


def load_openvino(folder: str, dtype: str | None = None, device: str | None = None, **others: Any) -> OpenVINOModel:
    """Return a folder's model; ValueError, with the option's name, for others than it takes, which are PyTorch's."""
    if given := [name for name, value in others.items() if value]:
        cure = "export the folder with --weights int8" if given == ["int8"] else "leave it out"
        raise ValueError(f"--{given[0].replace('_', '-')} is PyTorch's, and {folder} is for OpenVINO: {cure}.")
    return OpenVINOModel(folder, dtype, device)
