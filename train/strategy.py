"""How weights, gradients and optimizer lie on the processes: replicated (DDP), sharded (FSDP2) or DeepSpeed's (ZeRO).

Which one is accelerate's configuration; the loop and the checkpoints do not see it. All give and take whole tensors, so
that a run goes on under another strategy or another number of processes.
"""

import contextlib
import copy
import importlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from .loop_config import LoopConfig
from .optimization import make_optimizer

_SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)

# Name of a parameter -> its step, exp_avg and exp_avg_sq
OptimizerState = dict[str, dict[str, torch.Tensor]]


class Replicated:
    """Every process holds everything: one process, or DDP. `model` is what to call, `optimizer` what has a rate."""

    def __init__(self, model: torch.nn.Module, accelerator: Accelerator, config: LoopConfig):
        self.accelerator, self.max_norm = accelerator, config.max_grad_norm
        optimizer = make_optimizer(model, config)
        # In the order of the optimizer's state
        trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [name_of[key] for key in trained]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward: processes share gradients in the last micro-batch of a step only."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to the gradients those of `loss`, averaged over the processes."""
        self.accelerator.backward(loss)

    def step(self) -> torch.Tensor:
        """Clips the gradients, updates the weights; returns the norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert isinstance(norm, torch.Tensor)
        return norm

    def model_to_evaluate(self) -> torch.nn.Module:
        """What validation calls, on every process. Not DDP, whose processes would wait for each other."""
        return self.accelerator.unwrap_model(self.model)

    def whole_model(self) -> torch.nn.Module:
        """The bare model with all its weights, on every process."""
        return self.accelerator.unwrap_model(self.model)

    def optimizer_state(self) -> OptimizerState:
        """Whole tensors, on the main process."""
        state = self.optimizer.state_dict()["state"]
        whole: OptimizerState = {}
        for index, values in state.items():
            for key, value in values.items():
                # All processes take part; only the main one keeps what comes of it.
                tensor = _full(value)
                if self.accelerator.is_main_process:
                    whole.setdefault(self.names[index], {})[key] = tensor.detach().cpu().contiguous()
        return whole

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Takes what `optimizer_state` gave, on every process."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        shares = {
            index: {key: self._share(value, parameters[index]) for key, value in state[name].items()}
            for index, name in enumerate(self.names)
            if name in state
        }
        self.optimizer.load_state_dict({"state": shares, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _share(self, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        return value


class FullySharded(Replicated):
    """FSDP2: each process holds a slice of every weight, gradient and optimizer state.

    The model that was passed stays as it is, in the processes' ordinary memory; a copy is sharded and trained, and its
    weights come back when they are asked for.
    """

    def __init__(self, model: torch.nn.Module, accelerator: Accelerator, config: LoopConfig):
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.bare = model
        trained = copy.deepcopy(model)
        _keep_one_name_of_head(trained)
        plugin: Any = accelerator.state.fsdp_plugin
        # Every process has made or read the weights, so there are none to wait for.
        plugin.cpu_ram_efficient_loading = False
        if plugin.mixed_precision_policy is not None:
            # accelerate would sum gradients over the processes in bfloat16, and return the loss in it.
            dtype = plugin.mixed_precision_policy.param_dtype
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        super().__init__(trained, accelerator, config)
        # The names that the bare model's parameters go by, as in Replicated
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [name_of[id(model.get_parameter(name))] for name in self.names]

    def step(self) -> torch.Tensor:
        norm: Any = super().step()
        return norm.full_tensor()

    def model_to_evaluate(self) -> torch.nn.Module:
        return self.model

    def whole_model(self) -> torch.nn.Module:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.bare.get_parameter(name).copy_(_full(parameter))
        return self.bare

    def _share(self, value: torch.Tensor, parameter: Any) -> torch.Tensor:
        from torch.distributed.tensor import distribute_tensor

        if value.shape != parameter.shape:
            return value
        # Every process has read the whole tensor: none needs to be sent.
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )


class DeepSpeedZero:
    """DeepSpeed's ZeRO, stage 2 (gradients and optimizer sharded) or 3 (weights too), with or without offload.

    As with FSDP2, a copy is trained. Checkpoints are not DeepSpeed's own, which are pickles tied to a stage and a
    number of processes.
    """

    def __init__(self, model: torch.nn.Module, accelerator: Accelerator, config: LoopConfig):
        if accelerator.mixed_precision == "fp16":
            raise ValueError("DeepSpeed trains in bf16 or float32 here, not fp16: use ddp_bf16.yaml with fp16 on V100.")
        self.accelerator, self.bare = accelerator, model
        plugin: Any = accelerator.deepspeed_plugin
        self.stage = plugin.zero_stage
        if self.stage not in (2, 3):
            raise ValueError(f"Expected ZeRO stage 2 or 3, found {self.stage}: stage 1 saves nothing that 2 does not.")
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        # DeepSpeed's default is a buffer of 1 GB whatever the model.
        plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = min(n_parameters, 500_000_000)
        plugin.deepspeed_config |= {
            # A formality: DeepSpeed only prints with it, and batches are by tokens.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": config.max_grad_norm,
        }
        trained = copy.deepcopy(model)
        name_of = {id(parameter): name for name, parameter in trained.named_parameters()}
        self.model, self.optimizer = accelerator.prepare(trained, make_optimizer(trained, config))
        self.engine: Any = self.model
        self.utils: Any = importlib.import_module("deepspeed.utils")
        self.trained = {name_of[id(p)]: p for p in trained.parameters() if p.requires_grad}
        self.names = list(self.trained)
        self._start_optimizer()

    def _start_optimizer(self) -> None:
        """Makes the optimizer's state, which would come with the first step.

        By then DeepSpeed 0.19's stage 2 has looked for that of all parameter groups after it updated the first, and
        finds none of the others from then on.
        """
        zero, base = self.engine.optimizer, self.engine.optimizer.optimizer
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            moments = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
            base.state[flat] = {"step": self._count(torch.zeros(()), flat.device), **moments}
        if self.stage == 2:
            zero._lazy_init_hp_params_optimizer_state()

    def _count(self, step: torch.Tensor, device: torch.device) -> torch.Tensor | int:
        """Steps as the optimizer counts them: torch's with a tensor, DeepSpeed's CPU Adam with an int."""
        return (
            step.to(device, copy=True) if isinstance(self.engine.optimizer.optimizer, torch.optim.AdamW) else int(step)
        )

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> torch.Tensor:
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def model_to_evaluate(self) -> torch.nn.Module:
        return self.model

    def whole_model(self) -> torch.nn.Module:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                self.bare.get_parameter(name).copy_(self.utils.safe_get_full_fp32_param(parameter))
        return self.bare

    def optimizer_state(self) -> OptimizerState:
        base = self.engine.optimizer.optimizer
        # One step count for all: that of any slice
        step = torch.tensor(float(next(iter(base.state.values()))["step"]))
        state: OptimizerState = {}
        for name, parameter in self.trained.items():
            get = self.utils.safe_get_full_optimizer_state
            whole = {key: get(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            if self.accelerator.is_main_process:
                state[name] = {"step": step.clone(), **{key: value.cpu() for key, value in whole.items()}}
        return state

    def load_optimizer_state(self, state: OptimizerState) -> None:
        step = next(iter(state.values()))["step"]
        for values in self.engine.optimizer.optimizer.state.values():
            values["step"] = self._count(step, values["exp_avg"].device)
        for name, parameter in self.trained.items():
            # The float32 weights too: those of the engine were rounded to its type.
            self._set(parameter, None, self.bare.get_parameter(name).detach())
            for key in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    self._set(parameter, key, state[name][key])

    def _set(self, parameter: Any, key: str | None, value: torch.Tensor) -> None:
        """Puts this process's part of a whole tensor in the optimizer: a state, or the weight itself (key None)."""
        if self.stage == 2:
            value = value.to(parameter.device)
            if key is None:
                self.utils.safe_set_full_fp32_param(parameter, value)
            else:
                self.utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # Slices are of equal size, the last one padded.
        size = parameter.ds_tensor.numel()
        start = self.accelerator.process_index * size
        part = value.flatten()[start : start + size]
        part = torch.nn.functional.pad(part, (0, size - len(part))).to(parameter.ds_tensor.device)
        if key is None:
            self.utils.safe_set_local_fp32_param(parameter, part)
        else:
            self.utils.safe_set_local_optimizer_state(parameter, part, key)


