"""Towers too large for one GPU: weights, gradients and the optimizer's state shared out among the ranks (FSDP2).

Matrices and everything of more dimensions are cut along their first dimension, a part for each rank. A block's are
gathered when it computes and dropped again. Vectors and scalars (norms, biases, the logit scale), a thousandth of all
numbers, are whole on every rank: FSDP2 shards no scalars, and norms stay in float32 where matrices are gathered in
half precision.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from declip.errors import InputError
from declip.model.text_tower import is_huggingface, transformer_of
from declip.model.towers import Towers
from declip.ranks import Ranks
from declip.training.step import Step, compute_dtype

# Under which names image towers keep what they compute one after the other: timm's, and last those of all ResNets.
STAGES = (("blocks",), ("stages",), ("layers",), ("layer1", "layer2", "layer3", "layer4"))
LIST = nn.ModuleList | nn.Sequential


def shard(step: Step, clip: Towers, device: torch.device, ranks: Ranks) -> None:
    """Shard a step's parameters among the ranks, in place: block by block, and all that is in no block together.

    The towers are still on the CPU, and block by block what is this rank's goes to the device. Blocks gather their
    matrices in the precision that autocast computes in; gradients are averaged in float32. Weights are not put into the
    order that convolutions are fastest in, which FSDP2 does not take; images are.
    Raises InputError as `tower_blocks` does.
    """
    blocks = tower_blocks(clip)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    vectors = {parameter for parameter in step.parameters() if parameter.ndim < 2}
    options: Any = {"mesh": init_device_mesh(device.type, (ranks.count,)), "ignored_params": vectors}
    dtype = compute_dtype(device, step.precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(step, **options)
    for vector in vectors:
        vector.data = vector.data.to(device)


def tower_blocks(clip: Towers) -> list[nn.Module]:
    """What is gathered at once, of both towers; raises InputError where one does not say, or PyTorch is too old."""
    if torch.torch_version.TorchVersion(torch.__version__) < "2.7":
        raise InputError(f"engine.shard needs PyTorch 2.7 or later, this is {torch.__version__}: leave it out.")
    return [*_image_blocks(clip), *_text_blocks(clip)]


def _image_blocks(clip: Towers) -> list[nn.Module]:
    from open_clip.transformer import VisionTransformer

    tower = clip.visual
    if isinstance(tower, VisionTransformer):
        return list(tower.transformer.resblocks)
    trunk = getattr(tower, "trunk", tower)
    for names in STAGES:
        parts: list[Any] = [part for name in names if isinstance(part := getattr(trunk, name, None), LIST)]
        if len(parts) == len(names):
            return parts if len(parts) > 1 else list(parts[0])
    raise InputError("engine.shard: this image tower does not say which its blocks are, it cannot be sharded.")


def _text_blocks(clip: Towers) -> list[nn.Module]:
    if not is_huggingface(clip):
        return list(transformer_of(clip).transformer.resblocks)
    lists: list[Any] = [
        part for part in clip.text.transformer.modules() if isinstance(part, nn.ModuleList) and len(part)
    ]
    if not lists:
        raise InputError("engine.shard: this text tower has no list of layers, it cannot be sharded.")
    longest: Any = max(lists, key=len)
    return list(longest)


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is one rank's part of a larger one (a DTensor, which not every PyTorch here has)."""
    return hasattr(tensor, "to_local")


def whole(tensor: Any) -> Tensor:
    """The tensor of which each rank has a part, gathered: all ranks must ask. Any other tensor as it is."""
    gathered: Tensor = tensor.full_tensor() if is_shard(tensor) else tensor
    return gathered


class Part(nn.Parameter):
    """This rank's part of a sharded parameter, sharing its memory, for an optimizer: fused steps take no DTensors.

    sharded: the DTensor, which the backward pass gives a gradient
    """

    sharded: Any


def own_part(parameter: Any) -> nn.Parameter:
    """The Part of a sharded parameter; any other as it is."""
    if not is_shard(parameter):
        return parameter  # type: ignore[no-any-return]
    part = Part(parameter.detach().to_local(), requires_grad=parameter.requires_grad)
    part.sharded = parameter
    return part


def take_gradients(parts: list[Part]) -> list[Tensor]:
    """Give the parts their gradients, which their sharded parameters let go; those that there are."""
    for part in parts:
        gradient, part.sharded.grad = part.sharded.grad, None
        part.grad = None if gradient is None else gradient.to_local()
    return [part.grad for part in parts if part.grad is not None]


def is_sharded(module: nn.Module) -> bool:
    return any(is_shard(parameter) for parameter in module.parameters())


def gather_weights(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Whole tensors, on the CPU of rank 0; none on the others. All ranks must ask."""
    gathered = {}
    for name, tensor in tensors.items():
        one = whole(tensor)
        if not ranks.rank:
            gathered[name] = one.cpu()
    return gathered


def _as_own(saved: Tensor, own: Any) -> Any:
    """A whole tensor, sharded as `own` is; as it is where `own` is not."""
    if not is_shard(own):
        return saved
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(saved.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def load_weights(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors; each rank takes its part where the module is sharded."""
    own = module.state_dict()
    module.load_state_dict({name: _as_own(tensor, own[name]) for name, tensor in saved.items()})


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its `state_dict`; what belongs to a Part is sharded as its parameter is."""

    def sharded(tensor: Tensor, part: nn.Parameter) -> Tensor:
        if not isinstance(part, Part) or tensor.shape != part.shape:
            return tensor
        from torch.distributed.tensor import DTensor

        own, shape = part.sharded, {"shape": part.sharded.shape, "stride": part.sharded.stride()}
        return DTensor.from_local(tensor, own.device_mesh, own.placements, run_check=False, **shape)

    return _changed_state(optimizer, optimizer.state_dict(), sharded)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict` of what `optimizer_state` gave, whole."""

    def own(tensor: Any, part: nn.Parameter) -> Any:
        if not isinstance(tensor, Tensor):  # Muon notes in a flag which parameters it leaves to Adam
            return tensor
        if not isinstance(part, Part) or tensor.shape != part.sharded.shape:
            # Fused steps go through memory in its order: that of a state has to be its parameter's (channels last).
            return torch.empty_like(part, dtype=tensor.dtype).copy_(tensor) if tensor.shape == part.shape else tensor
        local: Tensor = _as_own(tensor, part.sharded).to_local()
        return local

    optimizer.load_state_dict(_changed_state(optimizer, saved, own))


def _changed_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], change: Any) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        **state,
        "state": {
            number: {name: change(tensor, parameters[number]) for name, tensor in own.items()}
            for number, own in state["state"].items()
        },
    }


class WholeCopy:
    """Whole modules on rank 0 with the weights of sharded ones; on the CPU while they are not used."""

    def __init__(self, modules: list[nn.Module], ranks: Ranks) -> None:
        """modules: before they are sharded, in place"""
        self.modules = modules
        self.copies: list[nn.Module] = [] if ranks.rank else [module.cpu() for module in copy.deepcopy(modules)]

    def gather(self, device: torch.device) -> list[nn.Module]:
        """The copies, on a device, with the weights of now: on rank 0, none on the others; all ranks must ask."""
        for place, module in enumerate(self.modules):
            own = self.copies[place].to(device).state_dict() if self.copies else {}
            for name, tensor in module.state_dict().items():
                gathered = whole(tensor)
                if own:
                    own[name].copy_(gathered)
        return self.copies

    def put_away(self) -> None:
        for module in self.copies:
            module.cpu()
