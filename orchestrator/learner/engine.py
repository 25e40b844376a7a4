"""One DeepSpeed rank: the only file that imports deepspeed, and the keeper of the accumulation contract.

    backward(loss) × K   ->   step(): reduce (once, unless the policy says per micro-batch), clip, apply

`loss` is a share of a global mean: a sum over this micro-batch already divided by the count of the whole
effective batch. DeepSpeed averages gradients over ranks, so it is multiplied by the world size once. The
traps this file steps around are in docs/design.md: default clipping of 1.0, bf16 accumulation and wire, a
phantom Adam step at bf16 stage 0, NaN parameters at fp32 stage 0, lost micro-batches when the boundary is not
set.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.core.reports import StepApplied
from orchestrator.core.zero import PERSISTENT_ELEMENTS, bucket_elements, overlaps
from orchestrator.learner.traffic import CollectiveCounter
from orchestrator.models.decay import parameter_groups
from orchestrator.recipe.schema import Learners, Optimizer

NORM_CHUNK = 1 << 12
"""Values whose squares are added in fp32; the sums of chunks are added in double."""


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """Where this rank stands. address, port: rank 0's rendezvous."""

    rank: int
    world: int
    address: str
    port: int
    timeout_s: float

    def join(self, device: torch.device) -> None:
        """Enters the process group; blocks until all ranks came or the deadline passed."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world),
            LOCAL_RANK=os.environ.get("LOCAL_RANK", "0") if device.type == "cuda" else str(self.rank),
            LOCAL_SIZE=str(self.world),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port),
        )
        load_deepspeed(device.type).init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=self.timeout_s),
        )

    def keep_deadline(self) -> None:
        """Gives the groups that DeepSpeed made beside the first one the same deadline: they have torch's, for
        NCCL 10 minutes."""
        from torch.distributed import distributed_c10d as c10d

        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=self.timeout_s), group)


def load_deepspeed(accelerator: str) -> Any:
    """The library, told what it computes on ("cuda", "cpu"), which it would look for when it is imported.
    Takes a second."""
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    return _deepspeed()


def _deepspeed() -> Any:
    """Imports deepspeed without its start-up noise and without compiling anything.

    TorchBackend would build a shared-memory op with g++ for a minute (and fail without g++); only inference
    uses it.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    import deepspeed.comm.comm
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _fragments() -> Any:
    """DeepSpeed's reads and writes of whole values by parameter."""
    from deepspeed import utils

    return utils


