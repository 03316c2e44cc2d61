"""Where the weights of a tiny model begin: in those of a converted checkpoint of the same family.

Knows the converter's plan, which it reads backwards, and how a decoder is made deeper without changing what it
computes. Does not know the corpus, losses or optimizers.
"""

import hashlib
import json
import re
import tempfile
from pathlib import Path

import sentencepiece
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from scripts.convert_hf_checkpoint import ARCHITECTURES, Plan
from scripts.tiny.family import Family
from scripts.tiny.hub import rename


def begin_with(
    family: Family, model: torch.nn.Module, tokenizer: Tokenizer, checkpoint_dir: Path, layers: tuple[int, ...]
) -> None:
    """Copies a converted checkpoint of the family into a model, whose encoder has the same shape.

    layers: which of the checkpoint's layers each of the model's begins with (Recipe.layers). A layer ~i is i with
    output projections of zero: it adds nothing until it is trained, and so the deeper decoder computes what the
    shallower did. A checkpoint that is as deep as the model gives its layers one by one. Words keep their rows of the
    embedding, those that are new keep random ones.
    """
    shape = json.loads((checkpoint_dir / "params.json").read_text())["model"]
    layers = () if shape["n_layer"] == len(model.model.language_model.layers) else layers
    old = {name: weight.float() for name, weight in read_hub_tensors(family, tokenizer, checkpoint_dir, shape).items()}
    places = rename(model, family.hub_names)
    rows = matching_rows(tokenizer, checkpoint_dir)
    with torch.no_grad():
        for name, weight in places.items():
            source = hub_source(name, layers)
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                both = [(row, theirs) for row, theirs in rows if row < len(weight) and theirs < len(old[name])]
                weight[[row for row, _ in both]] = old[name][[theirs for _, theirs in both]]
            elif "post_layernorm" not in name or source in old:  # SigLIP's is used by nothing, and not converted
                adds_nothing = source.endswith("~") and name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.copy_(old[source.removesuffix("~")] * (not adds_nothing))


def hub_source(name: str, layers: tuple[int, ...]) -> str:
    """The tensor of the checkpoint that a decoder's tensor begins with; ~ at its end where the layer is a new one."""
    if not (match := re.fullmatch(r"((?:language_model\.)?model\.layers\.)(\d+)(\..*)", name)) or not layers:
        return name
    source = layers[int(match[2])]
    return f"{match[1]}{source if source >= 0 else ~source}{match[3]}" + "~" * (source < 0)


def matching_rows(tokenizer: Tokenizer, checkpoint_dir: Path) -> list[tuple[int, int]]:
    """(row of this tokenizer, row of the checkpoint's) of all tokens that both know."""
    settings = json.loads((checkpoint_dir / "params.json").read_text())["tokenizer"]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint_dir / "tokenizer.model"))
    theirs = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())} | settings["special_tokens"]
    mine = tokenizer.get_vocab(with_added_tokens=True)
    return [(row, theirs[token]) for token, row in mine.items() if token in theirs]


def read_hub_tensors(family: Family, tokenizer: Tokenizer, checkpoint_dir: Path, shape: dict) -> dict[str, Tensor]:
    """The tensors of a converted checkpoint under their names on the hub: the converter's plan, backwards."""
    state = torch.load(checkpoint_dir / "model.pth", weights_only=True)
    with tempfile.TemporaryDirectory() as folder:  # a model of that shape says which names and shapes there are
        like = family.build(tokenizer, family.shape_of(shape))
        family.save(like, tokenizer, Path(folder))
        config = json.loads((Path(folder) / "config.json").read_text())
        plan: Plan = ARCHITECTURES[config["architectures"][0]](config, Path(folder))[1]
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    tensors = {}
    for name, source in plan.items():
        if name in ("vision.place", "vision.tile_place"):
            tensors |= split_places(name, state[name], {key: shapes[key] for key in source.keys})
        elif name in ("embedding.weight", "output.weight"):
            tensors[source.keys[0]] = state[name]
        else:
            parts = state[name].split([shapes[key][0] for key in source.keys])
            tensors |= {key: unfold(part, shapes[key]) for key, part in zip(source.keys, parts)}
    return tensors


def unfold(weight: Tensor, shape: list[int]) -> Tensor:
    """A tensor in its shape on the hub. Qwen's encoder has a kernel for two frames, which the converter adds up."""
    if len(shape) == 5:
        return (weight.view(*shape[:2], 1, *shape[3:]) / 2).expand(shape)
    return weight.view(shape)


def split_places(name: str, place: Tensor, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The parts of what Llama's encoder adds to its patches, which the converter adds up: all of it in one of them."""
    gate = torch.full((1,), 0.5)
    parts = {key: torch.zeros(shape) for key, shape in shapes.items()}
    whole = "tile_embedding.weight" if name == "vision.place" else "embedding.weight"
    for key, shape in shapes.items():
        if key.endswith("gate"):
            parts[key] = gate
        elif key.endswith(whole) and "pre_tile" not in key:
            parts[key] = (place / gate.tanh()).reshape(shape)
    return parts


def digest(checkpoint_dir: Path) -> str:
    return hashlib.sha256((checkpoint_dir / "model.pth").read_bytes()).hexdigest()
