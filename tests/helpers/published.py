"""The published config.json of every row of MODELS: the keys that describe the architecture.

Written down apart from that table, so that the two can be compared. Where from:
- the models' own config.json on Hugging Face: AMD-Llama-135m, Qwen2-72B and -Instruct, Qwen2.5-32B, Qwen2.5-VL-7B and
  72B (of the AWQ conversions; 72B's feed-forward layers are padded to 29696 there);
- copies, and fine-tunes that name their origin: Llama-2, Llama-3.1-8B, Llama-3.2-1B and 3B, the other Qwen2 and Qwen2.5
  sizes, base and Instruct, Qwen2.5-VL-3B, llava-onevision-qwen2-7b-si, Llama-3.2-11B- and 90B-Vision; litgpt's table
  for Qwen2.5's base models, and its issue 1942 for Llama-3.1-405B's 8 key/value heads;
- the number of parameters that Hugging Face shows for a repository (PARAMETERS): no wrong width or depth gives it.
Seen nowhere: the vocabulary of llava-hf's 7B and 72B (their conversion script pads 152064 + 2 to a multiple of 64), and
lmms-lab's 0.5b-si and 72b-si, which are assumed to be Qwen2-0.5B- and 72B-Instruct, as their model cards say.
"""

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
LLAMA2 = LLAMA | {"vocab_size": 32000, "max_position_embeddings": 4096, "rope_scaling": None}
LLAMA3 = LLAMA | {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "rope_scaling": None}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31 = LLAMA3 | {"max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": SCALING}
LLAMA32 = LLAMA31 | {"rope_scaling": SCALING | {"factor": 32.0}, "tie_word_embeddings": True}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}


def sizes(width: int, layers: int, heads: int, kv_heads: int, hidden: int) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
    }


def qwen(size: str, context: int = 32768, eps: float = 1e-06) -> dict:
    """Qwen2 and Qwen2.5 of a size differ only in the context length, base and Instruct sometimes in the norms too."""
    numbers = {
        "0.5B": sizes(896, 24, 14, 2, 4864) | {"vocab_size": 151936, "tie_word_embeddings": True},
        "1.5B": sizes(1536, 28, 12, 2, 8960) | {"vocab_size": 151936, "tie_word_embeddings": True},
        "3B": sizes(2048, 36, 16, 2, 11008) | {"vocab_size": 151936, "tie_word_embeddings": True},
        "7B": sizes(3584, 28, 28, 4, 18944) | {"vocab_size": 152064, "tie_word_embeddings": False},
        "14B": sizes(5120, 48, 40, 8, 13824) | {"vocab_size": 152064, "tie_word_embeddings": False},
        "32B": sizes(5120, 64, 40, 8, 27648) | {"vocab_size": 152064, "tie_word_embeddings": False},
        "72B": sizes(8192, 80, 64, 8, 29568) | {"vocab_size": 152064, "tie_word_embeddings": False},
    }[size]
    return QWEN | numbers | {"max_position_embeddings": context, "rms_norm_eps": eps}


def qwen_vl(size: str, vision_hidden: int = 3420) -> dict:
    text = qwen(size, context=128000)
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": vision_hidden,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "in_chans": 3,
        "hidden_act": "silu",
    }
    return text | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": 151655,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": vision,
    }


PINPOINTS = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]


def llava(size: str) -> dict:
    """lmms-lab's layout: the decoder's numbers at the top level."""
    return qwen(size) | {
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_hidden_size": 1152,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": PINPOINTS,  # (width, height)
    }


def llava_hf(size: str, vocab_size: int) -> dict:
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_token_index": 151646,
        "tie_word_embeddings": size == "0.5B",
        "text_config": qwen(size) | {"vocab_size": vocab_size},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "vision_feature_layer": -1,
        "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": PINPOINTS,  # (height, width)
        "projector_hidden_act": "gelu",
    }


def llama_vision(numbers: dict) -> dict:
    layers = numbers["num_hidden_layers"]
    text = LLAMA31 | numbers | {"cross_attention_layers": list(range(3, layers, 5)), "pad_token_id": 128004}
    del text["architectures"], text["attention_bias"], text["mlp_bias"]
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "attention_heads": 16,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "vision_output_dim": 7680,
        "image_size": 560,
        "patch_size": 14,
        "max_num_tiles": 4,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": 128256,
        "text_config": text,
        "vision_config": vision,
    }


