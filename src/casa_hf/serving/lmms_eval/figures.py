# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks of the paper, where lmms-eval's results have their scores, and what the authors report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Benchmark(NamedTuple):
    """A column of the table.

    Attributes:
        tasks: tasks of lmms-eval whose mean is its score.
        metrics: metrics that are added up.
        scale: factor from lmms-eval's score to the one that is reported.
        digits: decimals that are reported.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    scale: float = 100.0
    digits: int = 1


_MVBENCH = (
    "action_sequence moving_count action_prediction episodic_reasoning action_antonym action_count scene_transition "
    "object_shuffle object_existence fine_grained_pose unexpected_action moving_direction state_change "
    "object_interaction character_order action_localization counterfactual_inference fine_grained_action "
    "moving_attribute egocentric_navigation"
)

BENCHMARKS: Mapping[str, Benchmark] = {
    "ChartQA": Benchmark(("casa_chartqa",), ("relaxed_overall",)),
    "DocVQA": Benchmark(("casa_docvqa_val",), ("anls",)),
    "InfoVQA": Benchmark(("casa_infovqa_val",), ("anls",)),
    "OCRBench": Benchmark(("casa_ocrbench",), ("ocrbench_accuracy",), scale=1000.0, digits=0),
    "TextVQA": Benchmark(("casa_textvqa_val",), ("exact_match",)),
    "RealWorldQA": Benchmark(("casa_realworldqa",), ("exact_match",)),
    "AI2D": Benchmark(("casa_ai2d",), ("exact_match",)),
    "GQA": Benchmark(("casa_gqa",), ("exact_match",)),
    "MME": Benchmark(("casa_mme",), ("mme_perception_score", "mme_cognition_score"), scale=1.0, digits=0),
    "VideoMME": Benchmark(("videomme",), ("videomme_perception_score",), scale=1.0),
    "MVBench": Benchmark(tuple(f"mvbench_{name}" for name in _MVBENCH.split()), ("mvbench_accuracy",), scale=1.0),
    "MLVU": Benchmark(("mlvu_dev",), ("mlvu_percetion_score",), scale=1.0),
    "TempCompass": Benchmark(
        ("tempcompass_multi_choice", "tempcompass_yes_no", "tempcompass_caption_matching"),
        ("avg_accuracy",),
        scale=1.0,
    ),
}

_IMAGES = ("ChartQA", "DocVQA", "InfoVQA", "OCRBench", "TextVQA", "RealWorldQA", "AI2D", "GQA", "MME")


def _images(*scores: float) -> dict[str, float]:
    return dict(zip(_IMAGES, scores, strict=True))


# Released models at 896 pixels, from the README of the authors' repository.
RELEASED: Mapping[str, Mapping[str, float]] = {
    "Helium1-VL-2B": _images(79.2, 88.3, 58.9, 746, 75.0, 59.6, 65.5, 54.2, 1665),
    "CASA-Helium1-VL-2B": _images(77.6, 86.3, 55.1, 740, 75.5, 58.2, 66.0, 55.6, 1722),
    "CASA-Helium1-VL-2B-Shared": _images(75.2, 85.8, 52.0, 728, 74.5, 58.3, 66.2, 55.7, 1637),
    "Qwen2.5-VL-3B": _images(84.0, 93.6, 77.1, 797, 79.3, 62.2, 81.6, 61.0, 2249),
    "CASA-Qwen2_5-VL-3B": _images(81.8, 87.9, 58.2, 796, 76.5, 62.1, 76.1, 59.4, 1971),
    "CASA-Qwen2_5-VL-3B-Shared": _images(81.4, 87.8, 59.1, 797, 76.6, 63.0, 74.3, 59.2, 2075),
}


def _documents(chartqa: float, docvqa: float, infovqa: float) -> dict[str, float]:
    return {"ChartQA": chartqa, "DocVQA": docvqa, "InfoVQA": infovqa}


# The second version of the paper: tables 2 (from Helium), 3 and 4 (from Qwen2.5-VL).
PAPER: Mapping[str, Mapping[str, float]] = {
    "Helium, insertion": _documents(80.0, 87.2, 55.3),
    "Helium, CA": _documents(75.9, 85.8, 51.8),
    "Helium, CA shared": _documents(74.1, 84.0, 50.6),
    "Helium, CA replace": _documents(73.8, 84.5, 48.0),
    "Helium, CA t+v": _documents(75.3, 85.1, 52.1),
    "Qwen2.5-VL, CA": _documents(80.3, 87.0, 57.4),
    "Qwen2.5-VL, CA t+v": _documents(81.3, 87.1, 56.8),
    "Qwen2.5-VL, base": {"VideoMME": 58.8},
    "Qwen2.5-VL, CA t+v, a window for each frame": {"VideoMME": 56.9},
    "Qwen2.5-VL, CA t+v, a window for all frames": {"VideoMME": 59.0},
}

__all__ = ["BENCHMARKS", "PAPER", "RELEASED", "Benchmark"]
