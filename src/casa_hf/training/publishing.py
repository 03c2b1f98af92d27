# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' Trainer, with the Hub as CASA checkpoints need it: what others wrote there stays.

Transformers' card is about one run and replaces the repository's; ours has a part for the run, and keeps the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..configuration_casa import CasaConfig
from ..folder_files import own_file
from ..hub.card import published_card, training_procedure
from ..hub.card_parts import Card, decode_card, union
from ..hub.errors import explained
from ..hub.repositories import (
    CARD,
    check_branch_name,
    client,
    new_branch,
    present_card,
    refuse_foreign,
    repository_info,
)

# Of every card that a Trainer makes.
_TAG = "generated_from_trainer"


class PublishingTrainer(Trainer):
    """Trainer that publishes CASA checkpoints; arguments are those of `Trainer`."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers; what people wrote into the card of the branch stays, see `create_model_card`.

        A branch that doesn't exist is created, and removed if the push is refused.
        """
        # The base class waits for it between making the card and sending it, when somebody may edit the card.
        self._finish_current_push()
        if self.hub_model_id is None:
            private = args[0] if args else kwargs.get("private")  # from Transformers 5.24 on
            self.init_hf_repo(token, revision=revision, **({} if private is None else {"private": private}))
        # The base class passes what it doesn't know itself to `create_model_card`.
        kwargs |= {"hub_token": token, "hub_revision": revision}
        with self._branch(token, revision):
            return super().push_to_hub(commit_message, blocking, token, revision, *args, **kwargs)

    @contextmanager
    def _branch(self, token: str | None = None, revision: str | None = None) -> Iterator[None]:
        """Create the branch of a push if need be: the base class would fail without it, at the end of the training.

        The base class sends everything in the output folder; a link there that leads elsewhere is refused.
        """
        revision = self.args.hub_revision if revision is None else revision
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            for file in folder.rglob("*"):
                own_file(folder, file.relative_to(folder))
        if revision is None or not self.is_world_process_zero():
            yield
            return
        api = client(self.args.hub_token if token is None else token)
        info, is_new = repository_info(api, self.hub_model_id, revision)
        with new_branch(api, self.hub_model_id, revision, str(info.sha)) if is_new else nullcontext():
            yield

    def init_hf_repo(self, token: str | None = None, *args: Any, revision: str | None = None, **kwargs: Any) -> None:
        """As in Transformers, before the training: what would have a push refused after it is found here.

        Raises:
            CheckpointError: if the token is unusable, the Hub can't be reached, doesn't accept the token, or doesn't
                let it write there; if the repository holds another model; or if a card, there or in the output folder,
                can't be read.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        if not self.is_world_process_zero():
            return super().init_hf_repo(token, *args, **kwargs)
        file = Path(self.args.output_dir) / CARD  # the base class reads it for its own
        if file.is_file():
            Card.read(decode_card(file.read_bytes(), str(file)), str(file))
        revision = self.args.hub_revision if revision is None else revision
        check_branch_name(revision)
        api = client(self.args.hub_token if token is None else token)
        with explained(name, f"Preparing {name}"):
            super().init_hf_repo(token, *args, **kwargs)
            info, _ = repository_info(api, self.hub_model_id, revision)
            refuse_foreign(api, self.hub_model_id, info, suits_adapters=hasattr(self.model, "peft_config"))
            present_card(api, self.hub_model_id, info)

    def create_model_card(
        self, *args: Any, hub_token: str | None = None, hub_revision: str | None = None, **kwargs: Any
    ) -> None:
        """As in Transformers; for the Hub, with what the card of a CASA checkpoint says.

        The run's procedure and results go into our part of the repository's card.

        Args:
            *args, **kwargs: arguments of Transformers.
            hub_token, hub_revision: token, and branch of the repository whose card is kept; None for those of the
                training arguments.
        """
        super().create_model_card(*args, **kwargs)
        config = getattr(self.model, "config", None)
        if self.hub_model_id is None or not self.is_world_process_zero() or not isinstance(config, CasaConfig):
            return
        file = Path(self.args.output_dir) / CARD
        card = Card.read(file.read_text("utf-8"), CARD)
        card.data["tags"] = union(card.data.get("tags"), [_TAG])  # PEFT replaces those of the Trainer
        _drop_folder(card, config.name_or_path)
        procedure, card.text = training_procedure(card.text), ""
        api = client(self.args.hub_token if hub_token is None else hub_token)
        revision = self.args.hub_revision if hub_revision is None else hub_revision
        info, _ = repository_info(api, self.hub_model_id, revision)
        readme = published_card(
            card.write(),
            config,
            self.hub_model_id,
            revision=revision,
            present=present_card(api, self.hub_model_id, info),
            procedure=procedure,
            needs_origin=False,
        )
        file.write_text(readme, "utf-8")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in Transformers, without the model card that an earlier push has left in the output folder.

        The whole folder is pushed, and that card would undo what was written on the Hub since. The push at the end of
        the run makes a new one. A README.md that somebody else wrote stays, and is pushed.
        """
        file = Path(self.args.output_dir) / CARD
        sends = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        if sends and file.is_file() and f"\n- {_TAG}\n" in file.read_text("utf-8", "replace"):
            file.unlink()
        with self._branch() if sends else nullcontext():
            super()._push_from_checkpoint(checkpoint_folder)


def _drop_folder(card: Card, name: str | None) -> None:
    """Remove a base model that is a folder of this machine, as PEFT names it: it means nothing to others."""
    if not name or not os.path.isdir(name):
        return
    if card.data.get("base_model") == name:
        card.data.pop("base_model")
    card.data["tags"] = [tag for tag in card.data.get("tags") or [] if tag != f"base_model:adapter:{name}"]
