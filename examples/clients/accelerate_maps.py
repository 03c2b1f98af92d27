# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A model in less memory than it needs: python -m examples.clients.accelerate_maps my-casa-model offloaded --cpu 2GiB

Accelerate places blocks on the devices that there are, as far as they have room, and the rest on the disk, from where
each block is read when its turn comes. Fusion layers are placed with their blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.samples import PHOTOGRAPHS


def main(arguments: Sequence[str] | None = None) -> tuple[str, dict[str, object]]:
    """Ask about a photograph; returns the answer and where each part is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a CASA checkpoint")
    parser.add_argument("offload", help="folder for what has no room in memory")
    parser.add_argument("--cpu", required=True, help="memory of the CPU for weights, such as 2GiB")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    processor = CasaProcessor.from_pretrained(options.model)
    model = CasaForConditionalGeneration.from_pretrained(
        options.model, device_map="auto", max_memory={"cpu": options.cpu}, offload_folder=options.offload
    )
    photograph = {"type": "image", "path": str(PHOTOGRAPHS / "cat.jpg")}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [photograph, {"type": "text", "text": "What is in this image?"}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer)
    return answer, getattr(model, "hf_device_map", {"": model.device})  # where one device has it all


if __name__ == "__main__":
    main()
