"""One of the processes that test_tp.py starts: answers the cases of a JSON file, and writes down what came out.

python tests/helpers/rank.py CASES.json RESULTS: each rank writes RESULTS.<rank>. A case is the flags of generate.py,
and "image", a picture for the question; "traced": the step is one graph, but no kernels are compiled for it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import cli

import torch

import generate
import tp
from images import load_image

QUESTION = "How many circles are there?"
N_FORCED = 5  # tokens whose logits are compared after those of the prompt


def encode(tokenizer, image: str | None) -> tuple[list[int], list]:
    images = [load_image(image)] if image else []
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": QUESTION}]
    return tokenizer.encode_chat([{"role": "user", "content": content}]), images


def answer(case: dict, ranks: tp.OneProcess | None = None) -> dict:
    """The answer, and the whole logits of the prompt's end and of a few tokens after it."""
    args = generate.parse_args(case["flags"])
    if ranks and ranks.n_ranks > 1:
        ranks.greedy = args.temperature == 0
    engine, tokenizer = generate.load(args.checkpoint_path, ranks=ranks, **cli.load_options(args))
    tokens, images = encode(tokenizer, case.get("image"))
    torch.manual_seed(args.seed)
    sampling = generate.Sampling(args.temperature, args.top_k)
    if case.get("traced"):
        engine.model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    result = generate.generate(engine, tokens, images, args.max_new_tokens, sampling=sampling, draft=engine.draft)
    result["logits"] = logits(engine, tokens, images)
    return result | ({"sent": count_bytes(engine)} if ranks else {})


@torch.inference_mode()
def logits(engine, tokens: list[int], images: list) -> torch.Tensor:
    """[1 + N_FORCED, n_tokens], computed whole on every rank."""
    if isinstance(engine.model.output, tp.GatherLogits):
        engine.model.output.greedy = False
    engine.cached.keys, n = [], engine.model.args.n_tokens
    prompt = engine.build_prompt(tokens, images)
    first = engine.prefill(prompt)[:, :n]
    input_pos = torch.arange(len(prompt), len(prompt) + N_FORCED)
    return torch.cat((first, engine.model(torch.tensor(tokens[-N_FORCED:]), input_pos)[:, :n])).float()


@torch.inference_mode()
def count_bytes(engine) -> dict:
    """What a rank puts into the collectives of a token's step: operation -> bytes each time; greedy, and sampled."""
    counts: dict[str, list[int]] = {}
    true = tp.dist

    class Counting:
        def all_reduce(self, tensor):
            counts.setdefault("all_reduce", []).append(tensor.nbytes)
            true.all_reduce(tensor)

        def all_gather(self, parts, part):
            counts.setdefault("all_gather", []).append(part.nbytes)
            true.all_gather(parts, part)

        def broadcast(self, tensor, source):
            counts.setdefault("broadcast", []).append(tensor.nbytes)
            true.broadcast(tensor, source)

    sent, n_tokens = {}, engine.model.args.n_tokens
    tp.dist = Counting()
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        engine.model.output.greedy = temperature == 0
        generate.decode(engine, [1], 1, n_tokens, generate.Sampling(temperature))
        sent[name], counts = counts, {}
    tp.dist = true
    return sent


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    with tp.join_ranks(generate.parse_args(cases[0]["flags"])) as ranks:
        torch.save([answer(case, ranks) for case in cases], f"{sys.argv[2]}.{ranks.rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
