"""Text to token ids and back; conversations through the checkpoint's own chat template.

Knows SentencePiece files, the byte-level BPE vocabularies that scripts/hf_tokenizer.py stores in them, added tokens,
Jinja chat templates and stop tokens. Knows nothing of tensors, images (each is one token here) or command lines.
"""

import codecs
import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache, cached_property, partial
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn
from unicodedata import category, normalize

import sentencepiece

MOST_TOKENS = 2**22
FORMAT = 2  # of the "tokenizer" entry of params.json
REQUEST_TYPES: dict[str, Any] = dict(messages=list, prompt=(str, int), images=list, raw=bool, system=str)
REQUEST_TYPES |= dict(max_new_tokens=int, date_string=str)  # what --requests may say
IMAGE_KEYS = ("path", "image", "min_pixels", "max_pixels", "resized_height", "resized_width")  # of an image part
# What a chat template may take of the processor and, where the system can say so, of memory; and what it may write.
TEMPLATE_SECONDS, TEMPLATE_BYTES, TEMPLATE_CHARACTERS = 0.5, 2**28, 10_000_000
ONE_AT_A_TIME = threading.RLock()  # the memory is limited for the whole process
MAX_RENDERED = 7_000  # messages to find out which replies are unchanged: about half a second
LARGE = 2**4000  # an integer that a template does not multiply
PROBE, PRIVATE_USE = chr(0xF0000), range(0xF0001, 0xFFFFE)  # code points without a meaning
NO_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec.add_dummy_prefix = false: in a protobuf the last word counts
WORD = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"}  # categories of \w, in Rust's regex crate


def byte_alphabet() -> str:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(spare)) for byte in range(256))


ALPHABET = byte_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


def split_pattern(max_digits: int) -> re.Pattern:
    r"""The pattern that Qwen (max_digits 1) and Llama-3 (3) publish in tokenizer.json, in terms of `re`:

    (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+

    Their \s is Unicode's White_Space, to which Python's adds U+001C..U+001F; their ' s is not ' and a long s (U+017F).
    \w is \p{L}, \p{N} and "_", and \d is not all of \p{N}: fractions, Roman numerals, circled digits are told from
    letters here. None is beyond U+1FFFF; str.isnumeric() is also true of some ideographs, which are letters.
    """
    characters = map(chr, range(0x20000))
    other = "".join(c for c in characters if c.isnumeric() and not c.isdecimal() and not c.isalpha())
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