def _whole(tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise AssertionError(f"DeepSpeed has no {what} for a trainable parameter")
    return tensor.detach().float()


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy in this host's memory that no later step changes."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all tensors, fp32. torch's own adds millions of fp32 squares in a row: 1e-3 off at 25 M
    values."""
    norms = []
    for flat in (gradient.flatten() for gradient in gradients):
        whole = len(flat) - len(flat) % NORM_CHUNK
        norms += [
            torch.linalg.vector_norm(flat[:whole].view(-1, NORM_CHUNK), dim=1),
            torch.linalg.vector_norm(flat[whole:])[None],
        ]
    return torch.linalg.vector_norm(torch.cat(norms).double()).float()


def zero_missing(parameters: Iterable[nn.Parameter]) -> None:
    """Gives those that no token of the step reached (an expert, say) a gradient of zeros: else whether
    moments and weights decay in such a step would depend on how it was cut."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


@contextmanager
def cast_once() -> Iterator[None]:
    """Keeps autocast's low-precision copies of the weights from one forward to the next, instead of making
    them for each.

    Autocast forgets them when its outermost context ends. This is one around all micro-batches of a step that
    is not switched on itself, so that backwards run as before. Checkpointed layers that a GPU computes again
    on autograd's own thread still cast.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that clips and refuses a non-finite step itself, for ZeRO stage 0, where DeepSpeed does
    neither safely.

    DeepSpeed reads `overflow` and `_global_grad_norm` from the optimizer after each step.
    """

    def __init__(self, params: Any, *, max_norm: float, **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        self.max_norm = max_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        parameters = [p for group in self.param_groups for p in group["params"]]
        zero_missing(parameters)  # as the partitioned stages do
        norm = global_norm([p.grad for p in parameters])
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        super().step(closure)


def deepspeed_config(
    learners: Learners, optimizer: Optimizer, stage: int, sync: str, trainable: int
) -> dict[str, Any]:
    """Every key that DeepSpeed would otherwise default in silence, written out. trainable: elements; no
    bucket is larger."""
    gpu = bool(learners.gpus)
    bucket = bucket_elements(gpu)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(bucket, trainable),
        "allgather_bucket_size": bucket,
        "overlap_comm": overlaps(gpu, stage),
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS
        zero["stage3_max_reuse_distance"] = (
            0  # gathered again for the backward: stage 3 was chosen for its memory
        )
        zero["stage3_prefetch_bucket_size"] = bucket if gpu else 0  # a CPU overlaps nothing
    if learners.offload.optimizer != "none":
        zero["offload_optimizer"] = {"device": learners.offload.optimizer, "pin_memory": True}
    if learners.offload.parameters != "none":
        zero["offload_param"] = {"device": learners.offload.parameters, "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # nominal: the caller owns the boundary
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": sync != "no_sync",
        "gradient_clipping": 0.0 if stage == 0 else (optimizer.max_grad_norm or 0.0),
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
    if learners.precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif learners.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    elif learners.precision == "bf16_autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


class Engine:
    """A module under DeepSpeed with one explicit sync policy.

    sync: "no_sync" (stages 0, 1: one all-reduce at the step), "coalesced" (stages 1-3, fp32: one reduction at
    the end of `accumulation()`), "per_micro_batch" (stages 2, 3: a reduction in every backward).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        learners: Learners,
        optimizer: Optimizer,
        stage: int,
        sync: str,
        world: int,
    ) -> None:
        deepspeed = _deepspeed()
        self.stage, self.sync, self.world = stage, sync, world
        self.casts_weights = (
            learners.precision == "bf16_autocast" and stage < 3
        )  # at 3 the casts would be what it partitions
        trainable = [p for p in module.parameters() if p.requires_grad]
        options: dict[str, Any] = {
            "lr": optimizer.learning_rate,
            "betas": optimizer.betas,
            "eps": optimizer.eps,
        }
        groups = parameter_groups(module, optimizer.weight_decay)
        base: torch.optim.Optimizer
        if stage == 0:
            base = GuardedAdamW(groups, max_norm=optimizer.max_grad_norm or 0.0, **options)
        else:
            base = torch.optim.AdamW(groups, fused=True, **options)
        config = deepspeed_config(learners, optimizer, stage, sync, sum(p.numel() for p in trainable))
        self.ds, self.zero, _, _ = deepspeed.initialize(
            model=module, model_parameters=trainable, optimizer=base, config=config
        )
        self.module: nn.Module = self.ds.module
        self._linked = False
        self.counter = CollectiveCounter.install(deepspeed.comm.comm.cdb)
        self._assert_fp32_master()

    @property
    def managed(self) -> bool:
        return self.sync != "no_sync"

    def __call__(self, *inputs: Any) -> Any:
        return self.ds(*inputs)

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        """Holds all backwards of one optimizer step; its collectives are counted from here on."""
        self.counter.take()
        with (
            cast_once() if self.casts_weights else nullcontext(),
            self.ds.coalesce_grad_reduction() if self.sync == "coalesced" else nullcontext(),
        ):
            try:
                yield
            except BaseException:
                if self.sync == "coalesced":
                    self._leave_early()
                raise

    def _leave_early(self) -> None:
        """Prepares for the reduction that DeepSpeed runs even after an error: all ranks have to reduce the
        same tensors, so a gradient that is missing here counts as zero. The step is discarded or never taken.
        At ZeRO-3 the other ranks wait in the gather of a forward instead: no reduction then, so that the
        error is heard at once."""
        if self.stage == 3:
            self.ds._flush_coalesced_reduction_zero3 = lambda optimizer: None
            return
        zero_missing(p for p in self.module.parameters() if p.requires_grad)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of this micro-batch's share of the global mean."""
        if self.managed:
            self.ds.set_gradient_accumulation_boundary(last)
        self.ds.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepApplied:
        """Reduces what is left to reduce, clips by the global norm, applies once; refuses a non-finite
        gradient."""
        for group in self.ds.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        if self.managed:
            self.ds.set_gradient_accumulation_boundary(True)
        self._hand_over()
        self.ds.step()
        applied = bool(self.ds.was_step_applied())
        self._forget(applied)
        self._link_moments()
        reduced, gathered = self.counter.take() if self.world > 1 else (0, 0)  # a rank alone sends nothing
        norm = float(self.ds.get_global_grad_norm() or 0.0)
        return StepApplied(applied, norm if applied else float("nan"), learning_rate, reduced, gathered)

    def discard(self, idle_loss: Callable[[], Tensor]) -> None:
        """Drops the accumulated gradient of the step, leaving weights and moments bitwise as they are. A
        collective.

        idle_loss: makes a loss of every rank that depends on the parameters. Gradients lie in DeepSpeed's
        private buffers, other ones for each stage, precision and offload; every optimizer refuses a gradient
        that is no number, and clears them all.
        """
        with self.accumulation():
            self.backward(idle_loss() * float("nan"), last=True)
        if self.step(0.0).applied:
            raise AssertionError(
                "discard() applied a step: DeepSpeed no longer refuses a gradient that is no number"
            )

    def _hand_over(self) -> None:
        """With an offloaded optimizer DeepSpeed 0.19.8 hands over the gradients of those parameters alone
        that the LAST micro-batch reached: here those of all that any one did."""
        zero = self.zero
        if self.stage == 3 and zero.offload_optimizer:
            for parameter in self.module.parameters():
                partitioned: Any = parameter
                if (
                    parameter.requires_grad
                    and partitioned.partition_numel() * zero._get_param_partition_rank(parameter)
                    < partitioned.ds_numel
                ):
                    zero._offload_boundary_param_ids.add(partitioned.ds_id)
            zero._finalize_offload_gradient_accumulation()
        elif self.managed and getattr(zero, "cpu_offload", False):
            zero._finalize_cpu_offload_gradient_accumulation()

    def _forget(self, applied: bool) -> None:
        """Clears what DeepSpeed 0.19.8 would add to, or take for, the next step's gradients.

        It writes the first gradient of a step over the last step's, so a parameter that gets none would keep
        that, the infinities of a refused step included: ZeRO-3's partitions, and at stages 1 and 2 the sums
        under an offloaded optimizer. A refused step leaves bf16's fp32 partition there as well.
        """
        zero = self.zero
        if self.stage == 3:
            zero.grad_partitions_flat_buffer.zero_()
            if zero.offload_optimizer:
                zero.norm_for_param_grads.clear()
        elif getattr(zero, "cpu_offload", False):
            sums = [
                *zero.accumulated_grads_in_cpu.values(),
                *(p.grad for p in zero.single_partition_of_fp32_groups if p.grad is not None),
            ]
            for gradient in sums:
                gradient.zero_()
            zero.norm_for_param_grads.clear()
            zero._offload_accumulated_param_ids.clear()
            if not applied:
                for group in zero.averaged_gradients:
                    zero.averaged_gradients[group] = None

    def _link_moments(self) -> None:
        """DeepSpeed 0.19.8 looks for the moments of all groups once, when it has stepped the first: those of
        the second (what does not decay) are not there yet, and would never be found."""
        if self.stage in (1, 2) and not self._linked and self.has_moments():
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
            self._linked = True

    @contextmanager
    def full_parameters(self, parameters: list[nn.Parameter], *, writable: bool = False) -> Iterator[None]:
        """Makes whole parameters visible on every rank (a collective at ZeRO-3); writable: rank 0's values
        win."""
        if self.stage < 3:
            yield
            return
        gathered = _deepspeed().zero.GatheredParameters(parameters, modifier_rank=0 if writable else None)
        with gathered:
            yield

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 master weight, gathered on the device: copy it (`on_cpu`) where it is kept. A
        collective, as are the three below."""
        full = parameter if self.stage == 0 else _fragments().safe_get_full_fp32_param(parameter)
        return _whole(full, "fp32 master weight")

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """One of Adam's moments ("exp_avg", "exp_avg_sq"), whole, fp32, likewise."""
        if self.stage > 0:
            return _whole(_fragments().safe_get_full_optimizer_state(parameter, name), name)
        state = self.ds.basic_optimizer.state[parameter]
        return _whole(state[name] if name in state else torch.zeros_like(parameter), name)

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets the fp32 master weight and the copy that the model computes with."""
        if self.stage > 0:
            _fragments().safe_set_full_fp32_param(parameter, value)
        with self.full_parameters([parameter], writable=True), torch.no_grad():
            if self.stage < 3 or self.ds.global_rank == 0:
                parameter.data.copy_(value.to(parameter.dtype))

    def set_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Sets one of Adam's moments, which must exist (see `has_moments`)."""
        if self.stage > 0:
            _fragments().safe_set_full_optimizer_state(parameter, value, name)
        else:
            state = self.ds.basic_optimizer.state[parameter]
            if (
                name in state
            ):  # a parameter that never had a gradient has no state, here and when it was saved
                state[name].copy_(value)

    def has_moments(self) -> bool:
        """True once Adam's state exists: after the first step."""
        return any("exp_avg" in state for state in self.ds.basic_optimizer.state.values())

    def optimizer_step(self) -> int:
        """Steps that Adam has taken: its counter for bias correction."""
        return max(
            (int(state["step"]) for state in self.ds.basic_optimizer.state.values() if "step" in state),
            default=0,
        )

    def set_optimizer_step(self, step: int) -> None:
        """Sets the step counter of Adam's bias correction."""
        for state in self.ds.basic_optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(float(step))
            elif "step" in state:
                state["step"] = step

    def _assert_fp32_master(self) -> None:
        """fp32 master weights are the contract; DeepSpeed decides them from several keys, so look."""
        for group in self.ds.basic_optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.dtype != torch.float32:
                    raise AssertionError(
                        f"the optimizer holds {parameter.dtype} master weights, not fp32 (ZeRO stage "
                        f"{self.stage})"
                    )
