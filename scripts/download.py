"""Download the files of a Hugging Face model that the converter needs: weights, tokenizer, config, chat template.

python scripts/download.py --repo_id Qwen/Qwen2.5-VL-3B-Instruct --download_dir checkpoints [--hf_token T]
"""

import argparse
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WANTED = ["*.json", "*.jinja", "tokenizer.model", "original/tokenizer.model", "merges.txt"]


def choose_files(names: list[str]) -> list[str]:
    """The files to fetch. Where weights exist in several formats, only one of these is chosen."""
    top = [name for name in names if "/" not in name or name.startswith("original/")]
    weights = [name for name in top if fnmatch(name, "model*.safetensors")]
    weights = weights or [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    return weights + [name for name in top if any(fnmatch(name, pattern) for pattern in WANTED)]


def download(repo_id: str, download_dir: Path, token: str | None) -> Path:
    """The folder download_dir/repo_id, complete. A second call fetches only what is missing or has changed.

    huggingface_hub shows the progress. Raises OSError if the disk has no room for what is missing.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import logging

    from checkpoint import check_space  # with PyTorch, for which --help and wrong flags need not wait

    logging.set_verbosity_error()  # a retry does not concern the user, the last error does
    files = HfApi(token=token).model_info(repo_id, files_metadata=True).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    names = choose_files(list(sizes))
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise ValueError(f"{repo_id} holds neither model*.safetensors nor pytorch_model*.bin")
    folder = download_dir / repo_id
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (folder / name).exists() or (folder / name).stat().st_size != sizes[name]]
    check_space(folder, sum(sizes[name] for name in missing))
    snapshot_download(repo_id, local_dir=folder, allow_patterns=names, token=token)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo_id", required=True, help="organisation/name on Hugging Face")
    parser.add_argument("--download_dir", type=Path, default=Path("checkpoints"))
    parser.add_argument("--hf_token", help="for gated models; default: the HF_TOKEN variable or the stored login")
    args = parser.parse_args()
    try:
        folder = download(args.repo_id, args.download_dir, args.hf_token)
    except Exception as error:  # errors of network, server and disk have no common class
        print(f"download.py: {args.repo_id}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        sys.exit(2)
    print(folder)
    print(f"next: python scripts/convert_hf_checkpoint.py --checkpoint_dir {shlex.quote(str(folder))}", file=sys.stderr)


if __name__ == "__main__":
    main()