class AddedTokens:
    """Finds added tokens by their names in a text, as the `tokenizers` package does (its AddedVocabulary)."""

    def __init__(self, ids: dict[str, int], flags: dict[str, list[str]], normalize: Callable[[str], str] = str):
        """flags: of a name, those of single_word, lstrip and rstrip that are set; normalize: what the texts went by."""
        self.ids = {normalize(name): token for name, token in ids.items()}
        self.flags = {normalize(name): flags.get(name, ()) for name in ids}
        self.pattern = re.compile("|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or r"(?!)")

    def split(self, text: str, ignored: frozenset[int] = frozenset()) -> list[str | int]:
        """Ids of the tokens, and the text between them. The names of ignored ids are text."""
        parts: list[str | int] = []
        end = 0
        for match in self.pattern.finditer(text):
            (start, stop), token, flags = match.span(), self.ids[match[0]], self.flags[match[0]]
            inside = "single_word" in flags and WORD & {*map(category, text[start - 1 : start] + text[stop : stop + 1])}
            if token in ignored or inside:
                continue
            if "lstrip" in flags:
                start = max(end, len(text[:start].rstrip()))
            if "rstrip" in flags:
                stop = len(text) - len(text[stop:].lstrip())
            parts += [text[end:start], token]
            end = stop
        return [part for part in (*parts, text[end:]) if part != ""]


@cache
def template_environment():
    """Jinja as chat templates expect it (transformers' apply_chat_template), in a sandbox."""
    from jinja2 import TemplateError, pass_context, sandbox

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))  # one such operation could take hours, or all of the memory

        def unsafe_undefined(self, obj, attribute):
            raise sandbox.SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")

        def call_binop(self, context, operator, left, right):
            pairs = ((left, right), (right, left))
            repeated = [len(a) * b for a, b in pairs if isinstance(a, str | list | tuple) and isinstance(b, int)]
            large = any(isinstance(a, int) and abs(a) > LARGE for a in (left, right))
            if operator == "**" or large or max(repeated, default=0) > TEMPLATE_CHARACTERS:
                raise sandbox.SecurityError(f"it computes with {operator} what may be too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in ("selectattr", "rejectattr"):  # of a Content without text they would not look at the parts
        of_parts = lambda select, context, value, *test: select(context, [*value], *test)
        environment.filters[name] = pass_context(partial(of_parts, environment.filters[name]))
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return environment


@contextmanager
def bounded() -> Iterator[None]:
    """What is run here may take TEMPLATE_SECONDS of the processor, and on Linux TEMPLATE_BYTES of memory.

    Raises TimeoutError, or MemoryError from where the memory was asked for.
    """
    deadline, tracer = time.thread_time() + TEMPLATE_SECONDS, sys.gettrace()

    def watch(frame, event, argument):  # called for every line of Python, so for every one of a template's code
        if time.thread_time() > deadline:
            raise TimeoutError(f"it runs for more than {TEMPLATE_SECONDS} seconds")
        return watch

    with ONE_AT_A_TIME:
        restore = limit_memory(TEMPLATE_BYTES)
        try:
            sys.settrace(watch)
            yield
        finally:
            sys.settrace(tracer)
            restore()


def limit_memory(n_bytes: int) -> Callable[[], None]:
    """Let this process have so many bytes more than now, where it can be limited; the function ends the limit."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + n_bytes
        if before[0] == resource.RLIM_INFINITY or most < before[0]:
            resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    except (ImportError, OSError, ValueError):
        return lambda: None
    return lambda: resource.setrlimit(resource.RLIMIT_AS, before)


class Refusal(ValueError):
    """A template raised an error: it cannot write this conversation."""


class Content(str):
    """Text that is also a list of its parts to a template that loops over them: some take texts, some parts."""

    parts: list[dict]

    def __new__(cls, parts: list[dict]) -> "Content":
        content = super().__new__(cls, "".join(part["text"] for part in parts))
        content.parts = parts
        return content

    def __iter__(self):
        return iter(self.parts)


class ChatTemplate:
    """A checkpoint's own Jinja template: messages in the hub's format -> the text that the model was trained on."""

    def __init__(self, source: str, variables: dict[str, str], image: Sequence[str] | None):
        """image: the image token, between what stands in front of it and behind it. ValueError if it does not parse."""
        self.variables = {"tools": None, "documents": None, "add_generation_prompt": True, **variables}
        self.image = None if image is None or image[1] in source else "".join(image)  # for a template of texts alone
        # {% generation %} marks an assistant's text for training, and prints it.
        self.source = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", source)
        self.source = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", self.source)
        try:
            environment = template_environment()  # the first one imports Jinja
            with bounded():
                self.template = environment.from_string(self.source)
        except Exception as error:  # mostly jinja2.TemplateSyntaxError; Python's compiler has limits of its own
            raise ValueError(f"the chat template does not parse: {str(error) or type(error).__name__}") from error
        # What it writes around messages: three of one character, without which it is a template of its own kind.
        messages = [{"role": role, "content": text_part(PROBE)} for role in ("user", "assistant", "user")]
        self.around = ["", "", "", ""]
        with suppress(Refusal):
            self.around = [*self.render(messages, add_generation_prompt=False).split(PROBE), *self.around]

    def render(self, messages: list[dict], **variables: Any) -> str:
        """The text of messages whose content is a list of {"type": "text", "text": ...} and {"type": "image"}.

        Raises ValueError where the sandbox stops the template, or it has no end: Refusal where it raises an error.
        """
        from jinja2.sandbox import SecurityError

        messages = [message | {"content": self.form(message["content"])} for message in messages]
        text = StringIO()
        try:
            with bounded():
                for piece in self.template.generate(messages=messages, **self.variables | variables):
                    if text.write(piece) and text.tell() > TEMPLATE_CHARACTERS:
                        raise MemoryError(f"it writes more than {TEMPLATE_CHARACTERS} characters")
        except (SecurityError, TimeoutError, MemoryError) as error:
            raise ValueError(f"the chat template cannot be used: {str(error) or 'it takes too much memory'}") from error
        except Exception as error:  # raise_exception, and whatever the template's expressions raise
            raise Refusal(f"the chat template refuses this conversation: {error}") from error
        return text.getvalue()

    def form(self, parts: list[dict]) -> list[dict] | Content:
        """The content as the template takes it: parts where there are images, which a text template gets in front."""
        texts = [part for part in parts if part["type"] == "text"]
        if len(texts) == len(parts):
            return Content(texts)
        return parts if self.image is None else Content(text_part(self.image * (len(parts) - len(texts))) + texts)


def text_part(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


class Tokenizer:
    """tokenizer.model and the "tokenizer" entry of params.json, as scripts/hf_tokenizer.py wrote them.

    settings: format; type ("bytelevel" or "sentencepiece"); nfc, max_digits and ignore_merges (byte-level) or prefix
    (SentencePiece: which texts get a space in front, see _encode_piece); n_tokens; bos_id (None: no BOS); stop_ids;
    special_tokens and added_tokens {name: id}, the latter with a text; token_flags {name: [normalized, single_word,
    lstrip, rstrip]}; chat_template (None: raw prompts only) and its template_variables; image (None, or the image
    token between what stands in front of and behind it in a prompt).
    """

    def __init__(self, model_path: str | Path, settings: dict):
        """Raises OSError where the file is missing, ValueError where it or the settings are of no use."""
        if not Path(model_path).is_file():
            raise FileNotFoundError(f"{model_path} is missing: convert the checkpoint again")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=Path(model_path).read_bytes() + NO_PREFIX)
        except RuntimeError as error:
            raise ValueError(f"{model_path} is not a SentencePiece model: convert the checkpoint again") from error
        if settings.get("format") != FORMAT:
            raise ValueError("params.json is of another version of this program: convert the checkpoint again")
        check_settings(settings)
        self.settings = settings
        self.bytelevel = settings["type"] == "bytelevel"
        self.split = split_pattern(settings["max_digits"]) if self.bytelevel else None
        self.special: dict[str, int] = settings["special_tokens"]
        self.bos_id: int | None = settings["bos_id"]
        self.stop_ids = frozenset(settings["stop_ids"])
        ids, flags = self.special | settings["added_tokens"], settings["token_flags"]
        self.names = {token: name for name, token in ids.items()}
        # As `tokenizers` does: most names are looked for in the text as it is, the others in the normalized rest.
        others = {name: token for name, token in ids.items() if "normalized" in flags.get(name, ())}
        self.normalized = AddedTokens(others, flags, self._normalize)
        self.verbatim = AddedTokens({name: token for name, token in ids.items() if name not in others}, flags)
        self.silent = self.stop_ids & self.names.keys() | {*self.special.values(), self.pieces.unk_id()}  # no text
        self.chat_template: str | None = settings["chat_template"]
        self.image: Sequence[str] | None = settings["image"]
        self.image_id = self.special[self.image[1]] if self.image else None

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises ValueError where there is none, or none of use."""
        if not self.chat_template:
            raise ValueError("this checkpoint has no chat template: use --raw")
        return ChatTemplate(self.chat_template, self.settings["template_variables"], self.image)

    def end_of_turn(self) -> int | None:
        """The token that the chat template, if there is one, writes after an assistant's message."""
        end = self.chat_template and self.verbatim.pattern.match(self.template.around[2].lstrip())
        return self.verbatim.ids[end[0]] if end else None

    @cached_property
    def markup(self) -> re.Pattern:
        """Names that no message may spell: those of special tokens, and what the template writes around messages."""
        written = self.verbatim.split("".join(self.template.around))
        return AddedTokens(self.special | {self.names[i]: i for i in written if isinstance(i, int)}, {}).pattern

    def _guard(self, text: str, mark: str, joined: bool = False) -> str:
        """The text with mark inside the names of markup; and at its end, if what it is joined to could complete one."""
        text = self.markup.sub(lambda name: name[0][0] + mark + name[0][1:], text)
        end = len(text.rstrip()) if joined else 0
        return text[:end] + mark * (end > 0) + text[end:]

    def encode(self, text: str) -> list[int]:
        """Ids of a user's text, without BOS. A special token's name in it is text, an added token's is the token."""
        return self._encode(text, frozenset(self.special.values()))

    def _encode(self, text: str, ignored: frozenset = frozenset(), mark: str = "", start: bool = True) -> list[int]:
        """Ids of a text, which may begin a prompt (start). Names of ignored ids are text; mark is taken out of text."""
        parts: list[str | int] = []
        for part in self.verbatim.split(text, ignored):
            parts += [part] if isinstance(part, int) else self.normalized.split(self._normalize(part), ignored)
        encode = lambda i, text: self._encode_piece(text.replace(mark, ""), start and i == 0)
        return [i for n, part in enumerate(parts) for i in ([part] if isinstance(part, int) else encode(n, part))]

    def _normalize(self, text: str) -> str:
        if self.bytelevel:
            return normalize("NFC", text) if self.settings["nfc"] else text
        return "\u2581" + text.replace(" ", "\u2581") if self.settings["prefix"] == "prepend" else text

    def _encode_piece(self, text: str, start: bool) -> list[int]:
        """Ids of normalized text without added tokens.

        SentencePiece's prefix, a space in front, is "prepend" (of every piece; done before), "always" (where there is
        none), "first" (of these, the piece that begins a prompt) or "never", as tokenizer.json says it.
        """
        if self.split is None:
            prefix = self.settings["prefix"] == "always" or self.settings["prefix"] == "first" and start
            prefix = prefix and not text.startswith((" ", "\u2581"))
            return self.pieces.encode((" " * prefix + text).encode())
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
        in_pieces = 0 <= token < self.pieces.get_piece_size()
        if token in self.silent or not (in_pieces or token in self.names):
            return b""
        piece = self.names.get(token) or self.pieces.id_to_piece(token)
        if self.bytelevel:
            in_alphabet = all(character in BYTE_OF for character in piece)  # an added token's name need not be
            return bytes(BYTE_OF[character] for character in piece) if in_alphabet else piece.encode()
        if in_pieces and self.pieces.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # <0x0A>
        return piece.replace("\u2581", " ").encode()

    def agrees_with(self, other: "Tokenizer") -> bool:
        """Whether ids mean the same text in both: only special tokens and the vocabulary's end may differ."""
        both, silent = (self, other), self.silent | other.silent
        n, end = (min(sizes) for sizes in zip(*((t.pieces.get_piece_size(), t.settings["n_tokens"]) for t in both)))
        ids = [token for token in range(min(n, end)) if token not in silent]
        mine, theirs = ((t.pieces.id_to_piece(ids), [t.names.get(i) for i in range(n, end)]) for t in both)
        return self.settings["type"] == other.settings["type"] and mine == theirs

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
            messages = [read_image_urls(message) for message in request["messages"]]
            return self.encode_chat(messages, request.get("date_string")), find_images(messages)
        prompt, images = request["prompt"], [{"type": "image", "path": path} for path in request.get("images", [])]
        if isinstance(prompt, int):
            if not 0 < prompt < 2**24:
                raise ValueError(f"a prompt of {prompt} tokens cannot be made up")
            words = [i for i in range(self.settings["n_tokens"]) if i not in self.silent]
            made_up = random.Random(0).choices(words, k=prompt)
            return self.encode_raw(images) + made_up, find_images([{"content": images}])
        if request.get("raw"):
            placed = self.image is not None and self.image[1] in prompt
            ids = self.encode_raw(prompt if placed else self.place_images(prompt, images))
            return ids, find_images([{"content": images}])
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        system = [{"role": "system", "content": request["system"]}] if "system" in request else []
        messages = [*system, {"role": "user", "content": self.place_images(prompt, images)}]
        return self.encode_chat(messages, request.get("date_string")), find_images(messages)

    def place_images(self, prompt: str, images: list[dict]) -> list[dict]:
        """A message's parts: images stand where the prompt says <image>, else in front of it.

        For a model without images `<image>` is text. Raises ValueError for unequal numbers.
        """
        texts = prompt.split("<image>")
        if len(texts) == 1 or self.image_id is None:
            return [*images, *text_part(prompt)]
        if len(texts) - 1 != len(images):
            raise ValueError(f"the prompt has {len(texts) - 1} <image> placeholders for {len(images)} images")
        return text_part(texts[0]) + [p for image, text in zip(images, texts[1:]) for p in (image, *text_part(text))]

    def encode_raw(self, content: str | list[dict]) -> list[int]:
        """Ids of a prompt as it is, names of special tokens being those tokens: text, or parts as in encode_chat.

        BOS in front where the model's tokenizer adds it. An image is its token and borders.
        """
        image, parts = "".join(self.image or ()).strip(), self._read({"role": "user", "content": content}, "the prompt")
        text = "".join(part.get("text", image) for part in parts)
        return ([] if self.bos_id is None else [self.bos_id]) + self._encode(text)

    def encode_chat(self, messages: Sequence[dict], date_string: str | None = None) -> list[int]:
        """Ids of a conversation as the checkpoint's chat template writes it, with the header of the next reply.

        messages: {"role": "system" | "user" | "assistant", "content": text or a list of parts}; a part is
        {"type": "text", "text": ...} or {"type": "image", ...}. Nothing in them becomes a special token.
        A reply that the model gave can be put back as [{"type": "tokens", "ids": [...]}], without its stop token: then
        encode_chat(earlier) + ids + the stop token is a prefix of encode_chat(earlier + reply + more), unless the
        template changes the reply (thoughts are left out), or some sixty follow it: its text is put back. ValueError
        where the template refuses.
        """
        if not messages:
            raise ValueError("a conversation needs at least one message")
        contents = [self._read(message, f"message {i + 1}") for i, message in enumerate(messages)]
        known = self.template.source + "".join(part.get("text", "") for parts in contents for part in parts)
        unused = (character for character in map(chr, PRIVATE_USE) if character not in known)
        mark, turns, replies = next(unused), [], {}  # a reply by the character that stands for it
        for message, parts in zip(messages, contents, strict=True):
            if parts and parts[0]["type"] == "tokens":
                place = next(unused)
                replies[place], parts = parts[0]["ids"], text_part(place)
            texts = [text_part(self._guard(part.get("text", ""), mark, part is not parts[-1])) for part in parts]
            content = [part if "text" not in part else text[0] for part, text in zip(parts, texts, strict=True)]
            turns.append({"role": message["role"], "content": content})
        variables = {} if date_string is None else {"date_string": self._guard(date_string, mark)}
        ids: list[int] = []
        for text, reply in self._place_replies(turns, replies, mark, variables):
            if ids and self.verbatim.pattern.match(text.lstrip()):  # a reply ends with its stop token at once
                text = text.lstrip()
            ids += self._encode(text, mark=mark, start=not ids) + reply
        if not ids:
            raise ValueError("the chat template writes nothing of this conversation")
        return ids

    def _place_replies(self, turns: list[dict], replies: dict, mark: str, variables: dict) -> list[tuple[str, list]]:
        """The text in front of each of the replies, with its ids; then the text that is left, with none.

        A reply's ids are put back where the text in front of it is the prompt that it answered, and where the template
        writes the reply's text unchanged, white space apart. To find that out, the messages in front are rendered: of a
        conversation of more than about sixty replies the first are put back as text.
        """
        render, squeeze = lambda turns: self.template.render(turns, **variables), lambda text: "".join(text.split())
        texts = {place: self._guard(self.decode(ids), mark) for place, ids in replies.items()}
        where = {part.get("text"): i for i, turn in enumerate(turns) for part in turn["content"]}

        def in_plain(places: Collection[str]) -> list[dict]:
            """The turns with the text of these replies."""
            filled = {where[place]: turns[where[place]] | {"content": text_part(texts[place])} for place in places}
            return [filled.get(i, turn) for i, turn in enumerate(turns)]

        def is_unchanged(whole: str, places: Collection[str]) -> bool:
            filled = whole
            for place in places:
                filled = filled.replace(place, texts[place])
            return squeeze(filled) == squeeze(render(in_plain(places))) and all(whole.count(p) == 1 for p in places)

        kept = [*replies]
        del kept[: max(len(kept) - MAX_RENDERED // len(turns), 0)]
        turns = in_plain(replies.keys() - kept)
        placed, last, whole = [], None, render(turns)
        rest = lambda text: text.rpartition(last)[2] if last else text
        all_unchanged = bool(kept) and is_unchanged(whole, kept)  # asked once: there may be many
        for place in kept:
            prompt = render(turns[: where[place]])
            answered = whole.partition(place)[0].rstrip() == prompt.rstrip()
            if answered and (all_unchanged or is_unchanged(whole, [place])):
                placed.append((rest(prompt), replies[place]))
                last = place
            else:
                turns = in_plain([place])
                whole = render(turns)
        return [*placed, (rest(whole), [])]

    def _read(self, message: dict, where: str) -> list[dict]:
        """The parts of a message, images without their files; of a reply that is put back, one of type "tokens"."""
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: the role must be system, user or assistant, not {str(role)[:40]!r}")
        parts = text_part(content) if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{where}: the content must be text or a list of parts")
        for part in parts:
            match part:
                case {"type": "image"} if role != "user":
                    raise ValueError(f"{where}: only a user's message can hold an image, not the {role}'s")
                case {"type": "image"} if self.image_id is None:
                    raise ValueError(f"{where}: this model takes no images")
                case {"type": "image", **more} if unknown := [str(key) for key in more if key not in IMAGE_KEYS]:
                    raise ValueError(f"{where}: an image part has no {unknown[0]}, but {', '.join(IMAGE_KEYS)}")
                case {"type": "image"} | {"type": "text", "text": str()} if part["type"] == "image" or len(part) == 2:
                    continue
                case {"type": "tokens", "ids": list(ids)} if role == "assistant" and parts == [part]:
                    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < self.settings["n_tokens"]]:
                        raise ValueError(f"{where}: {str(wrong[0])[:20]} is not the id of a token")
                case _:
                    raise ValueError(f"{where}: a part must be text or an image, not {str(part)[:60]}")
        return [{"type": "image"} if part["type"] == "image" else part for part in parts]


def read_image_urls(message: dict) -> dict:
    """The message with image parts in the place of image_url parts, the form of other programs' requests."""

    def read(part):
        match part:
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url), **more}:
                return {**more, "type": "image", "path": url}
        return part

    match message:
        case {"content": list(parts)}:
            return message | {"content": [*map(read, parts)]}
    return message


