"""A draft changes the target's speed and never its output."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import generate
from generate import Draft, Sampling, accept, draw
from model import CachedTokens
from scripts.convert_hf_checkpoint import convert
from tests.helpers import device, hub
from tests.helpers.pictures import draw as draw_picture
from vision import Pruning, kept_indices

TEXT_FAMILIES = ["qwen2.5-tied", "llama3.1"]
VL_FAMILIES = ["qwen2.5-vl", "llava-hf", "llama-3.2-vision"]
RATIOS = [0.1, 0.25, 0.5, 0.75, 0.9, 0.99]
PRUNINGS = [None, *(Pruning(method, ratio, 7) for method in ("random", "structured") for ratio in RATIOS)]
NUMBERS = (1, 2, 5, 8)  # of tokens that the draft proposes in a step
# Every pruning with one of the numbers, and no pruning with all of them.
WAYS = [*((None, k) for k in NUMBERS), *zip(PRUNINGS[1:], itertools.cycle(NUMBERS))]


@pytest.fixture
def with_draft(pair, monkeypatch):
    """The engine of a family and its draft, another checkpoint ('itself' shares the weights, not the caches)."""

    def get(family: str, draft: str, k: int = 5, pruning: Pruning | None = None):
        target = pair(family)
        name = family if draft == "itself" else draft
        engine = generate.load(pair(name).path, device=device.name, dtype=torch.float32)[0]
        monkeypatch.setattr(target.engine, "draft", Draft(engine, pruning, k))
        return target

    return get


def ask(pair, text: str = "How many circles are there?") -> tuple[list[int], list]:
    """A question, with a picture for a model that sees."""
    parts = [{"type": "text", "text": text}]
    images = [draw_picture(200, 150)] if pair.encoder else []
    return pair.tokenizer.encode_chat([{"role": "user", "content": [{"type": "image"}] * len(images) + parts}]), images


def with_its_draft(engine, *args, **more) -> dict:
    """A request, answered with the draft that the engine was loaded with."""
    return generate.generate(engine, *args, draft=engine.draft, **more)


def without_draft(pair, *args) -> dict:
    """The same request, answered by the target alone."""
    pair.engine.forget()
    result = generate.generate(pair.engine, *args)
    pair.engine.forget()
    return result


PAIRS = [(family, draft) for family in (*TEXT_FAMILIES, *VL_FAMILIES) for draft in ("itself", f"{family}:other")]
PAIRS += [("qwen2.5-vl", "qwen2"), ("qwen2", "qwen2.5-vl")]  # a draft that sees nothing, and one that could
PAIRS += [("llama-3.2-vision", "llama3.1"), ("llama3.1", "llama-3.2-vision")]


@pytest.mark.parametrize("family, draft", PAIRS)
def test_greedy_with_a_draft_is_greedy_without(with_draft, family, draft):
    pair = with_draft(family, draft)
    question = ask(pair)
    expected = without_draft(pair, *question, 16, pair.tokenizer.stop_ids)
    has_images = pair.encoder and pair.engine.draft.engine.encoder
    for pruning, k in WAYS if has_images else WAYS[: len(NUMBERS)]:
        pair.engine.draft = Draft(pair.engine.draft.engine, pruning, k)
        pair.engine.forget()
        result = with_its_draft(pair.engine, *question, 16, pair.tokenizer.stop_ids)
        assert result["token_ids"] == expected["token_ids"], (pruning, k)
        assert pair.engine.cached.keys[-10:] == expected["token_ids"][-11:-1]
        if draft == "itself" and pruning is None:
            steps, rest = divmod(15, k + 1)
            assert result["accept_counts"][k] >= steps and sum(result["accept_counts"]) == steps + (rest > 0)


TRAINED = [path for path in generate.DEFAULT_IMAGE.parent.parent.glob("tiny-*/model.pth") if "draft" not in str(path)]


@pytest.mark.parametrize("path", TRAINED, ids=[path.parent.name for path in TRAINED])
def test_greedy_with_a_trained_draft_is_greedy_without(path):
    """The pairs that ship: draft tokens are accepted here in runs of every length, and answers end within them."""
    engine, tokenizer = generate.load(path, device=device.name, dtype=torch.float32)
    draft_path = path.parent.with_name(f"{path.parent.name}-draft") / path.name
    draft, _ = generate.load(draft_path, device=device.name, dtype=torch.float32)
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    question = tokenizer.encode_chat([{"role": "user", "content": content}])
    images = [Image.open(generate.DEFAULT_IMAGE.with_name("four-shapes.png"))]
    expected = generate.generate(engine, question, images, 64, tokenizer.stop_ids)["token_ids"]
    assert expected[-1] in tokenizer.stop_ids
    runs = set()
    for pruning, k in WAYS:
        engine.draft = Draft(draft, pruning, k)
        engine.forget()
        result = with_its_draft(engine, question, images, 64, tokenizer.stop_ids)
        assert result["token_ids"] == expected, (pruning, k)
        runs |= {n for n, count in enumerate(result["accept_counts"]) if count}
    assert len(runs) > 5, "of the nine lengths that a run of accepted draft tokens can have"


@pytest.mark.parametrize("family", ["qwen2", "qwen2.5-vl"])
def test_a_draft_equal_to_the_target_accepts_everything(with_draft, family):
    """Greedy and sampled: 1 token of the prefill, then k draft tokens and one more per verification."""
    pair = with_draft(family, "itself", k=4)
    for sampling in (Sampling(), Sampling(temperature=0.8)):
        pair.engine.forget()
        result = with_its_draft(pair.engine, *ask(pair), 21, frozenset(), sampling)
        assert result["accept_counts"] == [0, 0, 0, 0, 4], sampling
        assert len(result["token_ids"]) == 21


@pytest.mark.parametrize("n_new", range(1, 14))
def test_length_is_exact(with_draft, n_new):
    """A verification past the end gives only the requested tokens, and counts no more accepted ones than that."""
    pair = with_draft("qwen2", "itself", k=4)
    result = with_its_draft(pair.engine, *ask(pair), n_new)
    steps, rest = divmod(n_new - 1, 5)
    expected = [0, 0, 0, 0, steps]
    expected[rest] += rest > 0
    assert len(result["token_ids"]) == n_new and result["finish_reason"] == "length"
    assert result["accept_counts"] == expected
    assert len(pair.engine.cached.keys) == len(result["prompt_token_ids"]) + n_new - 1


@pytest.mark.parametrize("draft", ["itself", "qwen2:other"])
@pytest.mark.parametrize("place", range(0, 14))
def test_stop_token_anywhere_in_an_accepted_run(with_draft, place, draft):
    """At its start, inside and at its end: text, counts and caches end there."""
    pair = with_draft("qwen2", draft, k=4)
    tokens, images = ask(pair)
    free = without_draft(pair, tokens, images, 24)["token_ids"]
    end = free.index(free[place])  # the first place where this token stands
    result = with_its_draft(pair.engine, tokens, images, 24, {free[place]})
    assert result["token_ids"] == free[: end + 1] and result["finish_reason"] == "stop"
    assert pair.engine.cached.keys == tokens + free[:end]
    keys = pair.engine.draft.engine.cached.keys
    assert keys == (tokens + free)[: len(keys)] and len(keys) <= len(tokens) + end
    n_accepted = sum(n * count for n, count in enumerate(result["accept_counts"]))
    assert n_accepted <= end


@pytest.mark.parametrize("family, draft", [("qwen2", "qwen2:other"), ("qwen2.5-vl", "qwen2.5-vl:other")])
@pytest.mark.parametrize("pruning", [None, Pruning("structured", 0.5), Pruning("random", 0.75, 3)])
def test_conversation(with_draft, family, draft, pruning):
    """Several turns, an image in the first: the caches of target and draft are continued, not filled anew."""
    pair = with_draft(family, draft, 3, pruning)
    content = [{"type": "image"}] * (pair.encoder is not None) + [{"type": "text", "text": "How many?"}]
    images = [draw_picture(200, 150)] if pair.encoder else []
    messages = [{"role": "user", "content": content}]
    for turn in range(3):
        tokens = pair.tokenizer.encode_chat(messages)
        result = with_its_draft(pair.engine, tokens, images, 12, pair.tokenizer.stop_ids)
        kept = list(pair.engine.cached.keys), list(pair.engine.draft.engine.cached.keys)
        expected = without_draft(pair, tokens, images, 12, pair.tokenizer.stop_ids)
        assert result["token_ids"] == expected["token_ids"], turn
        pair.engine.forget()  # the comparison has overwritten the caches
        with_its_draft(pair.engine, tokens, images, 12, pair.tokenizer.stop_ids)
        assert (pair.engine.cached.keys, pair.engine.draft.engine.cached.keys) == kept
        kept = [token for token in result["token_ids"] if token not in pair.tokenizer.stop_ids]
        reply = {"role": "assistant", "content": [{"type": "tokens", "ids": kept}]}
        messages += [reply, {"role": "user", "content": "And then?"}]


@pytest.mark.parametrize("target_slots, draft_slots", [(None, 70), (75, None), (75, 70), (70, 75)])
def test_caches_do_not_overflow(with_draft, target_slots, draft_slots):
    """Whichever cache fills first: the target decodes to its own end, without the draft if need be."""
    pair = with_draft("qwen2", "itself", k=8)
    tokens, images = ask(pair)
    assert len(tokens) < 70
    free = without_draft(pair, tokens, images, 60)["token_ids"]
    for engine, slots in ((pair.engine, target_slots), (pair.engine.draft.engine, draft_slots)):
        engine.max_cache_size = slots
        engine.model.setup_caches(slots or 512)
        engine.cached.fill([])
    result = with_its_draft(pair.engine, tokens, images, 60)
    pair.engine.max_cache_size = None
    assert len(result["token_ids"]) == min(60, (target_slots or 1000) - len(tokens) + 1)
    assert result["token_ids"] == free[: len(result["token_ids"])]


def test_seed_makes_a_sampled_run_repeatable(with_draft):
    pair = with_draft("qwen2.5-vl", "qwen2.5-vl:other", 4, Pruning("random", 0.5, 11))
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pair.engine.forget()
        texts.append(with_its_draft(pair.engine, *ask(pair), 24, frozenset(), Sampling(1.0, 50))["token_ids"])
    assert texts[0] == texts[1] != texts[2]


def test_pruning_reaches_the_draft_only(with_draft):
    pair = with_draft("qwen2.5-vl", "qwen2.5-vl:other", 4, Pruning("structured", 0.75))
    result = with_its_draft(pair.engine, *ask(pair), 8)
    n = result["n_visual_tokens"]
    assert result["draft_n_visual_tokens"] == n - round(n * 0.75)
    full = pair.engine.build_prompt(*ask(pair))
    pruned = pair.engine.draft.translate(*ask(pair), pair.model.args.image_token_id)
    assert len(pruned) == len(full) - round(n * 0.75) and pruned.next_pos == full.next_pos
    image = pair.model.args.image_token_id
    text = full.rope_pos[full.tokens != image]
    assert torch.equal(text, pruned.rope_pos[pruned.tokens != image]), "text stays where it was"
    kept = kept_indices(n, Pruning("structured", 0.75))
    assert torch.equal(full.rope_pos[full.image_mask][kept], pruned.rope_pos[pruned.image_mask])


def test_kept_indices_count_and_spacing():
    """SPEC: of N tokens max(1, N - round(N * r)) are kept, whatever the method."""
    ratios = [round(0.05 * i, 2) for i in range(20)]
    for n, ratio in itertools.product((*range(1, 70), *range(100, 3001, 50)), ratios):
        expected = max(1, n - round(n * ratio))
        kept = kept_indices(n, Pruning("structured", ratio))
        assert len(kept) == expected and 0 <= kept[0] and kept[-1] < n
        gaps = kept.diff()
        assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1), "evenly spaced"
        if n % 50 == 0:
            random = kept_indices(n, Pruning("random", ratio, 3))
            assert len(random) == expected and torch.equal(random, random.unique())
            assert torch.equal(random, kept_indices(n, Pruning("random", ratio, 3)))
    assert not torch.equal(kept_indices(100, Pruning("random", 0.5, 3)), kept_indices(100, Pruning("random", 0.5, 4)))
    assert torch.equal(kept_indices(100, None), torch.arange(100))
    ends = range(9, 100, 10)
    for method in ("structured", "random"):
        kept = kept_indices(100, Pruning(method, 0.8), 0, ends)
        assert set(ends) < set(kept.tolist()) and len(kept) == len(ends) + 90 - round(90 * 0.8)
        assert torch.equal(kept, kept.unique())


# ---- the distribution ----------------------------------------------------------------------------------------------

N_SAMPLES, VOCABULARY, K = 200_000, 6, 2


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The probability of counts at least this far from the expected ones."""
    statistic = ((counts - expected) ** 2 / expected).sum().double()
    return torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2).double(), statistic / 2).item()


def sample_three(rule, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[N_SAMPLES, 3] tokens of a Markov chain p [V, V] that starts at token 0, spoken with draft q by a rule."""
    tokens = torch.zeros(N_SAMPLES, 1 + 3 + K + 1, dtype=torch.long)
    length = torch.ones(N_SAMPLES, 1, dtype=torch.long)
    judge = torch.vmap(rule, randomness="different")
    while length.min() < 4:
        proposed, last = [], tokens.gather(1, length - 1)[:, 0]
        for _ in range(K):
            proposed.append(draw(q[proposed[-1] if proposed else last]))
        context = torch.stack((last, *proposed), dim=1)
        new, n = judge(torch.stack(proposed, dim=1), q[context[:, :-1]], p[context])
        room = length.clamp(max=4)
        tokens.scatter_(1, room + torch.arange(K + 1), new)  # what follows the n + 1st is overwritten by the next
        length = torch.where(length < 4, length + n + 1, length)
    return tokens[:, 1:4]


def p_value(rule, p: torch.Tensor, q: torch.Tensor) -> float:
    three = sample_three(rule, p, q)
    counts = (three * torch.tensor([VOCABULARY**2, VOCABULARY, 1])).sum(1).bincount(minlength=VOCABULARY**3)
    expected = p[0][:, None, None] * p[:, :, None] * p[None]
    return chi_square_p(counts, expected.flatten() * N_SAMPLES)


def chains() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    near = logits + 0.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    bad = F.one_hot(logits.argmin(-1), VOCABULARY) * 20.0 + torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    drafts = {"itself": logits, "near": near, "bad": bad, "uniform": torch.zeros_like(logits)}
    return logits.softmax(-1), {name: draft.softmax(-1) for name, draft in drafts.items()}


@pytest.mark.parametrize("draft", ["itself", "near", "bad", "uniform"])
def test_sampling_with_a_draft_is_sampling_without(draft):
    torch.manual_seed(0)
    p, drafts = chains()
    assert p_value(accept, p, drafts[draft]) > 0.01


def accept_always(proposed, q, p):
    return F.pad(proposed, (0, 1)).index_copy(0, torch.tensor([K]), draw(p[-1:])), torch.tensor([K])


def accept_without_residual(proposed, q, p):
    """The mistake of drawing the replacement from p instead of max(p - q, 0)."""
    stays = torch.rand(K) < (p[:-1].gather(1, proposed[:, None]) / q.gather(1, proposed[:, None]))[:, 0]
    n = stays.long().cumprod(0).sum(0, keepdim=True)
    return F.pad(proposed, (0, 1)).index_copy(0, n, draw(p.index_select(0, n))), n


@pytest.mark.parametrize("rule", [accept_always, accept_without_residual])
def test_a_broken_rule_is_noticed(rule):
    torch.manual_seed(0)
    p, drafts = chains()
    assert p_value(rule, p, drafts["near"]) < 1e-6


def test_whole_step_samples_the_target(monkeypatch):
    """The plumbing around the rule, with two Markov chains for models and vocabularies of different size."""
    p, drafts = chains()

    class Chain:
        def __init__(self, table, rows):
            self.args = type("Args", (), {"n_tokens": rows})()
            self.table, self.norm = F.pad(table[:, :rows], (0, 3), value=9.0), torch.nn.LayerNorm(1)
            self.cached = CachedTokens(4)

        def __call__(self, tokens, input_pos, n_slots):
            return self.table[tokens]

    def engine(table, rows):
        return generate.Engine(Chain(table, rows))

    target, draft = engine(p.log(), VOCABULARY), engine(drafts["near"].log(), VOCABULARY - 1)
    counts = torch.zeros(VOCABULARY)
    torch.manual_seed(0)
    for _ in range(3000):
        counts[generate.speculate(target, draft, [0], 2, Sampling(1.0)).ids[0]] += 1
        target.cached.commit([0])
        draft.cached.commit([0])
    assert chi_square_p(counts, p[0] * 3000) > 0.01


# ---- two devices --------------------------------------------------------------------------------------------------


class StandInDevice(TorchFunctionMode):
    """A second device for machines that have one: "cpu:1", whose tensors are the CPU's, with a label.

    As with real devices, an operation on tensors of two is an error, and only what is moved changes its place. It says
    nothing about streams, timing or kernels of a real one.
    """

    second = torch.device("cpu", 1)

    def __init__(self):
        super().__init__()
        self.moves: list[tuple[torch.Size, torch.device]] = []  # the shape of each tensor that changed its device

    def place(self, tensor: torch.Tensor) -> torch.device:
        return getattr(tensor, "place", torch.device("cpu"))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if function == torch.Tensor.device.__get__:
            return self.place(tensors[0])
        places = {self.place(tensor) for tensor in tensors if tensor.ndim}
        assert len(places) < 2, f"{function} of tensors on two devices"
        target = next((x for x in (kwargs.get("device"), *args) if isinstance(x, torch.device)), None)
        result = function(*args, **kwargs)
        if function == torch.Tensor.to and target not in (None, *places):
            self.moves.append((args[0].shape, target))
            result = result.clone()  # it may be the same tensor
        place = target or next(iter(places), torch.device("cpu"))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                tensor.place = place
        return result


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 40)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", VL_FAMILIES)
def test_draft_on_a_device_of_its_own(with_draft, family, sampling):
    """The same tokens, and only draft tokens and, when sampling, their probabilities move between the devices."""
    pair = with_draft(family, f"{family}:other", 3, Pruning("structured", 0.5))
    question = ask(pair)

    def answer() -> dict:
        pair.engine.forget()
        torch.manual_seed(5)
        return with_its_draft(pair.engine, *question, 16, pair.tokenizer.stop_ids, sampling)

    expected = answer()
    draft, stand_in = pair.engine.draft.engine, StandInDevice()
    for tensor in itertools.chain(
        *(module.state_dict(keep_vars=True).values() for module in (draft.model, draft.encoder)),
        *(module.buffers() for module in (draft.model, draft.encoder)),
    ):
        tensor.place = stand_in.second
    with stand_in:
        assert (draft.device, pair.engine.device) == (stand_in.second, torch.device("cpu"))
        result = answer()
    assert result["token_ids"] == expected["token_ids"] and result["accept_counts"] == expected["accept_counts"]
    to_target = [shape for shape, device in stand_in.moves if device != stand_in.second]
    steps = sum(result["accept_counts"])
    n_tokens = pair.model.args.n_tokens
    assert to_target == ([(3,)] if sampling.temperature == 0 else [(3,), (3, n_tokens)]) * steps


# ---- the command line ----------------------------------------------------------------------------------------------


def run_program(capsys, *flags) -> tuple[int, str, str]:
    status = generate.main(["--device", "cpu", "--dtype", "float32", "--max_new_tokens", "12", *map(str, flags)])
    streams = capsys.readouterr()
    return status, streams.out, streams.err


def test_draft_on_the_command_line(pair, capsys, pictures):
    target, draft = pair("qwen2.5-vl").path, pair("qwen2.5-vl:other").path
    flags = ["--checkpoint_path", target, "--image", pictures["square"], "--prompt", "Hi", "--json"]
    alone = json.loads(run_program(capsys, *flags)[1])
    flags += ["--draft_checkpoint_path", draft, "--speculate_k", 3, "--mm_prune_ratio", 0.5, "--draft_device", "cpu"]
    status, out, err = run_program(capsys, *flags, "--mm_prune_method", "random")
    drafted = json.loads(out)
    assert status == 0 and drafted["token_ids"] == alone["token_ids"] and "accepted" in err
    assert (alone["n_visual_tokens"], drafted["draft_n_visual_tokens"]) == (64, 32)
    assert len(drafted["accept_counts"]) == 4
    assert drafted["mean_accepted"] == sum(i * n for i, n in enumerate(drafted["accept_counts"])) / sum(
        drafted["accept_counts"]
    )


def test_a_draft_with_another_tokenizer_is_refused(pair, capsys, tmp_path):
    folder, _ = hub.make_qwen_text(
        tmp_path / "other", tied=False, text="Zwölf laxe Typen qualmen verdächtig süße Objekte."
    )
    convert(folder)
    flags = ["--checkpoint_path", pair("qwen2").path, "--draft_checkpoint_path", folder / "model.pth", "--prompt", "Hi"]
    status, out, err = run_program(capsys, *flags)
    assert (status, out, err.count("\n")) == (2, "", 1) and "another tokenizer" in err


def test_a_prompt_too_long_for_the_draft_is_refused(pair, capsys):
    path = pair("qwen2").path
    flags = ["--checkpoint_path", path, "--draft_checkpoint_path", path, "--draft_max_cache_size", 20, "--prompt", 40]
    status, out, err = run_program(capsys, *flags)
    assert status == 2 and "--draft_max_cache_size" in err
