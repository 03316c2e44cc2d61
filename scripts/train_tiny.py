"""Trains the tiny vision-language models that come with the repository, from scratch, on a CPU.

Knows the corpus (scenes.py), the losses, the training loop and how models are examined. Does not know the families'
architectures (tiny_families.py) nor the repository's own model: it trains and examines with `transformers` and hands
the result to convert_hf_checkpoint.py.

    python scripts/train_tiny.py --out_dir OUT                # Qwen2.5-VL: train both, examine, convert, ship
    python scripts/train_tiny.py --out_dir OUT --family llava_onevision    # begins with the decoder of the Qwen draft
    python scripts/train_tiny.py --out_dir OUT --family llama3_2_vision    # in checkpoints/, and so does this one
    python scripts/train_tiny.py --out_dir OUT --model draft  # only one of a pair
    python scripts/train_tiny.py --out_dir OUT --evaluate     # examine what OUT holds already
    torchrun --standalone --nproc_per_node=2 scripts/train_tiny.py --threads 1 --out_dir OUT     # on two cores

What makes minutes on a CPU enough are three auxiliary losses that leave no trace in the checkpoint: visual rows must
name what they show (naming_loss), and in multiple-choice questions the middle of the decoder must know the answer's
content and look at the option that holds it (thought_loss).

Letters: B scenes a batch, L tokens a sample, N visual rows an image, D width.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.data
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts.tasks.scenes import (
    CAPTION_PROMPTS,
    HELD_OUT_SEED,
    OPEN_INSTRUCTION,
    SIZES,
    VALIDATION_SEED,
    Scene,
    held_out_questions,
    make_scene,
)
from scripts.tiny_families import (
    FAMILIES,
    SPLIT,
    SYSTEM,
    Cell,
    Family,
    Recipe,
    Size,
    digest,
    start_decoder,
    write_json,
)

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY = 800  # without the special tokens: enough for every word of the corpus to be one token
BATCH = 32  # scenes a step
NAMING_WEIGHT, THOUGHT_WEIGHT = 0.5, 0.5  # of naming_loss and thought_loss in the loss
REPORT_STEPS = 250
CONVERSATION_SHARE = 0.15  # of samples whose turns see one another; in the others each turn sees the image only
LINE_STARTS = ["(A", "(B", "(C", "(D", "Answer"]  # first tokens of the lines of a multiple-choice question


# ---- tokenizer -----------------------------------------------------------------------------------------------------


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
    """All (prompt, reply, content of the answer) of a scene in random order.

    A tenth of the open questions has a benchmark's instruction behind it.
    """
    asked = [(rng.choice(CAPTION_PROMPTS), scene.caption, scene.caption)]
    for question in scene.questions:
        instructed = not question.options and rng.random() < 0.1
        asked.append((question.prompt + f"\n{OPEN_INSTRUCTION}" * instructed, question.reply, question.answer))
    rng.shuffle(asked)
    return asked


# ---- samples -------------------------------------------------------------------------------------------------------


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


class Sampler(torch.utils.data.Dataset):
    """Batch number -> Batch: a pure function, so that a resumed training sees what an uninterrupted one would."""

    def __init__(
        self,
        family: Family,
        tokenizer: Tokenizer,
        first_seed: int,
        n_batches: int,
        training: bool,
        part: slice = slice(None),
    ):
        self.family = family
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}  # most questions come again and again
        self.first_seed = first_seed
        self.n_batches = n_batches
        self.training = training  # with some samples whose turns see one another
        self.part = part  # of each batch's scenes

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, index: int) -> Batch:
        seeds = batch_seeds(self.first_seed, index)[self.part]
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


def batch_seeds(first_seed: int, index: int) -> range:
    """Seeds of a batch's scenes: equal modulo the number of sizes, and therefore of one size."""
    first = first_seed + index // len(SIZES) * BATCH * len(SIZES) + index % len(SIZES)
    return range(first, first + BATCH * len(SIZES), len(SIZES))


