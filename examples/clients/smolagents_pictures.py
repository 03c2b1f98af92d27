# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""An agent that looks at a photograph, with smolagents and a server of its model:

casa-hf serve my-casa-model &
python -m examples.clients.smolagents_pictures my-casa-model
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from PIL import Image
from smolagents import CodeAgent, OpenAIModel

from casa_hf.samples import PHOTOGRAPHS


def main(arguments: Sequence[str] | None = None) -> CodeAgent:
    """Let an agent answer a question about an image; returns the agent, which knows the steps that it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="name of the model, as the server was given it")
    parser.add_argument("--server", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--task", default="What is in the image? Give a word to final_answer.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=512)
    options = parser.parse_args(arguments)
    model = OpenAIModel(
        options.model, api_base=options.server, api_key="-", temperature=0, max_tokens=options.max_tokens
    )
    agent = CodeAgent(tools=[], model=model, max_steps=options.steps)
    print(agent.run(options.task, images=[Image.open(PHOTOGRAPHS / "cat.jpg")]))
    return agent


if __name__ == "__main__":
    main()
