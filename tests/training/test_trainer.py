# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' Trainer as it is, TRL's SFTTrainer, and CasaTrainer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.training import CasaDataCollator, CasaTrainer, PackedDataset, freeze, generate_answers
from casa_hf.training.samples import Dialogue
from tests.training.helpers import CONVERSATIONS, ask, load_model, loss_and_gradients


def arguments(folder, **options):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "remove_unused_columns": False,
            "use_cpu": True,
            **options,
        }
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def fusion_model(folder, dtype=torch.float32):
    model = load_model(folder, dtype)
    freeze(model, "paper-qwen")
    return model


def test_answers_are_about_images_as_the_collator_makes_them(casa_folder, tmp_path):
    """A run's limits hold in its evaluation, whatever processor is saved."""
    small, large = (CasaProcessor.from_pretrained(casa_folder, max_pixels=edge**2) for edge in (56, 168))
    model, given = load_model(casa_folder, torch.float32), {"max_new_tokens": 12, "do_sample": False}
    examples = [CONVERSATIONS[0]]
    expected, others = (generate_answers(model, processor, examples, **given) for processor in (small, large))
    assert expected != others
    trainer = CasaTrainer(
        model=model,
        args=arguments(tmp_path),
        eval_dataset=examples,
        processing_class=large,
        data_collator=CasaDataCollator(small),
        generate=given,
        score=lambda answers, references: {"answers": answers},
    )
    assert trainer.evaluate()["eval_answers"] == expected


def test_accumulated_batches_count_tokens_not_batches(casa_folder, processor, tmp_path):
    """One step over four unequal batches is the step over all of them."""
    lengths = [int((CasaDataCollator(processor)([example])["labels"] != -100).sum()) for example in CONVERSATIONS]
    assert len(set(lengths)) > 1
    model = fusion_model(casa_folder, torch.float64)
    before = weights(model)
    _, gradients = loss_and_gradients(model, CasaDataCollator(processor)(CONVERSATIONS))
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4, optim="sgd", max_grad_norm=0),
        train_dataset=CONVERSATIONS,
        data_collator=CasaDataCollator(processor),
        processing_class=processor,
    )
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    for name, value in weights(model).items():
        step = (before[name] - value) / 1e-2
        # The optimizer rounds the difference of nearly equal numbers, and the loss is in float32.
        assert (step - gradients[name]).abs().max() <= 1e-4 * gradients[name].abs().max(), name


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_of_an_evaluation_is_a_mean_over_answer_tokens(casa_folder, processor, tmp_path, batch_size, packed):
    model = load_model(casa_folder, torch.float32)
    batch = CasaDataCollator(processor)(CONVERSATIONS)
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).item()
    trainer = CasaTrainer(
        model=model,
        args=arguments(tmp_path, per_device_eval_batch_size=batch_size),
        eval_dataset=PackedDataset(CONVERSATIONS, processor, max_text_tokens=70) if packed else CONVERSATIONS,
        processing_class=processor,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(metric_key_prefix="test")["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_without_answers_have_no_part_in_the_loss_of_an_evaluation(casa_folder, processor, tmp_path):
    """A batch of them alone has the mean of nothing, which is not a number."""

    class WithoutThird(CasaDataCollator):
        def __call__(self, features):
            batch = super().__call__(features)
            return {**batch, "labels": torch.full_like(batch["labels"], -100)} if features == [missing] else batch

    missing = CONVERSATIONS[2]

    def evaluated(collator, examples):
        trainer = CasaTrainer(
            model=load_model(casa_folder, torch.float32),
            args=arguments(tmp_path, per_device_eval_batch_size=1),
            eval_dataset=examples,
            data_collator=collator,
        )
        return trainer.evaluate()["eval_loss"]

    others = [example for example in CONVERSATIONS if example is not missing]
    expected = evaluated(CasaDataCollator(processor), others)
    assert evaluated(WithoutThird(processor), CONVERSATIONS) == pytest.approx(expected, rel=1e-6)


def outputs_with_logits(model, found):
    """Have each forward of a model note whether it gave logits."""
    return model.register_forward_hook(lambda module, args, output: found.append(output.logits is not None))


def test_logits_are_computed_only_for_those_who_read_them(casa_folder, processor, tmp_path):
    """Neither for the loss of training nor for that of an evaluation; the losses are those with logits."""
    model, found = fusion_model(casa_folder, torch.float64), []
    given = {"model": model, "args": arguments(tmp_path, max_steps=2), "processing_class": processor}
    given |= {"train_dataset": CONVERSATIONS, "eval_dataset": CONVERSATIONS, "lr_new": 0.0, "lr_existing": 0.0}
    expected = CasaTrainer(
        **given, compute_loss_func=lambda outputs, labels, num_items_in_batch: plain(outputs, labels)
    )
    hook = outputs_with_logits(model, found)
    losses = []
    for trainer in (expected, CasaTrainer(**given)):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
        assert found == [trainer is expected] * len(found) and len(found) == 2 + 1
        found.clear()
    hook.remove()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def plain(outputs, labels):
    """The mean over the tokens of a batch."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_metrics_and_callers_get_logits(casa_folder, processor, tmp_path):
    model, shapes = fusion_model(casa_folder), []
    trainer = CasaTrainer(
        model=model,
        args=arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=CONVERSATIONS,
        processing_class=processor,
        compute_metrics=lambda prediction: shapes.append(prediction.predictions.shape) or {"metric": 3.0},
    )
    batch = CasaDataCollator(processor)(CONVERSATIONS)
    assert trainer.evaluate()["eval_metric"] == 3.0
    assert shapes == [(*batch["labels"].shape, model.config.text_config.vocab_size)]
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape == shapes[0] and plain(outputs, batch["labels"]).item() == pytest.approx(loss.item())
    assert trainer.predict(CONVERSATIONS).predictions.shape == shapes[0]


def test_smoothed_labels_are_those_of_the_next_token(casa_folder, processor, tmp_path):
    """One step over four unequal batches is that of PyTorch's smoothed loss of shifted labels over all of them."""
    model = fusion_model(casa_folder, torch.float64)
    before = weights(model)
    batch = CasaDataCollator(processor)(CONVERSATIONS)
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.3).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    trainer = CasaTrainer(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=1,
            gradient_accumulation_steps=4,
            optim="sgd",
            max_grad_norm=0,
            label_smoothing_factor=0.3,
        ),
        train_dataset=CONVERSATIONS,
        processing_class=processor,
        lr_new=1e-2,
        lr_existing=1e-2,
    )
    trainer.train()
    for name, value in weights(model).items():
        step = (before[name] - value) / 1e-2
        assert (step - gradients[name]).abs().max() <= 1e-4 * gradients[name].abs().max(), name


