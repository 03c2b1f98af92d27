# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Captions of a folder or a file of questions on many machines, with Ray Data (`pip install "ray[data]"`).

    python -m examples.scale.caption MODEL pictures/ captions/ --workers 2
    python -m examples.scale.caption MODEL questions.jsonl answers/ --workers 8 --gpus 1 --engine vllm

Each worker is a process with a model of its own; Ray hands out batches of rows, starts workers that died anew, and
gives their batches to others. What a batch says is a file of its own in OUTPUT/parts, written to a temporary name and
moved, with a name that follows from its rows: a batch that runs twice leaves one file. A job that is started again
leaves out what is in these files; when none is missing they become OUTPUT/captions.jsonl, in the order of the input,
one line for one row. OUTPUT has to be a folder that all machines share; so have pictures, unless they are URLs.

On a cluster the same command runs on its head (`ray start --head`, `ray start --address=...` on the others) with
`--address auto`, or anywhere through `ray job submit`; docs/scale.md has the arithmetic.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import mimetypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from casa_hf.cli.rows import Row, rows_of_file

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
CLIPS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
PROMPT = "Describe this in one sentence."


# ---------------------------------------------------------------- rows and files


def read_rows(given: Path, prompt: str) -> list[Row]:
    """The rows of a job: lines of a JSONL file as `casa-hf generate --input` reads them, or files of a folder.

    Raises:
        ValueError: if there are none, or a line isn't a question.
    """
    if given.is_file():
        return rows_of_file(given)
    files = sorted(path for path in given.rglob("*") if path.suffix.lower() in PICTURES + CLIPS)
    if not files:
        raise ValueError(f"{given} has no pictures or clips ({', '.join(PICTURES + CLIPS)}).")
    rows = []
    for file in files:
        name, is_clip = str(file.absolute()), file.suffix.lower() in CLIPS
        told = {"prompt": prompt, "videos" if is_clip else "images": [str(file.relative_to(given))]}
        rows.append(Row(prompt, () if is_clip else (name,), (name,) if is_clip else (), told))
    return rows


def read_parts(output: Path) -> dict[int, str]:
    """The finished lines by the number of their row; of a row that two files have, that of the first."""
    found: dict[int, str] = {}
    for part in sorted((output / "parts").glob("*.jsonl")):
        for line in part.read_text("utf-8").split("\n"):
            if line:
                entry = json.loads(line)
                found.setdefault(entry["row"], entry["line"])
    return found


def write_part(output: Path, numbers: Sequence[int], lines: Sequence[str]) -> None:
    """Keep what a batch says: whole, or not at all."""
    name = hashlib.sha256(json.dumps([int(number) for number in numbers]).encode()).hexdigest()[:24]
    content = [json.dumps({"row": int(row), "line": line}) for row, line in zip(numbers, lines, strict=True)]
    part = output / "parts" / f"{name}.jsonl"
    temporary = part.with_name(f".{name}.{os.getpid()}.tmp")
    temporary.write_text("\n".join(content) + "\n", "utf-8")
    os.replace(temporary, part)


def check_same_job(output: Path, rows: Sequence[Row], model: str) -> None:
    """Refuse to mix two jobs.

    Raises:
        ValueError: if the output is of other rows or another model.
    """
    shown = [[row.prompt, row.images, row.videos] for row in rows]
    job = {"model": model, "rows": hashlib.sha256(json.dumps(shown).encode()).hexdigest()}
    file = output / "job.json"
    (output / "parts").mkdir(parents=True, exist_ok=True)
    if file.exists() and json.loads(file.read_text("utf-8")) != job:
        raise ValueError(f"{output} has captions of other rows or of another model; give another folder.")
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(job), "utf-8")
    os.replace(temporary, file)


def finish(output: Path, count: int) -> Path:
    """The file of all lines, in the order of the rows.

    Raises:
        RuntimeError: if a row is missing.
    """
    lines = read_parts(output)
    if missing := [number for number in range(count) if number not in lines]:
        raise RuntimeError(f"{len(missing)} of {count} rows are missing, the first is {missing[0]}. Start it again.")
    file = output / "captions.jsonl"
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(f"{lines[number]}\n" for number in range(count)), "utf-8")
    os.replace(temporary, file)
    return file


# ---------------------------------------------------------------- workers


