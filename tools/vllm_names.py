# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Compare what `casa_hf.serving.vllm` uses of vLLM with the sources of a version, which needn't be installed:
`python -m tools.vllm_names FOLDER`, where FOLDER holds vLLM's folder `vllm`, as its archive on PyPI does.

It reads, and runs nothing: names that are imported have to be there, methods that are overridden have to take what
vLLM's take, and functions that are called have to take what they are given. What they do is for tests to find out.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLUGIN = [*(ROOT / "src" / "casa_hf" / "serving" / "vllm").glob("*.py"), ROOT / "examples" / "vllm_live.py"]


@dataclass(frozen=True)
class Call:
    """A call of the plugin: so many arguments by position, and others by name."""

    positional: int
    keywords: tuple[str, ...] = ()


_LAYER = ("bias", "quant_config", "prefix")
_TOWER = Call(1, ("norm_eps", "quant_config", "prefix"))
_MODELS = "vllm.model_executor.models"

# What overrides a method that only the plugin calls.
OWN = {"FusionAttention.forward"}

# What is called on objects that vLLM hands over, and constructors.
CALLS: dict[str, Call] = {
    "vllm.v1.core.kv_cache_manager:KVCacheManager.create_kv_cache_blocks": Call(1),
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": Call(1),
    "vllm.v1.kv_cache_spec_registry:register_kv_cache_spec": Call(0, ("manager_class",)),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": Call(3),
    "vllm.v1.attention.backend:subclass_attention_backend_with_overrides": Call(3),
    "vllm.v1.attention.backend:CommonAttentionMetadata": Call(
        0,
        (
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "causal",
        ),
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": Call(5),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": Call(6, ("output",)),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update": Call(5),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": Call(6, ("output",)),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update": Call(5),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward": Call(6, ("output",)),
    "vllm.utils.torch_utils:direct_register_custom_op": Call(0, ("op_name", "op_func", "mutates_args", "fake_impl")),
    "vllm.config:VllmConfig.with_hf_config": Call(1, ("architectures",)),
    "vllm.model_executor.layers.attention:Attention": Call(
        3, ("num_kv_heads", "cache_config", "quant_config", "prefix")
    ),
    "vllm.model_executor.layers.linear:QKVParallelLinear": Call(4, _LAYER),
    "vllm.model_executor.layers.linear:RowParallelLinear": Call(2, _LAYER),
    "vllm.model_executor.layers.layernorm:RMSNorm": Call(1, ("eps",)),
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead": Call(2, ("quant_config", "prefix")),
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead.tie_weights": Call(1),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor": Call(1),
    f"{_MODELS}.qwen2:Qwen2Model": Call(0, ("vllm_config", "prefix", "decoder_layer_type")),
    f"{_MODELS}.qwen2:Qwen2Model.forward": Call(4),
    f"{_MODELS}.qwen3:Qwen3Model": Call(0, ("vllm_config", "prefix")),
    f"{_MODELS}.llama:LlamaModel": Call(0, ("vllm_config", "prefix", "layer_type")),
    f"{_MODELS}.llama:LlamaModel.forward": Call(4),
    f"{_MODELS}.qwen2_vl:Qwen2VisionTransformer": _TOWER,
    f"{_MODELS}.qwen2_vl:Qwen2VisionTransformer.forward": Call(1, ("grid_thw",)),
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VisionTransformer": _TOWER,
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VisionTransformer.forward": Call(1, ("grid_thw",)),
    f"{_MODELS}.qwen3_vl:Qwen3_VisionTransformer": _TOWER,
    f"{_MODELS}.qwen3_vl:Qwen3_VisionTransformer.forward": Call(1, ("grid_thw",)),
    f"{_MODELS}.utils:AutoWeightsLoader.load_weights": Call(1, ("mapper",)),
    f"{_MODELS}.module_mapping:MultiModelKeys.from_string_field": Call(
        0, ("language_model", "connector", "tower_model")
    ),
    "vllm.multimodal.processing:PromptReplacement": Call(0, ("modality", "target", "replacement")),
    "vllm.multimodal.processing:PromptUpdateDetails.select_token_id": Call(2),
    "vllm.multimodal.processing:PromptUpdateDetails": Call(0, ("full", "is_embed")),
    "vllm.multimodal.parse:MultiModalDataParser": Call(0, ("video_needs_metadata",)),
    "vllm.multimodal.inputs:MultiModalFieldConfig.batched": Call(1, ("keep_on_cpu",)),
    "vllm.multimodal.inputs:MultiModalFieldConfig.flat_from_sizes": Call(2, ("keep_on_cpu",)),
}

# What is replaced by a function of the plugin, and the arguments that this one passes on.
REPLACED = {"vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": {"request", "max_cache_hit_length"}}


class Sources:
    """vLLM's files.

    Args:
        folder: folder that holds `vllm`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        """A module's tree; None if there is none."""
        if name not in self._read:
            path = self.folder.joinpath(*name.split("."))
            files = [path.with_suffix(".py"), path / "__init__.py"]
            found = next((file for file in files if file.is_file()), None)
            self._read[name] = None if found is None else ast.parse(found.read_text("utf-8"))
        return self._read[name]

    def find(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """The module in which a name of another one is defined, and the statement; None if there is none."""
        tree = self.module(module)
        for statement in _statements(tree.body if tree else []):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        base = _absolute(module, self.module(f"{module}.__init__") is not None, statement)
                        return self.find(base, alias.name) if self.module(base) else (module, statement)
            elif name in _defined(statement):
                return module, statement
        return (module, ast.Pass()) if self.module(f"{module}.{name}") else None

    def method(self, module: str, owner: str, name: str) -> ast.FunctionDef | None:
        """A method of a class or of those that it inherits from."""
        found = self.find(module, owner)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        for statement in _statements(found[1].body):
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                return statement
        for base in found[1].bases:
            if isinstance(base, ast.Subscript):
                base = base.value
            if isinstance(base, ast.Name) and (inherited := self.method(found[0], base.id, name)):
                return inherited
        return None

    def _declared(self, module: str, owner: str) -> list[ast.AnnAssign]:
        found = self.find(module, owner)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return []
        inherited = [
            part for base in found[1].bases if isinstance(base, ast.Name) for part in self._declared(found[0], base.id)
        ]
        return [*inherited, *(part for part in found[1].body if isinstance(part, ast.AnnAssign))]

    def fields(self, module: str, owner: str) -> ast.arguments:
        """The arguments of a data class."""
        declared = self._declared(module, owner)
        named = [(part, part.target.id) for part in declared if isinstance(part.target, ast.Name)]
        given = [ast.arg("self"), *(ast.arg(name) for part, name in named if part.value is None)]
        later = [ast.arg(name) for part, name in named if part.value is not None]
        return ast.arguments([], [*given, *later], None, [], [], None, [ast.Constant(None) for _ in later])


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those behind conditions included; later ones hold, as when they are run."""
    for statement in reversed(list(body)):
        yield statement
        for part in ("body", "orelse", "handlers", "finalbody"):
            inner = getattr(statement, part, None)
            if inner and isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(
                    [each for one in inner for each in (one.body if isinstance(one, ast.ExceptHandler) else [one])]
                )


def _defined(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {statement.name}
    if isinstance(statement, ast.AnnAssign):
        return {statement.target.id} if isinstance(statement.target, ast.Name) else set()
    if isinstance(statement, ast.Assign):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return {alias.asname or alias.name for alias in statement.names} if isinstance(statement, ast.Import) else set()


def _absolute(module: str, is_package: bool, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - statement.level + is_package]
    return ".".join([*kept, *([statement.module] if statement.module else [])])


def _names(arguments: ast.arguments) -> tuple[list[str], set[str], bool]:
    """Names of arguments but the first (`self`), those that must be given, and whether any others may be."""
    positional = [each.arg for each in [*arguments.posonlyargs, *arguments.args]][1:]
    required = set(positional[: len(positional) - len(arguments.defaults)])
    only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required |= {each.arg for each, default in only if default is None}
    names = [*positional, *(each.arg for each in arguments.kwonlyargs)]
    return names, required, bool(arguments.vararg or arguments.kwarg)


def _wrong_call(arguments: ast.arguments, call: Call) -> str | None:
    names, required, any_other = _names(arguments)
    positional = names[: len(names) - len(arguments.kwonlyargs)][: call.positional]
    given = {*positional, *call.keywords}
    if missing := sorted(required - given):
        return f"needs {', '.join(missing)}"
    unknown = sorted(set(call.keywords) - set(names))
    if (unknown or call.positional > len(positional)) and not any_other:
        return f"doesn't take {', '.join(unknown) or f'{call.positional} arguments'}"
    return None


def _wrong_override(own: ast.arguments, theirs: ast.arguments) -> str | None:
    names, required, any_other = _names(own)
    others, _, _ = _names(theirs)
    if unknown := [name for name in others if name not in names and not any_other]:
        return f"doesn't take {', '.join(unknown)}"
    return f"needs {', '.join(sorted(required - set(others)))}" if required - set(others) else None


def problems(
    folder: Path,
    plugin: Iterable[Path] = PLUGIN,
    calls: dict[str, Call] = CALLS,
    replaced: dict[str, set[str]] = REPLACED,
) -> list[str]:
    """What of the plugin doesn't fit to vLLM's sources, a sentence each.

    Args:
        folder: folder that holds `vllm`.
        plugin: files that import vLLM.
        calls: calls by "module:function" or "module:Class.method".
        replaced: arguments that are known of functions that are replaced.
    """
    sources, found = Sources(folder), []
    for path in plugin:
        tree = ast.parse(path.read_text("utf-8"))
        origin: dict[str, tuple[str, str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                assert node.module is not None
                for alias in node.names:
                    origin[alias.asname or alias.name] = (node.module, alias.name)
                    if sources.find(node.module, alias.name) is None:
                        found.append(f"{path.name}: {node.module} has no {alias.name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found += [f"{path.name}: {problem}" for problem in _wrong_methods(sources, node, origin)]
    for name in [*calls, *replaced]:
        arguments = _arguments(sources, name)
        if arguments is None:
            found.append(f"{name} isn't there")
        elif name in replaced:
            if new := sorted(set(_names(arguments)[0]) - replaced[name]):
                found.append(f"{name} is replaced without its {', '.join(new)}")
        elif problem := _wrong_call(arguments, calls[name]):
            found.append(f"{name} {problem}")
    return found


def _wrong_methods(sources: Sources, own: ast.ClassDef, origin: dict[str, tuple[str, str]]) -> Iterator[str]:
    for base in own.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        if not isinstance(base, ast.Name) or base.id not in origin:
            continue
        for method in own.body:
            if (
                not isinstance(method, ast.FunctionDef)
                or method.name == "__init__"
                or f"{own.name}.{method.name}" in OWN
            ):
                continue
            theirs = sources.method(*origin[base.id], method.name)
            problem = theirs and _wrong_override(method.args, theirs.args)
            if problem:
                yield f"{own.name}.{method.name} {problem}"


def _arguments(sources: Sources, name: str) -> ast.arguments | None:
    """Arguments of a function, a method or a constructor."""
    module, _, qualified = name.partition(":")
    owner, _, method = qualified.partition(".")
    found = sources.find(module, owner)
    if found is None:
        return None
    written = (
        found[1] if isinstance(found[1], ast.FunctionDef) else sources.method(module, owner, method or "__init__")
    )
    if written is None:
        return None if method or not isinstance(found[1], ast.ClassDef) else sources.fields(module, owner)
    arguments = written.args
    is_static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in written.decorator_list)
    if (not method and written is found[1]) or is_static:
        return ast.arguments(
            arguments.posonlyargs,
            [ast.arg("self"), *arguments.args],
            arguments.vararg,
            arguments.kwonlyargs,
            arguments.kw_defaults,
            arguments.kwarg,
            arguments.defaults,
        )
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the plugin with the sources of a version of vLLM.")
    parser.add_argument("folder", type=Path, help="folder that holds vLLM's folder `vllm`")
    options = parser.parse_args()
    if not (options.folder / "vllm").is_dir():
        parser.error(f"{options.folder} holds no folder `vllm`.")
    found = problems(options.folder)
    print("\n".join(found) or "All names are there, and take what they are given.")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