@pytest.mark.parametrize("bf16", [False, True])
def test_the_plain_trainer_learns_and_keeps_frozen_weights(casa_folder, processor, tmp_path, bf16):
    model = fusion_model(casa_folder)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=12, per_device_train_batch_size=4, bf16=bf16),
        train_dataset=CONVERSATIONS,
        eval_dataset=CONVERSATIONS,
        data_collator=CasaDataCollator(processor, packing=True),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert all(p.dtype == torch.float32 for p in parameters.values())


def test_a_resumed_run_ends_where_an_unbroken_one_does(casa_folder, processor, tmp_path):
    def trainer(folder, steps):
        return CasaTrainer(
            model=fusion_model(casa_folder),
            args=arguments(folder, max_steps=steps, save_strategy="steps", save_steps=3, seed=3),
            train_dataset=PackedDataset(CONVERSATIONS, processor, max_text_tokens=70),
            processing_class=processor,
        )

    unbroken = trainer(tmp_path / "a", 6)
    unbroken.train()
    first = trainer(tmp_path / "b", 3)
    first.train()
    checkpoint = tmp_path / "b" / "checkpoint-3"
    assert (checkpoint / "preprocessor_config.json").exists() or (checkpoint / "processor_config.json").exists()
    CasaProcessor.from_pretrained(checkpoint)
    second = trainer(tmp_path / "b", 6)
    second.train(resume_from_checkpoint=str(checkpoint))
    for name, value in weights(unbroken.model).items():
        assert torch.equal(weights(second.model)[name], value), name
        assert not torch.equal(weights(first.model)[name], value), name


