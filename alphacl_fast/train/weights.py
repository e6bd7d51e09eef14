"""Initial weights from a file, and the choice of a checkpoint's weights for evaluation."""

from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import CHECKPOINT
from .config import RunError
from .models import Net

State = dict[str, Tensor]


def load_weights(net: Net, path: Path) -> None:
    """Load initial weights.

    Args:
        net: network to load them into.
        path: run folder or checkpoint of a run of any recipe (its averaged or best weights, if it
            has them), or a state dict of the network, of its encoder, or of torchvision's ResNet,
            whose last layer is left out.

    Raises:
        RunError: the file cannot be read, or holds weights of another network.
    """
    found = _read(path / CHECKPOINT if path.is_dir() else path)
    problems = []
    for module, state in (
        (net, found),
        (net.encoder, of_encoder(found)),
        (net.encoder, found),
        (net.encoder.body, _as_torchvision(found, net)),
    ):
        own = module.state_dict()
        wrong = _difference(own, state)
        if not wrong:
            module.load_state_dict(state)
            return
        problems.append((len(set(own) & set(state)), wrong))
    _, wrong = max(problems, key=lambda problem: problem[0])
    raise RunError(
        f"--weights {path} holds weights of another network: {wrong}; expected weights of "
        "this network, of its encoder, or of torchvision's ResNet of this size"
    )


def evaluated(state: dict) -> State:
    """Pick the weights of a checkpoint that are evaluated: the best, the averaged or the last."""
    if state.get("best"):
        return state["best"]["model"]
    return _under("module.", state["ema"]) if "ema" in state else state["model"]


def of_encoder(state: State) -> State:
    """Pick the encoder's weights of a network's."""
    return _under("encoder.", state)


def _under(prefix: str, state: State) -> State:
    return {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}


def _read(path: Path) -> State:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"cannot read --weights {path}: {error.strerror or error}") from error
    except Exception as error:  # unpickling a file of another origin can raise almost anything
        raise RunError(
            f"--weights {path} must be a file of torch.save, got one that cannot be read "
            f"({type(error).__name__})"
        ) from error
    if isinstance(found, dict) and {"config", "epoch", "model"} <= {*found}:
        found = evaluated(found)
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise RunError(f"--weights {path} must hold a dict of tensors, got {_kind(found)}")
    if not all(bool(torch.isfinite(x).all()) for x in found.values()):
        raise RunError(f"--weights {path} holds a weight that is infinite or NaN")
    return found


def _kind(found) -> str:
    if not isinstance(found, dict):
        return type(found).__name__
    name, value = next(
        (name, value) for name, value in found.items() if not isinstance(value, Tensor)
    )
    return f"{type(value).__name__} under {name!r}"


def _as_torchvision(found: State, net: Net) -> State:
    """Rename torchvision's ResNet: its layers come in the order of the encoder's body."""
    layers = {name: x for name, x in found.items() if not name.startswith("fc.")}
    own = [*net.encoder.body.state_dict()]
    if "layer1.0.conv1.weight" not in layers or len(own) != len(layers):
        return {}
    return dict(zip(own, layers.values(), strict=True))


def _difference(own: State, state: State) -> str:
    """Say in words how names or shapes differ; "" if they do not."""
    missing, unknown = ([x for x in a if x not in b] for a, b in ((own, state), (state, own)))
    if missing:
        return f"{missing[0]} is missing"
    if unknown:
        return f"{unknown[0]} is unknown"
    for name, x in own.items():
        if x.shape != state[name].shape:
            return f"{name} has the shape {tuple(state[name].shape)} and not {tuple(x.shape)}"
    return ""
