"""The scripts that train the tiny models: batched forward passes, files, where weights begin, what must not be seen."""

from dataclasses import replace

import pytest
import torch
import transformers

import generate
from scripts.convert_hf_checkpoint import convert
from scripts.tasks.scenes import HELD_OUT_SEED, VALIDATION_SEED, held_out_questions

train = pytest.importorskip("scripts.tiny.train", exc_type=ImportError)
examine, samples, start, trainer = (
    pytest.importorskip(f"scripts.tiny.{name}", exc_type=ImportError)
    for name in ("examine", "samples", "start", "trainer")
)
N_SCENES = 300  # enough for most words of the corpus to be tokens


@pytest.fixture(scope="module", params=train.FAMILIES)
def base(request, tmp_path_factory):
    """A family, its tokenizer, a base with random weights, and the folder with that one converted."""
    family, folder = train.FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    tokenizer = samples.train_tokenizer(family, n_scenes=N_SCENES)
    torch.manual_seed(0)
    model = family.build(tokenizer, family.recipes["base"].shape)
    with torch.no_grad():  # rows that fill the vocabulary up: transformers would choose them too
        model.get_input_embeddings().weight[tokenizer.get_vocab_size() :] = 0
    family.save(model, tokenizer, folder)
    convert(folder)
    return family, tokenizer, model, folder


def test_from_random_weights_to_an_answer(base):
    """The training's forward pass gives transformers' logits; what is saved says the same there and here."""
    family, tokenizer, model, folder = base
    trainer.check_forward(family, model, tokenizer)
    engine, ours = generate.load(folder / "model.pth", dtype=torch.float32)
    reference = family.load(folder).float()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    processor = family.processor_class.from_pretrained(folder)
    for scene, question in held_out_questions(4):  # one of each size
        content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
        tokens = ours.encode_chat([{"role": "user", "content": content}])
        ids = generate.generate(engine, tokens, [scene.image], 12, ours.stop_ids)["token_ids"]
        inputs = examine.model_inputs(family, theirs, processor, scene.image, question.prompt, None)
        output = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert ours.decode(ids) == theirs.decode(output, skip_special_tokens=True)


@torch.no_grad()
def test_a_deeper_decoder_begins_by_computing_the_same(base):
    """The target of 12 layers gives the logits of the base, read back from its converted checkpoint."""
    family, tokenizer, model, folder = base
    recipe = family.recipes["target"]
    deeper = family.build(tokenizer, recipe.shape)
    start.begin_with(family, deeper, tokenizer, folder, recipe.layers)
    batch = samples.Sampler(family, tokenizer, VALIDATION_SEED, training=False, size=2)[0]
    rounded = family.load(folder).float()  # what is saved is bfloat16
    rounded.set_attn_implementation("written_out")
    known = slice(0, tokenizer.get_vocab_size())  # the others fill the vocabulary up, and are random
    expected, logits = (
        trainer.reply_logits(family, m, batch, family.encode(m, batch.pixels, batch.size))[0][:, known]
        for m in (rounded, deeper)
    )
    torch.testing.assert_close(logits, expected, atol=2e-2, rtol=2e-2)  # Llama's places are split up, and rounded again


def test_a_draft_begins_with_two_layers_of_the_base(base):
    family, tokenizer, model, folder = base
    recipe = family.recipes["draft"]
    draft = family.build(tokenizer, recipe.shape)
    start.begin_with(family, draft, tokenizer, folder, recipe.layers)
    assert len(recipe.layers) == 2
    for layer, source in zip(draft.model.language_model.layers, recipe.layers):
        weight = model.model.language_model.layers[source].mlp.up_proj.weight
        torch.testing.assert_close(layer.mlp.up_proj.weight, weight.bfloat16().float())


def test_a_step_with_pruned_visual_tokens(base):
    """A frozen encoder stays as it is, everything else learns, and a pruned batch gives other logits."""
    family, tokenizer, _, folder = base
    recipe = replace(family.recipes["draft"], frozen_encoder=True)
    model = family.build(tokenizer, recipe.shape)
    start.begin_with(family, model, tokenizer, folder, recipe.layers)
    training = trainer.Trainer(family, model, recipe)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    batch = samples.Sampler(family, tokenizer, 0, training=True, size=2)[0]
    rows = family.encode(model, batch.pixels, batch.size).detach()
    whole, pruned = (trainer.reply_logits(family, model, batch, rows, pruned)[0] for pruned in (False, True))
    assert pruned.isfinite().all() and not torch.allclose(whole, pruned)
    training.step(batch)
    encoder = {id(weight) for weight in family.encoder_parameters(model)}
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert all((id(weight) in encoder) != (name in changed) for name, weight in model.named_parameters())


def test_muons_direction_has_equal_singular_values():
    values = torch.linalg.svdvals(
        trainer.orthogonalize(torch.randn(48, 32, generator=torch.Generator().manual_seed(0)))
    )
    assert 0.5 < values.min() and values.max() < 1.5


def test_training_never_sees_a_held_out_seed():
    for family in train.FAMILIES.values():
        for recipe in family.recipes.values():
            seeds = samples.batch_seeds(recipe.first_seed, recipe.steps - 1, recipe.batch)
            assert max(seeds) < VALIDATION_SEED < HELD_OUT_SEED
