"""tokenizer.py and scripts/hf_tokenizer.py against the `tokenizers` package, SentencePiece and the chat templates.

Most tests run twice or more: on small vocabularies that are trained here, and on the real ones where the folder
../shared/data is there (it is no part of the repository).
"""

import io
import json
import random
import re
import subprocess
import sys
import sysconfig
import time
import unicodedata
from datetime import date
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from jinja2 import Environment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference

from scripts.hf_tokenizer import QWEN_SPLIT, convert_tokenizer
from tokenizer import StreamDecoder, Tokenizer, split_pattern

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"

# ---- texts ---------------------------------------------------------------------------------------------------------

LANGUAGES = """
English: It's raining; we'll stay in, and they've gone. I'D SAY "YOU'RE RIGHT".
Deutsch: Übermorgen fährt Frau Weiß für 3,50 € über die Straße.
Français: L'été dernier, j'ai mangé à Noël des œufs où ça coûte 1 234,5 €.
Español: ¿Dónde está el niño? ¡Mañana será otro día!
Português: Não há pão na padaria às nove da manhã.
Italiano: Perché la città è così bella di sera?
Polski: Zażółć gęślą jaźń, proszę bardzo.
Čeština: Příliš žluťoučký kůň úpěl ďábelské ódy.
Magyar: Árvíztűrő tükörfúrógép és jó reggelt.
Română: Știți că țăranii își îngrijesc grădina?
Türkçe: İstanbul'da ığdır çiçeği gördüm, şöyle güzeldi.
Suomi: Hyvää päivää, äiti söi jäätelöä yöllä.
Svenska: Smörgåsbord på ön är gott.
Íslenska: Þetta er góður dagur á Íslandi.
Gaeilge: Tá an aimsir go breá inniu, a Shéamais.
Русский: Съешь же ещё этих мягких булок, да выпей чаю.
Українська: Їжак і ґава живуть у лісі біля Києва.
Ελληνικά: Καλημέρα σας, πώς είστε σήμερα;
עברית: שָׁלוֹם עולם, מה שלומך היום?
العربية: مرحبا بالعالم، كيف حالك اليوم؟ ١٢٣٤
فارسی: سلام، می‌خواهم کتاب بخرم ۴۵۶.
हिन्दी: नमस्ते दुनिया, आज मौसम कैसा है? १२३
বাংলা: আমি বাংলায় গান গাই।
தமிழ்: வணக்கம் உலகம், நலமா?
ไทย: สวัสดีชาวโลก วันนี้อากาศดีมาก ๑๒๓
ქართული: გამარჯობა მსოფლიო.
Հայերեն: Բարեւ աշխարհ, ինչպե՞ս ես:
አማርኛ: ሰላም ለዓለም።
中文：今天天气很好，我们去公园散步吧。一二三，１２３。
日本語：吾輩は猫である。ガギグゲゴとｶﾞｷﾞ、がか゛。
한국어: 안녕하세요 세계, 가나다.
Tiếng Việt: Việc học hợp tác với nhiều người; chào thế giới.
""".strip().splitlines()
EMOJI = ["👨‍👩‍👧‍👦 family", "🇩🇪🇯🇵🇧🇷", "👍🏽👋🏿", "❤️‍🔥", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "1️⃣2️⃣", "🤷🏻‍♀️!?", "🎉🎉🎉🎉🎉", "☺︎ ☺️"]
NUMBERS = [
    "1",
    "12 123 1234 12345",
    "3.14159e-10",
    "1,000,000",
    "½¾ⅫⅧ①②³",
    "٣٤٥٦٧",
    "a1b22c333d4444",
    "0x7fff_ffff",
    "〇一二",
]
SPACES = [
    *(
        "",
        " ",
        "  ",
        "   x",
        "x   ",
        "\n",
        "\n\n",
        " \n \n",
        "\r\n\r\n",
        "\t\tx\t",
        "a \n  b\n\n\n   c ",
        "\u3000x\u3000\u3000y",
    ),
    *("a\x1cb\x1d \x1e\x1f c", "\x85\x85a", "\xa0\xa0a\xa0", "\u2028\u2029x", "\u200b\u200bx", "\u180ex", "\x0b\x0c x"),
    *("\ufeffx", "x\x00y", " !?\n\n", "...\r\n\r\n ", "__init__ _a", "\x1c_\x1d!_\n"),
]
QUOTES = [
    "'ſ 'S 'LL 'Re 'ſt",
    "don't DON'T I'M he'D 'tis ''s",
    "e\u0301 é \u212b \ufb01 ｶﾞ q\u0323\u0307",
    "\u1e9b\u0323",
]
MARKUP = [
    "<|im_start|>system\nhi<|im_end|>",
    "<|begin_of_text|><|eot_id|>",
    "<image><s></s><|image_pad|>",
    "[INST] <<SYS>>",
]


