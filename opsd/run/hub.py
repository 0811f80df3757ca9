"""Models and data sets by their Hub id: which commit is in the cache, and what was looked for where."""

import re
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, is_offline_mode
from huggingface_hub.file_download import repo_folder_name


def cache_folder(repo_id: str, repo_type: str) -> Path:
    """Return the folder that the cache has, or would have, for a repository."""
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type=repo_type))


def cached_commit(repo_id: str, repo_type: str, revision: str | None = None) -> str | None:
    """Return the commit of a revision (by default main), by the cache; `None` for local files, and if unknown."""
    if Path(repo_id).expanduser().exists():
        return None
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    reference = cache_folder(repo_id, repo_type) / "refs" / (revision or "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def describe_search(name: str, repo_type: str, revision: str | None, error: Exception) -> str:
    """Say of a model or data set that is not found what was looked for where, and the way out."""
    folder = cache_folder(name, repo_type)
    commits = sorted(path.name for path in folder.glob("snapshots/*"))
    in_cache = f"it holds {', '.join(commits)}" if commits else "it is not there" if not folder.exists() else "empty"
    hub = f"switched off by HF_HUB_OFFLINE: {error}" if is_offline_mode() else error
    kind = "" if repo_type == "model" else f" --repo-type {repo_type}"
    return (
        f"not found. Looked for: a file or folder {Path(name).expanduser().absolute()}, which is not there; revision "
        f"{revision or 'main'} in the cache {folder} ({in_cache}); the Hub ({hub}). Give the path of a copy, or "
        f"fetch it where there is a network with `hf download{kind} {name}`, and bring that folder of the cache here "
        "(HF_HUB_CACHE says where it is)"
    )


def check_model(name: str, flag: str, revision: str | None = None) -> None:
    """
    Check that a model is in a folder, in the cache or on the Hub, by its config.json alone.

    Raises:
        FileNotFoundError: naming the flag, and what was looked for where.
        ValueError: for what cannot be a Hub id.
    """
    if Path(name).expanduser().is_dir():
        return
    try:
        hf_hub_download(name, constants.CONFIG_NAME, revision=revision)
    except OSError as error:
        raise FileNotFoundError(f"--{flag} {name}: {describe_search(name, 'model', revision, error)}") from error
    except ValueError as error:
        raise ValueError(f"--{flag} {name}: neither a folder here nor a Hub id: {error}") from error
