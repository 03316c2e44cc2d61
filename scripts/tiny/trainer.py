"""The training of one tiny model: the losses, the loop, and how a training watches itself.

Knows transformers' models through their family. Does not know where weights begin, nor files of checkpoints.

What makes minutes on a CPU enough are three auxiliary losses that leave no trace in the checkpoint: visual tokens must
name what they show (naming_loss), and in multiple-choice questions the middle of the decoder must know the answer's
content and look at the option that holds it (thought_loss).

Letters: B scenes a batch, L tokens a sample, N visual tokens an image, D width.
"""

import copy
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from scripts.tasks.scenes import SIZES, VALIDATION_SEED, make_scene
from scripts.tiny.family import Family, Recipe
from scripts.tiny.samples import Batch, Sampler

NAMING_WEIGHT, THOUGHT_WEIGHT = 0.5, 0.5  # of naming_loss and thought_loss in the loss
REPORT_SECONDS = 180.0  # of CPU time, between validations and saved states

# ---- losses --------------------------------------------------------------------------------------------------------


def reply_logits(family: Family, model: torch.nn.Module, batch: Batch, rows: Tensor, pruned: bool = False):
    """Logits [n, vocabulary] of the n tokens that a batch's labels name, with visual tokens [B, N, D].

    Also the states [B, L, D] in front of the decoder's last two layers. pruned: every other visual token is not seen.
    """
    seen = (batch.turn[:, None, :] == 0) | (batch.turn[:, None, :] == batch.turn[:, :, None])  # [B, L, L]
    seen = seen.tril()
    if pruned:
        rows, seen = family.prune(model, batch, rows, seen)
    mask = torch.zeros(seen.shape, dtype=rows.dtype).masked_fill(~seen, float("-inf"))[:, None]
    output = family.decode(model, batch.tokens, rows, mask, batch.rope_pos)
    return model.lm_head(output.last_hidden_state[batch.labels >= 0]), output.hidden_states[-3]


def naming_loss(model: torch.nn.Module, rows: Tensor, names: Tensor) -> Tensor:
    """Asks each visual token for the words of what it shows, through the output layer, before the decoder sees it.

    Without it the encoder learns colours at once, but for tens of minutes neither shapes nor letters.
    """
    named = names[..., 0] >= 0
    return F.cross_entropy(name_logits(model, rows[named]).repeat_interleave(4, 0), names[named].flatten())


def name_logits(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Logits [n, vocabulary] of n visual tokens taken for the decoder's output."""
    return model.lm_head(F.rms_norm(rows, rows.shape[-1:]))


def thought_loss(model: torch.nn.Module, states: Tensor, thoughts: Tensor) -> Tensor:
    """Asks states [B, L, D] for what they should know, and the first head of the next layer where it looks."""
    decoder = model.model.language_model
    knows, looks = thoughts[..., 0] >= 0, thoughts[..., 2] >= 0
    if not looks.any():
        return states.new_zeros(())
    logits = model.lm_head(decoder.norm(states[knows])).repeat_interleave(2, 0)
    scores = decoder.layers[-2].self_attn.scores[:, 0][looks]  # [n, L]
    return F.cross_entropy(logits, thoughts[knows][:, :2].flatten()) + F.cross_entropy(scores, thoughts[looks][:, 2])


# ---- the optimizer -------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan's) in float32: PyTorch's works in bfloat16, which CPUs without it multiply ten times slower.

    A step is the momentum with its singular values made equal, as large as one of AdamW's (arXiv 2502.16982).
    """

    def __init__(self, weights: list[Tensor], lr: float, weight_decay: float):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in [weight for weight in group["params"] if weight.grad is not None]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 0.05)
                direction = orthogonalize(weight.grad.lerp(momentum, 0.95))  # Nesterov's
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(direction, alpha=0.2 * max(weight.shape) ** 0.5 * group["lr"])


def orthogonalize(matrix: Tensor, n_iterations: int = 4) -> Tensor:
    """Newton-Schulz: singular values of about 1, with Muon's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(n_iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


# ---- the loop ------------------------------------------------------------------------------------------------------


class Trainer:
    """Muon for matrices, AdamW for the rest, in float32."""

    def __init__(self, family: Family, model: torch.nn.Module, recipe: Recipe):
        self.family, self.model, self.recipe = family, model, recipe
        encoder = family.encoder_parameters(model)
        if recipe.frozen_encoder:
            for weight in encoder:
                weight.requires_grad_(False)
        self.encoder = {id(weight) for weight in encoder}
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        matrices = [name for name, weight in weights.items() if weight.ndim == 2 and "embed" not in name]
        shared = {"lr": recipe.learning_rate, "weight_decay": 0.01}
        rest = [weight for name, weight in weights.items() if name not in matrices]
        self.optimizers = [
            torch.optim.AdamW(rest, betas=(0.9, 0.98), **shared),
            Muon([weights[name] for name in matrices], **shared),
        ]
        self.steps = 0
        self.log: list[dict] = []

    def step(self, batch: Batch) -> float:
        """One update. Returns the loss."""
        loss = self.loss(batch)
        loss.backward()
        naming = self.steps < self.recipe.naming_steps
        learning = [w for w in self.model.parameters() if w.grad is not None and (id(w) in self.encoder or not naming)]
        for weight in set(self.model.parameters()) - set(learning):
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule(self.steps, self.recipe) * self.recipe.learning_rate
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """First the encoder alone learns to name what it sees, then all of the model to answer too."""
        recipe = self.recipe
        with torch.set_grad_enabled(not recipe.frozen_encoder):
            rows = self.family.encode(self.model, batch.pixels, batch.size)
        if self.steps < recipe.naming_steps:
            return naming_loss(self.model, rows, batch.names)
        pruned = int((self.steps + 1) * recipe.pruned) > int(self.steps * recipe.pruned)
        logits, states = reply_logits(self.family, self.model, batch, rows, pruned)
        known = batch.labels >= 0
        losses = F.cross_entropy(logits, batch.labels[known], reduction="none")
        loss = (losses * batch.weight[known]).sum() / batch.weight[known].sum()
        if not recipe.frozen_encoder:
            loss = loss + NAMING_WEIGHT * naming_loss(self.model, rows, batch.names)
        return loss + THOUGHT_WEIGHT * thought_loss(self.model, states, batch.thoughts) if recipe.thoughts else loss

    def save(self, path: Path):
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"steps": self.steps, "log": self.log, "model": self.model.state_dict(), "optimizers": optimizers}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)  # a crash in between loses nothing

    def load(self, path: Path):
        """Goes on where save() stopped."""
        state = torch.load(path, weights_only=True)
        self.steps, self.log = state["steps"], state["log"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)