def reply_logits(family: Family, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, vocabulary] of the n tokens that a batch's labels name.

    Also the visual rows [B, N, D] and the states [B, L, D] in front of the decoder's last two layers.
    """
    rows = family.encode(model, batch.pixels, batch.size)
    seen = (batch.turn[:, None, :] == 0) | (batch.turn[:, None, :] == batch.turn[:, :, None])  # [B, L, L]
    seen = seen.tril()[:, None]
    mask = torch.zeros(seen.shape, dtype=rows.dtype).masked_fill(~seen, float("-inf"))
    output = family.decode(model, batch.tokens, rows, mask, batch.rope_pos)
    return model.lm_head(output.last_hidden_state[batch.labels >= 0]), rows, output.hidden_states[-3]


# ---- training ------------------------------------------------------------------------------------------------------


def naming_loss(model: torch.nn.Module, rows: Tensor, names: Tensor) -> Tensor:
    """Asks each visual row for the words of what it shows, through the output layer, before the decoder sees it.

    Without it the encoder learns colours at once, but for tens of minutes neither shapes nor letters.
    """
    named = names[..., 0] >= 0
    return F.cross_entropy(name_logits(model, rows[named]).float().repeat_interleave(4, 0), names[named].flatten())


def thought_loss(model: torch.nn.Module, states: Tensor, thoughts: Tensor) -> Tensor:
    """Asks states [B, L, D] for what they should know, and the first head of the next layer where it looks."""
    decoder = model.model.language_model
    knows, looks = thoughts[..., 0] >= 0, thoughts[..., 2] >= 0
    logits = model.lm_head(decoder.norm(states[knows])).float().repeat_interleave(2, 0)
    scores = decoder.layers[-2].self_attn.scores[:, 0][looks].float()  # [n, L]
    return F.cross_entropy(logits, thoughts[knows][:, :2].flatten()) + F.cross_entropy(scores, thoughts[looks][:, 2])


def name_logits(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Logits [n, vocabulary] of n visual rows taken for the decoder's output."""
    return model.lm_head(F.rms_norm(rows, rows.shape[-1:]))


