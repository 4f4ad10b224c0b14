"""What `save_pretrained` and `push_to_hub` write of a native model beside weights and configurations: a model card, where there is none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from llava.model.native.model_card import model_card

CARD = "README.md"
_UPLOADING = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
"""Arguments of `save_pretrained` that are about the hub."""


class HubFolder:
    """For a `PreTrainedModel`: a card goes with its weights. A card that a folder or a repository has already stays as it is."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """transformers' own, and a model card. Arguments for the hub, such as `repo_id`, are those of `push_to_hub`."""
        hub = {name: kwargs.pop(name) for name in _UPLOADING if name in kwargs}
        folder = Path(save_directory)
        model: Any = self
        before = _times(folder)
        if not model.is_remote_code():
            # A folder that came with code says so in its configuration; this one is written without.
            model.config.__dict__.pop("auto_map", None)
        super().save_pretrained(save_directory, is_main_process, state_dict, token=hub.get("token"), **kwargs)  # type: ignore[misc]
        if not is_main_process:
            return
        repo_id, tags = hub.pop("repo_id", folder.name if push_to_hub else None), hub.pop("tags", None) or ()
        if not (folder / CARD).exists() and not getattr(model, "_hf_peft_config_loaded", False):
            (folder / CARD).write_text(model_card(model, repo_id, tags=tags), encoding="utf-8")
        if push_to_hub:
            changed = [name for name, time in _times(folder).items() if before.get(name) != time]
            _upload(folder, changed, repo_id, **hub)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs: Any) -> Any:
        """Upload the model to a repository of the hub, which is made if it does not exist.

        Args:
            kwargs: transformers' own: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`, `tags`.

        Returns:
            The hub's description of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, repo_id=repo_id, tags=kwargs.pop("tags", None))
            return _upload(Path(folder), os.listdir(folder), repo_id, **kwargs)


def _times(folder: Path) -> dict[str, int]:
    """Files of a folder, with the time of their last change."""
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()} if folder.is_dir() else {}


def _upload(
    folder: Path,
    names: Iterable[str],
    repo_id: str,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload files of a folder in one commit; the repository's own card stays."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    has_card = api.file_exists(repo_id, CARD, revision=revision)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[name for name in names if name != CARD or not has_card],
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )
