"""Tiny random checkpoints in Hugging Face layouts, made with transformers, whose models are the reference too."""

import copy
import io
import json
from functools import cache
from pathlib import Path

import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
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
QWEN_TEMPLATE = (  # equivalent to Qwen2's own, for text
    "{% for message in messages %}" + DEFAULT_SYSTEM + "{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}" + GENERATION
)
QWEN_VL_TEMPLATE = (
    "{% for message in messages %}" + DEFAULT_SYSTEM + "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n" + GENERATION
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_SPECIALS += ["<|eom_id|>", "<|eot_id|>"]
LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
LLAMA2_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{% set system_message = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% set content = message.content %}{% if loop.first and system_message %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message.content %}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAVA_TEMPLATE = (  # llava-hf's own
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_VISION_TEMPLATE = (  # what Llama-3.2-Vision's own says of messages without tools
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- set system_message = '' %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- set seen = namespace(images=false) %}{%- for message in messages %}{%- for content in message['content'] %}"
    "{%- if content['type'] == 'image' %}{%- set seen.images = true %}{%- endif %}{%- endfor %}{%- endfor %}"
    "{%- if seen.images and system_message %}"
    "{{- raise_exception('Prompting with images is incompatible with system messages.') }}{%- endif %}"
    "{%- if not seen.images %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' }}"
    "{{- system_message + '<|eot_id|>' }}"
    "{%- endif %}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- for content in message['content'] %}{%- if content['type'] == 'image' %}{{- '<|image|>' }}"
    "{%- else %}{{- content['text'] }}{%- endif %}{%- endfor %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
PADDING = 10  # vocabulary entries beyond the tokenizer's tokens
SENTENCE = (
    "The quick brown fox asks how many circles there are: 12 or 7? Three, says the lazy dog, and it doesn't lie. "
)


def make_tokenizer(specials: list[str], text: str = SENTENCE, split: str = QWEN_SPLIT) -> Tokenizer:
    """A byte-level BPE with Qwen's normalizer and split, special tokens after the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text] * 3, trainer)
    tokenizer.add_special_tokens(specials)
    return tokenizer


def make_llama3_tokenizer(specials: list[str]) -> Tokenizer:
    """As Llama-3's: no normalizer, up to three digits a token, BOS in front."""
    tokenizer = make_tokenizer(specials, split=LLAMA3_SPLIT)
    tokenizer.normalizer = None
    bos = specials[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


@cache
def train_sentencepiece() -> bytes:
    """A model file with Llama-2's rules: byte fallback, a space in front, nothing normalized."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def randomize(model: torch.nn.Module, seed: int = 0, padding: int = PADDING) -> None:
    """Weights large enough that greedy text varies; norms and biases that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name or "ln_q" in name or "layernorm" in name:
                p.copy_(1 + 0.2 * noise)
            elif p.numel() == 1:  # a gate: zero would hide the layer behind it
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
                p[len(p) - padding :] = 0  # entries without a token: transformers could sample them, we never do


def save_hub(folder: Path, state: dict, config: dict, tokenizer: Tokenizer, template: str, stop: list[int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop, "repetition_penalty": 1.05}))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "add_bos_token": False}))
    return folder


def make_qwen_text(folder: Path, tied: bool, seed: int = 0, dtype: torch.dtype = torch.float32, text: str = SENTENCE):
    """Qwen2 / Qwen2.5: the two differ only in numbers."""
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


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_llama(folder: Path, config: dict, layout: str = "single.safetensors", seed: int = 0):
    """A Llama-3 text model: config on top of LLAMA; layout as in store()."""
    tokenizer = make_llama3_tokenizer(LLAMA3_SPECIALS)
    model, state, config = make_llama_model(tokenizer.get_vocab_size() + PADDING, config, seed)
    stop = [tokenizer.token_to_id(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    save_hub(folder, state, config, tokenizer, LLAMA3_TEMPLATE, stop)
    store(folder, layout)
    return folder, model


def make_llama2(folder: Path, layout: str = "sharded.bin", seed: int = 0):
    """Llama-2: SentencePiece, a key/value head for each query head, and the buffers that old transformers saved."""
    heads = LLAMA["num_attention_heads"]
    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece()).get_piece_size() + PADDING
    model, state, config = make_llama_model(vocab_size, {"num_key_value_heads": heads}, seed)
    for i in range(config["num_hidden_layers"]):
        state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    del config["attention_bias"]
    save_hub(
        folder, state, config | {"pad_token_id": 0}, make_llama3_tokenizer(LLAMA3_SPECIALS), LLAMA2_TEMPLATE, stop=[2]
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA2_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "LlamaTokenizer"}))
    store(folder, layout)
    return folder, model


