"""Other programs that run the shapes of a model with random weights, for scripts/benchmark.py to compare with.

Knows transformers' configurations and llama.cpp's files, as they follow from model.ModelArgs. Does not know our engine.
A peer has prefill() and step(), each of which runs that once and returns the seconds it took.
"""

import contextlib
import importlib.util
import itertools
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from gpu import now
from model import ModelArgs


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    start = now(device)
    run()
    return now(device) - start


class Transformers:
    """The whole model with its image processor. The faster of two ways to decode counts as its speed.

    eager: what generate() does by default for a token, without generate()'s own overhead, to the peer's advantage.
    compiled: StaticCache, forward under torch.compile.
    """

    def __init__(self, args: ModelArgs, tokens: list[int], images: list[Image.Image], device, dtype, fill: Callable):
        import transformers

        self.device = device
        kind, config = self.describe(transformers, args)
        with torch.device("meta"):
            model = getattr(transformers, kind)(config).to(dtype)
        self.model = model.to_empty(device=device).requires_grad_(False).eval()
        self.model.tie_weights()
        for parameter in self.model.parameters():
            fill(parameter) if parameter.ndim > 1 else parameter.fill_(1)
        for module in self.model.modules():  # to_empty() cleared computed buffers too
            if "rotary" in type(module).__name__.lower():
                fresh = type(module)(module.config) if hasattr(module, "config") else type(module)(module.dim)
                module.load_state_dict(fresh.state_dict())
                for name, buffer in fresh.named_buffers():
                    setattr(module, name, buffer.to(device))
            elif getattr(module, "position_ids", None) is not None:
                module.position_ids.copy_(torch.arange(module.position_ids.shape[-1]))
        self.images, self.args = images, args
        self.ids = torch.tensor([tokens], device=device)
        self.text_config = config.get_text_config()
        self.caches = {}

    def describe(self, transformers, args: ModelArgs) -> tuple[str, object]:
        """The name of the class and its configuration. Raises ValueError for a family that is not known here."""
        text = dict(
            hidden_size=args.dim,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.n_layer,
            num_attention_heads=args.n_head,
            num_key_value_heads=args.n_kv_head,
            vocab_size=args.vocab_size,
            tie_word_embeddings=args.tie_embeddings,
            max_position_embeddings=args.max_seq_len,
            rms_norm_eps=args.norm_eps,
            rope_parameters=dict(rope_type="default", rope_theta=args.rope_base),
        )
        if args.vision is None:
            name = "Qwen2" if args.qkv_bias else "Llama"
            return f"{name}ForCausalLM", getattr(transformers, f"{name}Config")(**text)
        vit, kind = args.vision, args.vision["type"]
        if kind == "qwen2_5_vl":
            self.processor = transformers.Qwen2VLImageProcessorPil(
                min_pixels=vit["min_pixels"], max_pixels=vit["max_pixels"]
            )
            text["rope_parameters"] |= dict(mrope_section=list(args.mrope_section))
            vision = dict(depth=vit["depth"], hidden_size=vit["dim"], num_heads=vit["n_head"], in_channels=3)
            vision |= dict(intermediate_size=vit["hidden"], out_hidden_size=vit["out_dim"], patch_size=vit["patch"])
            vision |= dict(spatial_merge_size=vit["merge"], temporal_patch_size=2, window_size=vit["window"])
            vision |= dict(fullatt_block_indexes=vit["full_layers"], hidden_act="silu")
            config = transformers.Qwen2_5_VLConfig(
                text_config=text,
                vision_config=vision,
                tie_word_embeddings=args.tie_embeddings,
                image_token_id=args.image_token_id,
            )
            return "Qwen2_5_VLForConditionalGeneration", config
        if kind == "llava":
            grid = [list(size) for size in vit["resolutions"]]
            size = dict(height=vit["tile"], width=vit["tile"])
            self.processor = transformers.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=grid)
            vision = dict(model_type="siglip_vision_model", hidden_size=vit["dim"], intermediate_size=vit["hidden"])
            vision |= dict(num_hidden_layers=vit["depth"], num_attention_heads=vit["n_head"], image_size=vit["tile"])
            config = transformers.LlavaOnevisionConfig(
                text_config=dict(text, model_type="qwen2"),
                vision_config=dict(vision, patch_size=vit["patch"], vision_use_head=False),
                vision_feature_layer=-1,
                image_token_index=args.image_token_id,
                image_grid_pinpoints=grid,
                vision_aspect_ratio=f"anyres_max_{vit['max_tiles']}",
                tie_word_embeddings=args.tie_embeddings,
            )
            return "LlavaOnevisionForConditionalGeneration", config
        raise ValueError(f"--compare transformers does not know the encoder {kind}")

    def read_prompt(self, n_visual: int | None = None) -> dict:
        """Inputs of forward(): preprocessed images, and one image token for each of their features."""
        if not self.images:
            return {"input_ids": self.ids}
        inputs = {k: v.to(self.device) for k, v in self.processor(self.images, return_tensors="pt").items()}
        if n_visual is None:
            n_visual = self.count_features(inputs)
        ids = torch.cat((self.ids[:, :1].expand(1, n_visual), self.ids[:, 1:]), dim=1)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == self.args.image_token_id).int()
        return inputs | {"input_ids": ids}

    def count_features(self, inputs: dict) -> int:
        if "image_grid_thw" in inputs:
            return int(inputs["image_grid_thw"].prod()) // self.args.vision["merge"] ** 2
        pixels = inputs["pixel_values"].to(self.model.dtype)
        features = self.model.get_image_features(pixels, inputs["image_sizes"], vision_feature_layer=-1)
        return len(torch.cat(list(features.pooler_output)))

    def prefill(self) -> float:
        """From the image and the ids to the first token's logits, into a new growing KV cache."""
        if not hasattr(self, "n_visual"):
            self.n_visual = self.read_prompt()["input_ids"].shape[1] - self.ids.shape[1] + 1 if self.images else None
        start = now(self.device)
        output = self.model(**self.read_prompt(self.n_visual), use_cache=True, logits_to_keep=1)
        seconds = now(self.device) - start
        self.caches["eager"] = output.past_key_values
        return seconds

    def step(self) -> float:
        """Decode one token with the KV cache of the last prefill."""
        cache, text = self.caches["eager"], self.ids[:, -1:]
        return seconds_of(lambda: self.model(text, past_key_values=cache, logits_to_keep=1), self.device)

    def compile(self, n_slots: int) -> None:
        import transformers

        self.caches["compiled"] = transformers.StaticCache(config=self.text_config, max_cache_len=n_slots)
        inputs = self.read_prompt(getattr(self, "n_visual", None))
        self.model(**inputs, past_key_values=self.caches["compiled"], logits_to_keep=1)
        mode = "default" if self.device.type == "cpu" else "reduce-overhead"
        self.compiled = torch.compile(self.model.forward, mode=mode)
        self.prompt_tokens = inputs["input_ids"].shape[1]
        self.position = torch.full((1, 1), self.prompt_tokens, device=self.device)

    def compiled_step(self) -> float:
        cache, text = self.caches["compiled"], self.ids[:, -1:]
        run = lambda: self.compiled(text, past_key_values=cache, position_ids=self.position, logits_to_keep=1)
        seconds = seconds_of(run, self.device)
        self.position += 1
        return seconds


