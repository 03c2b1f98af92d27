# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Datasets of conversations: mixtures, datasets by name, and errors that say which example is meant."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from casa_hf.training import (
    CasaDataCollator,
    PackedDataset,
    TrainingConfig,
    generate_answers,
    load_conversations,
    load_mixture,
)
from casa_hf.training import recipe as recipe_module
from casa_hf.training.data import Mixture, shares
from casa_hf.training.samples import measure
from tests.clips import write_clip
from tests.training.helpers import CONVERSATIONS, PHOTOGRAPHS, ask, load_model, load_processor


def write(path, answers, image=None):
    """Conversations with these answers as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**ask("What?", answer), "images": []} for answer in answers]
    for row in rows if image else []:
        row["messages"][0]["content"].insert(0, {"type": "image"})
        row["images"] = [image]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def answers(examples):
    return [example["messages"][-1]["content"][0]["text"] for example in examples]


@pytest.fixture
def files(tmp_path):
    images = write(tmp_path / "images" / "train.jsonl", [f"image {index}" for index in range(70)])
    videos = write(tmp_path / "videos" / "train.jsonl", [f"video {index}" for index in range(9)])
    return images, videos


# ---------------------------------------------------------------- mixtures


def test_weights_are_shares_of_the_conversations_and_none_is_left_out(files):
    images, videos = files
    data = [{"path": images, "weight": 3}, {"path": videos, "weight": 1}]
    found = Counter(answers(load_mixture(data)))
    # 70 are three quarters of 93 1/3; of 94, three quarters are 70.5.
    by_kind = Counter(answer.split()[0] for answer in found.elements())
    assert sum(by_kind.values()) == 94 and by_kind["image"] in (70, 71)
    assert {count for answer, count in found.items() if "video" in answer} <= {2, 3}  # 23 or 24 of 9
    assert len(found) == 79
    swapped = Counter(answers(load_mixture([{"path": images, "weight": 0.1}, {"path": videos, "weight": 0.9}])))
    assert sum(swapped.values()) == 700 and sum(swapped[f"video {index}"] for index in range(9)) == 630
    assert set(swapped.values()) == {1, 70}


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([30, 10], [3, 1], [30, 10]),
        ([30, 1], [3, 1], [30, 10]),
        ([1, 10], [0.3, 0.1], [30, 10]),
        ([30, 70], [0.3, 0.7], [30, 70]),
        ([1, 1, 1], [1, 1, 1], [1, 1, 1]),
        ([5, 1, 1], [1, 1, 1], [5, 5, 5]),
        ([7], [0.2], [7]),
    ],
)
def test_numbers_of_conversations(sizes, weights, expected):
    assert shares(sizes, weights) == expected


def test_the_order_is_the_seed_s(files):
    data = [{"path": path, "weight": weight} for path, weight in zip(files, (3, 1), strict=True)]
    first = answers(load_mixture(data, seed=5))
    assert first == answers(load_mixture(data, seed=5)) != answers(load_mixture(data, seed=6))
    kinds = "".join(answer[0] for answer in first)
    assert "iiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiii" not in kinds and "vvvvvvvvvvv" not in kinds
    one = answers(load_mixture(files[0], seed=5))
    assert sorted(one) == sorted(f"image {index}" for index in range(70)) and one != sorted(one)
    both = Counter(answers(load_mixture(list(files))))
    assert both.keys() == set(first) and set(both.values()) == {1}


def test_a_conversation_that_occurs_again_is_read_once(processor):
    class Read(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    order = torch.tensor([2, 0, 2, 1, 2])
    packed = PackedDataset(Mixture([Read(CONVERSATIONS[:2]), Read(CONVERSATIONS[2:3])], order), processor)
    assert sorted(read) == [0, 0, 1]
    assert [example for row in packed for example in row] == [CONVERSATIONS[index] for index in order]
    sizes = [measure(processor, CONVERSATIONS[index]) for index in order]
    assert (packed.num_text_tokens, packed.num_image_tokens) == tuple(map(sum, zip(*sizes, strict=True)))


def test_a_run_packs_images_and_videos_together(casa_folder, tmp_path):
    """A folder with a file of each kind gives rows of both, other ones for another seed."""
    write(tmp_path / "images.jsonl", [f"image {index}" for index in range(12)])
    write(tmp_path / "videos.jsonl", [f"video {index}" for index in range(12)])
    processor = load_processor(casa_folder)
    settings = {"model": "m", "output": "o", "max_text_tokens": 120}

    def rows(data, **options):
        config = TrainingConfig.from_dict({**settings, "data": data, **options})
        packed = recipe_module._pack(config, processor, load_mixture(config.data, seed=config.seed))
        return [tuple(answers(row)) for row in packed]

    found = rows(str(tmp_path))
    assert len(found) > 3 and max(map(len, found)) > 2
    assert sum(len({answer.split()[0] for answer in row}) == 2 for row in found) > len(found) / 2
    assert found == rows(str(tmp_path)) != rows(str(tmp_path), seed=1)
    weighted = [{"path": str(tmp_path / f"{kind}s.jsonl"), "weight": w} for kind, w in (("image", 3), ("video", 1))]
    counts = Counter(answer.split()[0] for row in rows(weighted) for answer in row)
    assert counts == {"image": 36, "video": 12}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], ["empty"]),
        ([{"path": "a", "weight": 1}, "b"], ["b has no weight", "a has one"]),
        ([{"path": "a", "weight": 0}], ["weight of a", "0", "positive"]),
        ([{"path": "a", "weight": True}], ["True", "positive"]),
        ([{"path": "a", "wieght": 1}], ["wieght", "path and optionally name, split, weight"]),
        ([3], ["3", "a path, or a mapping"]),
    ],
)
def test_mixtures_that_say_nothing_are_refused(data, words):
    with pytest.raises(ValueError) as refused:
        load_mixture(data)
    assert all(word in str(refused.value) for word in words)


def test_a_share_of_nothing_is_refused(files, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    empty = str(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"empty\.jsonl has a weight but no conversations"):
        load_mixture([{"path": files[0], "weight": 1}, {"path": empty, "weight": 1}])
    assert len(load_mixture([files[0], empty])) == 70


def test_no_conversations_at_all_are_not_too_long_ones(processor, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no conversations in the data"):
        PackedDataset(load_mixture(str(tmp_path)), processor)


def test_a_split_of_what_is_read_whole_is_refused(files, tmp_path):
    """Given for one dataset or for all of them; the default of an evaluation isn't given."""
    file, folder = files[0], str(tmp_path / "videos")
    for path, kind in ((file, "a file"), (folder, "a folder without a name")):
        words = f"split='test' is for datasets with splits, but {path} is {kind}"
        with pytest.raises(ValueError, match=words):
            load_conversations(path, "test")
        with pytest.raises(ValueError, match=words):
            load_mixture([files[1], {"path": path, "split": "test"}])
    with pytest.raises(ValueError, match="The split 'test' is for datasets that don't name their own"):
        load_mixture([file, folder], "test")
    assert len(load_mixture([file, folder], default_split="validation")) == 79


