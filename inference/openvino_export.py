"""The whole model as a folder of graphs that OpenVINO GenAI's stock pipelines run as LLaVA, without Python."""

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightvlm import LightVLM, LightVLMProcessor
from lightvlm.data.files import new_folder, write_json
from lightvlm.inference.export import ImageTokens
from lightvlm.pruning_lightvlm import allot_budgets
from lightvlm.views_lightvlm import one_view
from PIL import Image
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.versions import require_version

# Since 2026.1 GenAI resizes pictures as Pillow does; since 2026.0 never to less than an encoder reads.
REQUIRED = ("openvino>=2026.1", "openvino-tokenizers>=2026.1")
WEIGHTS = ("int8", "int4")


class PrunedImage(ImageTokens):
    """What the language model reads of an image of one view: as many tokens as a fixed or dynamic budget gives it.

    Args:
        model: whose encoder, pruner and projector are used.
        num_image_tokens: K, of a dynamic budget the largest.
        mean: the mean K of a dynamic budget; None for a fixed one.
    """

    def __init__(self, model: LightVLM, num_image_tokens: int, mean: int | None):
        super().__init__(model, num_image_tokens)
        self.mean = mean
        self.whole = one_view(model.config.patches_per_side, 1, model.device)  # cached: tracing must not be the first

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return tokens (1, K, hidden), in raster order, of pixels (1, channels, height, width)."""
        pruner, most = self.model.pruner, self.num_image_tokens
        features, prior, places = self.model.encode(pixel_values)
        features, prior, layout = self.whole.place(places, features, prior)
        scores = pruner.score(features, prior, None, layout)
        order = pruner.select(scores, features, most)
        if self.mean is not None:
            complexity = pruner.estimate_complexity(features, scores)
            budgets = allot_budgets(complexity, torch.tensor([self.mean]), pruner.dynamic_budget)
            order = order[:, : budgets[0].clamp(max=most)]
        kept = order.sort(dim=1).values
        patches = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
        return pruner.add_places(self.model.multi_modal_projector(patches), self.whole.at(kept, []))


class Past(DynamicLayer):
    """A layer of a KV cache that begins with these keys and values, (rows, heads, length, width)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values


