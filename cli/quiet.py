"""What libraries say about themselves, and not about the user's files or options, stays unsaid."""

import logging

SAID = {
    "torchao": "Failed to load",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torch.utils._pytree": "%s is an Enum subclass",
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
    "onnxscript.optimizer._constant_folding": "Skipping constant folding",
    "transformers.modeling_utils": "`loss_type=",
}


def is_for_users(record: logging.LogRecord) -> bool:
    """Return False for what torchao and bitsandbytes say when they are imported, and exporters of every graph.

    torchao misses kernels that int8 weights don't need (mxfp8, cutlass), and registers enumerations in a way that
    PyTorch deprecates; bitsandbytes misses one that makes four bits faster. ONNX's exporter has no need of
    torchvision, and tracing for OpenVINO reads what kind of loss a model has.
    """
    return not str(record.msg).startswith(SAID[record.name])


def without_bar(factory, args: tuple, kwargs: dict):
    """Return a progress bar of transformers that is not drawn."""
    return factory(*args, **kwargs | {"disable": True})


def silence_libraries() -> None:
    """Filter these messages, and hide the bars of weights read and written; downloads keep theirs."""
    from transformers.utils.logging import set_tqdm_hook

    for name in SAID:
        logging.getLogger(name).addFilter(is_for_users)
    set_tqdm_hook(without_bar)
