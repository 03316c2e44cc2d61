"""The tokenizer half of the converter: a hub folder -> tokenizer.model and the "tokenizer" entry of params.json.

Knows the hub's tokenizer files and the SentencePiece file format. Does not know weights. Rules and chat templates are
recognized by comparison with the known ones, and others are refused: nothing that a checkpoint holds is executed.
"""

import json
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from tokenizer import ALPHABET, CHAT_FORMATS, Tokenizer

SUPPORTED = "supported are the tokenizers of Llama-2 (SentencePiece), Llama-3 and Qwen2 (byte-level BPE)"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_DIGITS = {QWEN_SPLIT: 1, QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): 3}  # split pattern -> digits in a token
# Chat formats by what their templates say, as simplify_template() writes it: the first with all of its phrases there.
LLAMA3_HEADER = "'<|start_header_id|>'+message.role+'<|end_header_id|>\n\n'"
TEMPLATE_PHRASES = {
    "llama3-vision": (LLAMA3_HEADER, "'<|image|>'", "'Cutting Knowledge Date: December 2023\n'"),
    "llama3.1": (LLAMA3_HEADER + "+message.content|trim+", "'Cutting Knowledge Date: December 2023\n'"),
    "llama3": (LLAMA3_HEADER + "+message.content|trim+",),
    "llama2": ("'[INST] '+content.strip()+' [/INST]'", "'<<SYS>>\n'+system_message+'\n<</SYS>>\n\n'+message.content"),
    "qwen-vl": ("<|im_start|>{{ message.role }}\n", "<|vision_start|><|image_pad|><|vision_end|>"),
    "llava": ("'<|im_start|>'+message.role+'\n'", "'<image>\n'", "{{ content.text }}", "'<|im_end|>'+'\n'"),
    "llava-1": ("'<|im_start|>'+message.role+' '", "'<image>'", "{{ '\n'+content.text }}", "{{'<|im_end|>'}}"),
    "chatml": ("'<|im_start|>'+message.role+'\n'+message.content", "'<|im_end|>'+'\n'", "'<|im_start|>assistant\n' }}"),
}
# sentencepiece_model.proto: SentencePiece.Type, and TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BPE = 2
Piece = tuple[str, float, int]  # text, score, type


def convert_tokenizer(hub_dir: Path, out_dir: Path, extra_tokens: Sequence[str] = ()) -> dict:
    """Write out_dir/tokenizer.model and return the settings that tokenizer.Tokenizer takes (see there).

    extra_tokens: special tokens that the model needs and its tokenizer may lack ("<image>" for lmms-lab's Llava); those
    get the ids past the vocabulary. settings["n_tokens"] is the number of ids without them.
    Raises ValueError or OSError, one line, for files that are missing, broken or none of the known kinds.
    """
    config = read_json(hub_dir / "tokenizer_config.json", optional=True)
    try:
        tokenizer = read_tokenizer(hub_dir, config)
        settings, proto = convert_vocabulary(tokenizer, hub_dir / "tokenizer.model", extra_tokens)
        template = read_template(hub_dir, config)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{hub_dir}: the tokenizer's files are not laid out as expected: {error!r}") from error
    chat_format = recognize_template(template, settings)
    if template and chat_format is None:
        print(f"{hub_dir}: an unknown chat template; this model will take --raw prompts only", file=sys.stderr)
    settings["chat_format"] = chat_format
    settings["default_system"] = find_default_system(template) if chat_format else None
    settings["default_date"] = find_default_date(template) if chat_format else None
    settings["stop_ids"] = find_stop_ids(hub_dir, config, chat_format, settings["special_tokens"])
    (out_dir / "tokenizer.model").write_bytes(proto)
    Tokenizer(out_dir / "tokenizer.model", settings)  # what it would refuse is refused now
    return settings


def convert_vocabulary(tokenizer: dict, model_path: Path, extra_tokens: Sequence[str]) -> tuple[dict, bytes]:
    """The settings that follow from tokenizer.json, and the SentencePiece file."""
    model, entries = tokenizer["model"], tokenizer["added_tokens"]
    added = {entry["content"]: entry["id"] for entry in entries}
    n_tokens = 1 + max([*model["vocab"].values(), *added.values()])
    missing = [name for name in extra_tokens if name not in added]
    added |= {name: n_tokens + i for i, name in enumerate(missing)}
    # Whatever markup is made of is special here, even where the hub calls it a mere added token.
    markup = {token for chat in CHAT_FORMATS.values() for token in chat.special_tokens()}
    special = {entry["content"] for entry in entries if entry.get("special")} | {*missing} | markup
    bos = find_bos(tokenizer.get("post_processor"))
    settings = {
        "type": "sentencepiece" if model.get("byte_fallback") else "bytelevel",
        "n_tokens": n_tokens,
        "add_bos": bos is not None,
        "bos_id": added[bos] if bos else None,
        "special_tokens": {name: i for name, i in added.items() if name in special},
    }
    if not model.get("byte_fallback"):
        settings |= read_bytelevel_rules(tokenizer)
        return settings, write_proto(bytelevel_pieces(model, added), bytelevel=True)
    if model_path.is_file():
        check_sentencepiece(model_path)
        return settings, model_path.read_bytes()
    check_llama2_rules(tokenizer)
    return settings, write_proto(llama2_pieces(model, added), bytelevel=False)


# ---- the hub's files -----------------------------------------------------------------------------------------------


def read_json(path: Path, optional: bool = False) -> dict:
    """A JSON object; {} where the file is optional and missing. Raises OSError or ValueError, naming the file."""
    if not path.is_file():
        if optional:
            return {}
        raise FileNotFoundError(f"{path} is missing: download the checkpoint again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download the checkpoint again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object: download the checkpoint again")
    return content


def read_tokenizer(hub_dir: Path, config: dict) -> dict:
    """The content of tokenizer.json, put together from older files where there is none."""
    if (hub_dir / "tokenizer.json").is_file():
        return read_json(hub_dir / "tokenizer.json")
    decoder = config.get("added_tokens_decoder", {})
    added = [{"id": int(i), **entry} for i, entry in decoder.items()]
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
    if config.get("tokenizer_class") not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        found = config.get("tokenizer_class")
        raise ValueError(f"{hub_dir}: vocab.json without tokenizer.json, of tokenizer_class {found}; {SUPPORTED}")
    lines = (hub_dir / "merges.txt").read_text(encoding="utf-8").split("\n")
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    merges = [line for line in lines if line and not line.startswith("#version")]
    return {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {"type": "BPE", "vocab": read_json(hub_dir / "vocab.json"), "merges": merges},
        "added_tokens": added,
    }


def assemble_llama2(model_path: Path, config: dict, added: list[dict]) -> dict:
    pieces = load_sentencepiece(model_path)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    known = {entry["content"] for entry in added}
    controls = [
        {"id": i, "content": name, "special": True}
        for name, i in vocabulary.items()
        if (pieces.is_control(i) or pieces.is_unknown(i)) and name not in known
    ]
    bos = [{"SpecialToken": {"id": pieces.id_to_piece(pieces.bos_id())}}] if config.get("add_bos_token", True) else []
    return {
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocabulary, "merges": []},
        "added_tokens": controls + added,
        "post_processor": {"type": "TemplateProcessing", "single": [*bos, {"Sequence": {"id": "A"}}]},
    }


def load_sentencepiece(model_path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    except RuntimeError as error:
        raise ValueError(f"{model_path} is not a SentencePiece model ({error}); {SUPPORTED}") from error


# ---- rules ---------------------------------------------------------------------------------------------------------


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
    rules = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if rules.get(key)]
    if rules.get("type", "BPE") != "BPE" or odd:
        refuse("model", rules)
    if missing := set(ALPHABET) - model["vocab"].keys():
        raise ValueError(f"the tokenizer's vocabulary lacks {len(missing)} of the 256 bytes; {SUPPORTED}")
    return {"nfc": normalizer is not None, "max_digits": max_digits, "ignore_merges": bool(rules.get("ignore_merges"))}


def check_llama2_rules(tokenizer: dict) -> None:
    """ValueError unless a space becomes U+2581, one is put in front, and nothing else is changed or split."""
    match tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer"):
        case (
            {
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ]
            },
            None,
        ):
            return
        case None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first" | "always", "split": False}:
            return
        case other:
            refuse("normalizer and pre_tokenizer", other)


def check_sentencepiece(model_path: Path) -> None:
    """ValueError unless the model keeps a text as it is, but for one space in front, as Llama-2's does."""
    pieces = load_sentencepiece(model_path)
    text = "".join(pieces.encode("  a  b", out_type=str))
    if text != "▁▁▁a▁▁b" or pieces.encode("ﬁ") == pieces.encode("fi"):
        raise ValueError(f"{model_path} changes the text before encoding it ('  a  b' -> '{text}'); {SUPPORTED}")


def find_bos(post_processor: dict | None) -> str | None:
    """The token that the tokenizer puts in front of a text."""
    for step in (post_processor or {}).get("processors", [post_processor or {}]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


# ---- the SentencePiece file ----------------------------------------------------------------------------------------


def merge_scores(merges: list[str] | list[list[str]]) -> dict[str, float]:
    """Token -> score. SentencePiece merges the neighbours whose union scores best: the one that BPE learned first."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        token = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
        scores.setdefault(token, -float(rank))
    return scores


def bytelevel_pieces(model: dict, added: dict[str, int]) -> dict[int, Piece]:
    """Id -> piece. What no merge makes is a control piece, which is never found inside a word."""
    scores = merge_scores(model["merges"])
    pieces = {}
    for token, i in model["vocab"].items():
        made = len(token) == 1 or token in scores
        pieces[i] = (token, scores.get(token, 0.0), NORMAL if made else CONTROL)
    pieces |= {i: (name, 0.0, CONTROL) for name, i in added.items()}
    pieces[max(pieces) + 1] = ("<unknown piece>", 0.0, UNKNOWN)  # required, never used; the space keeps its name apart
    return pieces


def llama2_pieces(model: dict, added: dict[str, int]) -> dict[int, Piece]:
    scores = merge_scores(model["merges"])
    pieces = {}
    for token, i in model["vocab"].items():
        if token == model["unk_token"]:
            kind = UNKNOWN
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = BYTE
        else:
            kind = NORMAL if len(token) == 1 or token in scores else CONTROL
        pieces[i] = (token, scores.get(token, 0.0), kind)
    return pieces | {i: (name, 0.0, CONTROL) for name, i in added.items() if name != model["unk_token"]}


def write_proto(pieces: dict[int, Piece], bytelevel: bool) -> bytes:
    """A ModelProto (sentencepiece_model.proto): the pieces in the order of their ids, trainer_spec, normalizer_spec."""
    written = []
    for i in range(max(pieces) + 1):
        text, score, kind = pieces.get(i, (f"<unused {i}>", 0.0, CONTROL))
        written.append(field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + field(3, kind)))
    unknown = next(text for text, _, kind in pieces.values() if kind == UNKNOWN)
    trainer = field(3, BPE) + field(35, int(not bytelevel)) + field(45, unknown.encode())  # byte_fallback, unk_piece
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
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


# ---- chat templates and stop tokens --------------------------------------------------------------------------------


def read_template(hub_dir: Path, config: dict) -> str | None:
    """The chat template: of the processor, which knows images, before the tokenizer's."""
    if (hub_dir / "chat_template.jinja").is_file():
        return (hub_dir / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_json(hub_dir / "chat_template.json", optional=True).get("chat_template")
    template = template or config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def simplify_template(template: str) -> str:
    """One spelling for what templates spell in several: message['role'], quotes, line breaks, space around + and |."""
    text = re.sub(r"\[['\"](\w+)['\"]\]", r".\1", template.replace("\\n", "\n"))
    return re.sub(r"\s*([+|])\s*", r"\1", text.replace('"', "'"))


def recognize_template(template: str | None, settings: dict) -> str | None:
    """A key of tokenizer.CHAT_FORMATS, or None where there is no template or an unknown one."""
    text = simplify_template(template or "")
    found = next((name for name, phrases in TEMPLATE_PHRASES.items() if all(p in text for p in phrases)), None)
    if (found == "llama2") != (settings["type"] == "sentencepiece"):
        return None
    if found == "chatml" and "<image>" in settings["special_tokens"]:
        return "llava"  # lmms-lab: Qwen2's template, images as LLaVA-NeXT's conversation.py writes them
    return found


def find_default_system(template: str) -> str | None:
    """The system prompt that a ChatML template writes where the conversation has none."""
    match = re.search(r"<\|im_start\|>system(?:\\n|\n)(?!['\"])(.+?)<\|im_end\|>", template, re.DOTALL)
    return match[1].replace("\\n", "\n").replace("\\'", "'") if match else None


def find_default_date(template: str) -> str | None:
    """The date that a Llama-3.1 template prints by default; None where it asks for today's (Llama-3.2)."""
    match = re.search(r"date_string = ['\"](.+?)['\"]", template)
    return match[1] if match and "strftime_now" not in template else None


def find_stop_ids(hub_dir: Path, config: dict, chat_format: str | None, special: dict[str, int]) -> list[int]:
    """All that ends an answer: generation_config.json's and config.json's eos, the tokenizer's, the end of a turn."""
    stop_ids = []
    for name in ("generation_config.json", "config.json"):
        content = read_json(hub_dir / name, optional=True)
        for section in (content, content.get("text_config") or {}):
            eos = section.get("eos_token_id")
            stop_ids += eos if isinstance(eos, list) else [eos]
    eos_token = config.get("eos_token")
    stop_ids.append(special.get(eos_token["content"] if isinstance(eos_token, dict) else eos_token))
    if chat_format:
        stop_ids.append(special[CHAT_FORMATS[chat_format].end_token()])
    return list(dict.fromkeys(i for i in stop_ids if i is not None))