class Decoder(nn.Module):
    """The language model and its head, from embeddings, with keys and values as arguments."""

    def __init__(self, model: LightVLM):
        super().__init__()
        self.body, self.head = model.model.language_model, model.lm_head

    def forward(self, inputs_embeds, attention_mask, position_ids, beam_idx, past) -> tuple[torch.Tensor, ...]:
        """Return logits (rows, length, vocabulary), and keys and values of each layer.

        Args:
            inputs_embeds: (rows, length, hidden).
            attention_mask: (rows, past and length).
            position_ids: (rows, length).
            beam_idx: (rows,), the rows of the past that go on.
            past: keys and values of each layer, (rows, heads, past, width).
        """
        cache = DynamicCache()
        cache.layers = [Past(*(each.index_select(0, beam_idx) for each in layer)) for layer in past]
        length, total = inputs_embeds.shape[1], attention_mask.shape[1]
        places = torch.arange(total)
        is_read = (places <= places[total - length :, None]) & attention_mask[:, None, None].bool()
        output = self.body(
            inputs_embeds=inputs_embeds,
            attention_mask=torch.where(is_read, 0.0, torch.finfo(torch.float16).min),  # of 4D, and used as it is
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return self.head(output.last_hidden_state), *present


def convert(module: nn.Module, inputs: Any, shapes: dict[str, list[int]], outputs: list[str]):
    """Return a module as a graph, with names and shapes (-1 if any) of its inputs, and names of its outputs."""
    import openvino

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about tracing
        graph = openvino.convert_model(module.eval(), example_input=inputs)
    for port, (name, shape) in zip(graph.inputs, shapes.items(), strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
        port.get_tensor().set_names({name})
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    return graph


def convert_vision(model: LightVLM, num_image_tokens: int, mean: int | None):
    """Return the graph from `pixel_values` of an image to `last_hidden_state`, the tokens that are kept."""
    side = model.config.vision_config.image_size
    shape = [1, 3, side, side]
    module = PrunedImage(model, num_image_tokens, mean)
    return convert(module, torch.zeros(shape), {"pixel_values": shape}, ["last_hidden_state"])


def convert_embeddings(model: LightVLM):
    """Return the graph from token ids, `input`, to `inputs_embeds`."""
    ids = torch.ones(1, 3, dtype=torch.long)
    return convert(model.get_input_embeddings(), ids, {"input": [-1, -1]}, ["inputs_embeds"])


def convert_language_model(model: LightVLM):
    """Return the language model as a graph that keeps its keys and values from call to call."""
    from openvino.passes import MakeStateful, Manager

    config = model.config.text_config
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    names = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    present = [name.replace("past_key_values", "present") for name in names]
    rows, past, length = 2, 5, 3  # unlike each other
    inputs = {
        "inputs_embeds": torch.zeros(rows, length, hidden),
        "attention_mask": torch.ones(rows, past + length, dtype=torch.long),
        "position_ids": torch.arange(past, past + length).expand(rows, -1),
        "beam_idx": torch.arange(rows, dtype=torch.int32),
        "past": [[torch.zeros(rows, heads, past, width) for _ in range(2)] for _ in range(layers)],
    }
    shapes = {
        "inputs_embeds": [-1, -1, hidden],
        "attention_mask": [-1, -1],
        "position_ids": [-1, -1],
        "beam_idx": [-1],
    }
    shapes |= dict.fromkeys(names, [-1, heads, -1, width])
    graph = convert(Decoder(model), inputs, shapes, ["logits", *present])
    manager = Manager()
    manager.register_pass(MakeStateful(dict(zip(names, present, strict=True))))
    manager.run_passes(graph)
    start_empty(graph, heads, width)
    return graph


def start_empty(graph, heads: int, width: int) -> None:
    """Let each state begin without a position, of as many rows as the embeddings have."""
    from openvino import opset13 as ops

    rows = ops.gather(
        ops.shape_of(graph.input("inputs_embeds"), output_type="i64"), ops.constant([0]), ops.constant(0)
    )
    shape = ops.concat([rows, *(ops.constant(np.array([size], dtype=np.int64)) for size in (heads, 0, width))], 0)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            zero = ops.constant(0.0, dtype=node.get_output_element_type(0))
            node.set_arguments([ops.broadcast(zero, shape)])
    graph.validate_nodes_and_infer_types()


def check(model: LightVLM, processor: LightVLMProcessor, weights: str | None) -> None:
    """Raise ValueError if OpenVINO GenAI would run this checkpoint otherwise than it runs here, or is missing."""
    config = model.config
    for package in (*REQUIRED, *(("nncf",) if weights else ())):
        try:
            require_version(package)
        except ImportError:
            raise ValueError(
                f'OpenVINO GenAI\'s folder needs {package}: pip install --upgrade "lightvlm[edge]"'
            ) from None
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights must be None, {' or '.join(WEIGHTS)}, got {weights!r}.")
    if config.position_ids == "original":
        raise ValueError(
            "OpenVINO GenAI counts positions consecutively, and this checkpoint's are original: run it in PyTorch, or "
            'train it with position_ids="consecutive".'
        )
    if config.image_newline:
        raise ValueError(
            "This checkpoint sees several views of every image, and a graph has one: run it in PyTorch, or build it "
            "of a LLaVA-1.5."
        )
    if {*(getattr(config.text_config, "layer_types", None) or ())} - {"full_attention"}:
        raise ValueError(
            f"The layers of this {config.text_config.model_type} do not all attend to all that is before: run it in "
            "PyTorch."
        )
    if processor.image_token != "<image>":
        raise ValueError(
            f'OpenVINO GenAI writes "<image>" for LLaVA, and this checkpoint reads {processor.image_token!r}.'
        )


def resolve(model: LightVLM, processor: LightVLMProcessor, num_image_tokens: int | str) -> tuple[int, int | None]:
    """Return the largest K of a graph, and the mean of a dynamic budget; ValueError if there is none such."""
    most = model.config.encoded_patches
    (budget,), (mean,) = processor.resolve_budgets(num_image_tokens, 1)
    if not mean and budget > most:
        raise ValueError(f"num_image_tokens={budget}: an image of one view has from 1 to {most}.")
    if mean and model.model.pruner.complexity is None:
        raise ValueError(f'num_image_tokens="{num_image_tokens}": this checkpoint cannot tell what an image needs.')
    if mean:
        allot_budgets(torch.zeros(1), torch.tensor([mean]), model.config.dynamic_budget)
    return min(budget, most), mean or None


def describe_pixels(processor: LightVLMProcessor, side: int) -> dict[str, Any]:
    """Return what GenAI makes a view with as the processor does, cropped or squashed; ValueError if it cannot."""
    whole, own = processor.image_processor, Image.effect_noise((3 * side + 1, 2 * side), 64).convert("RGB")
    expected = processor(images=own, text="<image>", return_tensors="pt")["pixel_values"].reshape(-1, 3, side, side)[0]
    shared = {"crop_size": {"height": side, "width": side}, "image_mean": [*whole.image_mean]}
    shared |= {"image_std": [*whole.image_std]}
    for shortest in (side, 1, (whole.size or {}).get("shortest_edge") or side):  # a shortest edge of 1 is squashed
        if np.abs(prepare(own, shortest, shared) - expected.numpy()).max() < 0.01:
            return shared | {"size": {"shortest_edge": shortest}}
    raise ValueError(
        "OpenVINO GenAI resizes pictures for LLaVA by bicubic interpolation, cropped or squashed to a square, and the "
        f"checkpoint's {type(whole).__name__} does otherwise: correct its processor_config.json, or run it in PyTorch."
    )


def prepare(image: Image.Image, shortest: int, config: dict[str, Any]) -> np.ndarray:
    """Return the pixels, (channels, height, width), that GenAI makes of a picture for LLaVA."""
    side, scale = config["crop_size"]["height"], shortest / min(image.size)
    image = image.resize([max(int(length * scale), side) for length in image.size], Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side))) / 255
    return ((pixels - config["image_mean"]) / config["image_std"]).transpose(2, 0, 1)