def schedule(step: int, recipe: Recipe) -> float:
    """Fraction of the peak learning rate: warmup, constant, a linear descent over the last 40 %."""
    return min(1.0, (step + 1) / recipe.warmup, (recipe.steps - step) / (0.4 * recipe.steps))


def train(family: Family, recipe: Recipe, tokenizer: Tokenizer, model: torch.nn.Module, work_dir: Path) -> Trainer:
    """Trains a model to the end of its recipe, from where work_dir/training.pt stands if it does."""
    check_forward(family, model, tokenizer)
    trainer = Trainer(family, model, recipe)
    if (work_dir / "training.pt").exists():
        trainer.load(work_dir / "training.pt")
    before = trainer.log[-1]["minutes"] if trainer.log else 0.0
    sampler = Sampler(family, tokenizer, recipe.first_seed, training=True, size=recipe.batch)
    began, reported, losses = time.time(), time.process_time(), []
    while trainer.steps < recipe.steps:
        losses.append(trainer.step(sampler[trainer.steps]))
        if time.process_time() - reported > REPORT_SECONDS or trainer.steps == recipe.steps:
            entry = {"step": trainer.steps, "minutes": before + (time.time() - began) / 60}
            entry |= {"loss": sum(losses) / len(losses)} | validate(family, model, tokenizer)
            trainer.log.append({key: round(value, 4) for key, value in entry.items()})
            print(json.dumps(trainer.log[-1]), flush=True)
            trainer.save(work_dir / "training.pt")
            losses.clear()
            reported = time.process_time()
    return trainer


# ---- watching ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(family: Family, model: torch.nn.Module, tokenizer: Tokenizer, n_batches: int = 4) -> dict[str, float]:
    """Fraction of replies to validation scenes that are right in every token, and of visual tokens named rightly.

    Short answers and captions, and those with half of the visual tokens left out.
    """
    sampler = Sampler(family, tokenizer, VALIDATION_SEED, training=False, size=16)
    right = defaultdict(list)
    for index in range(n_batches):
        batch = sampler[index]
        rows = family.encode(model, batch.pixels, batch.size)
        for suffix in ("", ", pruned"):
            logits, _ = reply_logits(family, model, batch, rows, bool(suffix))
            for kind, hits in replies_right(batch, logits).items():
                right[kind + suffix] += hits
        named = batch.names[..., 0] >= 0
        names, likely = batch.names[named], name_logits(model, rows[named]).topk(4).indices
        found = (names[:, :, None] == likely[:, None]).any(-1) | (names < 0)
        right["naming"] += found.all(-1).tolist()
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def replies_right(batch: Batch, logits: Tensor) -> dict[str, list[bool]]:
    """Of short answers and of captions: which are right in every token, by the logits of reply_logits."""
    known = batch.labels >= 0
    hit = torch.ones_like(known)
    hit[known] = logits.argmax(-1) == batch.labels[known]
    right = defaultdict(list)
    for row, turn in sorted({(row, batch.turn[row, column].item()) for row, column in known.nonzero().tolist()}):
        here = known[row] & (batch.turn[row] == turn)
        right["caption" if here.sum() > 12 else "answer"].append(hit[row, here].all().item())
    return right


@torch.no_grad()
def check_forward(family: Family, model: torch.nn.Module, tokenizer: Tokenizer):
    """The forward pass used here gives the logits of transformers' own: one scene of each size, turn by turn.

    Raises AssertionError.
    """
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("sdpa")
    sampler = Sampler(family, tokenizer, VALIDATION_SEED, training=False, size=1)
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
        rows = family.encode(model, batch.pixels, batch.size)
        logits, _ = reply_logits(family, model, batch, rows)
        torch.testing.assert_close(logits, torch.cat(expected), atol=1e-3, rtol=1e-3)