Strategy = Replicated | FullySharded | DeepSpeedZero


def make_strategy(model: torch.nn.Module, accelerator: Accelerator, config: LoopConfig) -> Strategy:
    """The strategy that accelerate was configured with.

    Raises  ValueError for one that this loop does not know, with what to use instead
    """
    kind = accelerator.distributed_type
    if config.compile:
        _check_compilable(kind)
    if kind in _SHARDED and not all(p.is_floating_point() for p in model.parameters()):
        raise ValueError("Quantized weights cannot be sharded here: use DDP (ddp_bf16.yaml).")
    if kind == DistributedType.DEEPSPEED:
        return DeepSpeedZero(model, accelerator, config)
    if kind == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("Expected fsdp_version: 2 in accelerate's configuration, found 1. See fsdp2.yaml.")
        return FullySharded(model, accelerator, config)
    if kind == DistributedType.MEGATRON_LM:
        raise ValueError("Expected DDP, FSDP2 or DeepSpeed, found Megatron-LM. See train/accelerate_configs.")
    if config.compile:
        # In place, so that the names of the weights stay as they are
        model.compile(dynamic=True)
    return Replicated(model, accelerator, config)


def _check_compilable(kind: DistributedType) -> None:
    if kind in _SHARDED:
        raise ValueError("compile needs whole weights: one process or DDP (ddp_bf16.yaml), not FSDP2 or DeepSpeed.")
    compilers = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang", "cl"]
    if not any(shutil.which(name) for name in compilers if name):
        raise ValueError("compile needs a C++ compiler, and none was found: install g++, or leave out --compile.")


def _keep_one_name_of_head(model: Any) -> None:
    """Removes second names of the output head's own parameters from modules around it.

    BERT's head names the decoder's bias twice. FSDP2 puts input embeddings and decoder, which are tied, in one group,
    and refuses a parameter that another group sees too. The second name is for checkpoints; no forward reads it.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if head is None:
        return
    own = {id(parameter) for parameter in head.parameters(recurse=False)}
    for module in model.modules():
        if module is not head and module is not embeddings:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in own:
                    delattr(module, name)


def _full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
