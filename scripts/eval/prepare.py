"""What a benchmark script fetches before it runs: a data set at its pinned revision, and the model; afterwards no network is needed.

    python scripts/eval/prepare.py --dataset ID --revision HASH --config NAME --split NAME --cache DIR --model DIR_OR_HUB_ID [--offline]

The data set goes to a cache of its own, so that the harness, which is then run offline, finds this revision there and no other.
Prints the number of rows of the split, and a name for the model in its present state.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PINNED = "pinned.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(description="Fetch a pinned data set and a model.")
    parser.add_argument("--dataset", required=True, help="hub id")
    parser.add_argument("--revision", required=True, help="commit of the data set, 40 digits")
    parser.add_argument("--config", action="append", default=[], help="configuration that the task reads; the first holds the split")
    parser.add_argument("--split", required=True, help="split that is asked")
    parser.add_argument("--cache", type=Path, required=True, help="folder of this data set alone")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--offline", action="store_true", help="use what is there; anything missing is an error")
    args = parser.parse_args(argv)
    os.environ["HF_DATASETS_CACHE"] = str(args.cache.resolve())  # read when `datasets` is imported
    os.environ["HF_HUB_OFFLINE"] = "1" if args.offline else os.environ.get("HF_HUB_OFFLINE", "0")
    try:
        rows = fetch_data(args)
        print(rows, fetch_model(args.model))
    except Exception as error:  # the libraries raise many kinds where a network or a hub fails
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def fetch_data(args: argparse.Namespace) -> int:
    """Fetch the data set unless it is there.

    Returns:
        How many rows the split has.

    Raises:
        ValueError: no full commit, a folder that holds another revision, or nothing there and no network allowed.
    """
    if len(args.revision) != 40 or set(args.revision) - set("0123456789abcdef"):
        raise ValueError(f"The revision is {args.revision!r}, expected a commit of {args.dataset} in full, 40 hexadecimal digits.")
    wanted = {"dataset": args.dataset, "revision": args.revision, "configs": args.config}
    marker = args.cache / PINNED
    if marker.exists():
        found = json.loads(marker.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in wanted} != wanted:
            raise ValueError(f"{args.cache} holds {found}, expected {wanted}; give DATA another folder, or delete that one.")
        return _rows(found, args.split)
    if args.offline:
        raise ValueError(f"{args.cache} does not hold {args.dataset}; run this once where there is a network, without OFFLINE=1.")
    import datasets

    splits: dict[str, int] = {}
    for config in args.config:
        loaded = datasets.load_dataset(args.dataset, None if config == "default" else config, revision=args.revision)
        for name, split in loaded.items():
            check_revision([Path(file["filename"]) for file in split.cache_files], args.revision)
            splits.setdefault(name, len(split))
    args.cache.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({**wanted, "rows": splits}), encoding="utf-8")
    return _rows({"rows": splits}, args.split)


def _rows(found: dict[str, Any], split: str) -> int:
    if split not in found["rows"]:
        raise ValueError(f"The data set has the splits {', '.join(found['rows'])}, expected {split} among them; is the revision right?")
    return int(found["rows"][split])


def check_revision(files: Sequence[Path], revision: str) -> None:
    """Refuse prepared files of another revision.

    Raises:
        ValueError: a file that does not lie under its revision.
    """
    wrong = [file for file in files if revision not in file.parts]
    if wrong:
        raise ValueError(f"{wrong[0]} does not lie under the revision {revision}; delete the folder and fetch again.")


def fetch_model(model: str) -> str:
    """Fetch a model and the settings of its vision tower unless they are there; a name for its present state."""
    from huggingface_hub import snapshot_download

    from llava.eval.engines import describe_model
    from llava.model.loading import resolve_tower

    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
    tower = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("mm_vision_tower")
    if isinstance(tower, str) and not Path(resolve_tower(tower, folder)).is_dir():
        snapshot_download(tower, allow_patterns=["*.json"])
    return describe_model(model)


if __name__ == "__main__":
    sys.exit(main())
