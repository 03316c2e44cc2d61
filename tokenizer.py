"""Text to token ids and back, and the chat formats of the supported models.

Knows SentencePiece files, the byte-level BPE vocabularies that scripts/hf_tokenizer.py stores in them, chat formats and
stop tokens. Knows nothing of tensors, images (each is one token here) or command lines.
"""

import codecs
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import groupby
from pathlib import Path

import sentencepiece

Part = int | str  # a piece of a prompt: a token id, or text that is still to be encoded
Turn = tuple[str, list[Part]]  # role, content
REQUEST_TYPES = {  # what --requests may say
    "messages": list,
    "prompt": (str, int),
    "images": list,
    "raw": bool,
    "system": str,
    "max_new_tokens": int,
    "date_string": str,
}
MARKUP_TOKEN = re.compile(r"(<\|\w+\|>|<image>|</?s>)")  # a special token in the strings of CHAT_FORMATS


@dataclass(frozen=True)
class ChatFormat:
    """How one family writes a conversation. `<...>` in these strings are special tokens; a user's text never is."""

    turn: str  # one message: {role} and {content} are filled in
    reply: str  # the assistant's header, with which a prompt ends
    begin: str = ""
    answer: str = ""  # the assistant's turn, where it is not `turn`
    image: str = ""  # the image token and what surrounds it
    image_token: str = ""
    images_first: bool = False  # images stand in front of the text of their message, wherever they were given
    text_prefix: str = ""  # in front of every part of text
    trim: bool = False  # white space around a message is dropped
    system_in_user: bool = False  # the system prompt is written into the first user turn, and roles alternate
    dated: bool = False  # the system turn is always there and gives dates, except in a conversation with images

    def special_tokens(self) -> list[str]:
        return MARKUP_TOKEN.findall(self.begin + self.turn + self.answer + self.reply + self.image)

    def end_token(self) -> str:
        """What ends a reply."""
        return MARKUP_TOKEN.findall(self.answer or self.turn)[-1]


CHATML = ChatFormat(turn="<|im_start|>{role}\n{content}<|im_end|>\n", reply="<|im_start|>assistant\n")
LLAVA = replace(CHATML, image="<image>\n", image_token="<image>", images_first=True)
LLAMA3 = ChatFormat(
    begin="<|begin_of_text|>",
    turn="<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    reply="<|start_header_id|>assistant<|end_header_id|>\n\n",
    trim=True,
)
CHAT_FORMATS = {
    "chatml": CHATML,
    "qwen-vl": replace(CHATML, image="<|vision_start|><|image_pad|><|vision_end|>", image_token="<|image_pad|>"),
    "llava": LLAVA,
    # llava-hf's first conversions: a space after the role, a newline before the text, none between turns
    "llava-1": replace(LLAVA, turn="<|im_start|>{role} {content}<|im_end|>", image="<image>", text_prefix="\n"),
    "llama2": ChatFormat(
        turn="<s>[INST] {content} [/INST]", answer=" {content} </s>", reply="", trim=True, system_in_user=True
    ),
    "llama3": LLAMA3,
    "llama3.1": replace(LLAMA3, dated=True),
    "llama3-vision": replace(LLAMA3, dated=True, trim=False, image="<|image|>", image_token="<|image|>"),
}


def byte_alphabet() -> str:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(spare)) for byte in range(256))


ALPHABET = byte_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


def other_numbers() -> str:
    r"""The body of an `re` class for what \p{N} holds beyond \d: fractions, Roman numerals, circled digits...

    Python's \w is exactly \p{L}, \p{N} and "_", so these ranges are all that is missing to tell letters from numbers.
    No number lies beyond U+1FFFF; str.isnumeric() is also true of some ideographs, which are letters.
    """
    ranges: list[list[int]] = []
    for code in range(0x20000):
        character = chr(code)
        if character.isnumeric() and not character.isdecimal() and not character.isalpha():
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


