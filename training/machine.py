"""What runs on the machine at hand: a device and a precision, chosen if the user did not."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from lightvlm.inference.checkpoint import FLOAT32_ONLY
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging

logger = logging.get_logger(__name__)


class RunsHere:
    """Put before `TrainingArguments` among the bases of a class: arguments that this machine can follow.

    Without a GPU, or under `accelerate launch --cpu`, training runs on the CPU. A `bf16` of None becomes True if the
    device computes in bf16, and False otherwise.

    Raises:
        ValueError: if `bf16` is asked of a GPU that has none.
    """

    def __post_init__(self) -> None:
        has_gpu = torch.accelerator.is_available() or is_torch_xla_available()
        self.use_cpu = self.use_cpu or not has_gpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        if self.use_cpu:
            has_bf16 = torch.backends.cpu.get_cpu_capability() not in FLOAT32_ONLY
        else:
            has_bf16 = is_torch_bf16_gpu_available() or is_torch_xla_available()
        if self.bf16 is None:
            self.bf16 = has_bf16 and not self.fp16
        elif self.bf16 and not has_bf16 and not self.use_cpu:
            raise ValueError("this GPU does not compute in bf16: pass --bf16 false, or --bf16 false --fp16 true")
        elif self.bf16 and not has_bf16:
            logger.warning("This CPU computes in bf16 many times slower than in float32: pass --bf16 false.")
        super().__post_init__()


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`, and exit with 2 and the reason on standard error if the input is at fault.

    Processes that trained together part in an orderly way, or one in a hundred hangs, or aborts, after all is saved.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