def chat_template(processor: LightVLMProcessor) -> str:
    """Return the template that makes GenAI, which adds no tokens to a prompt, read what transformers reads."""
    talk = [{"role": "user", "content": [{"type": "text", "text": "yes"}]}]
    options = {"add_generation_prompt": True}
    prompt = processor.apply_chat_template(talk, **options)
    (read,) = processor.apply_chat_template(talk, tokenize=True, return_dict=True, **options)["input_ids"]
    bare = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    added = len(read) - len(bare)
    if read[added:] != bare:
        raise ValueError("The tokenizer of this checkpoint ends prompts with a token, which OpenVINO GenAI does not.")
    return "".join(processor.tokenizer.convert_ids_to_tokens(read[:added])) + processor.chat_template


def export_openvino(
    model: LightVLM,
    processor: LightVLMProcessor,
    folder: str | Path,
    num_image_tokens: int | str,
    weights: str | None = None,
    checkpoint: dict[str, str] | None = None,
) -> None:
    """Write the whole model as a new folder that OpenVINO GenAI's `VLMPipeline` and its servers run as LLaVA.

    An image is one view, its K is the graph's, and the question has no say in which tokens are kept.

    Args:
        model: in evaluation mode, of float32, on the CPU.
        processor: the checkpoint's.
        folder: which isn't there yet, or is empty.
        num_image_tokens: K, or "dynamic" or "dynamic:64", which the graph decides for each image.
        weights: "int8" or "int4" for the language model; None for all of them as they are.
        checkpoint: its `fingerprint`, which goes into the folder.

    Raises:
        ValueError: if the folder has files, OpenVINO is missing or too old, or the checkpoint's answers would be
            other ones there.
    """
    import openvino

    check(model, processor, weights)
    most, mean = resolve(model, processor, num_image_tokens)
    side = model.config.vision_config.image_size
    pixels, template = describe_pixels(processor, side), chat_template(processor)
    with new_folder(folder) as work:
        for name, convert_part in (
            ("vision_embeddings", lambda: convert_vision(model, most, mean)),
            ("text_embeddings", lambda: convert_embeddings(model)),
            ("language", lambda: convert_language_model(model)),
        ):
            graph = compress(convert_part(), name, weights)
            openvino.save_model(graph, work / f"openvino_{name}_model.xml", compress_to_fp16=False)
            del graph  # before the next one
        save_tokenizer(processor, work)
        write_json(work / "preprocessor_config.json", pixels)
        (work / "chat_template.jinja").write_text(template)
        save_configuration(model, processor, work)
        about = {
            "format": 1,
            "num_image_tokens": f"dynamic:{mean}" if mean else most,
            "max_image_tokens": most,
            "num_patches": model.config.num_patches,
            "views": 1,
            "position_ids": model.config.position_ids,
            "question_aware": False,
            "weights": weights,
            "encoder": "float32",
            "dtype": "float32",
            "checkpoint": checkpoint,
            "made_with": {
                name: version(name) for name in ("openvino", "openvino-tokenizers", "torch", "transformers")
            },
        }
        write_json(work / "lightvlm.json", about)


def compress(graph, name: str, weights: str | None):
    """Return the graph with int8 or int4 weights in the language model; exact without."""
    if name == "language" and weights is None:
        graph.set_rt_info("f32", ["runtime_options", "KV_CACHE_PRECISION"])  # or the CPU's cache would be of 8 bits
    if weights is None or name == "vision_embeddings":
        return graph
    import nncf

    if weights == "int4" and name == "language":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=128)
    return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)


def save_tokenizer(processor: LightVLMProcessor, folder: Path) -> None:
    """Write tokenizer and detokenizer as graphs."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    graphs = convert_tokenizer(processor.tokenizer, with_detokenizer=True)
    for name, graph in zip(("tokenizer", "detokenizer"), graphs, strict=True):
        openvino.save_model(graph, folder / f"openvino_{name}.xml")


def save_configuration(model: LightVLM, processor: LightVLMProcessor, folder: Path) -> None:
    """Write what GenAI reads, and in `checkpoint/` all of the checkpoint but weights and code."""
    ours = {"auto_map", "image_newline"}
    config = {name: value for name, value in model.config.to_dict().items() if name not in ours}
    write_json(
        folder / "config.json", config | {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    )
    generation = model.generation_config.to_diff_dict()
    write_json(folder / "generation_config.json", {"max_new_tokens": 256} | generation)  # as `chat`
    own = folder / "checkpoint"
    model.config.save_pretrained(own)
    model.generation_config.save_pretrained(own)
    processor.save_pretrained(own)
    for code in own.glob("*.py"):
        code.unlink()
