"""Download what the converter needs of a model from the hub: weights, tokenizer, configuration, chat template.

python scripts/download.py --repo_id Qwen/Qwen2.5-VL-3B-Instruct --download_dir checkpoints [--hf_token T]
"""

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

WANTED = ["*.json", "*.jinja", "tokenizer.model", "original/tokenizer.model", "merges.txt"]


def choose_files(names: list[str]) -> list[str]:
    """The files to fetch: of the formats in which weights are offered, only one."""
    top = [name for name in names if "/" not in name or name.startswith("original/")]
    weights = [name for name in top if fnmatch(name, "model*.safetensors")]
    weights = weights or [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    return weights + [name for name in top if any(fnmatch(name, pattern) for pattern in WANTED)]


def download(repo_id: str, download_dir: Path, token: str | None) -> Path:
    """The folder download_dir/repo_id, complete. A second call fetches only what is missing or has changed."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries are no news to the user, the last error is
    names = choose_files(HfApi(token=token).list_repo_files(repo_id))
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise ValueError(f"{repo_id} holds neither model*.safetensors nor pytorch_model*.bin")
    folder = download_dir / repo_id
    snapshot_download(repo_id, local_dir=folder, allow_patterns=names, token=token)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo_id", required=True, help="as on the hub: organisation/name")
    parser.add_argument("--download_dir", type=Path, default=Path("checkpoints"))
    parser.add_argument("--hf_token", help="for gated models; default: the HF_TOKEN variable or the stored login")
    args = parser.parse_args()
    try:
        print(download(args.repo_id, args.download_dir, args.hf_token))
    except Exception as error:  # the network's, the hub's and the disk's errors share no class
        print(f"download.py: {args.repo_id}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
