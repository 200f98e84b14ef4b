"""Replicas of a model: each trains on its share of a batch, and gradients become one.

The train step calls `Replicas` where processes must agree. Weights, gradients and optimizer state
are on every replica, or divided among them by torch's FSDP2. It must never know about optimizers.

Source: ZeRO stages 1, 2, 3: Rajbhandari et al., arXiv 1910.02054, §5.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penstock.parallel.environment import Place
from penstock.parallel.mesh import Line, Peers
from penstock.parallel.world import World

_BUCKET_BYTES = 32 << 20
"""Gradients summed in one call: long enough that its latency does not count, short enough that its
copy is small beside the model."""


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that replicas may have divided: its own storage."""
    divided: Any = tensor
    return divided.to_local() if hasattr(tensor, "to_local") else tensor


class Replicas:
    """What one replica does with the others during a step. Alone, nothing."""

    def __init__(
        self,
        models: Sequence[nn.Module] = (),
        peers: Peers | None = None,
        shard: str = "none",
    ) -> None:
        """Divide the models' parameters as `shard` says: none, optimizer, gradients or weights.

        Every one of the peers must hold the same weights before.
        """
        self.peers = peers or World(Place())
        self.shard = shard if self.peers.size > 1 else "none"
        self._models: Sequence[Any] = models
        self._rows: dict[str, tuple[int, int]] = {}
        for model in models if self.shard != "none" else ():
            _divide(model, self.peers, free_weights=shard == "weights")
            self._rows |= dict(_rows(model))

    @property
    def is_divided(self) -> bool:
        """Whether each replica holds only its rows of every parameter."""
        return self.shard != "none"

    def needs_sums(self, accumulation: int) -> bool:
        """Whether the step must sum `accumulation` micro-batches' gradients in float32 itself."""
        if self.shard == "none":
            return accumulation > 1 or self.peers.size > 1
        return accumulation > 1 and self.shard != "optimizer"

    def begin(self, *, is_last: bool) -> None:
        """Before each micro-batch: whether its gradients are the last to be added."""
        for model in self._models if self.is_divided else ():
            model.set_is_last_backward(is_last)
            model.set_requires_gradient_sync(is_last or self.shard != "optimizer")
            model.set_reshard_after_backward(is_last or self.shard == "weights")

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch, from its loss () float32."""
        loss.backward()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over replicas of a small tensor, in place."""
        return self.peers.sum(value)

    def reduce(self, gradients: Sequence[Tensor], names: Sequence[str]) -> None:
        """Sum the step's gradients, of parameters so named, over the replicas, in place; divided
        ones are summed already.
        """
        if self.peers.size == 1 or self.is_divided:
            return
        for bucket in _buckets(gradients):
            flat = self.peers.sum(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            pieces = flat.split([gradient.numel() for gradient in bucket])
            shaped = [piece.view_as(g) for piece, g in zip(pieces, bucket, strict=True)]
            torch._foreach_copy_(list(bucket), shaped)

    def norm(self, own: Tensor) -> Tensor:
        """The Euclidean norm over all replicas' parts, () float32, from that of this one's."""
        if not self.is_divided:
            return own
        return self.peers.sum(own.double().square()).sqrt().float()

    def counted(self, gradients: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """Those of the gradients that go into this process's part of the norm: all."""
        return list(gradients)

    def saved(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those of this process's tensors that go into a checkpoint: all."""
        return tensors

    def rows_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This replica's part of whole tensors, named by a parameter or KIND.PARAMETER."""
        return {name: self._own(name, tensor) for name, tensor in tensors.items()}

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        rows = self._rows.get(name) or self._rows.get(name.partition(".")[2])
        return tensor if rows is None else tensor[slice(*rows)]


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in their order, so many at a time that they fill a bucket."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.nbytes
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _divide(model: Any, peers: Peers, *, free_weights: bool) -> None:  # noqa: ANN401 - FSDP changes the model's class
    """Leave each process its rows of every parameter; blocks are gathered one at a time."""
    from torch.distributed.device_mesh import (  # noqa: PLC0415 - half a second
        DeviceMesh,
        init_device_mesh,
    )
    from torch.distributed.fsdp import (  # noqa: PLC0415
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    device, names = next(model.parameters()).device.type, ("replicas",)
    if isinstance(peers, Line) and peers.group is not None:
        mesh = DeviceMesh.from_group(peers.group, device, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(device, (peers.size,), mesh_dim_names=names)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    # The root also holds embedding and head, which may share their weights. Of a stage's blocks
    # some are elsewhere.
    parts = [*(block for block in model.blocks if any(True for _ in block.parameters())), model]
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=free_weights, mp_policy=policy)
    for part in parts:
        # Sums, not means: loss weights are divided by their sum over the whole batch.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "token_losses")


def _rows(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """First and past-last row of each parameter that this process holds, by name."""
    from torch.distributed.tensor._utils import (  # noqa: PLC0415
        compute_local_shape_and_global_offset,
    )

    for name, parameter in model.named_parameters():
        tensor: Any = parameter
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        yield name, (offset[0], offset[0] + shape[0])