def split_pattern(max_digits: int) -> re.Pattern:
    r"""The pattern that Qwen (max_digits 1) and Llama-3 (3) publish in tokenizer.json, in terms of `re`:

    (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+

    Their \s is Unicode's White_Space, to which Python's adds U+001C..U+001F; their ' s is not ' and a long s (U+017F).
    """
    other = other_numbers()
    letter, number = rf"[^\W\d_{other}]", rf"[\d{other}]"
    space, not_space = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
    alternatives = (
        r"(?ai:'s|'t|'re|'ve|'m|'ll|'d)",
        rf"(?:[^\w\r\n]|_)?{letter}+",
        rf"{number}{{1,{max_digits}}}",
        r" ?(?:[^\w\s]|[_\x1c-\x1f])++[\r\n]*",
        rf"{space}*[\r\n]+",
        rf"{space}+(?!{not_space})",
        rf"{space}+",
    )
    return re.compile("|".join(alternatives))


class Tokenizer:
    """tokenizer.model and the "tokenizer" entry of params.json, as scripts/hf_tokenizer.py wrote them.

    settings: type ("bytelevel" or "sentencepiece"), nfc, max_digits and ignore_merges (byte-level only), add_bos,
    bos_id, stop_ids, special_tokens {name: id}, chat_format (a key of CHAT_FORMATS, or None), default_system (None: no
    system turn) and default_date (None: today's).
    """

    def __init__(self, model_path: str | Path, settings: dict):
        """Raises OSError where the file is missing, ValueError where it or the settings are of no use."""
        if not Path(model_path).is_file():
            raise FileNotFoundError(f"{model_path} is missing: convert the checkpoint again")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
        except RuntimeError as error:
            raise ValueError(f"{model_path} is not a SentencePiece model: convert the checkpoint again") from error
        self.settings = settings
        self.bytelevel = settings["type"] == "bytelevel"
        self.split = split_pattern(settings["max_digits"]) if self.bytelevel else None
        self.special: dict[str, int] = settings["special_tokens"]
        self.bos_id: int | None = settings["bos_id"]
        self.stop_ids = frozenset(settings["stop_ids"])
        self.silent = frozenset(self.special.values()) | {self.pieces.unk_id()}  # ids without a text
        self.chat = CHAT_FORMATS[settings["chat_format"]] if settings["chat_format"] else None
        if missing := sorted(set(self.chat.special_tokens() if self.chat else []) - self.special.keys()):
            raise ValueError(f"chat format {settings['chat_format']} needs tokens that are not there: {missing}")
        self.image_id = self.special[self.chat.image_token] if self.chat and self.chat.image_token else None

    def encode(self, text: str) -> list[int]:
        """Ids of a user's text: a special token's name in it is text like any other. No BOS."""
        if not self.bytelevel:
            return self.pieces.encode(text.encode())
        if self.settings["nfc"]:
            text = unicodedata.normalize("NFC", text)
        words = [codecs.charmap_decode(word.encode(), "strict", ALPHABET)[0] for word in self.split.findall(text)]
        ids = self.pieces.encode(words, num_threads=1)  # merges cannot cross words; threads cost more than they save
        if self.settings["ignore_merges"]:  # a word of the vocabulary is one token, even where merges do not lead to it
            whole = self.pieces.piece_to_id(words)
            ids = [merged if one in self.silent else [one] for one, merged in zip(whole, ids, strict=True)]
        return [token for word_ids in ids for token in word_ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and ids that have none. Bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self)
        return decoder.push(ids) + decoder.flush()

    def token_bytes(self, token: int) -> bytes:
        """What one id stands for: part of a UTF-8 text, perhaps of one character; b"" for a special token."""
        if token in self.silent or not 0 <= token < self.pieces.get_piece_size():
            return b""
        piece = self.pieces.id_to_piece(token)
        if self.bytelevel:
            in_alphabet = all(character in BYTE_OF for character in piece)  # an added token's name need not be
            return bytes(BYTE_OF[character] for character in piece) if in_alphabet else piece.encode()
        if self.pieces.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # <0x0A>
        return piece.replace("\u2581", " ").encode()

    def agrees_with(self, other: "Tokenizer") -> bool:
        """Whether ids mean the same text in both: only special tokens and the vocabulary's end may differ."""
        n = min(self.settings["n_tokens"], other.settings["n_tokens"])
        silent = self.silent | other.silent
        ids = [token for token in range(n) if token not in silent]
        same_kind = self.settings["type"] == other.settings["type"]
        return same_kind and self.pieces.id_to_piece(ids) == other.pieces.id_to_piece(ids)

    def encode_request(self, request: dict) -> tuple[list[int], list[dict]]:
        """Ids of a request, {"messages": [...]} or {"prompt", "images", "raw", "system"}, and its image parts in order.

        A prompt that is a number N becomes N arbitrary ids. Raises ValueError for what is wrong with the request.
        """
        if not isinstance(request, dict) or ("messages" in request) == ("prompt" in request):
            raise ValueError("a request is an object that holds either messages or a prompt")
        for name, value in request.items():
            if not isinstance(value, REQUEST_TYPES.get(name, ())):
                raise ValueError(f"no {name} of this kind in a request; known are {', '.join(REQUEST_TYPES)}")
        if "messages" in request:
            ids = self.encode_chat(request["messages"], request.get("date_string"))
            return ids, find_images(request["messages"])
        prompt, images = request["prompt"], [{"type": "image", "path": path} for path in request.get("images", [])]
        if isinstance(prompt, int):
            if not 0 < prompt < 2**24:
                raise ValueError(f"a prompt of {prompt} tokens cannot be made up")
            words = sorted(set(range(self.settings["n_tokens"])) - self.silent)
            made_up = random.Random(0).choices(words, k=prompt)
            return self.encode_raw(images) + made_up, find_images([{"content": images}])
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        content = self.place_images(prompt, images)
        messages = [{"role": "user", "content": content}]
        if request.get("raw"):
            return self.encode_raw(content), find_images(messages)
        if "system" in request:
            messages.insert(0, {"role": "system", "content": request["system"]})
        return self.encode_chat(messages, request.get("date_string")), find_images(messages)

    def place_images(self, prompt: str, images: list[dict]) -> list[dict]:
        """A message's parts: images stand where the prompt says <image>, else in front of it.

        For a model without images `<image>` is text. Raises ValueError for unequal numbers.
        """
        texts = prompt.split("<image>")
        if len(texts) == 1 or self.image_id is None:
            return [*images, {"type": "text", "text": prompt}]
        if len(texts) - 1 != len(images):
            raise ValueError(f"the prompt has {len(texts) - 1} <image> placeholders for {len(images)} images")
        parts = [{"type": "text", "text": text} for text in texts]
        return [parts[0], *(part for pair in zip(images, parts[1:], strict=True) for part in pair)]

    def encode_raw(self, content: str | list[dict]) -> list[int]:
        """Ids of a prompt as it is: text, or parts as in encode_chat. BOS in front where the model's tokenizer adds it.

        An image is its token and borders, without the line break that a chat format may write after it.
        """
        chat = self.chat and replace(self.chat, image=self.chat.image.strip(), images_first=False, text_prefix="")
        bos = [self.bos_id] if self.settings["add_bos"] else []
        return bos + self._encode_parts(self._read_content("user", content, "the prompt", chat))

    def encode_chat(self, messages: Sequence[dict], date_string: str | None = None) -> list[int]:
        """Ids of a conversation in the model's own format, ending with the header of the assistant's next reply.

        messages: {"role": "system" | "user" | "assistant", "content": text or a list of parts}; a part is
        {"type": "text", "text": ...} or {"type": "image", ...}, which becomes one image token and its borders.
        A reply that the model gave can be put back as [{"type": "tokens", "ids": [...]}], without its stop token: then
        encode_chat(earlier) + ids + the stop token is a prefix of encode_chat(earlier + reply + more), which encoding
        the reply's text again would not guarantee.
        Raises ValueError for what the format cannot say.
        """
        if self.chat is None:
            raise ValueError("this checkpoint has no chat format that is known: use --raw")
        if not messages:
            raise ValueError("a conversation needs at least one message")
        turns = [self._read_message(message, f"message {i + 1}") for i, message in enumerate(messages)]
        if self.settings["default_system"] is not None and turns[0][0] != "system":
            turns.insert(0, ("system", [self.settings["default_system"]]))
        if self.chat.system_in_user:
            turns = merge_system(turns)
        if self.chat.trim:
            turns = [(role, ["".join(text).strip()] if is_text(text) else text) for role, text in turns]
        if self.chat.dated:
            turns = self._date(turns, date_string)
        parts = [part for role, content in turns for part in self._write_turn(role, content)]
        return self._encode_parts([*self._markup(self.chat.begin), *parts, *self._markup(self.chat.reply)])

    def _read_message(self, message: dict, where: str) -> Turn:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: the role must be system, user or assistant, not {role!r}")
        return role, self._read_content(role, message.get("content"), where, self.chat)

    def _read_content(self, role: str, content: str | list[dict], where: str, chat: ChatFormat | None) -> list[Part]:
        """Content in the hub's format as text (at least one str, perhaps empty) or, for a given reply, ids alone."""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{where}: the content must be text or a list of parts")
        if [part.get("type") for part in parts] == ["tokens"] and role == "assistant":
            return list(parts[0]["ids"])
        if chat and chat.images_first:
            parts = sorted(parts, key=lambda part: part.get("type") != "image")
        read: list[Part] = [""]
        for part in parts:
            match part:
                case {"type": "text", "text": str(text)}:
                    read.append(chat.text_prefix + text if chat else text)
                case {"type": "image"} if role != "user":
                    raise ValueError(f"{where}: only a user's message can hold an image, not the {role}'s")
                case {"type": "image"} if self.image_id is None:
                    raise ValueError(f"{where}: this model takes no images")
                case {"type": "image"}:
                    read += self._markup(chat.image)
                case _:
                    raise ValueError(f"{where}: a part must be text or an image, not {str(part)[:60]}")
        return read

    def _date(self, turns: list[Turn], date_string: str | None) -> list[Turn]:
        """Llama-3.1's system turn. A conversation with images has none (Llama-3.2-Vision's template)."""
        system = ""
        if turns[0][0] == "system":
            system, turns = "".join(turns[0][1]).strip(), turns[1:]
        if any(self.image_id in content for role, content in turns if role == "user"):
            if system:
                raise ValueError("this model takes no system message together with images: leave one of them out")
            return turns
        if date_string is None:
            date_string = self.settings["default_date"] or date.today().strftime("%d %b %Y")
        header = f"Cutting Knowledge Date: December 2023\nToday Date: {date_string}\n\n"
        return [("system", [header + system]), *turns]

    def _write_turn(self, role: str, content: list[Part]) -> list[Part]:
        turn = self.chat.answer if role == "assistant" and self.chat.answer else self.chat.turn
        head, tail = turn.replace("{role}", role).split("{content}")
        if role == "assistant" and not is_text(content):  # a reply's own ids: it began after `reply` and ended at once
            head, tail = self.chat.reply, tail.lstrip()
        return [*self._markup(head), *content, *self._markup(tail)]

    def _markup(self, text: str) -> list[Part]:
        """A string of CHAT_FORMATS with its special tokens as ids. Never given text of a user."""
        return [self.special[part] if i % 2 else part for i, part in enumerate(MARKUP_TOKEN.split(text))]

    def _encode_parts(self, parts: list[Part]) -> list[int]:
        """Neighbouring texts are encoded as one, as if they had been written in one string."""
        runs = [(text, list(run)) for text, run in groupby(parts, key=lambda part: isinstance(part, str))]
        return [token for text, run in runs for token in (self.encode("".join(run)) if text else run)]


