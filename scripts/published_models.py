"""The published sizes of every supported model, under the names that Hugging Face lists them by.

Knows numbers of config.json files, as ModelArgs. Does not know checkpoints: what is loaded has its own params.json.
scripts/benchmark.py builds models of these shapes with random weights; the converter compares with a row for
--model_name. tests/test_published.py holds every row against the config.json and against transformers.
"""

from model import ModelArgs

# An Instruct or chat model without a row of its own has its base model's numbers. Defaults: n_kv_head = n_head,
# head_dim = dim / n_head (see named()).
LLAMA3 = dict(vocab_size=128256, n_kv_head=8, rope_base=500000.0, max_seq_len=8192)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA31 = dict(max_seq_len=131072, rope_scaling=SCALING)
LLAMA32 = dict(LLAMA3, max_seq_len=131072, rope_scaling=dict(SCALING, factor=32.0), tie_embeddings=True)
QWEN = dict(vocab_size=152064, n_kv_head=8, qkv_bias=True, norm_eps=1e-6, rope_base=1000000.0, max_seq_len=32768)
QWEN_TIED = dict(QWEN, vocab_size=151936, n_kv_head=2, tie_embeddings=True)
QWEN_VL = dict(max_seq_len=128000, mrope_section=(16, 24, 24), image_token_id=151655)
PIXELS = dict(patch=14, merge=2, window=112, full_layers=[7, 15, 23, 31], min_pixels=3136, max_pixels=12845056)
VIT = dict(PIXELS, type="qwen2_5_vl", dim=1280, depth=32, n_head=16, hidden=3420)
TILES = [(384 * height, 384 * width) for height in range(1, 7) for width in range(1, 7)]
SIGLIP = dict(type="llava", dim=1152, depth=26, n_head=16, hidden=4304, patch=14, tile=384, max_tiles=9)
LLAVA_VIT = dict(SIGLIP, resolutions=[(height, width) for width, height in TILES])  # lmms-lab's order; llava-hf's is
LLAVA_HF_VIT = dict(SIGLIP, resolutions=TILES)  # another, which decides between canvases that keep as many pixels
MLLAMA_VIT = dict(type="llama3_2_vision", dim=1280, depth=32, n_global=8, n_head=16, hidden=5120)
MLLAMA_VIT |= dict(tile=560, patch=14, max_tiles=4, keep=[3, 7, 15, 23, 30])
MODELS = {
    "Llama-2-7b-hf": dict(vocab_size=32000, dim=4096, n_layer=32, n_head=32, intermediate_size=11008),
    "Llama-2-13b-hf": dict(vocab_size=32000, dim=5120, n_layer=40, n_head=40, intermediate_size=13824),
    "Llama-2-70b-hf": dict(vocab_size=32000, dim=8192, n_layer=80, n_head=64, n_kv_head=8, intermediate_size=28672),
    "AMD-Llama-135m": dict(vocab_size=32000, dim=768, n_layer=12, n_head=12, intermediate_size=2048, max_seq_len=2048),
    "Meta-Llama-3-8B": dict(LLAMA3, dim=4096, n_layer=32, n_head=32, intermediate_size=14336),
    "Meta-Llama-3-70B": dict(LLAMA3, dim=8192, n_layer=80, n_head=64, intermediate_size=28672),
    "Llama-3.1-405B": dict(LLAMA3, dim=16384, n_layer=126, n_head=128, intermediate_size=53248, **LLAMA31),
    "Llama-3.2-1B": dict(LLAMA32, dim=2048, n_layer=16, n_head=32, intermediate_size=8192),
    "Llama-3.2-3B": dict(LLAMA32, dim=3072, n_layer=28, n_head=24, intermediate_size=8192),
    "Qwen2.5-0.5B": dict(QWEN_TIED, dim=896, n_layer=24, n_head=14, intermediate_size=4864),
    "Qwen2.5-1.5B-Instruct": dict(QWEN_TIED, dim=1536, n_layer=28, n_head=12, intermediate_size=8960),
    "Qwen2.5-3B": dict(QWEN_TIED, dim=2048, n_layer=36, n_head=16, intermediate_size=11008),
    "Qwen2.5-7B-Instruct": dict(QWEN, dim=3584, n_layer=28, n_head=28, n_kv_head=4, intermediate_size=18944),
    "Qwen2.5-14B-Instruct": dict(QWEN, dim=5120, n_layer=48, n_head=40, intermediate_size=13824),
    "Qwen2.5-32B-Instruct": dict(QWEN, dim=5120, n_layer=64, n_head=40, intermediate_size=27648),
    "Qwen2.5-72B-Instruct": dict(QWEN, dim=8192, n_layer=80, n_head=64, intermediate_size=29568),
}
for size in ("8B", "70B"):
    MODELS[f"Llama-3.1-{size}"] = dict(MODELS[f"Meta-Llama-3-{size}"], **LLAMA31)
for size, norm_eps in {"1.5B": 1e-6, "7B": 1e-6, "14B": 1e-5, "32B": 1e-5, "72B": 1e-5}.items():
    instruct = MODELS[f"Qwen2.5-{size}-Instruct"]
    MODELS[f"Qwen2.5-{size}"] = dict(instruct, max_seq_len=131072, norm_eps=norm_eps)
for size in ("0.5B", "1.5B", "7B", "72B"):
    MODELS[f"Qwen2-{size}"] = dict(MODELS[f"Qwen2.5-{size}"], max_seq_len=131072)
    MODELS[f"Qwen2-{size}-Instruct"] = MODELS.get(f"Qwen2.5-{size}-Instruct", MODELS[f"Qwen2.5-{size}"])
for name, base, vit in (("3B", "3B", VIT), ("7B", "7B-Instruct", VIT), ("72B", "72B-Instruct", dict(VIT, hidden=3456))):
    row = dict(MODELS[f"Qwen2.5-{base}"], **QWEN_VL)
    MODELS[f"Qwen2.5-VL-{name}-Instruct"] = dict(row, vision=dict(vit, out_dim=row["dim"]))
for size, base, hf_rows in (("0.5b", "0.5B", 152000), ("7b", "7B-Instruct", 152128), ("72b", "72B-Instruct", 152128)):
    row = dict(MODELS[f"Qwen2.5-{base}"], image_token_id=151646)
    MODELS[f"llava-onevision-qwen2-{size}-si"] = dict(row, vision=dict(LLAVA_VIT, out_dim=row["dim"]))
    row |= dict(vocab_size=hf_rows, vision=dict(LLAVA_HF_VIT, out_dim=row["dim"]))
    MODELS[f"llava-onevision-qwen2-{size}-si-hf"] = row
for name, base, n_layer in (("11B", "8B", 40), ("90B", "70B", 100)):
    row = dict(MODELS[f"Llama-3.1-{base}"], n_layer=n_layer, cross_attention_layers=tuple(range(3, n_layer, 5)))
    row |= dict(image_token_id=128256, n_input_only=8, vision=dict(MLLAMA_VIT, out_dim=row["dim"]))
    MODELS[f"Llama-3.2-{name}-Vision"] = row


def named(name: str) -> ModelArgs:
    """The row `name` of MODELS, completed. Raises KeyError for a name that is not in the table."""
    row = dict(MODELS[name], n_tokens=MODELS[name]["vocab_size"])
    return ModelArgs(**{"n_kv_head": row["n_head"], "head_dim": row["dim"] // row["n_head"], **row})