# ---------------------------------------------------------------- datasets by name


@pytest.fixture
def dataset(tmp_path):
    """A folder as it would be on the Hub: two configurations with two splits each."""
    pytest.importorskip("datasets")
    folder = tmp_path / "me" / "data-v1.5"
    entries = []
    for name in ("charts", "photos"):
        entries.append(f"- config_name: {name}\n  data_files:")
        for split in ("train", "test"):
            write(folder / name / f"{split}.jsonl", [f"{name} {split} {index}" for index in range(4)], "p/cat.jpg")
            entries.append(f"  - split: {split}\n    path: {name}/{split}.jsonl")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(entries) + "\n---\n")
    (folder / "p").mkdir()
    shutil.copy(PHOTOGRAPHS / "cat.jpg", folder / "p")
    return folder


def test_a_dataset_is_read_by_its_configuration_and_split(dataset):
    found = load_conversations(dataset, "test", "photos")
    assert answers(found) == [f"photos test {index}" for index in range(4)]
    assert found[0]["images"] == [str(dataset / "p" / "cat.jpg")]
    assert answers(load_conversations(dataset, "train[:2]", name="charts")) == ["charts train 0", "charts train 1"]
    mixed = load_mixture(
        [
            {"path": str(dataset), "name": "photos", "split": "test[:1]", "weight": 1},
            {"path": str(dataset), "name": "charts", "weight": 4},
        ]
    )
    assert sorted(answers(mixed)) == [*(f"charts train {index}" for index in range(4)), "photos test 0"]
    charts = {"path": str(dataset), "name": "charts"}
    for options in ({"split": "test"}, {"default_split": "test"}):
        assert sorted(answers(load_mixture(charts, **options))) == [f"charts test {index}" for index in range(4)]
    with pytest.raises(ValueError, match="but there are none"):
        load_mixture({**charts, "split": "train"}, "test")
    for options in ({"name": "maps"}, {"name": "photos", "split": "validation"}):
        with pytest.raises(ValueError, match=r"can't be read with name=.*"):
            load_conversations(dataset, **options)
    with pytest.raises(ValueError, match=r"name='photos'.*is a file"):
        load_conversations(dataset / "photos" / "test.jsonl", name="photos")


