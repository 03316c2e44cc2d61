"""Trains the tiny vision-language models that come with the repository, on a CPU, and ships them to checkpoints/.

Knows the stages of a family and what is written about them. Does not know the families' architectures (qwen_vl.py,
llava_onevision.py, llama_vision.py) nor the repository's own model: it trains and examines with `transformers` and
hands the result to convert_hf_checkpoint.py.

    python scripts/tiny/train.py --out_dir OUT                            # Qwen2.5-VL: base, target, draft
    python scripts/tiny/train.py --out_dir OUT --begin_dir checkpoint     # the base goes on from a converted checkpoint
    python scripts/tiny/train.py --out_dir OUT --family llava_onevision   # or llama3_2_vision
    python scripts/tiny/train.py --out_dir OUT --model draft              # one stage; a training that stopped goes on

The base is a decoder of a few layers with its encoder, and is not shipped. The target has the base's layers and more of
them between, which begin by adding nothing. The draft begins with two of the base's layers. Both begin with the base's
encoder.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import PIL
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from scripts.tasks.scenes import HELD_OUT_SEED, make_scene
from scripts.tiny.examine import report
from scripts.tiny.family import Family
from scripts.tiny.hub import write_json
from scripts.tiny.llama_vision import LlamaVision
from scripts.tiny.llava_onevision import LlavaOneVision
from scripts.tiny.qwen_vl import QwenVL
from scripts.tiny.samples import train_tokenizer
from scripts.tiny.start import begin_with, digest
from scripts.tiny.trainer import Trainer, train

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": QwenVL(),
    "llava_onevision": LlavaOneVision(),
    "llama3_2_vision": LlamaVision(),
}
EXAMPLES = {  # held-out scenes: file name -> seed
    "star-and-two-circles": HELD_OUT_SEED + 17,
    "four-shapes": HELD_OUT_SEED + 33,
    "eagle-75": HELD_OUT_SEED + 147_463,
    "bird-lamp": HELD_OUT_SEED + 5_691,
    "three-bars": HELD_OUT_SEED + 10,
    "four-bars": HELD_OUT_SEED + 8,
}


def make(family: Family, stage: str, work_dir: Path, begin_dir: Path | None) -> None:
    """Trains one model; work_dir/hub then holds it, converted too, and work_dir/log.json its history.

    begin_dir: the converted checkpoint that it begins with; None: random weights, for a base.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    recipe, tokenizer = family.recipes[stage], train_tokenizer(family)
    model = family.build(tokenizer, recipe.shape)
    begins_with = None
    if begin_dir:
        begin_with(family, model, tokenizer, begin_dir, recipe.layers)
        begins_with = {"sha256": digest(begin_dir), **json.loads((begin_dir / "training.json").read_text())}
        begins_with["held_out"] = begins_with.get("held_out", {}).get("total")
        if json.loads((begin_dir / "params.json").read_text())["model"]["n_layer"] == recipe.depth:  # it goes on
            recipe = replace(recipe, naming_steps=0, **family.tuning)
    trainer = train(family, recipe, tokenizer, model, work_dir)
    family.save(model, tokenizer, work_dir / "hub")
    converter = REPOSITORY / "scripts" / "convert_hf_checkpoint.py"
    subprocess.run([sys.executable, converter, "--checkpoint_dir", work_dir / "hub"], check=True)
    summary = summarize(trainer, stage) | ({"begins_with": begins_with} if begins_with else {})
    write_json(work_dir / "hub" / "training.json", summary)
    write_json(work_dir / "log.json", {"log": trainer.log})


def summarize(trainer: Trainer, stage: str) -> dict:
    """What is worth knowing about a training, for training.json."""
    last, recipe = trainer.log[-1], trainer.recipe
    return {
        "stage": stage,
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "layers": list(recipe.layers),
        "frozen_encoder": recipe.frozen_encoder,
        "batches_with_half_of_the_visual_tokens": recipe.pruned,
        "learning_rate": recipe.learning_rate,
        "steps": trainer.steps,
        "scenes": trainer.steps * recipe.batch,
        "minutes": round(last["minutes"], 1),
        "threads": torch.get_num_threads(),
        "final_loss": last["loss"],
        "versions": {module.__name__: str(module.__version__) for module in (torch, transformers, PIL)},
    }


def ship(hub_dir: Path, destination: Path) -> None:
    """Copies what generate.py reads, with the summary, into the repository."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("model.pth", "params.json", "tokenizer.model", "training.json"):
        shutil.copyfile(hub_dir / name, destination / name)


def ship_scenes(destination: Path):
    """Six held-out scenes, two of each kind, as files that users can ask about."""
    destination.mkdir(parents=True, exist_ok=True)
    for name, seed in EXAMPLES.items():
        make_scene(seed).image.save(destination / f"{name}.png", optimize=True)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    family = FAMILIES[args.family]
    base_dir = args.out_dir / f"{args.family}-base" / "hub"
    for stage in family.recipes if args.model == "all" else [args.model]:
        work_dir = args.out_dir / f"{args.family}-{stage}"
        begins = args.begin_dir if stage == "base" or args.model != "all" else None
        make(family, stage, work_dir, begins or (None if stage == "base" else base_dir))
        summary = json.loads((work_dir / "hub" / "training.json").read_text())
        summary["held_out"] = report(family, work_dir / "hub", args.num_questions)
        write_json(work_dir / "hub" / "training.json", summary)
        if stage != "base":
            ship(work_dir / "hub", REPOSITORY / "checkpoints" / (family.ship_name + "-draft" * (stage == "draft")))
    ship_scenes(REPOSITORY / "checkpoints" / "scenes")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_dir", type=Path, required=True, help="checkpoints, logs and training states")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    parser.add_argument("--model", choices=["base", "target", "draft", "all"], default="all")
    parser.add_argument("--begin_dir", type=Path, help="a converted checkpoint with which the base begins")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--num_questions", type=int, default=500)
    return parser.parse_args()


if __name__ == "__main__":
    main()
