"""Inference: load a checkpoint, answer many questions, compile, quantize, export."""

from lightvlm.inference.checkpoint import load
from lightvlm.inference.compilation import compile_for_inference, int8_config

__all__ = ["compile_for_inference", "int8_config", "load"]