def test_a_hub_id_may_have_a_full_stop(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"The dataset 'me/data-v1\.5' can't be read with name='maps'"):
        load_conversations("me/data-v1.5", name="maps")
    for name in ("me/data.jsonl", "me/data.csv", "data", "a/b/c", "../nowhere", "me/da ta"):
        with pytest.raises(ValueError, match="not a file, a folder or a Hub id"):
            load_conversations(name)


# ---------------------------------------------------------------- which example is meant


def truncate(path):
    shutil.copy(PHOTOGRAPHS / "cat.jpg", path)
    path.write_bytes(path.read_bytes()[:4000])


def test_a_missing_image_is_named_before_training_starts(processor, tmp_path):
    file = write(tmp_path / "train.jsonl", ["a", "b"], "cat.jpg")
    write(tmp_path / "more.jsonl", ["c"], "photos/nowhere.jpg")
    shutil.copy(PHOTOGRAPHS / "cat.jpg", tmp_path)
    assert len(PackedDataset(load_mixture(file), processor)) == 1
    with pytest.raises(ValueError) as refused:
        PackedDataset(load_mixture(str(tmp_path)), processor)
    message = str(refused.value)
    assert "more.jsonl, line 1" in message and "'photos/nowhere.jpg'" in message and "no such file" in message
    assert "padding" not in message


def test_a_truncated_image_is_named_when_it_is_used(processor, tmp_path):
    """By its example, also where it has no file of its own."""
    file = write(tmp_path / "train.jsonl", ["a", "b"], "cat.jpg")
    truncate(tmp_path / "cat.jpg")
    assert Image.open(tmp_path / "cat.jpg").size[0] > 100
    collator = CasaDataCollator(processor)
    [row] = PackedDataset(load_conversations(file), processor)
    with pytest.raises(ValueError, match=r"^/.*train\.jsonl, line 1: .*cat\.jpg.*truncated"):
        collator([pickle.loads(pickle.dumps(row))])
    stored = [{**CONVERSATIONS[1]}, {**CONVERSATIONS[0], "images": [{"bytes": (tmp_path / "cat.jpg").read_bytes()}]}]
    [row] = PackedDataset(stored, processor)
    with pytest.raises(ValueError, match=r"Example 1: .*truncated"):
        collator([row])
    with pytest.raises(ValueError, match=r"What is in this picture.*truncated"):
        collator(stored)


def test_an_unusable_conversation_is_named(processor, tmp_path):
    (tmp_path / "train.jsonl").write_text(f'{json.dumps(ask("a", "b"))}\n\n{{"text": "x"}}\n')
    with pytest.raises(ValueError, match=r"^/.*train\.jsonl, line 3: .*messages"):
        PackedDataset(load_conversations(tmp_path), processor)


def test_images_in_tables_are_not_decoded_for_the_plan(processor, tmp_path):
    """A truncated one is found when it is used: in a column, in lists, in parts of messages, in a dataset."""
    datasets = pytest.importorskip("datasets")
    truncate(tmp_path / "cut.jpg")
    cut = {"bytes": (tmp_path / "cut.jpg").read_bytes(), "path": None}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a", "image": None}]}
    question = {"type": "text", "text": "q", "image": None}
    messages = [{"role": "user", "content": [question]}, answer]
    part = {"type": "image", "text": None, "image": cut}
    text, image = datasets.Value("string"), datasets.Image()
    parts = datasets.List({"type": text, "text": text, "image": image})
    turns = datasets.List({"role": text, "content": parts})
    tables = {
        "one": ({"messages": messages, "image": cut}, {"messages": turns, "image": image}),
        "lists": ({"messages": messages, "images": [cut]}, {"messages": turns, "images": datasets.List(image)}),
        "parts": ({"messages": [{"role": "user", "content": [part, question]}, answer]}, {"messages": turns}),
    }
    for name, (row, features) in tables.items():
        (tmp_path / name).mkdir()
        table = datasets.Dataset.from_list([row, row], features=datasets.Features(features))
        table.to_parquet(tmp_path / name / "train.parquet")
        for examples in (load_conversations(tmp_path / name), load_conversations(tmp_path / name, name="default")):
            planned = PackedDataset(examples, processor)
            assert len(planned.rows[0]) == 2 and planned.num_image_tokens > 0
            with pytest.raises(ValueError, match=r"Example 0 of .*truncated"):
                CasaDataCollator(processor)([planned[0]])