@pytest.mark.parametrize("by_name", [True, False])
def test_a_finished_run_takes_no_further_step(casa_folder, processor, tmp_path, caplog, by_name):
    """Three steps end within a pass over four conversations."""

    def trainer():
        return CasaTrainer(
            model=fusion_model(casa_folder),
            args=arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3),
            train_dataset=CONVERSATIONS,
            processing_class=processor,
        )

    first, second = trainer(), trainer()
    first.train()
    assert "finished" not in caplog.text
    output = second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if by_name else True)
    assert output.global_step == second.state.global_step == 3
    assert "has 3 of 3 steps, so this run is finished" in caplog.text
    assert not any("loss" in entry for entry in second.state.log_history[3:])
    assert all(torch.equal(weights(second.model)[name], value) for name, value in weights(first.model).items())
    second.train()  # again, from where it is
    assert not all(torch.equal(weights(second.model)[name], value) for name, value in weights(first.model).items())


def test_two_rates_and_evaluation_by_answers(casa_folder, processor, tmp_path):
    model = load_model(casa_folder, torch.float32)
    freeze(model, "paper-helium")
    # One sure answer: what the model says by itself.
    options = {"max_new_tokens": 5, "do_sample": False}
    said = generate_answers(model, processor, CONVERSATIONS[:1], **options)[0]
    evaluated = [ask("What is in this picture?", said, "cat"), *CONVERSATIONS[1:]]
    trainer = CasaTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=1, learning_rate=1.0, weight_decay=0.1, per_device_eval_batch_size=3),
        train_dataset=CONVERSATIONS,
        eval_dataset=evaluated,
        processing_class=processor,
        lr_new=0.0,
        lr_existing=1e-3,
        generate=options,
    )
    assert trainer.evaluate()["eval_exact_match"] == trainer.state.log_history[-1]["eval_exact_match"] == 0.25
    before = weights(model)
    trainer.train()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "casa_attn" not in name}


def test_answers_in_batches_are_those_of_single_questions(casa_folder, processor):
    model = load_model(casa_folder).train()
    options = {"max_new_tokens": 6, "do_sample": False}
    single = []
    for example in CONVERSATIONS:
        question = Dialogue.of(example).question()[0]
        inputs = processor(
            text=[processor.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)],
            images=question.images or None,
            return_tensors="pt",
        )
        output = model.eval().generate(**inputs, **options)
        new = output[0, inputs["input_ids"].shape[1] :]
        single.append(processor.decode(new, skip_special_tokens=True).strip())
    model.train()
    assert generate_answers(model, processor, CONVERSATIONS, batch_size=3, **options) == single
    assert len(set(single)) > 1 and model.training


