"""Train LightVLM on LLaVA JSON files with TRL's SFTTrainer.

    accelerate launch training/sft.py --config training/configs/phi2_clip_k144.yaml \\
        --data-path llava_instruct_150k.json --image-folder coco/train2017 --output-dir build/phi2-clip-k144

Every option of the configuration file can be given on the command line too, where it wins. The loss is that of the
answers. The output folder holds weights, processor, code and a card, and loads with `from_pretrained` as it is. So
does each `checkpoint-*` in it, but for a LoRA run's: an adapter, which the command `lightvlm` loads with its base. For
several GPUs put `--config_file training/accelerate/ddp.yaml` (or fsdp.yaml, zero3.yaml) before the script.
"""

import math
import shutil
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from huggingface_hub import ModelCard, ModelCardData
from lightvlm import LightVLMConfig, LightVLMForConditionalGeneration, LightVLMProcessor
from lightvlm.data.llava import load_llava
from lightvlm.data.readable_rows import ReadableRows, begin_readable
from lightvlm.data.turns import mask_blocks
from lightvlm.inference.checkpoint import load_to_train
from lightvlm.inference.compilation import int8_config, nf4_config
from lightvlm.training.collator import LightVLMCollator, StepRows, StepSampler, StepStream, group_rows, measure_rows
from lightvlm.training.machine import RunsHere, run
from lightvlm.training.saving import UNFINISHED, find_checkpoint, folder_written_beside, put_in_place
from peft import LoraConfig, PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled, unset_hf_deepspeed_config
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer, TrlParser

logger = logging.get_logger(__name__)

CARD = """\
---
{metadata}
---

# {name}

A LightVLM checkpoint: a vision-language model that answers from {num_image_tokens} of an image's {num_patches}
tokens, or from as many as a call asks for.

```python
from transformers import pipeline

folder = "."  # this folder, or its name on the Hub
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
content = [{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": "What is in this image?"}}]
print(pipe(text=[{{"role": "user", "content": content}}], max_new_tokens=64, return_full_text=False))
```

## Training

{training}
"""


@dataclass
class LightVLMArguments:
    """What to train, on what, and with how many image tokens."""

    model_path: str = field(metadata={"help": "folder or Hub name of a LightVLM checkpoint"})
    data_path: list[str] = field(metadata={"help": "LLaVA JSON files"})
    image_folder: str | None = field(default=None, metadata={"help": "folder that its image paths are relative to"})
    skip_bad_rows: bool = field(
        default=False,
        metadata={
            "help": "leave out rows that cannot be used, with a warning; a row whose image turns out to be cut off "
            "when it is read is replaced by one with as many images, counted in the log"
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "read rows as they are needed, in the files' order, over and over; needs max_steps"},
    )
    eval_data_path: list[str] | None = field(default=None, metadata={"help": "LLaVA JSON files, for a loss at each K"})
    eval_image_tokens: list[int] | None = field(
        default=None, metadata={"help": "the K of eval_data_path's losses; num_image_tokens by default"}
    )
    train_parts: list[str] = field(
        default_factory=lambda: ["multi_modal_projector", "pruner", "language_model", "lm_head"],
        metadata={"help": "parts of the model that learn; the others are frozen"},
    )
    num_image_tokens: int | None = field(
        default=None, metadata={"help": "K of training and of the saved checkpoint; the loaded one's if None"}
    )
    min_image_tokens: int | None = field(
        default=None, metadata={"help": "draw K per optimizer step, log-uniform from this on"}
    )
    max_image_tokens: int | None = field(
        default=None, metadata={"help": "the largest K drawn; the patches of a view if None"}
    )
    log_uniform_max: int | None = field(
        default=None, metadata={"help": "the largest K of the log-uniform draws; max_image_tokens if None"}
    )
    full_share: float = field(default=0.15, metadata={"help": "share of the drawn K that are the largest"})
    min_share: float = field(default=0.0, metadata={"help": "share of the drawn K that are the smallest"})
    position_ids: str | None = field(
        default=None,
        metadata={
            "help": "consecutive or original; by default consecutive if the pruner's embeddings of places learn, "
            "which make original ones needless, and otherwise as loaded"
        },
    )
    independent_turns: bool = field(
        default=False, metadata={"help": "train each question of a row as if it were asked alone"}
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "train a LoRA of this rank on language_model, in place of it and lm_head, and merge it"},
    )
    lora_alpha: int = field(default=256, metadata={"help": "its scale is lora_alpha / lora_r"})
    lora_base: str | None = field(
        default=None,
        metadata={"help": "weights of the language model that a LoRA run leaves alone: int8 or nf4, which is QLoRA"},
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before its layers"})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "of multi_modal_projector; learning_rate if None"}
    )
    save_dtype: str = field(default="float32", metadata={"help": "of the saved weights, such as bfloat16"})
    base_model: list[str] | None = field(
        default=None, metadata={"help": "Hub names for the card, if model_path is a folder made of them"}
    )

    @property
    def full_parts(self) -> list[str]:
        """Return the parts that learn in full, which in a LoRA run the language model and its head do not."""
        adapted = ("language_model", "lm_head") if self.lora_r else ()
        return [part for part in self.train_parts if part not in adapted]


