"""Several ranks say what one says: in threads, for any number of ranks, and as processes, as torchrun starts them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch

import checkpoint as checkpoint_files
import generate
import quantize
import tp
from model import ModelArgs, Transformer
from scripts.convert_hf_checkpoint import convert
from scripts.published_models import MODELS, named
from tests.helpers import hub, rank
from tests.helpers.checkpoints import MAKERS
from tests.helpers.processes import heed_interrupts

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = [name for name in MAKERS if name != "llava-384"]
UNEVEN = {  # neither heads nor widths can be divided; a group of int4 is two heads
    "hidden_size": 112,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 224,
    "rope_theta": 1e4,
}
SMALLEST = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 40,
}
ONE_LAYER = SMALLEST | {"num_hidden_layers": 1}
N_NEW = 8  # tokens that ranks in threads generate


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, pair):
    """The path of a family's model.pth, or of "family:mode", quantized."""

    @cache
    def get(name: str) -> Path:
        family, _, mode = name.partition(":")
        if family in MAKERS and not mode:
            return pair(family).path
        if mode and mode != "other":
            return quantize.quantize(get(family), mode, 32)[0]
        if mode:
            return pair(name).path
        config = {"uneven": UNEVEN, "smallest": SMALLEST, "one layer": ONE_LAYER}[family]
        folder, _ = hub.make_llama(tmp_path_factory.mktemp("hub") / family, config)
        convert(folder)
        return folder / "model.pth"

    return get


# ---- in threads: any number of ranks -------------------------------------------------------------------------------


class Threads:
    """Stands in for torch.distributed among n threads."""

    def __init__(self, n: int):
        self.barrier, self.own, self.box = threading.Barrier(n, timeout=60), threading.local(), [None] * n

    def exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.box[self.own.rank] = tensor.clone()
        self.barrier.wait()
        box = list(self.box)
        self.barrier.wait()
        return box

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.exchange(tensor)))

    def all_gather(self, parts, part):
        for mine, other in zip(parts, self.exchange(part)):
            mine.copy_(other)

    def broadcast(self, tensor, source):
        tensor.copy_(self.exchange(tensor)[source])


def in_threads(monkeypatch, path: Path, n: int, image: Path | None = None, greedy: bool = True) -> list[dict]:
    """Greedy tokens, logits and the engine of each of n ranks."""
    threads = Threads(n)
    monkeypatch.setattr(tp, "dist", threads)
    results: list = [None] * n

    store = torch.distributed.HashStore()

    @torch.inference_mode()
    def work(i: int) -> None:
        threads.own.rank = i
        try:
            results[i] = answer(tp.Ranks(i, n, store, greedy))
        except BaseException as error:
            threads.barrier.abort()
            store.set(f"failed {i}", "")
            results[i] = error

    def answer(ranks: tp.Ranks) -> dict:
        engine, tokenizer = generate.load(path, device="cpu", dtype=torch.float32, ranks=ranks)
        tokens, images = rank.encode(tokenizer, image)
        result = generate.generate(engine, tokens, images, N_NEW)
        return result | {"logits": rank.logits(engine, tokens, images), "engine": engine}

    running = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for error in results:
        if isinstance(error, Exception) and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results


@torch.inference_mode()
def alone(path: Path, image: Path | None = None) -> dict:
    engine, tokenizer = generate.load(path, device="cpu", dtype=torch.float32)
    tokens, images = rank.encode(tokenizer, image)
    result = generate.generate(engine, tokens, images, N_NEW)
    assert len(set(result["token_ids"])) > 4, "the text must vary, or equality says little"
    return result | {"logits": rank.logits(engine, tokens, images), "engine": engine}


def has_pictures(family: str) -> bool:
    return any(word in family for word in ("vl", "llava", "vision"))


def check_threads(monkeypatch, path: Path, n: int, image: Path | None = None, atol: float = 1e-4) -> list[dict]:
    expected, found = alone(path, image), in_threads(monkeypatch, path, n, image)
    for result in found:
        torch.testing.assert_close(result["logits"], expected["logits"], atol=atol, rtol=0)
        assert result["token_ids"] == expected["token_ids"]
    return found


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(monkeypatch, checkpoint, pictures, family, n):
    check_threads(monkeypatch, checkpoint(family), n, pictures["wide"] if has_pictures(family) else None)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 13, 14])
