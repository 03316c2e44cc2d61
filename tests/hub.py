"""Tiny random checkpoints in the hub's layouts, made with transformers, which is also the reference to compare with."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
DEFAULT_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
GENERATION = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
QWEN_TEMPLATE = (  # as far as text goes, what Qwen2's own says
    "{% for message in messages %}" + DEFAULT_SYSTEM + "{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}" + GENERATION
)
QWEN_VL_TEMPLATE = (
    "{% for message in messages %}" + DEFAULT_SYSTEM + "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n" + GENERATION
)
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_VISION_TEMPLATE = (  # the parts by which Llama-3.2-Vision's own is recognized
    "{{- bos_token }}{%- if not has_images %}{{- 'Cutting Knowledge Date: December 2023\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- for content in message['content'] %}{%- if content['type'] == 'image' %}{{- '<|image|>' }}"
    "{%- else %}{{- content['text'] }}{%- endif %}{%- endfor %}{{- '<|eot_id|>' }}{%- endfor %}"
)
PADDING = 10  # rows of the vocabulary beyond the tokenizer
SENTENCE = (
    "The quick brown fox asks how many circles there are: 12 or 7? Three, says the lazy dog, and it doesn't lie. "
)


def make_llama3_tokenizer(specials: list[str]) -> Tokenizer:
    """A byte-level BPE with Llama-3's split, which puts the first of the special tokens in front of a text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SENTENCE] * 3, trainer)
    tokenizer.add_special_tokens(specials)
    bos = specials[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def make_tokenizer(specials: list[str], text: str = SENTENCE) -> Tokenizer:
    """A byte-level BPE with Qwen's normalizer and split, special tokens after the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text] * 3, trainer)
    tokenizer.add_special_tokens(specials)
    return tokenizer


def randomize(model: torch.nn.Module, seed: int = 0, padding: int = PADDING) -> None:
    """Weights large enough that greedy text varies; norms and biases that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name or "ln_q" in name or "layernorm" in name:
                p.copy_(1 + 0.2 * noise)
            elif p.numel() == 1:  # a gate: zero would hide whatever is behind it
                p.copy_(0.6 + 0.1 * noise)
            elif "positional_embedding" in name or "class_embedding" in name:
                p.copy_(0.4 * noise)
            elif p.ndim == 1:
                p.copy_(0.1 * noise)
            elif "embed_tokens" in name:
                p.copy_(0.1 * noise)
            else:
                p.copy_(noise * 1.6 / p[0].numel() ** 0.5)
            if "embed_tokens" in name or "lm_head" in name:
                p[len(p) - padding :] = 0  # rows that no tokenizer names: transformers could pick them, we never do


def save_hub(folder: Path, state: dict, config: dict, tokenizer: Tokenizer, template: str, stop: list[int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop, "repetition_penalty": 1.05}))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "add_bos_token": False}))
    return folder


def make_qwen_text(folder: Path, tied: bool, seed: int = 0, dtype: torch.dtype = torch.float32, text: str = SENTENCE):
    """Qwen2 / Qwen2.5: the two differ in nothing but numbers."""
    tokenizer = make_tokenizer(QWEN_SPECIALS, text)
    config = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokenizer.get_vocab_size() + PADDING,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).eval()
    randomize(model, seed)
    model = model.to(dtype)
    state = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    return save_hub(folder, state, config, tokenizer, QWEN_TEMPLATE, stop), model


def make_qwen_vl(folder: Path, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32):
    tokenizer = make_tokenizer(QWEN_SPECIALS)
    special = {name: tokenizer.token_to_id(name) for name in QWEN_SPECIALS}
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokenizer.get_vocab_size() + PADDING,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
    }
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "hidden_act": "silu",
        "in_channels": 3,
    }
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    ids = {"image_token_id": special["<|image_pad|>"], "vision_start_token_id": special["<|vision_start|>"]}
    ids |= {"vision_end_token_id": special["<|vision_end|>"], "video_token_id": text["vocab_size"] - 1}
    nested = text | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0}}
    config = transformers.Qwen2_5_VLConfig(text_config=nested, vision_config=vision, tie_word_embeddings=tied, **ids)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    randomize(model, seed)
    model = model.to(dtype)
    state = {}
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            state[name] = tensor
    flat = text | ids | {"vision_config": vision, "rope_scaling": rope, "model_type": "qwen2_5_vl"}
    flat["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    stop = [special["<|im_end|>"], special["<|endoftext|>"]]
    save_hub(folder, state, flat, tokenizer, QWEN_VL_TEMPLATE, stop)
    limits = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    return folder, model


def make_llama_vision(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Llama-3.2-Vision with tiles of 4 x 4 patches. The image token is the first id that can only be read."""
    tokenizer = make_llama3_tokenizer([*LLAMA3_SPECIALS, "<|image|>"])
    special = {name: tokenizer.token_to_id(name) for name in [*LLAMA3_SPECIALS, "<|image|>"]}
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope["rope_type"] = "llama3"
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": special["<|image|>"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "cross_attention_layers": [1, 3],
        "pad_token_id": special["<|end_of_text|>"],
        "bos_token_id": special["<|begin_of_text|>"],
        "eos_token_id": special["<|eot_id|>"],
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        "max_num_tiles": 4,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        "vision_output_dim": 32 * 4,
        "intermediate_layers_indices": [1, 2, 4],
    }
    # These say whose input is kept; this transformers takes them for the blocks whose output is kept.
    shifted = vision | {"intermediate_layers_indices": [i - 1 for i in vision["intermediate_layers_indices"]]}
    nested = text | {"rope_parameters": rope | {"rope_theta": 500000.0}}
    ids = {"image_token_index": special["<|image|>"]}
    config = transformers.MllamaConfig(text_config=nested, vision_config=shifted, **ids)
    model = transformers.MllamaForConditionalGeneration(config).eval()
    randomize(model, seed, padding=0)
    with torch.no_grad():  # an image should change the text, not drown it: greedy text has to vary
        model.model.language_model.embed_tokens.weight *= 5
        model.model.multi_modal_projector.weight *= 0.2
    model = model.to(dtype)
    hub_names = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_model.": "vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        start = next(start for start in hub_names if name.startswith(start))
        state[hub_names[start] + name.removeprefix(start)] = tensor
    text |= {"rope_scaling": rope, "rope_theta": 500000.0}
    flat = ids | {"text_config": text, "vision_config": vision, "model_type": "mllama"}
    flat["architectures"] = ["MllamaForConditionalGeneration"]
    stop = [special["<|end_of_text|>"], special["<|eot_id|>"]]
    return save_hub(folder, state, flat, tokenizer, LLAMA_VISION_TEMPLATE, stop), model