@dataclass
class TrainingConfig(RunsHere, SFTConfig):
    """SFTConfig, whose loss is the answers' by default, and which runs on this machine."""

    assistant_only_loss: bool = field(
        default=True,
        metadata={"help": "learn the answers alone; if false, questions and the words of the template too"},
    )


def budget_problems(args: LightVLMArguments, largest: int) -> dict[str, bool]:
    """Return messages, and whether they are true of the numbers of image tokens."""
    bounds = [args.min_image_tokens, args.log_uniform_max, args.max_image_tokens]
    bounds = [budget for budget in bounds if budget is not None]
    budgets = [*bounds, *(args.eval_image_tokens or [])]
    budgets += [] if args.num_image_tokens is None else [args.num_image_tokens]
    shares = [args.full_share, args.min_share]
    in_range = all(1 <= budget <= largest for budget in budgets)
    return {
        f"an image has {largest} tokens at most, so give numbers from 1 to {largest}": not in_range,
        "log_uniform_max and max_image_tokens need min_image_tokens": bounds and args.min_image_tokens is None,
        "min_image_tokens, log_uniform_max and max_image_tokens must not decrease": bounds != sorted(bounds),
        "full_share and min_share are shares, and together at most 1": min(shares) < 0 or sum(shares) > 1,
    }


def data_problems(args: LightVLMArguments, training_args: TrainingConfig) -> dict[str, bool]:
    """Return messages, and whether they are true of the data and how often it is evaluated."""
    evaluates = training_args.eval_strategy != "no"
    cuts = training_args.max_length is not None
    strategy = training_args.train_sampling_strategy
    return {
        "eval_image_tokens needs eval_data_path": args.eval_image_tokens and not args.eval_data_path,
        "eval_data_path needs eval_strategy": args.eval_data_path and not evaluates,
        "eval_strategy needs eval_data_path": evaluates and not args.eval_data_path,
        "streaming needs max_steps": args.streaming and training_args.max_steps < 1,
        "independent_turns cuts nothing off, so set max_length to null": args.independent_turns and cuts,
        "train_sampling_strategy is random or group_by_length": strategy not in ("random", "group_by_length"),
        "a stream's rows come in the files' order, so leave train_sampling_strategy": args.streaming
        and strategy != "random",
    }


def model_problems(args: LightVLMArguments, training_args: TrainingConfig) -> dict[str, bool]:
    """Return messages, and whether they are true of what learns and what is saved."""
    has_projector = "multi_modal_projector" in args.train_parts
    has_rate = args.projector_learning_rate is not None
    loads_best = training_args.load_best_model_at_end
    return {
        "projector_learning_rate needs multi_modal_projector in train_parts": has_rate and not has_projector,
        "position_ids is consecutive or original": args.position_ids not in (None, "consecutive", "original"),
        "lora_r is a rank, 1 or more": args.lora_r is not None and args.lora_r < 1,
        "lora_base is int8 or nf4": args.lora_base not in (None, "int8", "nf4"),
        "lora_base needs lora_r": args.lora_base and not args.lora_r,
        "lora_base is not supported with FSDP and DeepSpeed": args.lora_base and is_sharded(),
        "lora_base=nf4 needs bitsandbytes: pip install bitsandbytes": args.lora_base == "nf4"
        and find_spec("bitsandbytes") is None,
        "save_dtype is float32, bfloat16 or float16": args.save_dtype not in ("float32", "bfloat16", "float16"),
        "load_best_model_at_end is not supported; give the best checkpoint-* to `lightvlm infer` as it is": loads_best,
        "output_dir is model_path, which would be overwritten: give another": same_folder(
            args.model_path, training_args.output_dir
        ),
        "push_to_hub is not supported; upload the finished folder with `lightvlm push`": training_args.push_to_hub,
    }


