"""LightVLM: a vision-language model that answers from a fraction of the image's tokens."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_lightvlm import LightVLMConfig
from .modeling_lightvlm import LightVLMForConditionalGeneration, LightVLMModel
from .processing.processing_lightvlm import LightVLMProcessor
from .pruning_lightvlm import TokenPruner

LightVLM = LightVLMForConditionalGeneration
AutoModelForVision2Seq = AutoModelForImageTextToText  # the name that transformers 5 removed

AutoConfig.register("lightvlm", LightVLMConfig)
AutoModel.register(LightVLMConfig, LightVLMModel)
AutoModelForImageTextToText.register(LightVLMConfig, LightVLMForConditionalGeneration)
AutoModelForMultimodalLM.register(LightVLMConfig, LightVLMForConditionalGeneration)
AutoProcessor.register(LightVLMConfig, LightVLMProcessor)

__all__ = [
    "AutoModelForVision2Seq",
    "LightVLM",
    "LightVLMConfig",
    "LightVLMForConditionalGeneration",
    "LightVLMModel",
    "LightVLMProcessor",
    "TokenPruner",
]
