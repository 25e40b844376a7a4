"""One DeepSpeed rank. This is the only file that imports deepspeed, and it keeps the accumulation contract.

    backward(loss) × K   ->   step(): reduce (once, or per micro-batch by policy), clip, apply

`loss` is a share of a global mean: the sum over this micro-batch, divided by the count of the whole effective
batch. DeepSpeed averages gradients over ranks, so the loss is multiplied by the world size once.
docs/design.md lists what this file has to work around: default clipping of 1.0, bf16 accumulation and
reduction, a spurious Adam step at bf16 stage 0, NaN parameters at fp32 stage 0, micro-batches that are lost
if the boundary is not set.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.core.errors import InternalError
from orchestrator.core.reports import StepApplied
from orchestrator.core.zero import PERSISTENT_ELEMENTS, bucket_elements, overlaps
from orchestrator.learner.optimizer import GuardedAdamW, zero_missing
from orchestrator.learner.traffic import CollectiveCounter
from orchestrator.models.decay import parameter_groups
from orchestrator.models.precision import precision_of
from orchestrator.recipe.schema import Learners, Optimizer


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """This rank's place among all ranks, and how it reaches them."""

    rank: int
    world: int
    address: str
    """Host of rank 0's rendezvous."""
    port: int
    """Port of rank 0's rendezvous."""
    timeout_s: float
    """Deadline of joining and of each collective."""

    def join(self, device: torch.device) -> None:
        """Enters the process group. Blocks until all ranks have joined or the deadline has passed."""
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
        """Gives the groups that DeepSpeed creates itself the same deadline. They start with torch's default,
        10 minutes for NCCL."""
        from torch.distributed import distributed_c10d as c10d

        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=self.timeout_s), group)


def load_deepspeed(accelerator: str) -> Any:
    """The library, for the named accelerator ("cuda" or "cpu"). Without the name it would search for one at
    import. The import takes a second."""
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    return _deepspeed()


def _deepspeed() -> Any:
    """Imports deepspeed without its start-up output and without compiling anything.

    TorchBackend would compile a shared-memory op with g++ for a minute (and fail without g++). Only inference
    uses that op.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    import deepspeed.comm.comm
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _fragments() -> Any:
    """The module with DeepSpeed's functions that read and write whole values of a parameter."""
    from deepspeed import utils

    return utils


