"""The files of a Hugging Face checkpoint, and the settings of modules, that the tiny families have in common.

Does not know any one family.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_weights(hub_dir: Path, state: dict[str, Tensor]):
    hub_dir.mkdir(parents=True, exist_ok=True)
    state = {name: weight.detach().bfloat16().contiguous() for name, weight in state.items()}
    save_file(state, hub_dir / "model.safetensors", metadata={"format": "pt"})


def rename(model: torch.nn.Module, starts: dict[str, str]) -> dict[str, Tensor]:
    """The model's weights with the beginnings of their names replaced."""
    state = {}
    for name, weight in model.named_parameters():
        start = next(start for start in starts if name.startswith(start))
        state[starts[start] + name.removeprefix(start)] = weight
    return state


def write_tokenizer(hub_dir: Path, tokenizer: Tokenizer, special_tokens: list[str], more: dict):
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(hub_dir / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, "special": True}
        | dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
        for token in special_tokens
    }
    common = {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False, "model_max_length": 2048}
    write_json(hub_dir / "tokenizer_config.json", common | more)


def write_generation(hub_dir: Path, bos: int, pad: int, stops: list[int]):
    generation = {"do_sample": False, "bos_token_id": bos, "pad_token_id": pad, "eos_token_id": stops}
    write_json(hub_dir / "generation_config.json", generation)


def pick(config, names: str) -> dict:
    return {name: getattr(config, name) for name in names.split()}


TEXT_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "rms_norm_eps max_position_embeddings initializer_range"
)
QWEN_TOKENIZER = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def text_shape(width: int, depth: int, mlp: int) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": mlp,
        "num_attention_heads": width // 32,
        "num_key_value_heads": 2,
    }


def text_shape_of(model: dict) -> dict:
    """text_shape of a converted checkpoint, given the "model" of its params.json."""
    return text_shape(model["dim"], model["n_layer"], model["intermediate_size"])


def siglip_shape(width: int, depth: int, mlp: int) -> dict:
    heads = {"num_attention_heads": width // 32, "vision_use_head": False}
    return {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": mlp} | heads


def mllama_shape(width: int, depth: int, n_global: int, mlp: int, keep: list[int]) -> dict:
    """`keep`: the layers whose inputs are part of a row, as the hub counts."""
    layers = {"num_hidden_layers": depth, "num_global_layers": n_global, "intermediate_layers_indices": keep}
    return {"hidden_size": width, "intermediate_size": mlp, "attention_heads": width // 32} | layers


def rows_of_vocabulary(tokenizer: Tokenizer) -> int:
    return -(-tokenizer.get_vocab_size() // 64) * 64