@pytest.mark.parametrize("mode", ["", ":int8", ":int4", ":fp8"])
def test_what_cannot_be_divided(monkeypatch, checkpoint, mode, n):
    """14 query heads, 2 key/value heads, 7 groups of int4 in a row of wo and of w2."""
    # int8: the 16 bits of an activation are scaled by the largest of the columns that a rank has
    path = checkpoint("uneven" + mode)
    found = check_threads(monkeypatch, path, n, atol=2e-3 if mode == ":int8" else 1e-4)
    if mode == ":int4" and n <= 7:
        for result in found:
            assert result["engine"].model.args.intermediate_size % 32 == 0, "groups stay whole"


@pytest.mark.parametrize("n", range(2, 7))
def test_smallest(monkeypatch, checkpoint, n):
    """Widths below a unit of dealing, and vocabulary rows that leave nothing for the last ranks' alignment."""
    check_threads(monkeypatch, checkpoint("smallest"), n)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("mode", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("family", ["qwen2.5-tied", "qwen2.5-vl", "llava-hf", "llama-3.2-vision"])
def test_quantized_families(monkeypatch, checkpoint, pictures, family, mode, n):
    image = pictures["wide"] if has_pictures(family) else None
    check_threads(monkeypatch, checkpoint(f"{family}:{mode}"), n, image, atol=2e-3 if mode == "int8" else 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_head_and_width_is_dealt_once(name):
    """All models, whole and in int4's groups of 128, on any number of ranks."""
    args = named(name)
    group, width = args.n_head // args.n_kv_head, args.intermediate_size
    for n in {2, 3, 4, 5, 6, 8, 12, 16, args.n_head} & set(range(args.n_head + 1)):
        heads = tp.split_heads(args.n_head, args.n_kv_head, n)
        assert [head for dealt in heads for head in dealt] == list(range(args.n_head))
        for n_groups in (1, width // quantize.group_for(width, 128)):
            plans = [tp.plan(args, n_groups, i, n) for i in range(n)]
            assert sum(small.intermediate_size for small, *_ in plans) == width
            assert [row for *_, rows in plans for row in rows] == list(range(args.vocab_size))
            for small, layers, _ in plans:
                queries = layers["attention.wq"][1]
                assert len(queries) == small.n_head and small.n_head % small.n_kv_head == 0
                assert small.n_head - len([head for head in queries if head >= 0]) <= group
                assert small.vocab_size + small.n_input_only == args.vocab_size + args.n_input_only
            if n <= 8 and n_groups > 1:
                assert all(small.intermediate_size % (width // n_groups) == 0 for small, *_ in plans)


# ---- as processes --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    n: int, *command, port: int | None = None, folders: list[Path] | None = None, limit: int = 120, **pipes
) -> list:
    """n ranks without torchrun; each may have a working folder of its own. limit: of a collective, in seconds."""
    shared = os.environ | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    # The store is rank 0's here, where torchrun would serve it: PyTorch, and gloo, report to those who lose it.
    shared |= {"OMP_NUM_THREADS": "1", "COLLECTIVE_TIMEOUT_S": str(limit), "TORCH_CPP_LOG_LEVEL": "FATAL"}
    processes = []
    for i in range(n):
        ids = {"RANK": str(i), "LOCAL_RANK": str(i)}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
        folder = folders[i] if folders else ROOT
        line = [sys.executable, *map(str, command)]
        options = {"env": shared | ids, "cwd": folder, "text": True, "preexec_fn": heed_interrupts, **streams}
        processes.append(subprocess.Popen(line, **options))
    return processes


def finish(processes: list, timeout: float = 240) -> tuple[list[int], str, str]:
    """Statuses, and all that was printed. Nobody is left behind."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    out, err = ("".join(parts) for parts in zip(*outputs))
    return [process.returncode for process in processes], out, err


def in_processes(folder: Path, n: int, cases: list[dict]) -> list[list[dict]]:
    """What each rank has found of each case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    statuses, out, err = finish(start(n, ROOT / "tests/helpers/rank.py", folder / "cases.json", folder / "results"))
    assert statuses == [0] * n and out == "", err
    return [torch.load(folder / f"results.{i}") for i in range(n)]


def make_cases(checkpoint, pictures) -> dict[str, dict]:
    def case(target: str, *flags: str, draft: str | None = None, length: int = 16) -> dict:
        flags = ["--prompt", "-", "--checkpoint_path", str(checkpoint(target)), *flags, "--max_new_tokens", str(length)]
        flags += [] if "--dtype" in flags else ["--dtype", "float32"]
        flags += ["--draft_checkpoint_path", str(checkpoint(draft))] if draft else []
        return {"flags": flags, "image": str(pictures["wide"]) if has_pictures(target) else None}

    sampled = ["--temperature", "0.8"]
    return {
        **{family: case(family) for family in ("llama2", "qwen2.5-tied", *PICTURED)},
        "uneven": case("uneven"),
        **{f"uneven:{mode}": case(f"uneven:{mode}") for mode in ("int8", "int4", "fp8")},
        **{f"{family}, drafted": case(family, draft=f"{family}:other") for family in PICTURED},
        "pruned": case(
            "qwen2.5-vl", "--mm_prune_ratio", "0.7", "--mm_prune_method", "random", draft="qwen2.5-vl:other"
        ),
        "drafted by text": case("qwen2.5-vl", draft="qwen2"),
        "drafted by int4": case("uneven:int8", draft="uneven:int4"),
        "sampled": case("uneven", *sampled, length=32),
        "top_k": case("qwen2.5-vl", *sampled, "--top_k", "20", length=32),
        "sampled, drafted": case("qwen2.5-vl", *sampled, draft="qwen2.5-vl:other", length=32),
        "bfloat16": case("uneven", "--dtype", "bfloat16"),
        "bfloat16, int4": case("uneven:int4", "--dtype", "bfloat16"),
    }


PICTURED = ["qwen2.5-vl", "llava-hf", "llama-3.2-vision"]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_processes(checkpoint, pictures, tmp_path, n):
    """Logits and texts: families, quantized ones, drafts, pruning; sampled texts too, with the same seed."""
    cases = make_cases(checkpoint, pictures)
    if n == 3:  # uneven for every model; the formats, and drawing, are tried with 2 and 4 ranks
        cases = {name: case for name, case in cases.items() if not re.search("int|fp8|bfloat16|sampled|top_k", name)}
    found = dict(zip(cases, zip(*in_processes(tmp_path, n, list(cases.values())))))
    for name, results in found.items():
        compare(name, rank.answer(cases[name]), results)
    for name in (*(f"{family}, drafted" for family in PICTURED), "pruned", "drafted by text"):
        family = name.partition(",")[0] if "," in name else "qwen2.5-vl"
        assert found[name][0]["token_ids"] == found[family][0]["token_ids"], f"a draft changes nothing: {name}"
    for result in found["uneven"]:
        check_bytes(result["sent"], n, result["logits"].shape[1])


def compare(name: str, expected: dict, results: tuple[dict, ...]) -> None:
    """Each rank's answer with that of one process, and with that of rank 0."""
    for result in results:
        if "bfloat16" in name:
            scale = expected["logits"].abs().max()
            assert (result["logits"] - expected["logits"]).abs().max() < 0.06 * scale, name
        else:
            atol = 2e-3 if "int8" in name or "by int4" in name else 1e-4
            torch.testing.assert_close(result["logits"], expected["logits"], atol=atol, rtol=0, msg=name)
            assert result["token_ids"] == expected["token_ids"], name
            assert result.get("accept_counts") == expected.get("accept_counts"), name
        assert result["token_ids"] == results[0]["token_ids"], f"{name}: ranks disagree"
        assert torch.equal(result["logits"], results[0]["logits"]), f"{name}: ranks disagree"


def check_bytes(sent: dict[str, dict], n: int, n_tokens: int) -> None:
    """A token costs two sums of a row a layer, the largest logit of a rank (or its logits), and the token."""
    n_layer, dim = 3, UNEVEN["hidden_size"]
    greedy, sampled = sent["greedy"], sent["sampled"]
    assert greedy["all_reduce"] == sampled["all_reduce"] == [4 * dim] * 2 * n_layer
    assert greedy["broadcast"] == sampled["broadcast"] == [8]
    assert greedy["all_gather"] == [8]
    assert n_tokens / n <= sampled["all_gather"][0] / 4 < n_tokens / n + tp.UNIT


def test_compiled(checkpoint, tmp_path):
    """The decode step is one graph, collectives and all (compile_step asks for fullgraph), and says the same."""
    flags = ["--checkpoint_path", str(checkpoint("one layer")), "--dtype", "float32", "--prompt", "-"]
    flags += ["--max_new_tokens", "12"]
    sampled = {"flags": [*flags, "--temperature", "0.9"]}
    expected = [rank.answer({"flags": flags}), rank.answer(sampled)]
    cases = [{"flags": [*flags, "--compile"]}, sampled | {"traced": True}]
    for results in in_processes(tmp_path, 2, cases):
        for result, alone in zip(results, expected):
            assert result["token_ids"] == alone["token_ids"]


MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tp
from checkpoint import load_mapped
from model import ModelArgs
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
path = Path(sys.argv[2])
kept = dict(tp.Ranks(1, 4, None, True).shard(ModelArgs(**eval(sys.argv[3])), load_mapped(path), path)[1])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory(tmp_path):
    """A rank's peak is its part of the layers and the pages of one layer; the tables stay in the file."""
    shape = dict(dim=768, n_layer=10, n_head=12, n_kv_head=12, head_dim=64, intermediate_size=3072)
    shape |= dict(vocab_size=32000, n_tokens=32000)
    state = Transformer(ModelArgs(**shape)).bfloat16().state_dict()
    torch.save(state, tmp_path / "model.pth")
    layers = sum(t.nbytes for name, t in state.items() if name.startswith("layers."))
    found = run_alone("-c", MEASURE, ROOT, tmp_path / "model.pth", shape)
    n_bytes = int(found.stdout) * 1024
    assert layers / 4 < n_bytes < layers / 4 + layers / 10 + 2e7, (layers, n_bytes)


# ---- starting and ending together ----------------------------------------------------------------------------------

TINY = ROOT / "checkpoints/tiny-qwen2.5-vl"
# At this temperature the text is noise, which comes at once and goes on.
LONG = ["--prompt", "300", "--max_new_tokens", "3500", "--temperature", "5", "--checkpoint_path", TINY / "model.pth"]


def run_alone(*command, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, **more)


def torchrun(n: int, *command, **more) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return run_alone(
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *command, env=environment, **more
    )


def test_torchrun_prints_once():
    """Without arguments, as in the README: the tiny pair and its picture; and a conversation of rank 0's stdin."""
    expected, found = run_alone("generate.py"), torchrun(2, "generate.py")
    assert found.returncode == 0, found.stderr
    assert found.stdout == expected.stdout
    assert [found.stderr.count(word) for word in ("loaded", "prompt 61 tokens", "draft: ")] == [1, 1, 1]
    said = f"/image {ROOT}/checkpoints/scenes/four-shapes.png\nHow many circles are there?\nAnd now?\n"
    expected, found = (start("generate.py", "--interactive", input=said) for start in (run_alone, partial(torchrun, 2)))
    assert (found.returncode, found.stdout) == (0, expected.stdout), found.stderr


def test_evaluate(tmp_path):
    """Rank 0 alone writes and prints; a run that was stopped goes on."""
    path = tmp_path / "results.jsonl"
    flags = ["evaluate.py", "--num_questions", "6", "--output", path, "--warmup", "0", "--dtype", "float32"]
    result = torchrun(2, *flags)
    assert result.returncode == 0, result.stderr
    lines = path.read_text().splitlines()
    assert len(lines) == 7 and len({json.loads(line)["id"] for line in lines[1:]}) == 6
    assert json.loads(lines[0])["device"].startswith("2 ranks")
    (found,) = json.loads(result.stdout.splitlines()[-1])["variants"].values()
    assert result.stdout.count("decode, tokens/s") == 1 and found["total"] == 6
    path.write_text("\n".join(lines[:4]) + "\n")
    result = torchrun(2, *flags, "--resume")
    assert result.returncode == 0, result.stderr
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in again[1:]] == [json.loads(line)["id"] for line in lines[1:]]
    assert [line["response"] for line in again[1:]] == [json.loads(line)["response"] for line in lines[1:]]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_rank_ends_all(dies):
    """In the middle of an answer, without torchrun, which would end the others too."""
    processes = start(2, "generate.py", *LONG)
    assert processes[0].stdout.read(20), "the answer has begun"
    begin = time.monotonic()
    processes[dies].send_signal(signal.SIGKILL)
    statuses, _, err = finish(processes, timeout=30)
    assert time.monotonic() - begin < 30
    assert statuses[dies] == -signal.SIGKILL and statuses[1 - dies] == 2
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("generate.py: ")]
    assert [line.partition(",")[0] for line in lines] == ["generate.py: rank 1 is gone"] * dies, "rank 0 alone prints"


def test_torchrun_ends_all_after_one_is_killed():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "generate.py",
        *LONG,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, text=True, **pipes)
    assert process.stdout.read(20), "the answer has begun"
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(ranks[-1], signal.SIGKILL)
    begin = time.monotonic()
    statuses, _, err = finish([process], timeout=30)
    assert time.monotonic() - begin < 30 and statuses[0] > 0, err
    assert not any(Path(f"/proc/{pid}/status").exists() for pid in ranks)


def test_ctrl_c_ends_all(tmp_path):
    """A chat's answer too, which with one process only stops. The model has no token that would end its answer."""
    path = Path(shutil.copytree(TINY, tmp_path / "endless")) / "params.json"
    params = json.loads(path.read_text())
    params["tokenizer"]["stop_ids"] = []
    path.write_text(json.dumps(params))
    flags = ["--checkpoint_path", path.with_name("model.pth"), "--max_cache_size", "2000", "--max_new_tokens", "1900"]
    processes = start(2, "generate.py", "--interactive", "--prompt", "What?", "--temperature", "5", *flags)
    assert processes[0].stdout.read(20)
    for process in processes:
        process.send_signal(signal.SIGINT)
    statuses, _, err = finish(processes, timeout=30)
    assert 130 in statuses and all(statuses) and "Traceback" not in err, (statuses, err)


def test_an_unresponsive_rank_and_a_port_in_use_end_all():
    """A rank lives, and does nothing any more: the others wait for it for as long as a collective may take."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    turned_away = start(2, "generate.py", port=listener.getsockname()[1])
    processes = start(2, "generate.py", *LONG, limit=(limit := 14))
    assert processes[0].stdout.read(20)
    processes[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    try:
        assert processes[0].wait(timeout=30) == 2
    finally:
        processes[1].kill()
    assert limit - 2 < time.monotonic() - begin < 30
    assert f"generate.py: rank 1 is gone, or has not answered for {limit} s\n" in finish(processes)[2]
    assert turned_away[0].wait(timeout=60) == 2
    turned_away[1].kill()  # waits for somebody else's server to speak; torchrun ends it when rank 0 has ended
    listener.close()
    _, out, err = finish(turned_away)
    assert out == "" and err.startswith("generate.py: rank 0 cannot use 127.0.0.1:") and len(err.splitlines()) == 1


def test_more_ranks_than_heads():
    ranks = tp.Ranks(0, 5, torch.distributed.HashStore(), greedy=True)
    with pytest.raises(ValueError, match="5 ranks, but tiny/model.pth has 4 query heads"):
        ranks.shard(checkpoint_files.read_params(TINY / "model.pth")[0], {}, Path("tiny/model.pth"))


def refused(processes: list, *words: str) -> None:
    """Every rank ends, none with 0; one line says why."""
    begin = time.monotonic()
    statuses, out, err = finish(processes, timeout=60)
    assert all(statuses) and 2 in statuses and out == "", (statuses, err)
    assert len(err.splitlines()) == 1 and err.startswith("generate.py: "), err
    assert all(word in err for word in words), err
    assert time.monotonic() - begin < 60


def test_refusals(tmp_path):
    """Mistakes that all ranks see, and those that one of them sees."""
    folders = [tmp_path / name for name in ("one", "other", "empty")]
    for folder, source in zip(folders, ("tiny-qwen2.5-vl", "tiny-qwen2.5-vl-draft", "none")):
        folder.mkdir()
        (folder / "model").symlink_to(ROOT / "checkpoints" / source)
    flags = [ROOT / "generate.py", "--checkpoint_path", "model/model.pth", "--prompt", "x"]
    launched = [  # all at once, as most of it is waiting
        (start(2, "generate.py", "--checkpoint_path", "/none/model.pth", "--prompt", "x"), "/none/model.pth"),
        (start(2, *flags, folders=folders[:2]), "rank 1", "model/model.pth is not the same"),
        (start(2, *flags, folders=folders[::2]), "rank 1", "model/model.pth is not the same"),
    ]
    if not torch.cuda.is_available():
        launched.append((start(2, "generate.py", "--device", "cuda"), "no GPU for rank"))
    for processes, *words in launched:
        refused(processes, *words)


def test_another_request_on_another_rank(tmp_path):
    """Rank 1 cannot read a picture that rank 0 reads, or no requests: all end, instead of waiting for one another."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
        lines = [{"prompt": "How many circles are there?", "images": [name]} for name in ("a.png", "b.png", "c.png")]
        (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for name in ("a.png", "b.png", "c.png"):
            (folder / name).symlink_to(ROOT / "checkpoints/scenes/four-shapes.png")
    (folders[1] / "b.png").unlink()
    (folders[1] / "c.png").unlink()
    (folders[1] / "c.png").symlink_to(ROOT / "checkpoints/scenes/four-bars.png")
    (folders[0] / "more.jsonl").symlink_to("requests.jsonl")
    flags = [ROOT / "generate.py", "--checkpoint_path", TINY / "model.pth", "--requests"]
    launched = [start(2, *flags, name, folders=folders) for name in ("requests.jsonl", "more.jsonl")]
    for processes, n_answers, line in zip(launched, (1, 0), ("rank 1 was asked something else", "rank 1: [Errno 2]")):
        statuses, out, err = finish(processes, timeout=60)
        assert all(statuses) and len(out.splitlines()) == n_answers, (statuses, out)
        assert err.count("generate.py: ") == 1 and line in err