def same_folder(one: str | None, other: str | None) -> bool:
    """Return whether both name one folder that is there."""
    return Path(one or "").is_dir() and Path(other or "").is_dir() and Path(one or "").samefile(other or "")


def check_arguments(args: LightVLMArguments, training_args: TrainingConfig, largest: int) -> None:
    """Raise ValueError with all that is wrong with the arguments, before anything heavy is loaded."""
    problems = budget_problems(args, largest)
    problems |= data_problems(args, training_args) | model_problems(args, training_args)
    if any(problems.values()):
        raise ValueError("; ".join(message for message, is_wrong in problems.items() if is_wrong) + ".")


def draw_budget(args: LightVLMArguments, generator: torch.Generator) -> int:
    """Return K of an optimizer step: `num_image_tokens`, or drawn if `min_image_tokens` is given.

    The largest K in `full_share` of the draws, the smallest in `min_share`, else log-uniform between.
    """
    if args.min_image_tokens is None:
        return args.num_image_tokens
    share, place = torch.rand(2, generator=generator).tolist()
    if share < args.full_share:
        return args.max_image_tokens
    if share < args.full_share + args.min_share:
        return args.min_image_tokens
    low, high = math.log(args.min_image_tokens), math.log(args.log_uniform_max or args.max_image_tokens)
    return round(math.exp(low + (high - low) * place))


def freeze_all_but(model: LightVLMForConditionalGeneration, parts: list[str]) -> None:
    """Let only the named parts learn, and of these only what gradients reach: DDP waits for all that may learn.

    Dropping tokens gives a scorer no gradient; the row and column embedding of kept tokens gets one. Of the vision
    encoder, what comes behind the deepest feature layer serves the prior alone, which has none either.
    """
    names = {part for name, _ in model.named_modules() for part in name.split(".")}
    if unknown := set(parts) - names:
        raise ValueError(f"train_parts: the model has no part called {', '.join(sorted(unknown))}.")
    for name, parameter in model.named_parameters():
        modules = name.split(".")
        is_scorer = "pruner" in modules and not any("_embedding" in module for module in modules)
        parameter.requires_grad = not is_scorer and any(part in modules for part in parts)
    tower, chosen = model.model.vision_tower, model.config.vision_feature_layer
    layers = tower.encoder.layers
    deepest = max(layer % (len(layers) + 1) for layer in ([chosen] if isinstance(chosen, int) else chosen))
    behind = [module for name, module in tower.named_children() if name in ("post_layernorm", "head")]
    for module in (*layers[deepest:], *behind):
        module.requires_grad_(False)


def is_sharded() -> bool:
    """Return whether weights are spread over processes."""
    return is_fsdp_enabled() or is_deepspeed_zero3_enabled()


def base_dtype(args: LightVLMArguments, training_args: TrainingConfig) -> torch.dtype:
    """Return the precision of weights that a LoRA run leaves alone: bf16, half of the memory, if it computes in it.

    FSDP keeps weights of one layer together, in one dtype, and DeepSpeed has a dtype of its own: float32 for them.
    """
    return torch.bfloat16 if args.lora_r and training_args.bf16 and not is_sharded() else torch.float32


