# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Questions and answers of the paper's benchmarks, as the authors' evaluation writes and reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def question(doc: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The question as the dataset has it, and what asks for a short answer.

    Args:
        doc: row of the dataset, with `question`.
        settings: `lmms_eval_specific_kwargs` of the task, with `post_prompt`.
    """
    return f"{doc['question']}{settings['post_prompt']}"


def stripped_question(doc: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The same, without space around the question (MME)."""
    return f"{doc['question'].strip()}{settings['post_prompt']}"


def lettered_question(doc: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """A question with choices, each after its letter (AI2D).

    Args:
        doc: row of the dataset, with `question` and `options`.
        settings: `lmms_eval_specific_kwargs` of the task, with `post_prompt`.
    """
    asked = doc["question"]
    if not asked.rstrip().endswith(("?", ".")):
        asked += "?"
    choices = [f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(doc["options"])]
    return "\n".join([f"Question: {asked}", "Choices:", *choices]) + settings["post_prompt"]


class WithoutFinalStop:
    """Filter of lmms-eval: answers without full stops, and then space, at their end."""

    def apply(self, resps: Iterable[str], docs: Any) -> list[str]:
        """The answers, one for each request."""
        return [answer.rstrip(".").strip() for answer in resps]


class FirstLetter:
    """Filter of lmms-eval: the first character of an answer, after "Answer: " if it begins with that."""

    def apply(self, resps: Iterable[str], docs: Any) -> list[str]:
        """The characters, one for each request; nothing for an empty answer."""
        return [answer.removeprefix("Answer: ")[:1] for answer in resps]


def share_right(results: Sequence[Mapping[str, Any]]) -> float:
    """Share of right answers, of those that were asked (OCRBench).

    lmms-eval's own counts on from run to run of a process, and takes each run for all 1,000 questions.

    Args:
        results: what lmms-eval's `ocrbench_process_results` gives for each question, with `score`.
    """
    return sum(result["score"] for result in results) / len(results)


def score_of_pairs(results: Sequence[Mapping[str, Any]]) -> float:
    """lmms-eval's score of MME, which refuses pictures of which only one of the two questions was asked.

    Args:
        results: what lmms-eval's `mme_process_results` gives for each question.
    """
    from lmms_eval.tasks.mme.utils import mme_aggregate_results

    asked = Counter((result["category"], result["question_id"]) for result in results)
    return mme_aggregate_results([each for each in results if asked[each["category"], each["question_id"]] == 2])


__all__ = [
    "FirstLetter",
    "WithoutFinalStop",
    "lettered_question",
    "question",
    "score_of_pairs",
    "share_right",
    "stripped_question",
]
