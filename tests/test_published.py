"""The table of models: each row against the published config.json, and shape by shape against transformers."""

import json
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers

from checkpoint import check_args
from scripts import convert_hf_checkpoint
from scripts.convert_hf_checkpoint import ARCHITECTURES, always_unused, build_tensor, expected_shapes
from scripts.published_models import MODELS, named
from tests.helpers.published import CONFIGS, LIKE, PARAMETERS, PREPROCESSOR

HUB_NAMES = {  # a tensor's name in new transformers -> its name in the published files
    "Qwen2_5_VLForConditionalGeneration": {"model.visual.": "visual.", "model.language_model.": "model."},
    "LlavaOnevisionForConditionalGeneration": {
        "model.image_newline": "image_newline",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
    "LlavaQwenForCausalLM": {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
    },
    "MllamaForConditionalGeneration": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.": "",
    },
}
DECODERS = {"Mllama": "LlamaForCausalLM", "Llava": "Qwen2ForCausalLM"}


def published(name: str) -> dict:
    """config.json of a row; of its decoder alone, while the converter does not support the whole."""
    config = CONFIGS[name]
    architecture = config["architectures"][0]
    if architecture in ARCHITECTURES:
        return config
    stand_in = next(decoder for start, decoder in DECODERS.items() if architecture.startswith(start))
    text = config.get("text_config", config) | {"architectures": [stand_in]}
    return text | {"tie_word_embeddings": config.get("tie_word_embeddings", text["tie_word_embeddings"])}


def is_whole(name: str) -> bool:
    return published(name) is CONFIGS[name]


@cache
def hub_tensors(name: str) -> dict[str, torch.Tensor]:
    """Meta tensors of the model that transformers builds of config.json, under the names of the published files."""
    config = published(name)
    architecture = config["architectures"][0]
    config = dict(LIKE[name] if is_whole(name) and name in LIKE else config)
    model_class = getattr(transformers, config.pop("architectures")[0])
    with torch.device("meta"):
        state = model_class(model_class.config_class(**json.loads(json.dumps(config)))).state_dict()
    names = HUB_NAMES.get(architecture, {})
    starts = {key: next((start for start in names if key.startswith(start)), "") for key in state}
    return {names.get(start, "") + key.removeprefix(start): state[key] for key, start in starts.items()}


@cache
def plan_of(name: str, folder):
    """The converter's result for a row's folder, whose files hold the tensors of hub_tensors."""
    config = published(name)
    architecture = config["architectures"][0]
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR.get(architecture, {})))
    with pytest.MonkeyPatch.context() as patch:
        places = {key: (tensor, key) for key, tensor in hub_tensors(name).items()}
        patch.setattr(convert_hf_checkpoint, "find_tensors", lambda hub_dir, renamed: places)
        patch.setattr(convert_hf_checkpoint, "read_tensor", lambda tensor, key: tensor)
        args, plan, unused = ARCHITECTURES[architecture](config, folder)
        shapes = expected_shapes(args)
        for ours, source in plan.items():
            build_tensor(ours, source, places, shapes[ours])  # refuses any other shape
    return args, plan, shapes, unused + always_unused(args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


def test_every_row_is_checked():
    assert set(MODELS) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_row_is_what_the_converter_makes_of_config_json(name, folder):
    args, *_ = plan_of(name, folder)
    row = named(name)
    if not is_whole(name):
        row = replace(row, vision=None)
    if args.image_token_id is None:  # lmms-lab's is the tokenizer's business
        row = replace(row, image_token_id=None)
    assert args == row


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_their_number_equal_those_of_transformers(name, folder):
    """Every published tensor is used once; combined (q, k and v; gate and up) they have our module's shapes."""
    args, plan, shapes, unused = plan_of(name, folder)
    hub = hub_tensors(name)
    assert plan.keys() == shapes.keys()
    used = [key for source in plan.values() for key in source.keys]
    assert len(used) == len(set(used))
    assert all(any(re.search(pattern, key) for pattern in unused) for key in set(hub) - set(used))
    if is_whole(name) and name in PARAMETERS:
        assert sum(hub[key].numel() for key in used) == PARAMETERS[name]


def test_vision_config_of_fine_tunes_that_leave_defaults_out(folder):
    """As transformers 4.49 saved Qwen2.5-VL-7B-Instruct."""
    name = "Qwen2.5-VL-7B-Instruct"
    architecture = CONFIGS[name]["architectures"][0]
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR[architecture]))
    config = CONFIGS[name] | {"vision_config": {"hidden_size": 1280, "in_chans": 3, "tokens_per_second": 2}}
    config["rope_scaling"] = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    args, *_ = ARCHITECTURES[architecture](config, folder)
    assert args == named(name)


def test_shapes_that_no_model_has_are_refused():
    """Every published one is allowed; a wrong type, size or fit is named."""
    for name in MODELS:
        check_args(named(name))
    right = named("Qwen2.5-VL-3B-Instruct")
    vision = right.vision | {"full_layers": [31, 7]}
    changes = [("n_layer", 10**9), ("dim", True), ("n_kv_head", 3), ("mrope_section", (1, 2, 3)), ("norm_eps", "x")]
    changes += [("rope_base", float("nan")), ("rope_scaling", {"factor": "2"}), ("vision", vision), ("vision", {})]
    for field, value in changes:
        with pytest.raises(ValueError):
            check_args(replace(right, **{field: value}))