def _whole(tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise InternalError(f"DeepSpeed has no {what} for a trainable parameter")
    return tensor.detach().float()


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy in this host's memory, which later steps do not change."""
    return tensor.detach().to("cpu", copy=True).contiguous()


@contextmanager
def cast_once() -> Iterator[None]:
    """Keeps autocast's low-precision copies of the weights for all forwards of a step.

    Autocast drops the copies when its outermost context ends. This context is the outermost one around all
    micro-batches, and does not enable autocast itself, so backwards run as before. Checkpointed layers that a
    GPU computes again on autograd's own thread still cast.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def deepspeed_config(
    learners: Learners, optimizer: Optimizer, stage: int, sync: str, trainable: int
) -> dict[str, Any]:
    """DeepSpeed's configuration with every key that would otherwise have a silent default.

    trainable: number of trainable elements, which bounds the size of a bucket.
    """
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
        # 0: gather again for the backward, since stage 3 was chosen for its memory
        zero["stage3_max_reuse_distance"] = 0
        zero["stage3_prefetch_bucket_size"] = bucket if gpu else 0  # a CPU overlaps nothing
    if learners.offload.optimizer != "none":
        zero["offload_optimizer"] = {"device": learners.offload.optimizer, "pin_memory": True}
    if learners.offload.parameters != "none":
        zero["offload_param"] = {"device": learners.offload.parameters, "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # nominal: the caller sets the boundary
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

    sync is one of
    - "no_sync" (stages 0 and 1): one all-reduce at the step,
    - "coalesced" (stages 1 to 3, fp32): one reduction at the end of `accumulation()`,
    - "per_micro_batch" (stages 2 and 3): a reduction in every backward.
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
        # at stage 3 the copies would be of tensors that it partitions
        self.casts_weights = precision_of(learners.precision).autocast and stage < 3
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
        """Encloses all backwards of one optimizer step. The step's collectives are counted from here on."""
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
        """Prepares for the reduction that DeepSpeed runs even after an error.

        All ranks have to reduce the same tensors, so a missing gradient counts as zero here. The step is
        discarded or never applied. At ZeRO-3 the other ranks wait in the gather of a forward instead, so the
        reduction is skipped and the error is reported immediately.
        """
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
        """Reduces the remaining gradients, clips by the global norm and applies once. Refuses a non-finite
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
        """Drops the accumulated gradient of the step. Weights and moments stay bitwise as they are. A
        collective.

        idle_loss: makes a loss on every rank that depends on the parameters. Gradients lie in private buffers
        of DeepSpeed that differ by stage, precision and offload. Every optimizer refuses a NaN gradient and
        then clears its own buffers, so this makes the gradient NaN.
        """
        with self.accumulation():
            self.backward(idle_loss() * float("nan"), last=True)
        if self.step(0.0).applied:
            raise InternalError("discard() applied a step: DeepSpeed no longer refuses a NaN gradient")

    def _hand_over(self) -> None:
        """Passes all gradients to an offloaded optimizer. DeepSpeed 0.19.8 passes only those of parameters
        that the LAST micro-batch reached."""
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
        """Clears the gradients that DeepSpeed 0.19.8 would carry into the next step.

        DeepSpeed writes the first gradient of a step over that of the last step. A parameter without a
        gradient would therefore keep the old one, or the infinities of a refused step. This concerns ZeRO-3's
        partitions, and the sums under an offloaded optimizer at stages 1 and 2. A refused step also leaves
        bf16's fp32 partition there.
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
        """Makes DeepSpeed look for the moments of all groups again. 0.19.8 looks once, after it has stepped
        the first group: the moments of the second (without decay) do not exist yet."""
        if self.stage in (1, 2) and not self._linked and self.has_moments():
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
            self._linked = True

    @contextmanager
    def full_parameters(self, parameters: list[nn.Parameter], *, writable: bool = False) -> Iterator[None]:
        """Gathers whole parameters on every rank for the duration of the context. A collective at ZeRO-3.

        writable: True sends rank 0's values back to the partitions.
        """
        if self.stage < 3:
            yield
            return
        gathered = _deepspeed().zero.GatheredParameters(parameters, modifier_rank=0 if writable else None)
        with gathered:
            yield

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 master weight, gathered on the device. Copy it (`on_cpu`) to keep it. A collective,
        like the three methods below."""
        full = parameter if self.stage == 0 else _fragments().safe_get_full_fp32_param(parameter)
        return _whole(full, "fp32 master weight")

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """One of Adam's moments ("exp_avg" or "exp_avg_sq"), whole and in fp32."""
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
        """Sets one of Adam's moments. They must exist (see `has_moments`)."""
        if self.stage > 0:
            _fragments().safe_set_full_optimizer_state(parameter, value, name)
        else:
            state = self.ds.basic_optimizer.state[parameter]
            if name in state:  # a parameter that never had a gradient has no state, here or in the checkpoint
                state[name].copy_(value)

    def has_moments(self) -> bool:
        """Whether Adam's state exists: true after the first step."""
        return any("exp_avg" in state for state in self.ds.basic_optimizer.state.values())

    def optimizer_step(self) -> int:
        """Adam's step counter, which bias correction uses."""
        return max(
            (int(state["step"]) for state in self.ds.basic_optimizer.state.values() if "step" in state),
            default=0,
        )

    def set_optimizer_step(self, step: int) -> None:
        """Sets Adam's step counter."""
        for state in self.ds.basic_optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(float(step))
            elif "step" in state:
                state["step"] = step

    def _assert_fp32_master(self) -> None:
        """Checks that the optimizer's weights are fp32. DeepSpeed derives their type from several keys."""
        for group in self.ds.basic_optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.dtype != torch.float32:
                    raise InternalError(
                        f"the optimizer holds {parameter.dtype} master weights, not fp32 (ZeRO stage "
                        f"{self.stage})"
                    )
