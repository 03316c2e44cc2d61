"""The table of models: each row against the hub's config.json, and shape by shape against transformers."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers

from model import MODELS, ModelArgs
from scripts.convert_hf_checkpoint import ARCHITECTURES, check_keys, expected_shapes
from tests.published import CONFIGS, PARAMETERS, PREPROCESSOR

CLASSES = {name: getattr(transformers, name, None) for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", *ARCHITECTURES)}
HUB_NAMES = {  # what new transformers calls a tensor -> what the hub's files call it
    "Qwen2_5_VLForConditionalGeneration": {"model.visual.": "visual.", "model.language_model.": "model."},
}
DECODERS = {"Mllama": "LlamaForCausalLM", "Llava": "Qwen2ForCausalLM"}


def published(name: str) -> dict:
    """config.json of a row; of its decoder alone, while the converter does not know the whole."""
    config = CONFIGS[name]
    architecture = config["architectures"][0]
    if architecture in ARCHITECTURES:
        return config
    stand_in = next(decoder for start, decoder in DECODERS.items() if architecture.startswith(start))
    text = config.get("text_config", config) | {"architectures": [stand_in]}
    return text | {"tie_word_embeddings": config.get("tie_word_embeddings", text["tie_word_embeddings"])}


@cache
def plan_of(name: str, folder):
    config = published(name)
    architecture = config["architectures"][0]
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR.get(architecture, {})))
    return ARCHITECTURES[architecture](config, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


def is_whole(name: str) -> bool:
    return published(name) is CONFIGS[name]


def test_every_row_is_checked():
    assert set(MODELS) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_row_is_what_the_converter_makes_of_config_json(name, folder):
    args, _ = plan_of(name, folder)
    row = ModelArgs.named(name)
    assert args == (row if is_whole(name) else replace(row, vision=None, image_token_id=None))


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_their_number_equal_those_of_transformers(name, folder):
    """Every tensor of the hub's is used once; put together (q, k and v; gate and up) they have our module's shapes."""
    config = published(name)
    args, plan = plan_of(name, folder)
    hub = hub_tensors(json.dumps(config, sort_keys=True))
    check_keys(plan, hub, args.tie_embeddings)
    used = [key for source in plan.values() for key in source.keys]
    assert len(used) == len(set(used))
    shapes = {n: source.change(torch.cat([hub[key] for key in source.keys])).shape for n, source in plan.items()}
    assert shapes == expected_shapes(args)
    if is_whole(name) and name in PARAMETERS:
        assert sum(hub[key].numel() for key in used) == PARAMETERS[name]


def test_vision_config_of_fine_tunes_that_leave_defaults_out(folder):
    """As transformers 4.49 saved Qwen2.5-VL-7B-Instruct."""
    name = "Qwen2.5-VL-7B-Instruct"
    architecture = CONFIGS[name]["architectures"][0]
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR[architecture]))
    config = CONFIGS[name] | {"vision_config": {"hidden_size": 1280, "in_chans": 3, "tokens_per_second": 2}}
    config["rope_scaling"] = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    args, _ = ARCHITECTURES[architecture](config, folder)
    assert args == ModelArgs.named(name)


@cache
def hub_tensors(config: str) -> dict[str, torch.Tensor]:
    """Tensors without memory of the model that transformers makes of config.json, under the hub's names."""
    config = json.loads(config)
    architecture = config.pop("architectures")[0]
    model_class = CLASSES[architecture]
    with torch.device("meta"):
        state = model_class(model_class.config_class(**config)).state_dict()
    renamed = {}
    for name, tensor in state.items():
        for new, old in HUB_NAMES.get(architecture, {}).items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed
