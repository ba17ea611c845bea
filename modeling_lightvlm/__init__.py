"""LightVLM: a vision-language model that answers from a fraction of the image's tokens."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_lightvlm import LightVLMConfig
from .modeling_lightvlm import LightVLMForConditionalGeneration, LightVLMModel
from .processing_lightvlm import LightVLMProcessor
from .pruning import TokenScorer, keep_distinct, prune, with_pruning
from .pruning_lightvlm import TokenPruner

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
LightVLM = LightVLMForConditionalGeneration
AutoModelForVision2Seq = AutoModelForImageTextToText  # the name that transformers 5 removed

AutoConfig.register("lightvlm", LightVLMConfig)
AutoModel.register(LightVLMConfig, LightVLMModel)
AutoModelForImageTextToText.register(LightVLMConfig, LightVLMForConditionalGeneration)
AutoModelForMultimodalLM.register(LightVLMConfig, LightVLMForConditionalGeneration)
AutoProcessor.register(LightVLMConfig, LightVLMProcessor)

__all__ = [
    "CHAT_TEMPLATE",
    "AutoModelForVision2Seq",
    "LightVLM",
    "LightVLMConfig",
    "LightVLMForConditionalGeneration",
    "LightVLMModel",
    "LightVLMProcessor",
    "TokenPruner",
    "TokenScorer",
    "keep_distinct",
    "prune",
    "with_pruning",
]
