# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs `casa-hf` in the process of the tests, with streams of its own."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from casa_hf.cli import main


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    def failed_with_one_line(self, *parts: str) -> bool:
        """Whether the command ended in exit code 1 and one line on standard error that has all parts."""
        one_line = self.err.startswith("error: ") and self.err.count("\n") == 1
        return self.code == 1 and self.out == "" and one_line and all(part in self.err for part in parts)

    def refused(self, *parts: str) -> bool:
        """Whether the command ended in exit code 2, and a complaint about a value that has all parts."""
        complaint = " ".join(self.err.rpartition("\nError: ")[2].split())
        named = complaint.startswith("Invalid value for ")
        return self.code == 2 and self.out == "" and named and all(part in complaint for part in parts)


class Terminal(io.StringIO):
    """A stream at whose other end somebody sits."""

    def isatty(self) -> bool:
        return True


class Cli:
    """Runs `casa-hf` in this process; its streams are no terminals unless said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path, stdin: str = "", terminal: bool = False) -> Outcome:
        stream = Terminal if terminal else io.StringIO
        self.capsys.readouterr()
        with self.monkeypatch.context() as patched:
            patched.setattr(sys, "stdin", stream(stdin))
            patched.setattr(sys, "stderr", errors := stream())
            with pytest.raises(SystemExit) as ended:
                main([str(argument) for argument in arguments])
        return Outcome(int(ended.value.code or 0), self.capsys.readouterr().out, errors.getvalue())
