"""What the tiny models are trained on: a tokenizer for the corpus, and batches of scenes with their questions.

Knows the corpus (scripts/tasks/scenes.py) and how turns are packed into samples. Does not know models or losses.

Letters: B scenes a batch, L tokens a sample, N visual tokens an image.
"""

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from scripts.tasks.scenes import CAPTION_PROMPTS, OPEN_INSTRUCTION, SIZES, Scene, make_scene
from scripts.tiny.family import SPLIT, SYSTEM, Cell, Family, Size

VOCABULARY = 800  # without the special tokens: enough for every word of the corpus to be one token
CONVERSATION_SHARE = 0.15  # of samples whose turns see one another; in the others each turn sees the image only
LINE_STARTS = ["(A", "(B", "(C", "(D", "Answer"]  # first tokens of the lines of a multiple-choice question


def train_tokenizer(family: Family, n_scenes: int = 6000) -> Tokenizer:
    """Byte-level BPE over the corpus, with Qwen's normalizer, splitting and decoding, finished as the family has it."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(**byte_level)]
    )
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    tokenizer.decoder = decoders.ByteLevel(**byte_level)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(n_scenes), trainer)
    return family.finish_tokenizer(tokenizer)


def corpus(n_scenes: int):
    """Texts as a conversation holds them: the tokenizer sees the line breaks around roles too."""
    yield f"system\n{SYSTEM}"
    for seed in range(n_scenes):
        scene = make_scene(seed)
        for prompt, reply, _ in asked_about(scene, Random(seed)):
            yield f"user\n{prompt}"
            yield f"assistant\n{reply}"
            yield reply


def asked_about(scene: Scene, rng: Random) -> list[tuple[str, str, str]]:
    """All (prompt, reply, content of the answer) of a scene in random order, of the long ones one, among the first.

    A tenth of the open questions has a benchmark's instruction behind it.
    """
    asked = []
    for question in scene.questions:
        instructed = not question.options and rng.random() < 0.1
        asked.append((question.prompt + f"\n{OPEN_INSTRUCTION}" * instructed, question.reply, question.answer))
    rng.shuffle(asked)
    question = rng.choice(scene.long_questions)
    prompt = rng.choice(CAPTION_PROMPTS) if question.kind == "describe" else question.text
    asked.insert(rng.randint(0, 2), (prompt, question.answer, question.answer))
    return asked


@dataclass
class Batch:
    """Scenes of one size. `turn` is 0 for the prefix with the image, else says which tokens see one another."""

    pixels: Tensor  # [B, ...] uint8, as the family cuts pictures up
    tokens: Tensor  # [B, L]
    labels: Tensor  # [B, L] the token that comes next where a reply is learned, else -100
    weight: Tensor  # [B, L] of each label in the loss
    thoughts: Tensor  # [B, L, 3] see Sampler.thoughts, -100 where there are none
    names: Tensor  # [B, N, 4] words for what a visual token shows (red, circle, top, left), -100 where there are none
    turn: Tensor  # [B, L]
    rope_pos: Tensor  # [3, B, L] time, height, width; [1, B, L] in families with plain positions
    size: Size  # of the pictures


class Sampler:
    """Batch number -> Batch: a pure function, so that a resumed training sees what an uninterrupted one would."""

    def __init__(
        self,
        family: Family,
        tokenizer: Tokenizer,
        first_seed: int,
        training: bool,
        size: int,
    ):
        self.family = family
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}  # most questions come again and again
        self.first_seed = first_seed
        self.training = training  # with some samples whose turns see one another
        self.size = size  # scenes a batch

    def __getitem__(self, index: int) -> Batch:
        seeds = batch_seeds(self.first_seed, index, self.size)
        scenes = [make_scene(seed) for seed in seeds]
        size = scenes[0].image.size
        samples = [self.sample(scene, Random(f"turns {seed}")) for scene, seed in zip(scenes, seeds)]
        tokens, labels, weight, thoughts, turn, rope_pos = (
            torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples)
        )
        pixels = torch.from_numpy(np.stack([self.family.pixels(scene.image) for scene in scenes]))
        cells = self.family.cells(size)
        names = torch.tensor([[self.name_cell(scene, cell) for cell in cells] for scene in scenes])
        return Batch(pixels, tokens, labels, weight, thoughts, names, turn, rope_pos.movedim(2, 0), size)

    def sample(self, scene: Scene, rng: Random):
        """Packs the caption and questions in random order behind one image, as many as fit into L tokens."""
        prefix, rope_pos = self.family.image_prefix(self.tokenizer, scene.image.size)
        asked = asked_about(scene, rng)
        conversation = self.training and rng.random() < CONVERSATION_SHARE
        tokens, labels, turn = list(prefix), [-100] * len(prefix), [0] * len(prefix)
        weight, thoughts, positions = [0.0] * len(prefix), [[-100] * 3] * len(prefix), []
        for prompt, reply, content in asked:
            question, answer = self.turn_tokens(prompt, reply, opens=not (conversation and positions))
            if len(tokens) + len(question) + len(answer) > self.family.sample_tokens:
                continue
            n = len(question) + len(answer)
            labels += [-100] * (len(question) - 1) + answer + [-100]
            weight += [reply_weight(reply, len(answer))] * n
            thoughts += self.thoughts(question, reply, content, len(thoughts)) + [[-100] * 3] * len(answer)
            tokens += question + answer
            turn += [1 if conversation else turn[-1] + 1] * n
            start = len(positions) if conversation else 0
            positions += range(start, start + n)
        padding = self.family.sample_tokens - len(tokens)
        tokens += [self.tokenizer.token_to_id(self.family.pad_token)] * padding
        labels += [-100] * padding
        weight += [0.0] * padding
        thoughts += [[-100] * 3] * padding
        turn += [turn[-1] + 1] * padding
        positions += [0] * padding
        text_pos = rope_pos[-1, 0] + 1 + np.array(positions)
        rope_pos = np.concatenate([rope_pos, np.repeat(text_pos[:, None], rope_pos.shape[1], axis=1)])
        weight = np.array(weight, np.float32)
        return np.array(tokens), np.array(labels), weight, np.array(thoughts), np.array(turn), rope_pos

    def thoughts(self, question: list[int], reply: str, content: str, start: int) -> list[list[int]]:
        """What the tokens of a multiple-choice question, the first of them at `start`, should have in mind.

        Two tokens to know in front of the decoder's last two layers: at the end of an option its letter, at the end of
        the question the content of the answer. And a place to look at from there, in the layer that follows: the end
        of the option with that content. Left alone, the choice is still a guess when all open questions are learned.
        """
        thoughts = [[-100] * 3 for _ in question]
        marks = [question.index(mark) for mark in map(self.encode_one, LINE_STARTS) if mark in question]
        for letter, end in zip("ABCD", marks[1:]):
            thoughts[end - 2][0] = self.encode_one(letter)
            if letter == reply:
                known = [token for token in self.encode(f" {content}") if token != self.encode_one(" ")][:2]
                thoughts[-1] = known + [-100] * (2 - len(known)) + [start + end - 2]
        return thoughts

    def encode_one(self, text: str) -> int:
        """The id of a text that is one token. Raises ValueError if it is not."""
        (token,) = self.encode(text)
        return token

    def name_cell(self, scene: Scene, cell: Cell | None) -> list[int]:
        """Tokens of the words for the region that covers most of a visual row's cell, a fifth of it at least."""
        if cell is None:
            return [-100] * 4
        areas = [(overlap(box, cell), words) for box, words in scene.regions]
        area, words = max(areas, key=lambda entry: entry[0])
        names = [token for word in words for token in self.encode(word)] if area > overlap(cell, cell) / 5 else []
        return names + [-100] * (4 - len(names))

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def turn_tokens(self, prompt: str, reply: str, opens: bool) -> tuple[list[int], list[int]]:
        """Token ids of a question with its markup, and of the reply with its end token."""
        before = "" if opens else self.family.before_turn
        question = f"{before}{prompt}{self.family.after_question}"
        return self.encode(question), self.encode(f"{reply}{self.family.end_of_turn}")


def reply_weight(reply: str, n_tokens: int) -> float:
    """Weight of each token of a reply: a caption must not drown the answers, and letters are what is learned last."""
    return (2.0 if reply in {*"ABCD"} else 1.0) * n_tokens**-0.5


def overlap(a: tuple, b: tuple) -> float:
    """Area that two boxes (left, top, right, bottom) share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def batch_seeds(first_seed: int, index: int, size: int) -> range:
    """Seeds of a batch's `size` scenes: equal modulo the number of sizes, and therefore of one size."""
    first = first_seed + index // len(SIZES) * size * len(SIZES) + index % len(SIZES)
    return range(first, first + size * len(SIZES), len(SIZES))