@cache
def source_code() -> list[str]:
    """Half a megabyte of Python's own standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::5]
    return [file.read_text(encoding="utf-8", errors="replace")[:20000] for file in files][:30]


@cache
def common_characters() -> list[str]:
    """Characters of Unicode 3.2 that are still of the same category: about them every Unicode version agrees."""
    old = unicodedata.ucd_3_2_0
    characters = (chr(code) for code in range(0x30000) if old.category(chr(code)) not in ("Cn", "Cs"))
    return [c for c in characters if old.category(c) == unicodedata.category(c)]


@cache
def random_texts(count: int = 5000) -> list[str]:
    generator = random.Random(0)
    everything = common_characters()
    pools = (
        everything,
        everything[:8000],
        [chr(code) for code in range(128)],
        list(" \t\n\r's'tſSLlvVeEdD__019½Ⅷaé\u0301\u0323字가\u3000\x1c\x1f\x85\xa0\u200d👍🏽🇩") + ["  ", "\n\n", "'ll"],
    )
    return ["".join(generator.choices(generator.choice(pools), k=generator.randint(1, 40))) for _ in range(count)]


def all_texts() -> list[str]:
    return [*LANGUAGES, *EMOJI, *NUMBERS, *SPACES, *QUOTES, *source_code(), *random_texts()]


# ---- chat templates ------------------------------------------------------------------------------------------------

# As the hub's, without what nobody asks for here (tools, videos).
TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{
'<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{
'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{%
if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "qwen-vl": """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string
%}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image'
%}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor
%}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}""",
    "llava": r"""{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% for content in
message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in
message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{'<|im_end|>' + '\n'}}{%
endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llava-1": r"""{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{% for content in
message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% for content in
message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{%
endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama2": r"""{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message =
messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{%
for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception(
'Conversation roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content =
'<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content =
message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() +
' [/INST]' }}{% else %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama3": r"""{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] +
'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content =
bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{
'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "llama3.1": r"""{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages =
messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}{{- system_message }}{{- "<|eot_id|>" }}{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
    "llama3-vision": r"""{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set
messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}{% set seen = namespace(images=false) %}
{%- for message in messages %}{%- for content in message['content'] %}{%- if content['type'] == 'image' %}{%- set
seen.images = true %}{%- endif %}{%- endfor %}{%- endfor %}{%- if seen.images and system_message %}{{-
raise_exception("Prompting with images is incompatible with system messages.") }}{%- endif %}{%- if not seen.images %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}{{- system_message }}{{- "<|eot_id|>" }}{%- endif %}
{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{%- if message['content'] is string %}{{- message['content'] }}{%- else %}{%- for content in message['content'] %}
{%- if content['type'] == 'image' %}{{- '<|image|>' }}{%- else %}{{- content['text'] }}{%- endif %}{%- endfor %}
{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
}


def render(template: str, messages: list[dict], **variables) -> str:
    """The template as transformers renders it."""
    template = re.sub(r"{% (end)?generation %}", "", template)  # marks of transformers' own, which print nothing
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["strftime_now"] = lambda layout: date.today().strftime(layout)
    environment.globals["raise_exception"] = None
    variables |= {"add_generation_prompt": True, "eos_token": "</s>"}
    return environment.from_string(template).render(messages=messages, **variables)


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(*parts: str | None) -> dict:
    """Content is text, or parts, of which None is an image."""
    if len(parts) == 1 and parts[0] is not None:
        return {"role": "user", "content": parts[0]}
    return {"role": "user", "content": [{"type": "text", "text": p} if p is not None else IMAGE for p in parts]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def tokens(ids: list[int]) -> dict:
    return {"role": "assistant", "content": [{"type": "tokens", "ids": ids}]}


IMAGE = {"type": "image", "path": "a.png"}
CONVERSATIONS = [
    [user("What is 12 + 345?")],
    [user("")],
    [user("  \n spaces on both sides, and a line break\n\n")],
    [system("You are a pirate.\n"), user("Hi")],
    [system(""), user(" Hi ")],
    [user("Hi"), assistant("Hello! "), user("Über 3 Straßen?")],
    [system(" Be brief "), user("A\n"), assistant("\n\nB"), user("C"), assistant("D "), user("E?")],
]
WITH_IMAGES = [
    [user(None, "What is this?")],
    [user("Before ", None, "\nafter", None)],
    [user(None)],
    [user(None, None, " Compare."), assistant("They differ."), user("How?"), assistant(""), user(None, "And this?")],
]
WITH_SYSTEM_AND_IMAGES = [[system("Be brief."), user(None, "\nWhat?")]]


def in_parts(messages: list[dict]) -> list[dict]:
    """The same with every content as a list, which some templates demand."""
    texts = [m for m in messages if isinstance(m["content"], str)]
    return [m | {"content": [{"type": "text", "text": m["content"]}]} if m in texts else m for m in messages]


# ---- tokenizers ----------------------------------------------------------------------------------------------------

IMAGES = {
    "qwen-vl": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    "llava": ("", "<image>", "\n"),
    "llava-1": ("", "<image>", ""),
    "llama3-vision": ("", "<|image|>", ""),
}
END = {
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "llama3.1": "<|eot_id|>",
    "llama3-vision": "<|eot_id|>",
}  # else ChatML's
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FAMILY = {"chatml": "qwen", "qwen-vl": "qwen", "llava": "qwen", "llava-1": "qwen", "llama2": "llama2"}  # else llama3
REAL = {"qwen": "qwen2.5", "llama3": "llama-3.2", "llama2": "llama-2"}


def train_bytelevel(family: str) -> Reference:
    """Byte-level BPE of 2,000 tokens with the rules of Qwen or Llama-3."""
    reference = Reference(models.BPE(ignore_merges=family == "llama3"))
    if family == "qwen":
        reference.normalizer = normalizers.NFC()
    pattern = QWEN_SPLIT if family == "qwen" else QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator([*LANGUAGES * 2, *EMOJI * 3, *NUMBERS, *source_code()[:4]], trainer)
    special = QWEN_TOKENS if family == "qwen" else LLAMA3_TOKENS
    reference.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    reference.add_tokens([AddedToken("<tool_call>", normalized=False)])
    if family == "llama3":
        bos = ("<|begin_of_text|>", reference.token_to_id("<|begin_of_text|>"))
        reference.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return reference


def forget_merges(path: Path) -> None:
    """Every fifth of the last merges: their tokens are then found as whole words only, as 588 of Llama-3's are."""
    content = json.loads(path.read_text())
    merges = content["model"]["merges"]
    parts = {part for merge in merges for part in merge}
    content["model"]["merges"] = [merge for i, merge in enumerate(merges) if i % 5 or "".join(merge) in parts]
    path.write_text(json.dumps(content))


def train_llama2(path: Path) -> None:
    """A SentencePiece model with Llama-2's rules."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*LANGUAGES, *source_code()[0].splitlines()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


class Pair:
    """A converted tokenizer and its reference."""

    def __init__(self, hub: Path, folder: Path, template: str | None = None, image: tuple | None = None):
        self.hub, self.folder = hub, folder
        if template:
            (hub / "chat_template.jinja").write_text(template)
        self.settings = convert_tokenizer(hub, folder, image)
        self.ours = Tokenizer(folder / "tokenizer.model", self.settings)
        self.encoded: dict[str, list[int]] = {}
        self.reference = self.pieces = None
        if self.settings["type"] == "sentencepiece":
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(hub / "tokenizer.model"))
        else:
            self.reference = Reference.from_file(str(hub / "tokenizer.json"))
            self.reference.add_special_tokens([AddedToken(image[1], normalized=False)] if image else [])

    def encode(self, text: str) -> list[int]:
        """What ours gives, once for all tests."""
        if text not in self.encoded:
            self.encoded[text] = self.ours.encode(text)
        return self.encoded[text]

    def expected(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are recognized."""
        if self.reference:
            return self.reference.encode(text, add_special_tokens=False).ids
        special = {"<s>": [1], "</s>": [2]}  # as the first LlamaTokenizer: each text between them is encoded by itself
        return [i for part in re.split("(</?s>)", text) for i in special.get(part) or self.pieces.encode(part)]


def write_hub(folder: Path, family: str, real: bool) -> Path:
    """A hub folder of the family: the real tokenizer's files or those of a small one, without a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    if real:
        source = DATA / "tokenizers" / REAL[family]
        if not source.is_dir():
            pytest.skip("../shared/data, with the real tokenizers, is not there")
        for name in ("tokenizer.json", "tokenizer.model"):
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
    elif family == "llama2":
        train_llama2(folder / "tokenizer.model")
    else:
        train_bytelevel(family).save(str(folder / "tokenizer.json"))
        if family == "llama3":
            forget_merges(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory):
    """make_pair(family, real, template, image): converted once a session."""

    @cache
    def make(family: str, real: bool = False, template: str | None = None, image: tuple | None = None) -> Pair:
        hub = write_hub(tmp_path_factory.mktemp("hub"), family, real)
        return Pair(hub, tmp_path_factory.mktemp("out"), template, image)

    return make


@pytest.fixture(params=["qwen", "llama3", "llama2", "real qwen", "real llama3", "real llama2"])
def pair(request, make_pair) -> Pair:
    return make_pair(request.param.split()[-1], request.param.startswith("real"))


@pytest.fixture(params=TEMPLATES)
def chat(request, make_pair) -> tuple[str, Pair]:
    """A chat format and a small tokenizer that has it."""
    name = request.param
    return name, make_pair(FAMILY.get(name, "llama3"), False, TEMPLATES[name], IMAGES.get(name))


# ---- text to ids ---------------------------------------------------------------------------------------------------


def test_ids_are_the_reference_s(pair):
    wrong = [text for text in all_texts() if pair.encode(text) != pair.expected(text)]
    assert not wrong, f"{len(wrong)} texts differ, the first: {wrong[0][:200]!r}"


def test_real_qwen_vl_has_the_same_tokens(make_pair, tmp_path):
    source = DATA / "tokenizers" / "qwen2.5-vl"
    if not source.is_dir():
        pytest.skip("../shared/data, with the real tokenizers, is not there")
    settings = convert_tokenizer(source, tmp_path, IMAGES["qwen-vl"])
    ours, plain = Tokenizer(tmp_path / "tokenizer.model", settings), make_pair("qwen", True).ours
    assert ours.template.image is None and ours.image_id == 151655 and settings["stop_ids"] == [151645]
    assert all(ours.encode(text) == plain.encode(text) for text in [*LANGUAGES, *EMOJI, *SPACES, *QUOTES])


@pytest.mark.parametrize("name, family", [("qwen2", "qwen"), ("llama-bpe", "llama3"), ("llama-spm", "llama2")])
def test_published_vectors(make_pair, name, family):
    source = DATA / "tokenizer_vectors" / f"ggml-vocab-{name}.gguf.inp"
    if not source.is_file():
        pytest.skip("../shared/data, with the published vectors, is not there")
    texts = source.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    vectors = source.with_suffix(".out").read_text().splitlines()
    ours = make_pair(family, True).ours
    bos = [] if ours.bos_id is None else [ours.bos_id]
    assert len(vectors) == 46
    for text, vector in zip(texts, vectors, strict=False):
        assert ours.encode(text) == [int(i) for i in vector.split()], repr(text)
        assert ours.encode_request({"prompt": text, "raw": True})[0] == bos + ours.encode(text)


@pytest.mark.parametrize("max_digits", [1, 3])
def test_split_pattern_on_every_character(max_digits):
    pattern = QWEN_SPLIT if max_digits == 1 else QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    reference, ours = pre_tokenizers.Split(Regex(pattern), "isolated"), split_pattern(max_digits)
    characters = [*common_characters(), *"".join(EMOJI), "\u180e", "\u0085"]
    for start in range(0, len(characters), 1000):
        text = "".join(f"a{c}{c} {c}1{c}'{c}\n" for c in characters[start : start + 1000])
        assert ours.findall(text) == [piece for piece, _ in reference.pre_tokenize_str(text)]


def test_special_tokens_in_a_text_stay_text(pair):
    texts = [*MARKUP, *pair.settings["special_tokens"], *(f"x{name}y" for name in pair.settings["special_tokens"])]
    special = {i for name, i in pair.settings["special_tokens"].items() if name != "<unk>"}
    for text in texts:
        ids = pair.ours.encode(text)
        assert not special & set(ids) and pair.ours.decode(ids) == text


def test_decode_gives_the_text_back(pair):
    def normalize(text: str) -> str:
        if pair.pieces:
            return text.replace("\u2581", " ")  # SentencePiece's mark for a space
        return unicodedata.normalize("NFC", text) if pair.settings["nfc"] else text

    wrong = [text for text in all_texts() if pair.ours.decode(pair.encode(text)) != normalize(text)]
    assert not wrong, f"{len(wrong)} texts differ, the first: {wrong[0][:200]!r}"


def random_ids(pair: Pair, seed: int = 0) -> list[list[int]]:
    """Mostly no text at all: broken UTF-8, special tokens and ids past the vocabulary too."""
    generator = random.Random(seed)
    special = sorted(pair.settings["special_tokens"].values())
    pools = [range(pair.settings["n_tokens"] + 3), special, range(600)]
    return [[generator.choice(generator.choice(pools)) for _ in range(generator.randint(0, 12))] for _ in range(2000)]


def test_decode_of_any_ids_is_the_reference_s(pair):
    def same(ids: list[int]) -> bool:
        text = pair.ours.decode(ids)
        if pair.reference:
            return text == pair.reference.decode(ids, skip_special_tokens=True)
        # SentencePiece prints a mark for <unk>, has no id past its pieces, writes U+FFFD for every byte where Python
        # and byte-level decoders write one for a broken character, and keeps a space in front that came as <0x20>.
        expected = pair.pieces.decode([i for i in ids if 2 < i < pair.pieces.get_piece_size()])
        return re.sub("\ufffd+", "\ufffd", text).lstrip() == re.sub("\ufffd+", "\ufffd", expected).lstrip()

    wrong = [ids for ids in random_ids(pair) if not same(ids)]
    assert not wrong, f"{len(wrong)} differ, the first: {wrong[0]}"


def test_streaming_gives_whole_characters_and_loses_nothing(pair):
    sequences = [pair.ours.encode(text) for text in [*LANGUAGES, *EMOJI, *SPACES, *random_texts(300)]]
    for i, ids in enumerate([*sequences, *random_ids(pair, seed=1)]):
        decoder = StreamDecoder(pair.ours)
        printed = [decoder.push([token]) for token in ids]
        assert i >= len(sequences) or "\ufffd" not in "".join(printed)
        assert "".join(printed) + decoder.flush() == pair.ours.decode(ids)


def test_half_a_character_waits(make_pair):
    ours = make_pair("qwen").ours
    ids = [next(iter(ours.pieces.piece_to_id([letter]))) for letter in "ðŁĲ¨"]  # the four bytes of a koala
    decoder = StreamDecoder(ours)
    assert [decoder.push([token]) for token in ids] == ["", "", "", "🐨"] and decoder.flush() == ""
    assert decoder.push(ids[:2]) == "" and decoder.flush() == "\ufffd"


def test_raw_prompts_begin_with_bos_where_the_reference_s_do(pair):
    for text in ("The sky is", " <s>", "<|im_start|>", " ", "a</s>\n<|eot_id|> b<tool_call>"):
        bos = [] if pair.settings["bos_id"] is None else [pair.settings["bos_id"]]
        assert pair.ours.encode_request({"prompt": text, "raw": True}) == (bos + pair.expected(text), [])
    if pair.reference:
        assert pair.ours.encode_raw("The sky is") == pair.reference.encode("The sky is").ids
    else:
        assert pair.ours.encode_raw("The sky is") == pair.pieces.encode("The sky is", add_bos=True)


def test_lone_surrogates_are_a_user_s_mistake(pair):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        pair.ours.encode("half an emoji: \ud83d")


def test_long_texts_stay_fast(pair):
    """A hundred kilobytes take about 30 ms; the limit is wide because the machine may be busy."""
    for text in ("".join(source_code())[:100_000], "a" * 100_000, " " * 100_000 + "x", "=-" * 50_000, "\n " * 50_000):
        start = time.process_time()
        pair.ours.encode(text)
        assert time.process_time() - start < 1


# ---- chats ---------------------------------------------------------------------------------------------------------


def compare_chats(pair: Pair, template: str, conversations: list[list[dict]], lists: bool = False, **variables) -> None:
    for messages in conversations:
        text = render(template, in_parts(messages) if lists else messages, **variables)
        expected = pair.expected(text)
        assert pair.ours.encode_chat(messages, variables.get("date_string")) == expected, text
        assert pair.ours.encode_chat(in_parts(messages), variables.get("date_string")) == expected, text


def conversations_for(name: str) -> list[list[dict]]:
    if name == "llama3-vision":
        return CONVERSATIONS + WITH_IMAGES
    return CONVERSATIONS + (WITH_IMAGES + WITH_SYSTEM_AND_IMAGES if name in IMAGES else [])


def bos_of(name: str) -> str:
    return "<s>" if name == "llama2" else "<|begin_of_text|>"


def test_chats_are_the_template_s(chat):
    name, pair = chat
    compare_chats(pair, TEMPLATES[name], conversations_for(name), name.startswith("llava"), bos_token=bos_of(name))


@pytest.mark.parametrize(
    "file, name, real",
    [
        ("qwen2.5", "chatml", True),
        ("qwen2.5-vl", "qwen-vl", False),
        ("llava-onevision", "llava", False),
        ("llama-2-chat", "llama2", True),
        ("llama-3.1", "llama3.1", False),
        ("llama-3.2", "llama3.1", True),
        ("llama-3.2-vision", "llama3-vision", False),
    ],
)
def test_chats_are_the_published_template_s(make_pair, file, name, real):
    path = DATA / "chat_templates" / f"{file}.jinja"
    if not path.is_file():
        pytest.skip("../shared/data, with the published chat templates, is not there")
    pair = make_pair(FAMILY.get(name, "llama3"), real, path.read_text(), IMAGES.get(name))
    for dates in ({}, {"date_string": "1 Jan 2025"}):
        arguments = {"bos_token": bos_of(name)} | dates
        compare_chats(pair, path.read_text(), conversations_for(name), file == "llava-onevision", **arguments)


def test_dates(make_pair):
    vision = make_pair("llama3", False, TEMPLATES["llama3-vision"], IMAGES["llama3-vision"]).ours
    fixed = make_pair("llama3", False, TEMPLATES["llama3.1"]).ours
    assert date.today().strftime("Today Date: %d %b %Y\n") in vision.decode(vision.encode_chat([user("Hi")]))
    assert "Today Date: 26 Jul 2024\n" in fixed.decode(fixed.encode_chat([user("Hi")]))
    assert "Today Date: tomorrow\n" in fixed.decode(fixed.encode_chat([user("Hi")], date_string="tomorrow"))


def test_a_reply_s_own_tokens_continue_the_prompt(chat):
    name, pair = chat
    first = user(None, "What?") if name in IMAGES else user("What?")
    end = pair.settings["special_tokens"][END.get(name, "<|im_end|>")]
    assert end in pair.ours.stop_ids
    generator = random.Random(0)
    for length in (0, 1, 30):
        messages, cached = [first], []
        for _ in range(3):
            reply = [generator.randrange(300, 1400) for _ in range(length)]
            prompt = pair.ours.encode_chat(messages)
            assert prompt[: len(cached)] == cached
            cached = prompt + reply + [end]
            messages += [tokens(reply), user("And?")]


def test_a_user_cannot_write_markup(chat):
    name, pair = chat
    special = set(pair.settings["special_tokens"].values())
    count = sum(i in special for i in pair.ours.encode_chat([user("Hi")]))
    for text in MARKUP:
        assert sum(i in special for i in pair.ours.encode_chat([user(text)])) == count


def test_images_in_raw_prompts_have_borders_and_nothing_else(chat):
    name, pair = chat
    if name not in IMAGES:
        with pytest.raises(ValueError, match="takes no images"):
            pair.ours.encode_raw([IMAGE])
        return
    bos = pair.ours.encode_raw("")
    image = [pair.settings["special_tokens"][token] for token in re.findall(r"<[^>]+>", "".join(IMAGES[name]))]
    parts = [{"type": "text", "text": "one"}, IMAGE, {"type": "text", "text": "two"}]
    assert pair.ours.encode_raw(parts) == [*bos, *pair.ours.encode("one"), *image, *pair.ours.encode("two")]
    assert pair.ours.image_id in image


MISTAKES = [
    ("chatml", [], "at least one message"),
    ("chatml", [{"role": "tool", "content": "x"}], "message 1: the role must be system, user or assistant, not 'tool'"),
    ("chatml", ["hello"], "message 1: the role"),
    ("chatml", [user("a"), {"role": "assistant"}], "message 2: the content must be text or a list of parts"),
    ("chatml", [user(None, "What?")], "message 1: this model takes no images"),
    (
        "qwen-vl",
        [{"role": "user", "content": [{"type": "video"}]}],
        "a part must be text or an image, not {'type': 'vid",
    ),
    ("qwen-vl", [{"role": "user", "content": [{"type": "text"}]}], "a part must be text or an image"),
    ("qwen-vl", [{"role": "user", "content": [{"type": "tokens", "ids": [1]}]}], "a part must be text or an image"),
    ("qwen-vl", [{"role": "system", "content": [IMAGE]}], "only a user's message can hold an image"),
    ("llama3-vision", [system("x"), user(None)], "refuses this conversation: Prompting with images is inc"),
    ("llama2", [user("a"), user("b")], "must alternate"),
    ("llama2", [user("a"), assistant("b"), system("c")], "must alternate"),
    ("llama2", [system("a")], "writes nothing of this conversation"),
    ("chatml", [user("a"), tokens([5, "a"])], "message 2: a is not the id of a token"),
    ("chatml", [user("a"), tokens([10**9])], "message 2: 1000000000 is not the id of a token"),
    ("chatml", [user("a"), tokens([-1])], "message 2: -1 is not the id of a token"),
    ("qwen-vl", [{"role": "user", "content": [IMAGE | {"detail": "low"}]}], "an image part has no detail, but path"),
    ("qwen-vl", [{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}], "a part must be text or an"),
]


@pytest.mark.parametrize("name, messages, mistake", MISTAKES)
def test_mistakes_are_one_line(make_pair, name, messages, mistake):
    ours = make_pair(FAMILY.get(name, "llama3"), False, TEMPLATES[name], IMAGES.get(name)).ours
    with pytest.raises(ValueError, match=re.escape(mistake)) as error:
        ours.encode_chat(messages)
    assert "\n" not in str(error.value)


def test_without_a_chat_format_only_raw_prompts_work(make_pair):
    ours = make_pair("qwen").ours
    assert ours.chat_template is None and ours.encode_raw("Hi") == ours.encode("Hi")
    with pytest.raises(ValueError, match="--raw"):
        ours.encode_chat([user("Hi")])


# ---- the converter -------------------------------------------------------------------------------------------------


def write_json(path: Path, **content) -> None:
    path.write_text(json.dumps(content))


def test_every_id_keeps_its_token(make_pair):
    for family in ("qwen", "llama3"):
        pair = make_pair(family)
        vocabulary = pair.reference.get_vocab(with_added_tokens=True)
        assert pair.settings["n_tokens"] == len(vocabulary)
        assert {pair.ours.pieces.id_to_piece(i): i for i in range(len(vocabulary))} == vocabulary
        assert "<tool_call>" not in pair.settings["special_tokens"]  # the hub prints it in answers


def test_older_files_give_the_same(make_pair, tmp_path):
    """vocab.json and merges.txt for tokenizer.json, and Llama-2's tokenizer.json for tokenizer.model."""
    pair = make_pair("qwen")
    content = json.loads((pair.hub / "tokenizer.json").read_text())
    merges = [" ".join(merge) for merge in content["model"]["merges"]]
    write_json(tmp_path / "vocab.json", **content["model"]["vocab"])
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    added = {str(entry["id"]): entry for entry in content["added_tokens"]}
    write_json(tmp_path / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=added)
    for _ in range(2):  # the second time beside the first one's tokenizer.model
        assert convert_tokenizer(tmp_path, tmp_path) == pair.settings
        assert (tmp_path / "tokenizer.model").read_bytes() == (pair.folder / "tokenizer.model").read_bytes()
    write_json(tmp_path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    with pytest.raises(ValueError, match="GPT2Tokenizer; supported are"):
        convert_tokenizer(tmp_path, tmp_path)


def llama2_json(model: Path) -> dict:
    """tokenizer.json as transformers makes it of a Llama-2 model: every pair of pieces that make a piece is a merge."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    plain = {name: i for i, name in enumerate(names) if not pieces.is_byte(i) and i > 2}
    merges = [[t[:k], t[k:]] for t in plain for k in range(1, len(t)) if t[:k] in plain and t[k:] in plain]
    merges.sort(key=lambda merge: -pieces.get_score(plain["".join(merge)]))
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": merges}
    return {
        "added_tokens": [{"id": i, "content": names[i], "special": True} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {}}]},
        "model": model | {"vocab": {name: i for i, name in enumerate(names)}},
    }


def test_llama2_without_its_model_file(make_pair, tmp_path):
    pair = make_pair("llama2")
    content = llama2_json(pair.hub / "tokenizer.model")
    write_json(tmp_path / "tokenizer.json", **content)
    settings = convert_tokenizer(tmp_path, tmp_path)
    assert settings == pair.settings
    ours = Tokenizer(tmp_path / "tokenizer.model", settings)
    assert all(ours.encode(text) == pair.expected(text) for text in all_texts())
    content |= {"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}}
    write_json(tmp_path / "tokenizer.json", **content)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="Whitespace.*supported are"):
        convert_tokenizer(tmp_path, tmp_path)


def test_real_llama2_without_its_model_file(make_pair, tmp_path):
    pair = make_pair("llama2", True)
    (tmp_path / "tokenizer.json").write_bytes((pair.hub / "tokenizer.json").read_bytes())
    assert convert_tokenizer(tmp_path, tmp_path) == pair.settings
    ours = Tokenizer(tmp_path / "tokenizer.model", pair.settings)
    assert all(ours.encode(text) == pair.expected(text) for text in all_texts())


def test_stop_ids_are_of_all_files(tmp_path):
    write_hub(tmp_path, "qwen", False)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    end = convert_tokenizer(tmp_path, tmp_path)["special_tokens"]["<|im_end|>"]
    assert convert_tokenizer(tmp_path, tmp_path)["stop_ids"] == [end]
    write_json(tmp_path / "generation_config.json", eos_token_id=[7, 5])
    write_json(tmp_path / "config.json", eos_token_id=5, text_config={"eos_token_id": 9})
    write_json(tmp_path / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    settings = convert_tokenizer(tmp_path, tmp_path)
    assert settings["stop_ids"] == [7, 5, 9, settings["special_tokens"]["<|endoftext|>"], end]
    assert Tokenizer(tmp_path / "tokenizer.model", settings).stop_ids == set(settings["stop_ids"])


def test_where_templates_are_found(tmp_path):
    write_hub(tmp_path, "qwen", False)

    def found() -> tuple[str, dict]:
        settings = convert_tokenizer(tmp_path, tmp_path)
        return settings["chat_template"], settings["template_variables"]

    assert found() == (None, {})
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATES["chatml"]}]
    tokens = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    write_json(tmp_path / "tokenizer_config.json", chat_template=named, **tokens)
    assert found() == (TEMPLATES["chatml"], {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    for name in ("processor_config.json", "chat_template.json"):
        write_json(tmp_path / name, chat_template=f"{{{{ '{name}' }}}}")
        assert found()[0] == f"{{{{ '{name}' }}}}"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["llama3"])
    assert found()[0] == TEMPLATES["llama3"]


CHANGES = [
    ("normalizer", {"type": "NFKC"}, 'normalizer is not a known one: {"type": "NFKC"}; supported are'),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "pre_tokenizer is not a known one"),
    ("model", {"type": "BPE", "dropout": 0.1}, "model is not a known one"),
    ("model", {"type": "WordPiece"}, "model is not a known one"),
    ("model", {"vocab": {"a": 0}}, "lacks 255 of the 256 bytes"),
    ("model", {"merges": None}, "not laid out as expected"),
    ("added_tokens", [{"id": 0}], "not laid out as expected"),
    ("added_tokens", None, "not laid out as expected"),
]


@pytest.mark.parametrize("key, value, mistake", CHANGES)
def test_other_tokenizers_are_refused(make_pair, tmp_path, key, value, mistake):
    content = json.loads((make_pair("qwen").hub / "tokenizer.json").read_text())
    write_json(tmp_path / "tokenizer.json", **content | {key: content[key] | value if key == "model" else value})
    with pytest.raises(ValueError, match=re.escape(mistake)) as error:
        convert_tokenizer(tmp_path, tmp_path)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files_are_named(make_pair, tmp_path):
    with pytest.raises(OSError, match="no tokenizer.json.*download"):
        convert_tokenizer(tmp_path, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="tokenizer.model is not a SentencePiece model"):
        convert_tokenizer(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="tokenizer.model is not a SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model", {})
    with pytest.raises(OSError, match="tokenizer.model is missing"):
        Tokenizer(tmp_path / "elsewhere" / "tokenizer.model", {})
    for content in ('{"model": ', "[1, 2]", b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match="tokenizer.json .*JSON.*download"):
            convert_tokenizer(tmp_path, tmp_path)
    pair = make_pair("qwen")
    with pytest.raises(ValueError, match="another version of this program: convert the checkpoint again"):
        Tokenizer(pair.folder / "tokenizer.model", {"type": "bytelevel", "chat_format": "llava"})


def test_a_sentencepiece_model_that_changes_the_text_is_refused(tmp_path):
    model = io.BytesIO()
    text = iter([*LANGUAGES, *source_code()[0].splitlines()])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=model, vocab_size=1000, minloglevel=2, hard_vocab_limit=False
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="changes the text"):
        convert_tokenizer(tmp_path, tmp_path)


def test_the_tokenizer_needs_sentencepiece_alone():
    code = "import sys, tokenizer; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    others = {name for name in run.stdout.split() if not name.startswith(("_", "sphinxcontrib"))}
    others -= sys.stdlib_module_names | {"tokenizer", "sentencepiece"}
    assert not others & {"torch", "numpy", "google", "tokenizers", "transformers", "regex", "jinja2"}