class LlamaCpp:
    """llama.cpp, through PyPI's xllamacpp: every matrix, the output layer too, of one of its types (bf16, q8_0, q4_0).

    Its times are those that it reports itself, for a request of 16 tokens after a prompt. It runs in its own process:
    within ours, its threads and PyTorch's would share one OpenMP and wait for each other (our decode steps took 1.7
    times as long).
    """

    def __init__(self, args: ModelArgs, kind: str, n_prompt: int, n_threads: int):
        if not all(map(importlib.util.find_spec, ("xllamacpp", "gguf"))):
            raise ValueError("--compare llama.cpp needs: pip install xllamacpp gguf")
        if args.vision or not args.qkv_bias:
            raise ValueError("--compare llama.cpp knows the Qwen2 text models only")
        self.prompt = [1000 + i % 100 for i in range(n_prompt)]
        self.numbers = itertools.count()
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        with tempfile.TemporaryDirectory() as folder:
            path = write_gguf(Path(folder) / "model.gguf", args, kind)
            n_slots = -(-(n_prompt + 64) // 256) * 256
            spawn.Process(target=serve_llama_cpp, args=(theirs, path, n_slots, n_threads), daemon=True).start()
            theirs.close()
            self.receive()  # returns once the file is loaded

    def request(self, n: int) -> dict:
        self.prompt[0] = 1000 + next(self.numbers)  # another prompt each time, so that its cache never applies
        request = {"prompt": self.prompt, "n_predict": n, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
        self.connection.send(request)
        return self.receive()

    def receive(self):
        try:
            return self.connection.recv()
        except EOFError:
            raise ValueError("llama.cpp ended early; its own messages stand above") from None

    def prefill(self) -> float:
        return self.request(1)["prompt_ms"] / 1000

    def step(self) -> float:
        return self.request(16)["predicted_per_token_ms"] / 1000


def serve_llama_cpp(connection, path: str, n_slots: int, n_threads: int) -> None:
    """The other process: answers each request with the times that it took, until the connection closes."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = n_slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    params.n_gpu_layers = 0
    params.verbosity = -1
    server = xllamacpp.Server(params)
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            connection.send(server.handle_completions(connection.recv())["timings"])


def write_gguf(path: Path, args: ModelArgs, kind: str) -> str:
    """A Qwen2 of random weights and a vocabulary of synthetic words."""
    import gguf
    import numpy as np

    types = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    types |= {"q4_0": gguf.GGMLQuantizationType.Q4_0}
    writer, random = gguf.GGUFWriter(path, "qwen2"), np.random.default_rng(0)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layer)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.n_head)
    writer.add_head_count_kv(args.n_kv_head)
    writer.add_rope_freq_base(args.rope_base)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(args.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * args.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(args.vocab_size - 1)

    def add_matrix(name: str, n: int, k: int) -> None:
        noise = random.standard_normal((min(n, 4096), k), dtype=np.float32) / k**0.5
        rows = gguf.quants.quantize(noise, types[kind])
        writer.add_tensor(f"{name}.weight", np.resize(rows, (n, rows.shape[1])), raw_dtype=types[kind])

    def add_vector(name: str, n: int) -> None:
        writer.add_tensor(name, np.ones(n, dtype=np.float32))

    add_matrix("token_embd", args.vocab_size, args.dim)
    if not args.tie_embeddings:
        add_matrix("output", args.vocab_size, args.dim)
    add_vector("output_norm.weight", args.dim)
    heads = {"q": args.n_head, "k": args.n_kv_head, "v": args.n_kv_head}
    for block in (f"blk.{i}" for i in range(args.n_layer)):
        for name, n in heads.items():
            add_matrix(f"{block}.attn_{name}", n * args.head_dim, args.dim)
            add_vector(f"{block}.attn_{name}.bias", n * args.head_dim)
        add_matrix(f"{block}.attn_output", args.dim, args.n_head * args.head_dim)
        add_matrix(f"{block}.ffn_gate", args.intermediate_size, args.dim)
        add_matrix(f"{block}.ffn_up", args.intermediate_size, args.dim)
        add_matrix(f"{block}.ffn_down", args.dim, args.intermediate_size)
        add_vector(f"{block}.attn_norm.weight", args.dim)
        add_vector(f"{block}.ffn_norm.weight", args.dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