def find_images(messages: Sequence[dict]) -> list[dict]:
    """The image parts of messages, in order. Raises ValueError for one that names no file."""
    contents = (message["content"] for message in messages if isinstance(message["content"], list))
    parts = [part for content in contents for part in content if part["type"] == "image"]
    if nameless := [part for part in parts if not isinstance(part.get("path"), str)]:
        raise ValueError(f"an image part has no path: {str(nameless[0])[:60]}")
    return parts


def is_id(value: object, most: int = MOST_TOKENS) -> bool:
    return type(value) is int and 0 <= value < most


def check_settings(settings: dict) -> None:
    """Raises ValueError for settings that are not as Tokenizer describes them."""
    match settings:
        case {"type": "bytelevel", "max_digits": 1 | 3, "nfc": bool(), "ignore_merges": bool()}:
            pass
        case {"type": "sentencepiece", "prefix": "prepend" | "always" | "first" | "never"}:
            pass
        case _:
            raise ValueError("params.json: the tokenizer's type and rules are not known: convert the checkpoint again")
    match settings:
        case {
            "n_tokens": int(n_tokens),
            "bos_id": int() | None as bos_id,
            "stop_ids": list(stop_ids),
            "special_tokens": dict(special),
            "added_tokens": dict(added),
            "token_flags": dict(flags),
            "chat_template": str() | None,
            "template_variables": dict(variables),
            "image": None | [str(), str(), str()] as image,
        }:
            ids = [n_tokens, *stop_ids, *special.values(), *added.values(), *([] if bos_id is None else [bos_id])]
            texts = [*special, *added, *variables.values()]
            right = all(map(is_id, ids)) and all(isinstance(t, str) for t in texts)
            right = right and "" not in special | added and all(isinstance(names, list) for names in flags.values())
            if right and n_tokens > 0 and (image is None or image[1] in special):
                return
    raise ValueError("params.json: the tokenizer's settings are not as they should be: convert the checkpoint again")


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
