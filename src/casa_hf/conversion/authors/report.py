# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The names of a checkpoint's tensors with what they become, from headers alone, also of a Hub id."""

from __future__ import annotations

from pathlib import Path

from ...checkpoint_files.config import is_of_authors, read_config
from ...checkpoint_files.headers import WithoutWeights
from ...checks import counted, listed
from ...folder_files import CheckpointError, WrongKindError
from .checkpoint import open_questions, read_names
from .facts import Facts
from .inference import infer_design
from .mapping_file import DROP, UNKNOWN, table_of
from .tensors import Assignment

_HOW_TO = f"""\
# The first column is a tensor, the second what it becomes in a CASA checkpoint. To mend the table, write such a name
# in place of each {UNKNOWN}, or {DROP} for a tensor that isn't needed: `casa-hf convert SOURCE OUTPUT --mapping FILE`.
# {{i}} is the number of a block; NAME[a:b] takes rows a to b of a tensor that holds several; the same tensor goes to
# all blocks with a fusion layer where {{i}} stands in the second column alone.
"""


def names_report(source: str | Path, *, revision: str | None = None, mapping: str | Path | None = None) -> str:
    """The table of a checkpoint in the format of the method's authors, with comments; weights aren't read.

    Args:
        source: folder, or Hub id, of which all files but the weights are downloaded, and of these the headers.
        revision: branch, tag or commit of a Hub id.
        mapping: path of a mapping file.

    Raises:
        CheckpointError: if there is no such checkpoint, if it is of a kind whose names are known, or if its
            configuration doesn't tell what its backbone is.
    """
    checkpoint = WithoutWeights.open(source, revision)
    if mapping is None and not is_of_authors(checkpoint.folder):
        config = read_config(checkpoint.folder, str(source))  # refuses what is none of ours
        raise WrongKindError(
            f"{source} has model_type {config.model_type!r}, whose names of tensors are known; only checkpoints in "
            "the format of the method's authors have such a table. See what would be written with `casa-hf convert "
            f"{source} --dry-run`."
        )
    headers = checkpoint.headers()
    names = read_names(checkpoint.folder, {name: tensor.shape for name, tensor in headers.items()}, mapping)
    facts, assignment = names.facts, names.assignment
    missing = [name for name in names.stock if name not in assignment.found]
    left = len(assignment.left)
    comments = [
        f"{source}{'' if checkpoint.commit is None else f' at commit {checkpoint.commit}'}: {facts.name}",
        f"{counted(len(headers), 'tensor')}: {len(headers) - left} understood, {left} not",
        *(f"found: {finding}" for finding in facts.findings),
        *_of_design(facts, assignment),
    ]
    if missing:
        comments.append(f"not found: {counted(len(missing), 'tensor')} of {facts.display_name}: {listed(missing)}")
    return "".join(f"# {line}\n" for line in comments) + _HOW_TO + table_of(assignment.lines(headers))


def _of_design(facts: Facts, assignment: Assignment) -> list[str]:
    """What the tensors say of the design, or why they don't."""
    if assignment.left:
        return ["the design is told when all tensors are understood"]
    try:
        design = infer_design(facts, assignment, {})
    except CheckpointError as error:
        return [f"contradictory: {error}"]
    return [
        *(f"found: {finding}" for finding in design.findings),
        *(f"to be given: {question}" for question in open_questions(design, facts.delimiters)),
    ]
