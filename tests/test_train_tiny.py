"""The script that trains the tiny models: its batched forward passes, its files, and what it must not see."""

import pytest
import torch
import transformers

import generate
from scripts.convert_hf_checkpoint import convert
from scripts.tasks.scenes import HELD_OUT_SEED, VALIDATION_SEED, held_out_questions

train_tiny = pytest.importorskip("scripts.train_tiny", exc_type=ImportError)
N_SCENES = 1000  # enough for the words of the corpus to be tokens


@pytest.mark.parametrize("name", train_tiny.FAMILIES)
def test_from_random_weights_to_an_answer(name, tmp_path):
    """The training's forward pass gives transformers' logits; the saved model gives the same text there and here."""
    family = train_tiny.FAMILIES[name]
    tokenizer = train_tiny.train_tokenizer(family, n_scenes=N_SCENES)
    torch.manual_seed(0)
    model = family.build(tokenizer, family.recipes["draft"].shape)
    train_tiny.check_forward(family, model, tokenizer)
    family.save(model, tokenizer, tmp_path)
    convert(tmp_path)
    engine, ours = generate.load(tmp_path / "model.pth", device="cpu", dtype=torch.float32)
    reference = family.load(tmp_path).float()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    processor = family.processor_class.from_pretrained(tmp_path)
    for scene, question in held_out_questions(4):  # one of each size
        content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
        tokens = ours.encode_chat([{"role": "user", "content": content}])
        ids = generate.generate(engine, tokens, [scene.image], 12, ours.stop_ids)["token_ids"]
        expected = train_tiny.answer(family, reference, theirs, processor, scene.image, question.prompt, 12)
        assert ours.decode(ids) == expected


@pytest.mark.parametrize("name", ["llava_onevision", "llama3_2_vision"])
def test_a_decoder_starts_from_a_trained_one(name, tmp_path):
    """Words mean what they meant, and layers are the borrowed ones; a smaller decoder lacks some."""
    family, source = train_tiny.FAMILIES[name], train_tiny.FAMILIES["qwen2_5_vl"]
    their_tokenizer, tokenizer = (train_tiny.train_tokenizer(f, n_scenes=N_SCENES) for f in (source, family))
    theirs = source.build(their_tokenizer, source.recipes["draft"].shape)
    source.save(theirs, their_tokenizer, tmp_path)
    convert(tmp_path)
    for recipe, borrowed in (("target", [0, 1, 2, 3]), ("draft", [0, 2, 3])):
        model = family.build(tokenizer, family.recipes[recipe].shape)
        started = train_tiny.start_decoder(model, tokenizer, tmp_path)
        assert not any("vision" in weight for weight in started)
        word = [tok.token_to_id("red") for tok in (their_tokenizer, tokenizer)]
        rows = [m.get_input_embeddings().weight[i] for m, i in zip((theirs, model), word)]
        torch.testing.assert_close(rows[1], rows[0].bfloat16().float())
        layers = [layer for layer in model.model.language_model.layers if hasattr(layer, "self_attn")]
        assert len(layers) == len(borrowed)
        for ours, i in zip(layers, borrowed):
            weight = theirs.model.language_model.layers[i].mlp.up_proj.weight
            torch.testing.assert_close(ours.mlp.up_proj.weight, weight.bfloat16().float())


def test_training_never_sees_a_held_out_seed():
    for family in train_tiny.FAMILIES.values():
        for recipe in family.recipes.values():
            seeds = train_tiny.batch_seeds(0, recipe.steps - 1)
            assert max(seeds) < VALIDATION_SEED < HELD_OUT_SEED