class Trainer:
    """bfloat16 weights for the arithmetic, float32 copies for the optimizers: Muon for matrices, AdamW for the rest."""

    def __init__(self, family: Family, model: torch.nn.Module, recipe: Recipe, started: set[str] = frozenset()):
        self.family = family
        self.started = started  # names of weights that come from a trained model
        self.model = model.bfloat16()
        self.weights = dict(model.named_parameters())
        self.masters = {name: weight.detach().float().requires_grad_() for name, weight in self.weights.items()}
        matrices = [n for n, w in self.weights.items() if w.ndim == 2 and "embed" not in n]
        rest = [w for n, w in self.masters.items() if n not in matrices]
        shared = {"lr": recipe.learning_rate, "weight_decay": 0.01}
        self.optimizers = [
            torch.optim.AdamW(rest, betas=(0.9, 0.98), **shared),
            torch.optim.Muon([self.masters[n] for n in matrices], adjust_lr_fn="match_rms_adamw", **shared),
        ]
        self.recipe = recipe
        self.steps = 0
        self.log: list[dict] = []

    def step(self, batch: Batch, fraction: float) -> float:
        """One update at `fraction` of the peak learning rate. Returns the loss."""
        loss = self.loss(batch)
        loss.backward()
        still = self.started if self.steps < self.recipe.naming_steps else ()
        learning = [name for name, weight in self.weights.items() if weight.grad is not None and name not in still]
        gradients = average([self.weights[name].grad.float() for name in learning])
        for name, gradient in zip(learning, gradients):
            self.masters[name].grad = gradient
        self.model.zero_grad()
        torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = fraction * self.recipe.learning_rate
            optimizer.step()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.masters[name])
        self.steps += 1
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """First the encoder alone learns to name what it sees, then all of the model to answer too."""
        if self.steps < self.recipe.naming_steps:
            rows = self.family.encode(self.model, batch.pixels, batch.size)
            return naming_loss(self.model, rows, batch.names)
        logits, rows, states = reply_logits(self.family, self.model, batch)
        known = batch.labels >= 0
        losses = F.cross_entropy(logits.float(), batch.labels[known], reduction="none")
        reply_loss = (losses * batch.weight[known]).sum() / batch.weight[known].sum()
        naming = naming_loss(self.model, rows, batch.names)
        return reply_loss + NAMING_WEIGHT * naming + THOUGHT_WEIGHT * thought_loss(self.model, states, batch.thoughts)

    def save(self, path: Path):
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"steps": self.steps, "log": self.log, "masters": self.masters, "optimizers": optimizers}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)  # a crash in between loses nothing

    def load(self, path: Path):
        """Goes on where save() stopped."""
        state = torch.load(path, weights_only=True)
        self.steps, self.log = state["steps"], state["log"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.masters[name].copy_(state["masters"][name])
                weight.copy_(self.masters[name])


def processes() -> tuple[int, int]:
    """This process's number and how many there are: more than one under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(tensors: list[Tensor]) -> list[Tensor]:
    """Means over the processes of a torchrun; the tensors themselves without one."""
    if not dist.is_initialized():
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]


def schedule(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: 200 steps of warmup, constant, a linear descent over the last 30 %."""
    return min(1.0, (step + 1) / 200, (steps - step) / (0.3 * steps))


@torch.no_grad()
def validate(family: Family, model: torch.nn.Module, tokenizer: Tokenizer, n_batches: int = 8) -> dict[str, float]:
    """Share of replies to validation scenes that are right in every token, and of visual rows named rightly."""
    sampler = Sampler(family, tokenizer, VALIDATION_SEED, n_batches, training=False)
    right = defaultdict(list)
    for index in range(n_batches):
        batch = sampler[index]
        known = batch.labels >= 0
        hit = torch.ones_like(known)
        logits, rows, _ = reply_logits(family, model, batch)
        hit[known] = logits.argmax(-1) == batch.labels[known]
        named = batch.names[..., 0] >= 0
        names, guesses = batch.names[named], name_logits(model, rows[named]).topk(4).indices
        found = (names[:, :, None] == guesses[:, None]).any(-1) | (names < 0)
        right["naming"] += found.all(-1).tolist()
        for row, turn in {(row, batch.turn[row, column].item()) for row, column in known.nonzero().tolist()}:
            here = batch.turn[row] == turn
            n = (known[row] & here).sum().item()
            right["caption" if n > 12 else "answer"].append(hit[row, here].all().item())
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def train(family: Family, recipe: Recipe, tokenizer: Tokenizer, work_dir: Path, start_dir: Path | None) -> Trainer:
    """Trains one model to the end of its recipe, from where work_dir/training.pt stands if it does.

    start_dir: the converted checkpoint whose decoder is the beginning.
    """
    torch.manual_seed(0)
    model = family.build(tokenizer, recipe.shape)
    started = start_decoder(model, tokenizer, start_dir) if start_dir else set()
    check_forward(family, model, tokenizer)
    trainer = Trainer(family, model, recipe, started)
    if (work_dir / "training.pt").exists():
        trainer.load(work_dir / "training.pt")
    minutes = trainer.log[-1]["minutes"] if trainer.log else 0.0
    began, losses = time.time(), []
    rank, n_processes = processes()
    sampler = Sampler(family, tokenizer, 0, recipe.steps, True, slice(rank, None, n_processes))
    rest = torch.utils.data.Subset(sampler, range(trainer.steps, recipe.steps))
    for batch in torch.utils.data.DataLoader(rest, batch_size=None, num_workers=1, prefetch_factor=4):
        losses.append(trainer.step(batch, schedule(trainer.steps, recipe.steps)))
        if rank == 0 and (trainer.steps % REPORT_STEPS == 0 or trainer.steps == recipe.steps):
            entry = {"step": trainer.steps, "minutes": minutes + (time.time() - began) / 60}
            entry |= {"loss": sum(losses) / len(losses)} | validate(family, model, tokenizer)
            trainer.log.append({key: round(value, 4) for key, value in entry.items()})
            print(json.dumps(trainer.log[-1]), flush=True)
            trainer.save(work_dir / "training.pt")
            losses.clear()
    return trainer


@torch.no_grad()
def check_forward(family: Family, model: torch.nn.Module, tokenizer: Tokenizer):
    """The forward pass used here gives the logits of transformers' own: one scene of each size, turn by turn.

    `model` has float32 weights. Raises AssertionError.
    """
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("sdpa")
    sampler = Sampler(family, tokenizer, VALIDATION_SEED, len(SIZES), training=False)
    processor = family.processor_class(**family.preprocessing)
    image_token = tokenizer.token_to_id(family.image_token)
    for size in range(len(SIZES)):
        batch = sampler[size]
        image = make_scene(sampler.first_seed + size).image
        tokens, labels, turn = batch.tokens[0], batch.labels[0], batch.turn[0]
        expected = []
        for number in turn[labels >= 0].unique():
            seen = (turn == 0) | (turn == number)
            ids = tokens[None, seen]
            inputs = family.stock_inputs(processor, image, ids == image_token)
            expected.append(stock(input_ids=ids, **inputs).logits[0, labels[seen] >= 0])
        expected = torch.cat(expected)
        logits, _, _ = reply_logits(family, model, batch)
        torch.testing.assert_close(logits[: len(expected)], expected, atol=1e-4, rtol=1e-4)


# ---- examination ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(family: Family, hub_dir: Path, n_questions: int) -> dict[str, dict]:
    """Exact match of greedy answers to held-out questions, from the files in hub_dir, by transformers alone.

    Returns kind -> {"right", "asked"}; "total", "open" and "multiple choice" are kinds too.
    """
    model = family.load(hub_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub_dir)
    processor = family.processor_class.from_pretrained(hub_dir)
    score = defaultdict(lambda: {"right": 0, "asked": 0})
    for scene, question in held_out_questions(n_questions):
        reply = answer(family, model, tokenizer, processor, scene.image, question.prompt)
        for kind in ("total", question.kind, "multiple choice" if question.options else "open"):
            score[kind]["asked"] += 1
            score[kind]["right"] += reply == question.reply
    return dict(score)


def answer(
    family: Family, model, tokenizer, processor, image: Image.Image, prompt: str, max_new_tokens: int = 48
) -> str:
    """The model's greedy reply to one prompt about one image."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace(family.image_token, family.image_token * family.n_image_tokens(image.size))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    inputs = family.stock_inputs(processor, image, ids == tokenizer.convert_tokens_to_ids(family.image_token))
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


# ---- shipping ------------------------------------------------------------------------------------------------------

EXAMPLES = {  # held-out scenes: file name -> seed
    "star-and-two-circles": HELD_OUT_SEED + 17,
    "four-shapes": HELD_OUT_SEED + 33,
    "eagle-75": HELD_OUT_SEED + 11,
    "bird-lamp": HELD_OUT_SEED + 13,
    "three-bars": HELD_OUT_SEED + 6,
    "four-bars": HELD_OUT_SEED + 24,
}


def report(family: Family, hub_dir: Path, n_questions: int) -> dict:
    """Examines a model, prints a line a kind of question, returns kind -> {"asked", "exact_match"}."""
    score = examine(family, hub_dir, n_questions)
    held_out = {
        kind: {"asked": n["asked"], "exact_match": round(n["right"] / n["asked"], 3)} for kind, n in score.items()
    }
    for kind, n in sorted(held_out.items()):
        print(f"{hub_dir.parent.name:24} {kind:16} {n['exact_match']:6.1%} of {n['asked']}")
    return held_out


def summarize(trainer: Trainer) -> dict:
    """What is worth knowing about a training, for log.json and training.json."""
    last = trainer.log[-1]
    return {
        "parameters": sum(weight.numel() for weight in trainer.weights.values()),
        "steps": trainer.steps,
        "scenes": trainer.steps * BATCH,
        "minutes": round(last["minutes"], 1),
        "processes": processes()[1],
        "threads_a_process": torch.get_num_threads(),
        "final_loss": last["loss"],
        "versions": {module.__name__: str(module.__version__) for module in (torch, transformers, PIL)},
    }


def ship(work_dir: Path, destination: Path):
    """Converts the files in the hub's layout and copies what generate.py reads, with a summary, into the repository."""
    converter = REPOSITORY / "scripts" / "convert_hf_checkpoint.py"
    subprocess.run([sys.executable, converter, "--checkpoint_dir", work_dir / "hub"], check=True)
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("model.pth", "params.json", "tokenizer.model"):
        shutil.copyfile(work_dir / "hub" / name, destination / name)
    summary = json.loads((work_dir / "log.json").read_text())
    del summary["log"]
    write_json(destination / "training.json", summary)


def ship_scenes(destination: Path):
    """Six held-out scenes, two of each kind, as files that users can ask about."""
    destination.mkdir(parents=True, exist_ok=True)
    for name, seed in EXAMPLES.items():
        make_scene(seed).image.save(destination / f"{name}.png", optimize=True)


# ---- command line --------------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    family = FAMILIES[args.family]
    for name in family.recipes if args.model == "both" else [args.model]:
        work_dir = args.out_dir / f"{args.family}-{name}"
        if not args.evaluate:
            make(family, name, work_dir)
        if processes()[0] > 0:
            continue
        log = json.loads((work_dir / "log.json").read_text())
        write_json(work_dir / "log.json", log | {"held_out": report(family, work_dir / "hub", args.num_questions)})
        if not args.evaluate:
            ship(work_dir, REPOSITORY / "checkpoints" / (family.ship_name + "-draft" * (name == "draft")))
    if not args.evaluate and processes()[0] == 0:
        ship_scenes(REPOSITORY / "checkpoints" / "scenes")


def make(family: Family, name: str, work_dir: Path):
    """Trains one model; work_dir/hub then holds its files and work_dir/log.json its history."""
    work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(family)
    recipe = family.recipes[name]
    start_dir = REPOSITORY / "checkpoints" / recipe.decoder if recipe.decoder else None
    trainer = train(family, recipe, tokenizer, work_dir, start_dir)
    if processes()[0] == 0:
        family.save(trainer.model, tokenizer, work_dir / "hub")
        start = {"decoder_from": start_dir.name, "its_sha256": digest(start_dir)} if start_dir else {}
        write_json(work_dir / "log.json", summarize(trainer) | start | {"log": trainer.log})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_dir", type=Path, required=True, help="hub-layout files, logs and training states")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    parser.add_argument("--model", choices=["target", "draft", "both"], default="both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--evaluate", action="store_true", help="examine the models in out_dir, train nothing")
    parser.add_argument("--num_questions", type=int, default=500)
    return parser.parse_args()


if __name__ == "__main__":
    main()