def test_a_table_of_datasets_trains_without_further_arguments(casa_folder, processor, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(CONVERSATIONS[:1] + CONVERSATIONS[2:3])
    table = table.cast_column("images", datasets.List(datasets.Image()))
    trainer = CasaTrainer(
        model=fusion_model(casa_folder),
        args=arguments(tmp_path, max_steps=1, remove_unused_columns=True),
        train_dataset=table,
        processing_class=processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[0] > 0
    expected = CasaDataCollator(processor)([CONVERSATIONS[0]])
    found = CasaDataCollator(processor)([table[0]])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    trainer.train()


def test_a_trained_model_loads_again(casa_folder, processor, tmp_path):
    trainer = CasaTrainer(
        model=fusion_model(casa_folder),
        args=arguments(tmp_path / "run", max_steps=1),
        train_dataset=CONVERSATIONS,
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = CasaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    batch = CasaDataCollator(CasaProcessor.from_pretrained(tmp_path / "saved"))(CONVERSATIONS)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)
    assert "use_cache" not in json.loads((tmp_path / "saved" / "config.json").read_text())


ALIKE = CONVERSATIONS[:1] + CONVERSATIONS[2:3]  # as rows of one table


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ALIKE)


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_an_iterable_trains_as_its_list_does(casa_folder, processor, tmp_path, kind):
    """Two conversations in a batch, whose pixels have another number of rows; evaluation by answers too."""
    stream = Stream()
    if kind == "datasets":
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_list(ALIKE)
        stream = table.cast_column("images", datasets.List(datasets.Image())).to_iterable_dataset()

    def trained(data, folder):
        trainer = CasaTrainer(
            model=fusion_model(casa_folder),
            args=arguments(
                tmp_path / folder, max_steps=2, per_device_train_batch_size=2, train_sampling_strategy="sequential"
            ),
            train_dataset=data,
            eval_dataset=data,
            processing_class=processor,
            generate={"max_new_tokens": 2},
        )
        trainer.train()
        return weights(trainer.model), trainer.evaluate()

    expected, scores = trained(ALIKE, "list")
    found, found_scores = trained(stream, "stream")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found_scores["eval_loss"] == pytest.approx(scores["eval_loss"], rel=1e-6)
    assert found_scores["eval_exact_match"] == scores["eval_exact_match"]


class SizedStream(Stream):
    """An iterable that knows its length."""

    def __len__(self):
        return len(ALIKE)


def test_an_iterable_with_a_length_is_evaluated_as_its_list_is(casa_folder, processor, tmp_path):
    def evaluated(data):
        trainer = CasaTrainer(
            model=load_model(casa_folder, torch.float32),
            args=arguments(tmp_path, per_device_eval_batch_size=2),
            eval_dataset=data,
            processing_class=processor,
            generate={"max_new_tokens": 3, "do_sample": False},
            score=lambda answers, references: {"answers": answers},
        )
        metrics = trainer.evaluate()
        return metrics["eval_answers"], metrics["eval_loss"]

    assert evaluated(SizedStream()) == evaluated(ALIKE)
    with pytest.raises(ValueError, match="The examples are an iterable, a SizedStream"):
        PackedDataset(SizedStream(), processor)


class Passes(torch.utils.data.IterableDataset):
    """Conversations in another order in each pass."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return (CONVERSATIONS[index] for index in order)


class SizedPasses(Passes):
    def __len__(self):
        return 4


def shuffled_table():
    """Streamed, with an order that `datasets` draws again in each pass."""
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": ask(f"What is in picture {n}?", f"Number {n}.")["messages"]} for n in range(4)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=1, buffer_size=4)


@pytest.mark.parametrize(
    ("data", "accumulated", "saved"),
    [
        (shuffled_table, 1, 7),
        pytest.param(Passes, 1, 2, marks=pytest.mark.slow),  # in the first pass
        pytest.param(Passes, 1, 4, marks=pytest.mark.slow),  # at its end
        (Passes, 1, 7),  # in the second
        pytest.param(
            Passes, 3, 2, marks=pytest.mark.slow
        ),  # in the second; each leaves one batch over, whose gradients count in the next
        (Passes, 3, 3),
        pytest.param(SizedPasses, 1, 7, marks=pytest.mark.slow),
        (SizedPasses, 3, 3),
    ],
)
def test_an_iterable_goes_on_in_the_pass_where_it_was(casa_folder, processor, tmp_path, data, accumulated, saved):
    """Weights are those of the run that wasn't interrupted, bit for bit; one that is made longer too."""

    def trained(steps, resume=None):
        trainer = CasaTrainer(
            model=fusion_model(casa_folder),
            args=arguments(
                tmp_path / "run",
                max_steps=steps,
                save_strategy="steps",
                save_steps=saved,
                gradient_accumulation_steps=accumulated,
            ),
            train_dataset=data(),
            processing_class=processor,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(saved + 2)
    shutil.move(tmp_path / "run", tmp_path / "whole")
    trained(saved)
    for folder in ("whole", "run"):  # of a run of the same steps, and of a shorter one
        resumed = trained(saved + 2, str(tmp_path / folder / f"checkpoint-{saved}"))
        assert resumed.state.epoch == whole.state.epoch
        for name, value in weights(whole.model).items():
            assert torch.equal(weights(resumed.model)[name], value), name


@pytest.mark.parametrize("generate", [None, {"max_new_tokens": 1}])
def test_the_speed_of_an_evaluation_counts_conversations(casa_folder, processor, tmp_path, generate):
    data = PackedDataset(CONVERSATIONS, processor, max_text_tokens=150)
    assert len(data) < len(CONVERSATIONS)
    trainer = CasaTrainer(
        model=load_model(casa_folder, torch.float32),
        args=arguments(tmp_path, per_device_eval_batch_size=1),
        eval_dataset=data,
        processing_class=processor,
        generate=generate,
    )
    for metrics in (trainer.evaluate(), {**trainer.evaluate(), **trainer.state.log_history[-1]}):
        speed = {name: metrics[f"eval_{name}_per_second"] * metrics["eval_runtime"] for name in ("samples", "steps")}
        assert speed == pytest.approx({"samples": len(CONVERSATIONS), "steps": len(data)}, rel=1e-2)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # its name in 5.17
def test_recomputed_activations_change_nothing(casa_folder, processor, tmp_path):
    """`gradient_checkpointing=True` of the arguments, with the frozen parts that the recipe has."""

    def trained(**options):
        model = fusion_model(casa_folder)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, max_steps=3, per_device_train_batch_size=2, **options),
            train_dataset=CONVERSATIONS,
            data_collator=CasaDataCollator(processor),
        )
        recomputed = []
        mlp = model.model.language_model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_: recomputed.append(True))
        trainer.train()
        return weights(model), len(recomputed)

    expected, once = trained()
    found, twice = trained(gradient_checkpointing=True)
    assert twice == 2 * once
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_the_processor_of_the_collator_is_saved(casa_folder, processor, tmp_path):
    collator = CasaDataCollator(processor)
    options = {"args": arguments(tmp_path / "run", max_steps=1), "train_dataset": CONVERSATIONS}
    trainer = CasaTrainer(fusion_model(casa_folder), data_collator=collator, **options)
    trainer.save_model(str(tmp_path / "saved"))
    assert CasaProcessor.from_pretrained(tmp_path / "saved").to_dict() == processor.to_dict()
    with pytest.raises(ValueError, match=r"no processor.*processing_class=processor"):
        CasaTrainer(fusion_model(casa_folder), **options)