PREPROCESSOR = {  # preprocessor_config.json, of the architectures that have one that matters
    "Qwen2_5_VLForConditionalGeneration": {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14},
}
LLAMA_8B, LLAMA_70B = sizes(4096, 32, 32, 8, 14336), sizes(8192, 80, 64, 8, 28672)
CONFIGS = {
    "Llama-2-7b-hf": LLAMA2 | sizes(4096, 32, 32, 32, 11008),
    "Llama-2-13b-hf": LLAMA2 | sizes(5120, 40, 40, 40, 13824),
    "Llama-2-70b-hf": LLAMA2 | LLAMA_70B,
    "AMD-Llama-135m": LLAMA2 | sizes(768, 12, 12, 12, 2048) | {"max_position_embeddings": 2048},
    "Meta-Llama-3-8B": LLAMA3 | LLAMA_8B,
    "Meta-Llama-3-70B": LLAMA3 | LLAMA_70B,
    "Llama-3.1-8B": LLAMA31 | LLAMA_8B,
    "Llama-3.1-70B": LLAMA31 | LLAMA_70B,
    "Llama-3.1-405B": LLAMA31 | sizes(16384, 126, 128, 8, 53248),  # 16 before August 2024
    "Llama-3.2-1B": LLAMA32 | sizes(2048, 16, 32, 8, 8192) | {"head_dim": 64},
    "Llama-3.2-3B": LLAMA32 | sizes(3072, 28, 24, 8, 8192) | {"head_dim": 128},
    "Qwen2-0.5B": qwen("0.5B", 131072),
    "Qwen2-0.5B-Instruct": qwen("0.5B"),
    "Qwen2-1.5B": qwen("1.5B", 131072),
    "Qwen2-1.5B-Instruct": qwen("1.5B"),
    "Qwen2-7B": qwen("7B", 131072),
    "Qwen2-7B-Instruct": qwen("7B"),
    "Qwen2-72B": qwen("72B", 131072, 1e-05),
    "Qwen2-72B-Instruct": qwen("72B"),
    "Qwen2.5-0.5B": qwen("0.5B"),
    "Qwen2.5-1.5B": qwen("1.5B", 131072),
    "Qwen2.5-1.5B-Instruct": qwen("1.5B"),
    "Qwen2.5-3B": qwen("3B"),
    "Qwen2.5-7B": qwen("7B", 131072),
    "Qwen2.5-7B-Instruct": qwen("7B"),
    "Qwen2.5-14B": qwen("14B", 131072, 1e-05),
    "Qwen2.5-14B-Instruct": qwen("14B"),
    "Qwen2.5-32B": qwen("32B", 131072, 1e-05),
    "Qwen2.5-32B-Instruct": qwen("32B"),
    "Qwen2.5-72B": qwen("72B", 131072, 1e-05),
    "Qwen2.5-72B-Instruct": qwen("72B"),
    "Qwen2.5-VL-3B-Instruct": qwen_vl("3B"),
    "Qwen2.5-VL-7B-Instruct": qwen_vl("7B"),
    "Qwen2.5-VL-72B-Instruct": qwen_vl("72B", vision_hidden=3456),
    "llava-onevision-qwen2-0.5b-si": llava("0.5B"),
    "llava-onevision-qwen2-7b-si": llava("7B"),
    "llava-onevision-qwen2-72b-si": llava("72B"),
    "llava-onevision-qwen2-0.5b-si-hf": llava_hf("0.5B", 152000),
    "llava-onevision-qwen2-7b-si-hf": llava_hf("7B", 152128),
    "llava-onevision-qwen2-72b-si-hf": llava_hf("72B", 152128),
    "Llama-3.2-11B-Vision": llama_vision(LLAMA_8B | {"num_hidden_layers": 40}),
    "Llama-3.2-90B-Vision": llama_vision(LLAMA_70B | {"num_hidden_layers": 100}),
}
LIKE = {  # for transformers, which has no lmms-lab layout: the same model as llava-hf would write it down
    "llava-onevision-qwen2-0.5b-si": llava_hf("0.5B", 151936),
    "llava-onevision-qwen2-7b-si": llava_hf("7B", 152064),
    "llava-onevision-qwen2-72b-si": llava_hf("72B", 152064),
}
PARAMETERS = {  # as Hugging Face shows them, a tied output layer counted once
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-2-13b-hf": 13_015_864_320,
    "Llama-2-70b-hf": 68_976_648_192,
    "AMD-Llama-135m": 134_105_856,
    "Meta-Llama-3-8B": 8_030_261_248,
    "Meta-Llama-3-70B": 70_553_706_496,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2-0.5B": 494_032_768,
    "Qwen2-1.5B": 1_543_714_304,
    "Qwen2-7B": 7_615_616_512,
    "Qwen2-72B": 72_706_203_648,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Llama-3.2-11B-Vision": 10_670_220_835,
}
