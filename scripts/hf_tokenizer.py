"""The tokenizer half of the converter: a hub folder -> tokenizer.model and the "tokenizer" entry of params.json.

Knows the hub's tokenizer files and the SentencePiece file format. Does not know weights. The rules of a tokenizer are
recognized by comparison with the known ones, and others are refused; a chat template is tried out in a sandbox.
"""

import json
import re
import struct
from pathlib import Path

import sentencepiece

from checkpoint import write_whole
from tokenizer import ALPHABET, FORMAT, Tokenizer, is_id

SUPPORTED = "supported are the tokenizers of Llama-2 (SentencePiece), Llama-3 and Qwen2 (byte-level BPE)"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_DIGITS = {QWEN_SPLIT: 1, QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): 3}  # split pattern -> digits in a token
NORMAL, UNKNOWN, CONTROL, BYTE, BPE = 1, 2, 3, 6, 2  # sentencepiece_model.proto: SentencePiece.Type, and ModelType


def convert_tokenizer(hub_dir: Path, out_dir: Path, image: tuple[str, str, str] | None = None) -> dict:
    """Write out_dir/tokenizer.model and return the settings that tokenizer.Tokenizer takes (see there).

    image: of a model that reads images, the image token between what stands in front of it and behind it. A tokenizer
    may lack the token (lmms-lab's Llava): it then gets the id past the vocabulary, which "n_tokens" does not count.
    Raises ValueError or OSError, one line, for files that are missing, broken or none of the known kinds.
    """
    config = read_json(hub_dir / "tokenizer_config.json", optional=True)
    try:
        tokenizer = read_tokenizer(hub_dir, config)
        check_tokenizer(tokenizer)
        variables = read_variables(hub_dir, config, tokenizer)
        settings = {"chat_template": read_template(hub_dir), "template_variables": variables, "image": image}
        settings |= read_tokens(tokenizer, {*variables.values()}, image)
        rules, proto = convert_vocabulary(tokenizer, hub_dir / "tokenizer.model", settings)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{hub_dir}: the tokenizer's files are not laid out as expected: {error!r}") from error
    write_whole(out_dir / "tokenizer.model", proto)
    settings |= {"format": FORMAT, "stop_ids": [], **rules}
    end_of_turn = Tokenizer(out_dir / "tokenizer.model", settings).end_of_turn()  # refuses a template of no use
    stop_ids = find_stop_ids(hub_dir, settings["special_tokens"].get(variables.get("eos_token")), end_of_turn)
    return settings | {"stop_ids": stop_ids}


def check_tokenizer(tokenizer: dict) -> None:
    """Raises ValueError for a vocabulary that is none, or has an id far beyond its size: every id has a piece."""
    model, entries = tokenizer["model"], tokenizer["added_tokens"]
    vocabulary = [*model["vocab"].items(), *((entry["content"], entry["id"]) for entry in entries)]
    most = len(vocabulary) + 2**16
    if wrong := [each for each in vocabulary if not (isinstance(each[0], str) and each[0] and is_id(each[1], most))]:
        raise ValueError(f"the tokenizer has the token {str(wrong[0][0])[:40]!r} with the id {str(wrong[0][1])[:40]}")
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if wrong := [
        pair for pair in pairs if not (isinstance(pair, list) and [type(text) for text in pair] == [str, str])
    ]:
        raise ValueError(f"the tokenizer has the merge {str(wrong[0])[:60]}, which is none of two tokens")


def read_tokens(tokenizer: dict, named: set[str], image: tuple[str, str, str] | None) -> dict:
    """The settings that name tokens. Those of tokenizer_config.json's names are special, and the image token is."""
    entries = tokenizer["added_tokens"]
    added = {entry["content"]: entry["id"] for entry in entries}
    n_tokens = 1 + max([*tokenizer["model"]["vocab"].values(), *added.values()])
    if image:
        added.setdefault(image[1], n_tokens)
    special = named | {entry["content"] for entry in entries if entry.get("special")} | {*(image or ())[1:2]}
    flags = {e["content"]: [f for f in ("normalized", "single_word", "lstrip", "rstrip") if e.get(f)] for e in entries}
    return {
        "n_tokens": n_tokens,
        "bos_id": added.get(find_bos(tokenizer)),
        "special_tokens": {name: i for name, i in added.items() if name in special},
        "added_tokens": {name: i for name, i in added.items() if name not in special},
        "token_flags": {name: found for name, found in flags.items() if found},
    }