def make_lora_config(model: LightVLMForConditionalGeneration, args: LightVLMArguments) -> LoraConfig:
    """Return adapters on all linear layers of the language model, beside the modules that learn in full."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    learning = {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=[name for name in linear if ".language_model." in name],
        modules_to_save=sorted(learning),
    )


class LightVLMTrainer(SFTTrainer):
    """SFTTrainer with a K for each optimizer step, and a plain checkpoint at the end.

    Args:
        arguments: what to train, on what, and with how many image tokens, all given.
        kwargs: SFTTrainer's.
    """

    def __init__(self, arguments: LightVLMArguments, **kwargs):
        self.arguments, self.replaced_rows, self.is_saving = arguments, 0, False
        super().__init__(**kwargs)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # what an optimizer changes by little needs the bits
        kwargs["model"].model.pruner.register_forward_hook(self.count_kept)

    def count_kept(self, pruner: nn.Module, inputs: tuple, kept: list[torch.Tensor]) -> None:
        """Note for the logs how many tokens were kept of each image, which no input says if K is dynamic."""
        if inputs[2].means:
            self.log_kept([len(indices) for indices in kept])

    def log_kept(self, counts: list[int]) -> None:
        """Add the tokens of images to what is logged."""
        self._metrics["train" if self.model.training else "eval"]["kept_image_tokens"] += counts

    def get_train_dataloader(self) -> DataLoader:
        """Load as Trainer does, with rows that know K of their optimizer step."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        draw = partial(draw_budget, self.arguments)
        rows_per_step = self.get_total_train_batch_size(self.args)
        rows_per_batch = rows_per_step // self.args.gradient_accumulation_steps  # of all processes
        multiple = 1 if self.args.world_size == 1 else rows_per_batch
        if isinstance(self.train_dataset, IterableDataset):
            skips = self.arguments.skip_bad_rows
            rows = StepStream(self.train_dataset, rows_per_step, rows_per_batch, draw, seed, skips)
        else:
            rows = StepRows(ReadableRows(self.train_dataset, self.arguments.skip_bad_rows))
        group = None
        if self.args.train_sampling_strategy == "group_by_length":
            lengths, images = measure_rows(self.train_dataset)
            group = partial(group_rows, lengths=lengths, images=images, rows_per_step=rows_per_step)

        def sampler(rows: StepRows) -> StepSampler:
            return StepSampler(len(rows), rows_per_step, draw, seed, lambda: int(self.state.epoch), multiple, group)

        return self._get_dataloader(rows, "Training", self._train_batch_size, sampler, is_training=True)

    def _get_dataloader(self, dataset: Dataset | StepRows | StepStream, *args, **kwargs) -> DataLoader:
        """Load as Trainer does; rows to evaluate on are read as those to train on are."""
        rows = ReadableRows(dataset, self.arguments.skip_bad_rows) if isinstance(dataset, Dataset) else dataset
        return super()._get_dataloader(rows, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create it as Trainer does, with the projector's own learning rate."""
        optimizer = super().create_optimizer(model)
        rate = self.arguments.projector_learning_rate
        if rate is not None:
            named = (model or self.model).named_parameters()
            projector = {id(weight) for name, weight in named if "multi_modal_projector" in name}
            for group in list(optimizer.param_groups):
                own = [weight for weight in group["params"] if id(weight) in projector]
                group["params"] = [weight for weight in group["params"] if id(weight) not in projector]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Prepare as Trainer does, but make independent turns' mask on the device: workers would send its square."""
        inputs = super()._prepare_inputs(inputs)
        replaced = inputs.pop("is_replacement", None)  # there with skip_bad_rows alone
        if replaced is not None and self.model.training:
            self.replaced_rows += self.accelerator.gather(replaced.sum()).sum().item()
        return mask_blocks(inputs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as SFTTrainer does, with the number of rows so far that took the place of one that cannot be read."""
        if self.arguments.skip_bad_rows and "loss" in logs:
            logs["replaced_rows"] = self.replaced_rows
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict, *args, **kwargs):
        """Compute it as SFTTrainer does, with FSDP as well."""
        head = self.model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()  # SFTTrainer reads its weights uncalled: a process would learn from its own rows alone
        if "num_image_tokens" in inputs and inputs.get("mean_image_tokens") is None:
            self.log_kept(inputs["num_image_tokens"].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        """Return Trainer's folder, or one beside it while a checkpoint is written."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self.is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Save as Trainer does, but let a kill leave no half of a checkpoint under the name of a whole one."""
        self.is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = self._get_output_dir(trial)
            put_in_place(Path(folder, UNFINISHED, f"checkpoint-{self.state.global_step}"), Path(folder))
            best = self.state.best_model_checkpoint
            rotate_checkpoints(folder, self.args.save_total_limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as Trainer does, and beside an adapter the configuration that it was trained with.

        FSDP wraps in a class of its own, whose name and file would be the checkpoint's.
        """
        if isinstance(self.model, FSDPModule):
            wrapper, wrapped = type(self.model), LightVLMForConditionalGeneration
            wrapper.__module__, wrapper.__name__ = wrapped.__module__, wrapped.__name__
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):
            self.model.config.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load as Trainer does, which would skip whole models: their weights are saved under LLaVA's names."""
        if self.is_fsdp_enabled or isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = LightVLMForConditionalGeneration.from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())

    def write_checkpoint(self) -> None:
        """Write the folder that is shipped: weights, merged and of `save_dtype`, processor, code and card.

        Weights that are spread over processes are gathered in a folder first, and one process goes on from there.
        """
        gathered = Path(self.args.output_dir, "gathered")
        self.save_model(str(gathered), _internal_call=True)
        if self.is_world_process_zero():
            unset_hf_deepspeed_config()  # or loading would wait for the other processes
            start = self.arguments.model_path if self.arguments.lora_r else gathered
            model = LightVLMForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
            if self.arguments.lora_r:
                model = PeftModel.from_pretrained(model, gathered).merge_and_unload()
            model.config.num_image_tokens = self.arguments.num_image_tokens
            model.config.position_ids = self.arguments.position_ids
            with folder_written_beside(self.args.output_dir) as folder:
                model.to(getattr(torch, self.arguments.save_dtype)).save_pretrained(folder)
                self.processing_class.save_pretrained(folder)
            self.create_model_card()
            shutil.rmtree(gathered)

    def create_model_card(self, *_args, **_kwargs) -> None:
        """Write README.md: what the checkpoint is, how to use it and how it was trained."""
        args, config, losses = self.arguments, self.model.config, {}
        for logs in self.state.log_history:
            losses |= {name: value for name, value in logs.items() if name.endswith("loss")}
        start = None if Path(args.model_path).is_dir() else args.model_path
        metadata = ModelCardData(
            pipeline_tag="image-text-to-text",
            library_name="transformers",
            base_model=args.base_model or start,
            tags=["lightvlm", "token-pruning"],
        )
        learned = ["pruner (but not its scorer)" if part == "pruner" else part for part in args.full_parts]
        learned += [f"language_model (LoRA of rank {args.lora_r})"] if args.lora_r else []
        drawn = f"{args.min_image_tokens} to {args.max_image_tokens} of them in training, drawn for each step, and "
        training = {
            "started from": Path(args.model_path).name,
            "data": ", ".join(Path(path).name for path in args.data_path),
            "image tokens": (drawn if args.min_image_tokens else "") + f"{args.num_image_tokens} by default",
            "trained": ", ".join(learned),
            "position ids": args.position_ids,
            "steps": f"{self.state.global_step:,} of {self.get_total_train_batch_size(self.args)} rows each",
            **{f"final {name}": f"{value:.4f}" for name, value in losses.items()},
        }
        if self.replaced_rows:
            training["rows whose images could not be read"] = f"{self.replaced_rows} times others took their place"
        card = ModelCard(
            CARD.format(
                metadata=metadata.to_yaml(),
                name=Path(self.args.output_dir).name,
                num_image_tokens=args.num_image_tokens,
                num_patches=config.num_patches,
                training="\n".join(f"- {name}: {value}" for name, value in training.items()),
            )
        )
        if self.is_world_process_zero():
            card.save(Path(self.args.output_dir, "README.md"))


def load_rows(args: LightVLMArguments) -> tuple[Dataset | IterableDataset, dict[str, Dataset] | None]:
    """Return rows to train on; and those to evaluate on, once for each K, called k144 for K = 144."""
    options = {"image_folder": args.image_folder, "skip_bad_rows": args.skip_bad_rows}
    rows = concatenate_datasets([load_llava(path, streaming=args.streaming, **options) for path in args.data_path])
    rows = begin_readable(rows, args.skip_bad_rows)
    if args.eval_data_path is None:
        return rows, None
    held_out = concatenate_datasets([load_llava(path, **options) for path in args.eval_data_path])
    budgets = {f"k{budget}": [budget] * len(held_out) for budget in args.eval_image_tokens}
    return rows, {name: held_out.add_column("num_image_tokens", column) for name, column in budgets.items()}


def check_optimizer_state(checkpoint: Path, trainer: LightVLMTrainer) -> None:
    """Raise ValueError if it was written by another kind of run: Trainer would fail at it, or go on without a word."""
    shards = len([*checkpoint.glob("global_step*/*_optim_states.pt")])
    is_sharded = any((checkpoint / name).exists() for name in ("optimizer.bin", "optimizer_0"))
    processes = trainer.args.world_size if trainer.is_deepspeed_enabled else 0
    if (shards, is_sharded) != (processes, trainer.is_fsdp_enabled):
        written = (
            f"DeepSpeed in {shards} processes" if shards else "FSDP" if is_sharded else "neither FSDP nor DeepSpeed"
        )
        raise ValueError(
            f"{checkpoint} was written with {written}, whose optimizer can only be resumed in the same way."
        )
    if (checkpoint / "adapter_config.json").exists() != isinstance(trainer.model, PeftModel):
        raise ValueError(f"{checkpoint} was written {'without' if trainer.arguments.lora_r else 'with'} lora_r.")


def main() -> None:
    parser = TrlParser((LightVLMArguments, TrainingConfig))
    args, training_args = parser.parse_args_and_config()
    config = LightVLMConfig.from_pretrained(args.model_path)
    check_arguments(args, training_args, config.max_image_tokens)
    args.num_image_tokens = args.num_image_tokens or config.num_image_tokens
    args.max_image_tokens = args.max_image_tokens or config.num_patches
    args.eval_image_tokens = args.eval_image_tokens or [args.num_image_tokens]
    training_args.remove_unused_columns = False  # of which one is K
    if Path(args.model_path).is_dir():
        args.model_path = str(Path(args.model_path).resolve())  # an adapter names it, wherever it is loaded from
    checkpoint = find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    if not (training_args.assistant_only_loss or args.independent_turns):
        logger.warning(
            "assistant_only_loss is false: questions are learned as well as answers, most of the loss and of "
            "mean_token_accuracy is about them, and the model may forget how to answer."
        )

    train_rows, eval_rows = load_rows(args)
    processor = LightVLMProcessor.from_pretrained(args.model_path)
    frozen_dtype = base_dtype(args, training_args)
    quantization = None
    if args.lora_base:
        quantization = int8_config() if args.lora_base == "int8" else nf4_config(frozen_dtype)
    model = load_to_train(args.model_path, dtype=frozen_dtype, quantization_config=quantization)
    model.config.num_image_tokens = processor.num_image_tokens = args.num_image_tokens
    learns_places = "pruner" in args.train_parts and config.score in ("positional", "question")
    args.position_ids = args.position_ids or ("consecutive" if learns_places else config.position_ids)
    model.config.position_ids = args.position_ids
    # FSDP wraps these alone: vision encoder layers are called in parts, which it does not allow. The model's own list
    # has them too, because device_map must not split them.
    model._no_split_modules = model.model.language_model._no_split_modules
    freeze_all_but(model, args.full_parts)

    trainer = LightVLMTrainer(
        args,
        model=model,
        args=training_args,
        data_collator=LightVLMCollator(
            processor,
            args.independent_turns,
            torch.bfloat16 if training_args.bf16 else torch.float32,
            max_length=training_args.max_length,
            assistant_only_loss=training_args.assistant_only_loss,
        ),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=make_lora_config(model, args) if args.lora_r else None,
    )
    if checkpoint:
        check_optimizer_state(checkpoint, trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.write_checkpoint()
    trainer.accelerator.wait_for_everyone()  # a process that leaves early may take the others down with it
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run(main)