def find_images(messages: Sequence[dict]) -> list[dict]:
    """The image parts of messages, in order. Raises ValueError for one that names no file."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    parts = [part for content in contents for part in content if part["type"] == "image"]
    for part in parts:
        if not isinstance(part.get("path"), str):
            raise ValueError(f"an image part has no path: {str(part)[:60]}")
    return parts


def is_text(content: list[Part]) -> bool:
    """False for the ids of a reply that was given as tokens."""
    return any(isinstance(part, str) for part in content)


def merge_system(turns: list[Turn]) -> list[Turn]:
    """Llama-2: the system prompt stands inside the first user turn; roles alternate. ValueError where they do not."""
    system = None
    if turns[0][0] == "system":
        (_, system), *turns = turns
    for i, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            raise ValueError("this model's messages must alternate: [system,] user, assistant, user, ...")
    if not turns:
        raise ValueError("this model needs a user's message after the system message")
    if system is not None:
        turns[0] = ("user", ["<<SYS>>\n", *system, "\n<</SYS>>\n\n", *turns[0][1]])
    return turns


class StreamDecoder:
    """Decodes ids as they come. The outputs of push(), then flush(), join to Tokenizer.decode() of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.strip_space = not tokenizer.bytelevel  # SentencePiece marks the start of a text with a space

    def push(self, ids: Iterable[int]) -> str:
        """The text that ids complete. The bytes of an unfinished character wait for the next call."""
        data = b"".join(map(self.tokenizer.token_bytes, ids))
        if self.strip_space and data:
            data, self.strip_space = data.removeprefix(b" "), False
        return self.utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self.utf8.decode(b"", final=True)