def convert_vocabulary(tokenizer: dict, model_path: Path, settings: dict) -> tuple[dict, bytes]:
    """The settings that say how a text is cut up, and the SentencePiece file."""
    model, added = tokenizer["model"], settings["special_tokens"] | settings["added_tokens"]
    if not model.get("byte_fallback"):
        rules = {"type": "bytelevel"} | read_bytelevel_rules(tokenizer)
        return rules, write_proto(make_pieces(model, added, True), bytelevel=True)
    prefix = find_prefix(tokenizer)
    if model_path.is_file():
        load_sentencepiece(model_path)
        return {"type": "sentencepiece", "prefix": prefix or "prepend"}, model_path.read_bytes()
    if prefix is None:
        refuse("normalizer and pre_tokenizer", [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    return {"type": "sentencepiece", "prefix": prefix}, write_proto(make_pieces(model, added, False), bytelevel=False)


def read_json(path: Path, optional: bool = False) -> dict:
    """A JSON object; {} where the file is optional and missing. Raises OSError or ValueError, naming the file."""
    if not path.is_file() and optional:
        return {}
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: download the checkpoint again")
    try:
        if isinstance(content := json.loads(path.read_text(encoding="utf-8")), dict):
            return content
        raise ValueError("an object is expected")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download the checkpoint again") from None


def read_tokenizer(hub_dir: Path, config: dict) -> dict:
    """The content of tokenizer.json, put together from older files where there is none."""
    old = read_json(hub_dir / "added_tokens.json", optional=True)
    added = [{"id": int(i), **entry} for i, entry in config.get("added_tokens_decoder", {}).items()]
    added = added or [{"id": i, "content": name} for name, i in old.items()]
    if (hub_dir / "tokenizer.json").is_file():
        tokenizer = read_json(hub_dir / "tokenizer.json")
        known = {entry["content"] for entry in tokenizer["added_tokens"]}
        tokenizer["added_tokens"] += [entry for entry in added if entry["content"] not in known]
        return tokenizer
    if (hub_dir / "vocab.json").is_file() and (hub_dir / "merges.txt").is_file():
        return assemble_qwen(hub_dir, config, added)
    if (hub_dir / "tokenizer.model").is_file():
        return assemble_llama2(hub_dir / "tokenizer.model", config, added)
    raise FileNotFoundError(
        f"{hub_dir} has no tokenizer.json, no tokenizer.model and no vocab.json with merges.txt: "
        "download the checkpoint again (original/tokenizer.model is not enough: it names no special tokens)"
    )


def assemble_qwen(hub_dir: Path, config: dict, added: list[dict]) -> dict:
    """vocab.json and merges.txt name no rules: those of Qwen2 are taken where tokenizer_config.json names its class."""
    if (found := config.get("tokenizer_class")) not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise ValueError(f"{hub_dir}: vocab.json without tokenizer.json, of tokenizer_class {found}; {SUPPORTED}")
    lines = (hub_dir / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    model = {"type": "BPE", "vocab": read_json(hub_dir / "vocab.json"), "merges": merges}
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
    steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    rules = {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    return rules | {"model": model, "added_tokens": added}


def assemble_llama2(model_path: Path, config: dict, added: list[dict]) -> dict:
    pieces = load_sentencepiece(model_path)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    controls = {name: i for name, i in vocabulary.items() if pieces.is_control(i) or pieces.is_unknown(i)}
    known = {entry["content"] for entry in added}
    added = [{"id": i, "content": name, "special": True} for name, i in controls.items() if name not in known] + added
    bos = [{"SpecialToken": {"id": pieces.id_to_piece(pieces.bos_id())}}] if config.get("add_bos_token", True) else []
    processor = {"type": "TemplateProcessing", "single": [*bos, {"Sequence": {"id": "A"}}]}
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocabulary, "merges": []}
    return {"model": model, "added_tokens": added, "post_processor": processor}


def load_sentencepiece(model_path: Path) -> sentencepiece.SentencePieceProcessor:
    """ValueError unless the model keeps a text as it is, but for one space in front, as Llama-2's does."""
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    except RuntimeError as error:
        raise ValueError(f"{model_path} is not a SentencePiece model ({error}); {SUPPORTED}") from error
    text = "".join(pieces.encode("  a  b", out_type=str))
    if text != "▁▁▁a▁▁b" or pieces.encode("ﬁ") == pieces.encode("fi"):
        raise ValueError(f"{model_path} changes the text before encoding it ('  a  b' -> '{text}'); {SUPPORTED}")
    return pieces


def read_variables(hub_dir: Path, config: dict, tokenizer: dict) -> dict[str, str]:
    """bos_token, eos_token and the like: names that templates may use."""
    named = read_json(hub_dir / "special_tokens_map.json", optional=True) | config
    named = {key: value for key, value in named.items() if re.fullmatch("(bos|eos|pad|unk)_token", key) and value}
    eos = {"eos_token": "</s>"} if tokenizer["model"].get("byte_fallback") else {}
    bos = {"bos_token": bos} if (bos := find_bos(tokenizer)) else {}
    return bos | eos | {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}


def read_template(hub_dir: Path) -> str | None:
    """The chat template: of the processor, which knows images, before the tokenizer's."""
    if (hub_dir / "chat_template.jinja").is_file():
        return (hub_dir / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(hub_dir / name, optional=True).get("chat_template")
        if isinstance(template, list):  # several named ones
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template:
            return template


def find_stop_ids(hub_dir: Path, *more: int | None) -> list[int]:
    """All that ends an answer: generation_config.json's and config.json's eos, then the others that are given."""
    contents = [read_json(hub_dir / name, optional=True) for name in ("generation_config.json", "config.json")]
    texts = [content.get("text_config") for content in contents]
    found = [part.get("eos_token_id") for part in (*contents, *texts) if isinstance(part, dict)]
    ids = [i for eos in (*found, *more) for i in (eos if isinstance(eos, list) else [eos]) if i is not None]
    if wrong := [i for i in ids if not is_id(i)]:
        raise ValueError(f"{hub_dir}: eos_token_id names {str(wrong[0])[:40]}, which is the id of no token")
    return list(dict.fromkeys(ids))


def refuse(what: str, found: object) -> None:
    raise ValueError(f"the tokenizer's {what} is not a known one: {json.dumps(found)[:300]}; {SUPPORTED}")


def read_bytelevel_rules(tokenizer: dict) -> dict:
    """The settings nfc, max_digits and ignore_merges. Raises ValueError for rules that tokenizer.py does not have."""
    normalizer, model = tokenizer.get("normalizer"), tokenizer["model"]
    if normalizer not in (None, {"type": "NFC"}):
        refuse("normalizer", normalizer)
    match tokenizer.get("pre_tokenizer"):
        case {
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ]
        } if pattern in MAX_DIGITS:
            max_digits = MAX_DIGITS[pattern]
        case other:
            refuse("pre_tokenizer", other)
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model.get("type", "BPE") != "BPE" or odd:
        refuse("model", {key: value for key, value in model.items() if key not in ("vocab", "merges")})
    if missing := set(ALPHABET) - model["vocab"].keys():
        raise ValueError(f"the tokenizer's vocabulary lacks {len(missing)} of the 256 bytes; {SUPPORTED}")
    return {"nfc": normalizer is not None, "max_digits": max_digits, "ignore_merges": bool(model.get("ignore_merges"))}


def find_prefix(tokenizer: dict) -> str | None:
    """The setting prefix: where the tokenizer puts a space, as U+2581. None for rules that are not Llama-2's."""
    prepend = {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    match tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer"):
        case {"normalizers": steps}, None if steps == [*prepend]:
            return "prepend"
        case None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            return scheme


def find_bos(tokenizer: dict) -> str | None:
    """The token that the tokenizer puts in front of a text."""
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]


def make_pieces(model: dict, added: dict[str, int], bytelevel: bool) -> dict[int, tuple[str, float, int]]:
    """Id -> (piece, score, type). What no merge makes is a control piece, which is never found inside a word."""
    # SentencePiece merges the neighbours whose union scores best: the one that BPE learned first.
    merged = [merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in model["merges"]]
    scores = {token: -float(rank) for rank, token in reversed([*enumerate(merged)])}
    kinds = dict.fromkeys(scores, NORMAL) | {token: NORMAL for token in model["vocab"] if len(token) == 1}
    if not bytelevel:
        kinds |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    pieces = {i: (token, scores.get(token, 0.0), kinds.get(token, CONTROL)) for token, i in model["vocab"].items()}
    pieces |= {i: (name, 0.0, CONTROL) for name, i in added.items()}
    return pieces | {max(pieces) + 1: ("<unknown piece>", 0.0, UNKNOWN)}  # required, never used: every byte has a piece


def write_proto(pieces: dict[int, tuple[str, float, int]], bytelevel: bool) -> bytes:
    """A ModelProto (sentencepiece_model.proto): the pieces in the order of their ids, trainer_spec, normalizer_spec."""
    written = []
    for i in range(max(pieces) + 1):
        text, score, kind = pieces.get(i, (f"<unused {i}>", 0.0, CONTROL))
        written.append(field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + field(3, kind)))
    trainer = field(3, BPE) + field(35, int(not bytelevel)) + field(45, b"<unknown piece>")  # byte_fallback, unk_piece
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces: a space is written U+2581 unless bytes are mapped
    normalizer = field(1, b"identity") + field(3, int(not bytelevel)) + field(4, 0) + field(5, int(not bytelevel))
    return b"".join([*written, field(2, trainer), field(3, normalizer)])


def field(number: int, value: int | bytes) -> bytes:
    """A protobuf field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)
