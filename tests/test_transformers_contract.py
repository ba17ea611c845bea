"""What transformers asks of its own models and processors, by the tests of its source distribution.

`make test` downloads that distribution, which has the modeling and processor mixins. It has no tests of generation
(this project's own cover each mode of `generate`), export, configurations and pipelines.
"""

import sys
import warnings
from pathlib import Path
from types import ModuleType
from unittest import TestCase, mock, skip

import pytest
import torch
from lightvlm import LightVLMForConditionalGeneration, LightVLMModel, LightVLMProcessor
from tiny import NUM_PATCHES, make_config, make_image, make_processor
from transformers.models.auto import modeling_auto

pytestmark = pytest.mark.slow  # its common tests; what is particular to this model has tests of its own
SOURCE = Path(__file__).parents[1] / "build" / "transformers"
if not SOURCE.is_dir():
    pytest.skip("transformers' own tests are not here: make test brings them", allow_module_level=True)

# What the mixins import and the source distribution lacks; that they come without tests is meant.
ABSENT = {
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
}
for name, content in ABSENT.items():
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(content)
sys.path.insert(0, str(SOURCE))

with warnings.catch_warnings():
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # transformers registers its marks elsewhere
    from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

    from tests import test_processing_common


class ModelTester:
    """The tiny model and its inputs, by the names that the mixin knows."""

    batch_size, seq_length, is_training = 2, 12, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    encoder_seq_length = key_length = seq_length

    def get_config(self):
        config = make_config("clip", "llama", num_image_tokens=4, vision_feature_layer=-1, image_newline=True)
        config.vision_config.num_hidden_layers = 2  # and a newline token, whose key LLaVA-NeXT checkpoints map
        for part in (config, config.vision_config, config.text_config):
            part.initializer_range = 0.02
        return config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        ids = ids_tensor([self.batch_size, self.seq_length], config.image_token_id - 1) + 1
        ids[ids == config.image_token_id] = 1
        ids[:, : config.num_image_tokens] = config.image_token_id
        pixels = floats_tensor([self.batch_size, 3, 84, 84])
        return config, {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


class LightVLMModelTest(ModelTesterMixin, TestCase):
    """All tests of every transformers model."""

    all_model_classes = (LightVLMModel, LightVLMForConditionalGeneration)
    _is_composite = True
    test_all_params_have_gradient = False  # the score learns by policy gradient, and LLaVA has an unused norm

    def setUp(self):
        self.model_tester = ModelTester()
        for names, model_class in (
            (modeling_auto.MODEL_MAPPING_NAMES, LightVLMModel),
            (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, LightVLMForConditionalGeneration),
        ):  # by which the mixin knows which class takes labels
            patch = mock.patch.dict(names, {"lightvlm": model_class.__name__})
            patch.start()
            self.addCleanup(patch.stop)

    @skip("the source distribution has no GenerationTesterMixin")
    def test_generation_tester_mixin_inheritance(self):
        pass


class LightVLMProcessorTest(test_processing_common.ProcessorTesterMixin, TestCase):
    """All tests of every transformers processor."""

    processor_class = LightVLMProcessor

    @classmethod
    def _setup_image_processor(cls):
        return make_processor().image_processor

    @classmethod
    def _setup_tokenizer(cls):
        return make_processor().tokenizer

    @staticmethod
    def prepare_processor_dict():
        template = make_processor().chat_template
        return {"chat_template": template, "num_patches": NUM_PATCHES, "num_image_tokens": 9}

    @pytest.fixture(autouse=True)
    def local_images(self, tmp_path):
        paths = [str(tmp_path / f"{seed}.png") for seed in range(2)]
        for seed, path in enumerate(paths):
            make_image(seed).save(path)
        with (
            mock.patch.dict(test_processing_common.MODALITY_INPUT_DATA, images=paths),
            mock.patch.object(test_processing_common, "url_to_local_path", lambda url: paths[0]),
        ):
            yield

    @skip("saving custom code writes auto_map into the processor that is saved")
    def test_processor_from_and_save_pretrained(self):
        pass

    @skip("as test_processor_from_and_save_pretrained")
    def test_processor_from_and_save_pretrained_as_nested_dict(self):
        pass

    @skip("K has a default in the checkpoint, and each call may choose another")
    def test_init_arguments_not_in_processor_kwargs(self):
        pass
