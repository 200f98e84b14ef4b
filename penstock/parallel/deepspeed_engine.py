"""A model in DeepSpeed's engine, which takes its backward passes and divides its state.

`train_parts.py` makes one where `plan.engine` is deepspeed: passes see `EngineModel`, the train
step `EngineReplicas`, and the optimizer reads and sets state by parameter. DeepSpeed's own
checkpoints are pickles and never used. It must never know about an optimizer's settings.

Source: DeepSpeed 0.19, https://deepspeed.readthedocs.io (initialize, safe_get_… and safe_set_…);
ZeRO stages 1, 2, 3: Rajbhandari et al., arXiv 1910.02054, §5.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from penstock.models.transformer import Transformer
from penstock.parallel.environment import tell_deepspeed
from penstock.parallel.mesh import Peers
from penstock.parallel.replicas import Replicas
from penstock.parallel.world import World

_STAGES = ("none", "optimizer", "gradients", "weights")
"""Values of `plan.shard` by ZeRO's stage."""
_BUCKET = 8 << 20
"""Elements of gradients reduced in one call. DeepSpeed makes buffers of that size, by default of
half a billion."""


class Engine:
    """One process's part of a model, its gradients and its optimizer's state."""

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        world: World,
        *,
        shard: str,
        micro: int,
        accumulation: int,
        clip: float | None,
    ) -> None:
        """Divide the model among the processes.

        Args:
            model: the same on every process; its parameters keep their names and identity.
            optimizer: of torch, over the model's parameters; DeepSpeed puts its own in their place
                and calls it. Its state must hold what `start` makes.
            world: all processes; each is a replica.
            shard: as `plan.shard`.
            micro: sequences of a micro-batch.
            accumulation: micro-batches of a step, on each replica.
            clip: gradients are divided so that their norm is no more than this.
        """
        self.stage = _STAGES.index(shard)
        self.model = model
        self._rank, self._optimizer = world.rank, optimizer
        self._deepspeed = deepspeed = _load(world, next(model.parameters()).device)
        module = _Module(model, self._gathered)
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip or 0.0,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": _BUCKET,
                # Small tensors are divided too: a block's are gathered with its large ones.
                "stage3_param_persistence_threshold": 0,
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        if next(model.parameters()).dtype == torch.bfloat16:
            settings["bf16"] = {"enabled": True}
            # Also for sums, as everywhere else.
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            settings["communication_data_type"] = "fp32"
        self._engine: Any = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings
        )[0]
        for part in (model.embed, *model.blocks, model.head) if self.stage == 3 else ():
            # Kernels and the head take the weights of all that is below them at once.
            for parameter in part.parameters():
                deepspeed.zero.register_external_parameter(part, parameter)

    def __call__(self, *inputs: Any, per_token: bool = False) -> Tensor:  # noqa: ANN401 - a model's
        """The loss, or with `per_token` the loss of each target; see `Transformer`."""
        return self._engine(*inputs, per_token=per_token)

    def begin(self, *, is_last: bool) -> None:
        """Before each micro-batch: whether its gradients are the last to be added."""
        self._engine.set_gradient_accumulation_boundary(is_last)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients to the step's, summed over all processes."""
        # DeepSpeed takes means; loss weights are divided by their sum over the whole batch.
        self._engine.backward(loss * self._engine.world_size, scale_wrt_gas=False)

    def step(self) -> None:
        """Clip, have the optimizer update its part, and let gradients go."""
        self._engine.step()

    def partitions(self) -> list[Tensor]:
        """The float32 masters this process's optimizer updates, as DeepSpeed lays them out."""
        if self.stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def start(self, state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """Take up an optimizer's state of each of the `partitions`; reading it works from then."""
        for partition, values in state.items():
            self._optimizer.state[partition] = values
        if self.stage in (1, 2):
            # Otherwise DeepSpeed finds them only after a first step.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def gradient(self, parameter: Any) -> Tensor:  # noqa: ANN401 - DeepSpeed's attributes
        """This process's part of a step's gradient, (n,) or whole."""
        if self.stage == 0:
            return parameter.grad
        if self.stage == 3:
            return self._deepspeed.utils.safe_get_local_grad(parameter)
        mapping = parameter._hp_mapping
        if mapping is None:
            return torch.zeros(0, device=parameter.device)
        found = mapping.get_lp_grad_fragment(parameter._index_in_param_group).reshape(-1)
        place = mapping.lp_fragment_address
        # In bf16 stage 1 keeps gradients whole.
        if found.numel() == parameter.numel() > place.numel:
            return found[place.start : place.start + place.numel]
        return found

    def whole(self, parameter: Tensor, kind: str | None = None) -> Tensor:
        """A parameter's float32 master, or its state of a kind; all processes call it."""
        if self.stage == 0:
            return parameter.detach() if kind is None else self._optimizer.state[parameter][kind]
        if kind is None:
            return self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)

    @torch.no_grad()
    def put(self, parameter: Any, value: Tensor, kind: str | None = None) -> None:  # noqa: ANN401 - as above
        """Set what `whole` returns, and with a master the weight; all processes call it."""
        value = value.to(parameter.device)
        if kind is None:
            with self._gathered([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        utils = self._deepspeed.utils
        if self.stage == 0 and kind is not None:
            self._optimizer.state[parameter][kind].copy_(value)
        elif self.stage in (1, 2) and kind is None:
            utils.safe_set_full_fp32_param(parameter, value)
        elif self.stage in (1, 2):
            utils.safe_set_full_optimizer_state(parameter, value, kind)
        elif self.stage == 3:
            own = _own(value, parameter.ds_tensor.numel(), self._rank)
            if kind is None:
                utils.safe_set_local_fp32_param(parameter, own)
            else:
                utils.safe_set_local_optimizer_state(parameter, own, kind)

    def _gathered(self, parameters: Sequence[Tensor], modifier_rank: int | None = None) -> Any:  # noqa: ANN401 - DeepSpeed's context manager
        """A context in which these parameters are whole."""
        return self._deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=modifier_rank, enabled=self.stage == 3
        )


def _own(value: Tensor, size: int, rank: int) -> Tensor:
    """The elements (size,) of a whole tensor that stage 3 has given a process, zeros behind it."""
    own = value.new_zeros(size)
    found = value.reshape(-1)[rank * size : (rank + 1) * size]
    own[: found.numel()] = found
    return own


class _Module(nn.Module):
    """What DeepSpeed sees: one `forward` for all that is computed, where its hooks begin."""

    def __init__(self, model: Transformer, gathered: Callable[[Sequence[Tensor]], Any]) -> None:
        super().__init__()
        self.model = model
        self._gathered = gathered

    def forward(self, *inputs: Any, per_token: bool = False) -> Tensor:  # noqa: ANN401 - a model's
        if not per_token:
            return self.model(*inputs)
        tokens, targets, segments = inputs
        hidden = self.model.hidden(tokens, segments)
        # No hook knows methods other than `forward`.
        with self._gathered(list(self.model.head.parameters())):
            return self.model.head.token_losses(hidden, targets)


class EngineModel:
    """Of a model in an engine, what passes use of a `Transformer`."""

    def __init__(self, engine: Engine) -> None:
        """The engine's model."""
        self._engine = engine
        self.transformer = engine.model
        self.dropout_keys = engine.model.dropout_keys

    def __call__(self, *inputs: Any) -> Tensor:  # noqa: ANN401 - a model's
        """The loss; see `Transformer.forward`."""
        return self._engine(*inputs)

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """See `Transformer.token_losses`."""
        return self._engine(tokens, targets, segments, per_token=True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's, which may be empty where weights are divided."""
        return self.transformer.parameters()


class EngineReplicas(Replicas):
    """What one replica does with the others where DeepSpeed speaks to them."""

    def __init__(self, engine: Engine, peers: Peers, shard: str) -> None:
        """`engine` has divided the model as `shard` says."""
        super().__init__(peers=peers)
        self._engine = engine
        self.shard = shard if peers.size > 1 else "none"

    def needs_sums(self, accumulation: int) -> bool:
        """Never: DeepSpeed sums `accumulation` micro-batches' gradients."""
        return False

    def begin(self, *, is_last: bool) -> None:
        """Before each micro-batch: whether its gradients are the last to be added."""
        self._engine.begin(is_last=is_last)

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch, with the sum over the replicas."""
        self._engine.backward(loss)

    def reduce(self, gradients: Sequence[Tensor], names: Sequence[str]) -> None:
        """Nothing: they are summed already."""

    def saved(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """This process's rows of whole tensors, which it gathers one after the other; all processes
        call it. DeepSpeed's own division is not by rows.
        """
        if not self.is_divided:
            return tensors
        size, rank = self.peers.size, self.peers.rank
        return {name: tensors[name].tensor_split(size)[rank].clone() for name in tensors}


def _load(world: World, device: torch.device) -> Any:  # noqa: ANN401 - a module
    """DeepSpeed, on this device, with the processes that have met, and silent but for errors."""
    tell_deepspeed(world.place, device.type)
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    import deepspeed  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - the extra `deepspeed`

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch 2.13 has others for: a line for each call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # An operation over shared memory, which it would have a compiler make at each first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
