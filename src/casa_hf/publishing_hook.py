# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where `casa_hf.hub` comes in when a model or a processor is saved or published.

The modelling files know nothing of the Hub. A checkpoint that carries them is saved and published by Transformers
alone, as is a class whose hook is not filled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, ClassVar

from transformers.utils import PushToHubMixin


class PublishingHook:
    """What happens around saving and publishing: nothing."""

    def saving(self, saved: Any, folder: Any, options: Mapping[str, Any]) -> AbstractContextManager[None]:
        """A context for `save_pretrained`.

        Args:
            saved: Model or processor.
            folder: Folder that it is saved in.
            options: Other arguments of the call, by name.
        """
        return nullcontext()

    def pushing(self, pushed: Any, repository: str, options: Mapping[str, Any]) -> AbstractContextManager[None]:
        """A context for `push_to_hub`, with the arguments of that call as in `saving`."""
        return nullcontext()

    def upload(
        self,
        pushed: Any,
        upload: Callable[..., Any],
        folder: Any,
        repository: str,
        timestamps: Mapping[str, float],
        **options: Any,
    ) -> Any:
        """Commit files of a folder to a repository.

        Args:
            pushed: Model or processor.
            upload: Transformers' own function, `PushToHubMixin._upload_modified_files`.
            folder: Folder with the files.
            repository: Hub id.
            timestamps: Times of the files that were there before, by name, in seconds.
            **options: Options of the commit, as of `push_to_hub`.

        Returns:
            What `push_to_hub` returns.
        """
        return upload(folder, repository, timestamps, **options)


class PublishedByHook(PushToHubMixin):
    """A base class of models and processors, before that of Transformers.

    Attributes:
        publishing_hook: Hook with what happens around saving and publishing.
    """

    publishing_hook: ClassVar[PublishingHook] = PublishingHook()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; see `publishing_hook`."""
        save = super().save_pretrained
        options = signature(save).bind_partial(save_directory, *args, **kwargs).arguments
        options |= options.pop("kwargs", {})
        with self.publishing_hook.saving(self, save_directory, options):
            return save(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As in Transformers; see `publishing_hook`."""
        with self.publishing_hook.pushing(self, repo_id, kwargs):
            return super().push_to_hub(repo_id, **kwargs)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, files_timestamps: Any, **kwargs: Any) -> Any:
        """The one step that `push_to_hub` and `save_pretrained(push_to_hub=True)` share."""
        upload = super()._upload_modified_files
        return self.publishing_hook.upload(self, upload, working_dir, repo_id, files_timestamps, **kwargs)
