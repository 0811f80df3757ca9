"""
Upload a run to the Hub, with its model card completed by the evaluations that are in its folder.

    python -m opsd.run.publish outputs/run --hub_model_id someone/model

Without --hub_model_id only the card is completed, which needs no Hub. `--push_to_hub` of the training programs uploads
at the end of a run.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode

from opsd.run.card import RESULTS, complete_card
from opsd.run.flags import SWITCH
from opsd.run.report import CURVES, METRICS

logger = logging.getLogger(__name__)

# What is uploaded of a run's folder: model, tokenizer, settings, card and figures; no checkpoints, and no files with
# problems, such as completions and the evaluations' samples
PUBLISHED = (
    *(
        "*.safetensors",
        "*.index.json",
        "*config*.json",
        "*token*.json",
        "vocab.json",
        "merges.txt",
        "*.jinja",
        "*.model",
    ),
    *("README.md", METRICS, CURVES, "*.png", f"{RESULTS}/*.md", f"{RESULTS}/*.png"),
)


def published_files(run_dir: Path) -> list[str]:
    """Return the files of a run that are uploaded, by their paths in it."""
    return sorted({str(path.relative_to(run_dir)) for pattern in PUBLISHED for path in run_dir.glob(pattern)})


def publish(
    run_dir: Path, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
) -> str:
    """
    Complete the card of a run, and upload model, card and figures; returns the address.

    Args:
        private: of a repository that is not there yet; `None` for the account's default.
        token: for the Hub; `None` for the one that is stored on this machine.
        revision: branch; `None` for main.

    Raises:
        ValueError: for a folder without a model or card.
        OSError: if the Hub is not reached, or refuses.
    """
    complete_card(run_dir)
    files = published_files(run_dir)
    if not any(file.endswith(".safetensors") for file in files):
        raise ValueError(f"{run_dir}: no model in it; give the folder of a finished run")
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=run_dir,
        allow_patterns=files,
        ignore_patterns=["checkpoint-*"],
        commit_message="Model, card and figures",
        revision=revision,
    )
    return str(repository)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, see the head of this file."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a finished run")
    parser.add_argument("--hub_model_id", help="repository, NAME or OWNER/NAME; default: no upload")
    parser.add_argument("--hub_private_repo", **SWITCH, help="make the repository private if it is new")
    args = parser.parse_args(arguments)
    try:
        if args.hub_model_id is None:
            logger.info("%s: %d evaluations in the card", args.run_dir / "README.md", complete_card(args.run_dir))
            return
        if is_offline_mode():
            raise ValueError("--hub_model_id: the Hub is switched off by HF_HUB_OFFLINE; leave one of the two out")
        address = publish(args.run_dir, args.hub_model_id, private=args.hub_private_repo or None)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    logger.info("uploaded to %s: %s", address, ", ".join(published_files(args.run_dir)))


if __name__ == "__main__":
    main()