@pytest.mark.parametrize("is_embedded", [False, True])
def test_videos_in_tables_are_their_files(casa_folder, tmp_path, is_embedded):
    """Named or embedded; without a decoder of `datasets`, which wants torchcodec."""
    datasets = pytest.importorskip("datasets")
    processor = load_processor(casa_folder)
    clip = write_clip(tmp_path / "clip.mp4", 4, 2)
    row = {"messages": ask("q", "a")["messages"], "videos": [str(clip)]}
    given = {"bytes": clip.read_bytes(), "path": "lost.mp4"} if is_embedded else str(clip)
    table = datasets.Dataset.from_list([{**row, "videos": [given]}])
    table.cast_column("videos", datasets.List(datasets.Video())).to_parquet(tmp_path / "train.parquet")
    examples = load_conversations(tmp_path / "train.parquet")
    assert measure(processor, examples[0]) == measure(processor, row)
    expected, found = CasaDataCollator(processor)([row]), CasaDataCollator(processor)([examples[0]])
    assert len(expected["image_grid_thw"]) == 4 and expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("place", ["videos", "video", "part"])
@pytest.mark.parametrize("is_embedded", [False, True])
def test_frames_in_tables(casa_folder, tmp_path, is_embedded, place):
    """Of a video that is the list of its frames, each an image of the table, in a column or in a part."""
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet

    processor = load_processor(casa_folder)
    (tmp_path / "frames").mkdir()
    names = [f"frames/{name}.jpg" for name in ("cat", "coffee", "rocket")]
    for name in names:
        shutil.copy(PHOTOGRAPHS / Path(name).name, tmp_path / name)
    frames = [{"bytes": (tmp_path / n).read_bytes(), "path": "lost.jpg"} if is_embedded else n for n in names]
    images = [Image.open(tmp_path / name) for name in names]
    expected = CasaDataCollator(processor)([{**ask("q", "a"), "videos": [images]}])
    text, clip = datasets.Value("string"), datasets.List(datasets.Image())
    parts = datasets.List({"type": text, "text": text, "video": clip})
    features = {"messages": datasets.List({"role": text, "content": parts})}
    question, answer = [{"type": "text", "text": "q", "video": None}], [{"type": "text", "text": "a", "video": None}]
    row: dict = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    if place == "part":
        question.insert(0, {"type": "video", "text": None, "video": frames})
    else:
        row[place] = [frames] if place == "videos" else frames
        features[place] = datasets.List(clip) if place == "videos" else clip
    table = datasets.Dataset.from_list([row], features=datasets.Features(features))
    # `to_parquet` would embed the files.
    pyarrow.parquet.write_table(table.data.table, tmp_path / "train.parquet")
    (example,) = load_conversations(tmp_path / "train.parquet")
    assert measure(processor, example)[1] > 0
    found = CasaDataCollator(processor)([example])
    assert len(found["image_grid_thw"]) == 3
    model = load_model(casa_folder, torch.float32)
    assert len(generate_answers(model, processor, [example, ask("q", "a")], max_new_tokens=1)) == 2
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_embedded_video_that_is_none_is_refused_by_its_size(casa_folder):
    row = {"messages": ask("q", "a")["messages"], "videos": [{"bytes": b"no film", "path": None}]}
    with pytest.raises(ValueError, match=r"Example 0: The video of 7 bytes can't be used"):
        PackedDataset([row], load_processor(casa_folder))


def test_an_error_of_any_kind_names_the_example(casa_folder, tmp_path):
    processor = load_processor(casa_folder)
    file = write(tmp_path / "train.jsonl", ["a"], "cat.jpg")
    shutil.copy(PHOTOGRAPHS / "cat.jpg", tmp_path)
    planned = PackedDataset(load_conversations(file), processor)
    processor.chat_template = "{{ raise_exception('No images here') }}"
    named = r"^/.*train\.jsonl, line 1: TemplateError: No images here"
    with pytest.raises(ValueError, match=named):
        PackedDataset(load_mixture(file), processor)
    with pytest.raises(ValueError, match=named):
        CasaDataCollator(processor)([planned[0]])
    strict = load_processor(casa_folder, media_policy={"max_decoded_pixels": 100})
    with pytest.raises(ValueError, match=r"line 1: The image '.*cat\.jpg' can't be used: .* max_decoded_pixels=100"):
        PackedDataset(load_conversations(file), strict)
