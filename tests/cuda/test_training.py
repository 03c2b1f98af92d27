# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Training steps on a CUDA device: losses, gradients and updated parameters are those of the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from casa_hf.torch_varlen import TORCH_VARLEN
from casa_hf.training import CasaTrainer, PackedDataset, freeze, parameter_groups
from tests.cuda.test_model import close, in_all, put
from tests.helpers_generation import Image, batch, new_model, words
from tests.kernels import KERNELS, reference_kernels, register_torch_kernel, use_backend
from tests.labelled_device import LabelledDevices, values
from tests.training.helpers import CONVERSATIONS, load_model, load_processor

ROWS = ([*words(3, 1), Image(2, 3, 1), *words(3, 2)], [Image(1, 2, 2), *words(2, 2), Image(3, 4, 3), 5])
BACKENDS = ("sdpa", *KERNELS)
QUICK = {("casa", "sdpa"), ("exact", "sdpa"), ("casa-shared", TORCH_VARLEN), ("casa", "flash_attention_2")}


def steps(model: Any, device: str, grids: str, packed: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of three steps, and gradients of the last."""
    rows = [[part for row in ROWS for part in row]] if packed else ROWS
    inputs = put(batch(*rows), device, model.dtype, grids)
    labels = inputs["input_ids"].clone()
    if packed:
        lengths = [len(batch(row)["input_ids"][0]) for row in ROWS]
        inputs["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        del inputs["attention_mask"]
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1e-4))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant, backend", in_all(("casa", "exact", "casa-shared", "ca-ffn"), BACKENDS, QUICK))
def test_steps(variant: str, backend: str, checkpointed: bool, packed: bool, devices: LabelledDevices) -> None:
    if backend == TORCH_VARLEN and not register_torch_kernel():
        pytest.skip("this torch has no such kernel")
    dtype = torch.float64 if backend == "sdpa" else torch.bfloat16
    with reference_kernels(devices.uncounted):
        model = use_backend(new_model(variant, dtype), backend).train()
        model.model.name_tower_backend()
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        other = copy.deepcopy(model)
        losses, gradients = steps(model, "cpu", "cpu", packed)
        other.to("cuda")
        own_losses, own_gradients = steps(other, "cuda", "cpu", packed)
    assert all(map(close, own_losses, losses))
    assert own_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert own_gradients[name].is_cuda
        torch.testing.assert_close(values(own_gradients[name]), gradient, msg=name)
    for (name, parameter), own in zip(model.named_parameters(), other.parameters(), strict=True):
        assert own.is_cuda and close(own.detach(), parameter.detach()), name


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_trainer(packed: bool, casa_folder: Path, tmp_path: Path, devices: LabelledDevices) -> None:
    """CasaTrainer, which takes the device that `torch.cuda` has, with its own optimizer and evaluation."""
    pytest.importorskip("accelerate")
    processor = load_processor(casa_folder)

    def run(name: str, use_cpu: bool) -> tuple[list[Any], dict[str, Tensor]]:
        model = load_model(casa_folder, torch.float32)
        freeze(model, "paper-qwen")
        data: Any = CONVERSATIONS
        if packed:
            data = PackedDataset(CONVERSATIONS, processor, max_text_tokens=70)
        options: dict[str, Any] = {"use_cpu": use_cpu, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
        options |= {"dataloader_pin_memory": False}  # what there is none of here
        options |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "remove_unused_columns": False}
        arguments = TrainingArguments(str(tmp_path / name), per_device_train_batch_size=2, **options)
        assert arguments.device.type == ("cpu" if use_cpu else "cuda")
        trainer = CasaTrainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=processor
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*losses, trainer.evaluate()["eval_loss"]], {n: p.detach() for n, p in model.named_parameters()}

    losses, parameters = run("cpu", True)
    with devices.as_gpu(1):
        own_losses, own_parameters = run("cuda", False)
    assert own_losses == pytest.approx(losses, rel=1e-5)
    assert all(close(own_parameters[name], parameter) for name, parameter in parameters.items())