class GenerateWorker:
    """Answers batches with `generate`, on the GPU that Ray gave it, or on the CPU.

    Args:
        model: folder or Hub id.
        output: folder of the job.
        max_new_tokens: tokens of an answer.
    """

    def __init__(self, model: str, output: str, max_new_tokens: int):
        import torch

        from casa_hf import CasaForConditionalGeneration, CasaProcessor

        self.output = Path(output)
        self.options = {"max_new_tokens": max_new_tokens}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = CasaForConditionalGeneration.from_pretrained(model, dtype="auto").to(device).eval()
        self.processor = CasaProcessor.from_pretrained(model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [_row(text) for text in batch["row"]]
        lines = [row.answered(**answer) for row, answer in zip(rows, self.answers(rows), strict=True)]
        write_part(self.output, batch["number"], lines)
        return {"number": batch["number"]}

    def answers(self, rows: Sequence[Row]) -> list[dict[str, str]]:
        """What is said to each row, or why nothing: a batch that can't be asked is asked row by row."""
        from casa_hf.answers import Question, answer_batch

        questions = [Question(row.prompt, list(row.images), list(row.videos)) for row in rows]
        try:
            return [{"answer": said} for said in answer_batch(self.model, self.processor, questions, **self.options)]
        except (ValueError, OSError) as error:
            if len(rows) == 1:
                return [{"error": str(error)}]
            return [answer for row in rows for answer in self.answers([row])]


class VllmWorker(GenerateWorker):
    """The same with vLLM (`pip install "casa_hf[vllm]"`), which makes larger batches of its own."""

    def __init__(self, model: str, output: str, max_new_tokens: int):
        from vllm import LLM, SamplingParams

        self.output = Path(output)
        self.llm = LLM(model, allowed_local_media_path="/")
        self.sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens)

    def answers(self, rows: Sequence[Row]) -> list[dict[str, str]]:
        try:
            messages = [[{"role": "user", "content": _parts(row)}] for row in rows]
            outputs = self.llm.chat(messages, self.sampling, use_tqdm=False)
            return [{"answer": output.outputs[0].text} for output in outputs]
        except (ValueError, OSError) as error:
            if len(rows) == 1:
                return [{"error": str(error)}]
            return [answer for row in rows for answer in self.answers([row])]


WORKERS = {"generate": GenerateWorker, "vllm": VllmWorker}


def _text(row: Row) -> str:
    return json.dumps([row.prompt, row.images, row.videos, row.given])


def _row(text: str) -> Row:
    prompt, images, videos, given = json.loads(text)
    return Row(prompt, tuple(images), tuple(videos), given)


def _parts(row: Row) -> list[dict[str, Any]]:
    """A row's message as OpenAI's protocol has it."""
    shown = [("image_url", name) for name in row.images] + [("video_url", name) for name in row.videos]
    parts: list[dict[str, Any]] = [{"type": kind, kind: {"url": _url(name)}} for kind, name in shown]
    return [*parts, {"type": "text", "text": row.prompt}]


def _url(name: str) -> str:
    if "://" in name or name.startswith("data:"):
        return name
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(name).read_bytes()).decode()}"


# ---------------------------------------------------------------- the job


def caption(
    model: str,
    given: Path,
    output: Path,
    *,
    prompt: str = PROMPT,
    engine: str = "generate",
    workers: int = 1,
    gpus: float = 0.0,
    cpus: float = 1.0,
    batch_size: int = 8,
    max_new_tokens: int = 64,
) -> Path:
    """Caption everything that isn't captioned yet, by workers of the Ray cluster that is connected.

    Args:
        model: folder, which all machines see, or Hub id.
        given: folder of pictures and clips, or JSONL file of questions.
        output: folder of the captions, which all machines share.
        prompt: question about each file of a folder.
        engine: key of `WORKERS`.
        workers: number of processes with a model.
        gpus, cpus: of each.
        batch_size: rows that a worker is given at a time, and that are done again when it dies.
        max_new_tokens: tokens of an answer.

    Returns:
        The file of all captions.

    Raises:
        ValueError: if there is nothing to caption, or the output is another job's.
    """
    import ray

    rows = read_rows(given, prompt)
    output = output.absolute()
    check_same_job(output, rows, model)
    done = read_parts(output)
    left = [{"number": number, "row": _text(row)} for number, row in enumerate(rows) if number not in done]
    print(f"{len(rows)} rows, {len(done)} of them are done", flush=True)
    if left:
        blocks = max(1, min(len(left) // batch_size, 4 * workers))
        said = ray.data.from_items(left, override_num_blocks=blocks).map_batches(
            WORKERS[engine],
            fn_constructor_args=(model, str(output), max_new_tokens),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus,
            num_cpus=cpus,
        )
        for number in _progress(said):
            print(f"{len(done) + number} of {len(rows)}", flush=True)
    return finish(output, len(rows))


def _progress(said: Any) -> Iterator[int]:
    """How many rows are done, now and then; whoever takes these makes the job run."""
    number = 0
    for batch in said.iter_batches(batch_size=None):
        number += len(batch["number"])
        yield number


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a CASA model")
    parser.add_argument("given", type=Path, help="folder of pictures and clips, or JSONL file of questions")
    parser.add_argument("output", type=Path, help="folder of the captions; a job that was stopped resumes there")
    parser.add_argument("--prompt", default=PROMPT, help="question about each file of a folder (default: %(default)s)")
    parser.add_argument("--engine", choices=WORKERS, default="generate", help="of a worker (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes with a model (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each worker (default: %(default)s)")
    parser.add_argument("--cpus", type=float, default=1.0, help="of each worker (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--address", help="of a Ray cluster, such as auto (default: this machine alone)")
    options = vars(parser.parse_args())
    ray.init(address=options.pop("address"))
    ray.data.DataContext.get_current().enable_progress_bars = False
    print(caption(options.pop("model"), options.pop("given"), options.pop("output"), **options))


if __name__ == "__main__":
    main()