def test_several_gpus_in_one_process_are_refused(casa_folder, processor, tmp_path):
    options = arguments(tmp_path / "run", max_steps=1)
    assert options.n_gpu <= 1
    options._n_gpu = 2  # as it is where there are two
    model = fusion_model(casa_folder)
    with pytest.raises(ValueError, match=r"2 GPUs but only one process.*accelerate launch --num_processes 2"):
        CasaTrainer(model, options, processing_class=processor)
    assert not (tmp_path / "run").exists()
    model.hf_device_map = {"model.visual": "meta", "": "cpu"}  # as `device_map` leaves one whose layers are on several
    CasaTrainer(model, options, processing_class=processor)


def test_several_gpus_and_a_model_that_is_made_later(casa_folder, processor, tmp_path):
    """Refused as with a model, unless it is spread over them."""
    options = arguments(tmp_path / "run", max_steps=1)
    options._n_gpu = 2  # as it is where there are two

    def spread():
        model = fusion_model(casa_folder)
        model.hf_device_map = {"model.visual": "meta", "": "cpu"}
        return model

    with pytest.raises(ValueError, match="2 GPUs but only one process"):
        CasaTrainer(model_init=lambda: fusion_model(casa_folder), args=options, processing_class=processor)
    assert not (tmp_path / "run").exists()
    trainer = CasaTrainer(model_init=spread, args=options, train_dataset=CONVERSATIONS, processing_class=processor)
    assert trainer.args.n_gpu == 1
    assert trainer.train().global_step == 1
    assert "use_cache" not in json.loads(trainer.model.config.to_json_string())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # its name in 5.17
@pytest.mark.parametrize("before", [None, True, False])
def test_a_model_is_saved_with_the_use_cache_that_it_had(casa_folder, processor, tmp_path, before):
    model = fusion_model(casa_folder)
    if before is not None:
        model.config.use_cache = before
    trainer = CasaTrainer(
        model,
        arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, gradient_checkpointing=True),
        train_dataset=CONVERSATIONS,
        processing_class=processor,
    )
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-1" / "config.json").read_text()).get("use_cache") is before