def make_llama_model(vocab_size: int, config: dict, seed: int):
    """The model, the tensors of its files and its config.json."""
    config = LLAMA | config | {"vocab_size": vocab_size}
    # transformers modifies the dict of rope_scaling
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**copy.deepcopy(config))).eval()
    randomize(model, seed)
    state = model.state_dict()
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    return model, state, config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def store(folder: Path, layout: str) -> None:
    """Store the weights of model.safetensors in another layout: single file or sharded, safetensors or bin."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards, kind = layout.split(".")
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    files = [f"{stem}.{kind}"]
    if shards == "sharded":
        files = [f"{stem}-{i:05}-of-00003.{kind}" for i in (1, 2, 3)]
    weight_map = {key: files[i % len(files)] for i, key in enumerate(state)}
    for file in files:
        part = {key: state[key].clone() for key in state if weight_map[key] == file}
        torch.save(part, folder / file) if kind == "bin" else save_file(part, folder / file, {"format": "pt"})
    if shards == "sharded":
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


def llava_model(tokenizer: Tokenizer, n_layer: int, layer: int, tied: bool, tile: int, tall: int, wide: int, seed: int):
    """A Llava-OneVision: a SigLIP of n_layer layers, image features from `layer`, at most tall x wide tiles."""
    text = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokenizer.get_vocab_size() + PADDING,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": n_layer,
        "num_attention_heads": 16,
        "image_size": tile,
        "patch_size": 14,
        "vision_use_head": n_layer > 3,
    }
    config = {
        "text_config": text,
        "vision_config": vision,
        "vision_feature_layer": layer,
        "image_token_index": tokenizer.token_to_id("<image>") or tokenizer.get_vocab_size(),
        "image_grid_pinpoints": [[tile * i, tile * j] for i in range(1, tall + 1) for j in range(1, wide + 1)],
        "vision_aspect_ratio": "anyres_max_9",
    }
    given = config | {"text_config": text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}}
    model = transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(**given, tie_word_embeddings=tied)
    )
    randomize(model, 2 + seed)  # seeds with which greedy text varies
    with torch.no_grad():  # as faint as patches are to SigLIP, so that the eps of its norms matters
        for name, p in model.model.vision_tower.named_parameters():
            if "embeddings." in name:
                p.mul_(0.02)
    return model.eval(), config


def llava_names(model: torch.nn.Module, names: dict[str, str]) -> dict:
    """The state dict under the names of Hugging Face checkpoints; the output layer is dropped if it has no name."""
    state = {}
    for name, tensor in model.state_dict().items():
        ours = next(part for part in names if name.startswith(part))
        if names[ours] is not None:
            # Older versions of transformers have the level vision_model, as published files do.
            state[names[ours] + name.removeprefix(ours).removeprefix("vision_model.")] = tensor.clone()
    return state


def make_llava_hf(folder: Path, tied: bool, tile=60, tall=4, wide=6, seed: int = 0, dtype=torch.float32):
    """llava-hf's layout. Tied: a tower of three layers; else four, features of the last but one, and a pooling head."""
    tokenizer = make_tokenizer([*QWEN_SPECIALS[:3], "<image>", "<video>"])
    layers = (3, -1) if tied else (4, -2)
    model, config = llava_model(tokenizer, *layers, tied, tile, tall, wide, seed)
    model = model.to(dtype)
    names = {
        "model.image_newline": "image_newline",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": None if tied else "language_model.lm_head.",
    }
    state = llava_names(model, names)
    if not tied:
        positions = torch.arange((tile // 14) ** 2)[None]
        state["vision_tower.vision_model.embeddings.position_ids"] = positions  # as versions up to 4.30 saved it
    config |= {"architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision"}
    config |= {"use_image_newline_parameter": True, "vision_feature_select_strategy": "full"}
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    save_hub(folder, state, config, tokenizer, LLAVA_TEMPLATE, stop)
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "size": {"height": tile, "width": tile}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder, model


def make_llava_lmms(folder: Path, tied: bool, tile=60, tall=4, wide=6, seed: int = 0, dtype=torch.float32):
    """lmms-lab's layout, of a llava-hf model. Its tokenizer has no <image>, its pinpoints are (width, height)."""
    tokenizer = make_tokenizer(QWEN_SPECIALS[:3])
    model, nested = llava_model(tokenizer, 3, -1, tied, tile, tall, wide, seed)
    model = model.to(dtype)
    names = {
        "model.image_newline": "model.image_newline",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
        "lm_head.": None if tied else "lm_head.",
    }
    pinpoints = [[w, h] for h, w in nested["image_grid_pinpoints"]]
    config = nested["text_config"] | {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": f"(1x1),...,({wide}x{tall})" if tied else pinpoints,
        "mm_hidden_size": 64,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"google/siglip-so400m-patch14-{tile}",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_sliding_window": False,
    }
    if tied:
        del config["tie_word_embeddings"]  # then the missing output layer means tied
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    return save_hub(folder, llava_names(model, names), config, tokenizer, QWEN_TEMPLATE, stop), model


def make_llama_vision(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Llama-3.2-Vision with tiles of 4 x 4 patches. The image token is the first input-only id."""
    names = [name for name in LLAMA3_SPECIALS if name != "<|eom_id|>"] + ["<|image|>"]
    tokenizer = make_llama3_tokenizer(names)
    special = {name: tokenizer.token_to_id(name) for name in names}
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
    # These name blocks whose input is kept; this transformers takes them for blocks whose output is kept.
    shifted = vision | {"intermediate_layers_indices": [i - 1 for i in vision["intermediate_layers_indices"]]}
    nested = text | {"rope_parameters": rope | {"rope_theta": 500000.0}}
    ids = {"image_token_index": special["<|image|>"]}
    config = transformers.MllamaConfig(text_config=nested, vision_config=shifted, **ids)
    model = transformers.MllamaForConditionalGeneration(config).eval()
    randomize(model, seed, padding=0)
    with torch.no_grad():  # an image should change the text, not dominate it: greedy text has to vary
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
