"""Weights for the model constructors: torchvision's enums, files and state_dicts."""

import os

import torch

from ..lazy import require


def load_weights(build, weights, progress, kwargs, enum_name):
    """Build ``build(**kwargs)`` and load what ``weights`` stands for (None: nothing).

    ``enum_name``: torchvision's enum of weights for this model, or None where it has none.
    """
    if weights is None:
        return build(**kwargs)
    name, state = _state_dict(weights, progress, kwargs, enum_name)
    model = build(**kwargs)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{name} does not fit {type(model).__name__}({_signature(kwargs)}): {error}. Build the model with the "
            "arguments that the weights were trained with"
        ) from error
    return model


def _signature(kwargs):
    return ", ".join(f"{k}={v!r}" for k, v in kwargs.items())


def _state_dict(weights, progress, kwargs, enum_name):
    if isinstance(weights, dict):
        return "the given state_dict", weights
    if isinstance(weights, os.PathLike) or (isinstance(weights, str) and _looks_like_path(weights)):
        return _from_file(os.fspath(weights))
    if enum_name is None:
        raise ValueError(f"weights must be a path to a state_dict or a state_dict, got {weights!r}")
    enum = getattr(require("torchvision.models", "vision", "torchvision's weights"), enum_name)
    if isinstance(weights, str):
        try:
            weights = enum[weights.removeprefix(f"{enum_name}.")]
        except KeyError:
            known = ", ".join(["DEFAULT", *enum.__members__])
            raise ValueError(
                f"unknown weights {weights!r}: expected one of {known}, a path to a state_dict, or a state_dict"
            ) from None
    if not isinstance(weights, enum):
        raise ValueError(
            f"weights must be a {enum_name} member or its name, a path or a state_dict, got "
            f"{type(weights).__name__} {weights!r}"
        )
    classes = len(weights.meta["categories"])
    if kwargs.setdefault("num_classes", classes) != classes:
        raise ValueError(
            f"{weights} has {classes} classes but num_classes={kwargs['num_classes']} was given: load it with "
            f"{classes}, then replace the classifier's last layer"
        )
    return str(weights), weights.get_state_dict(progress=progress, check_hash=True)


def _looks_like_path(text):
    return os.sep in text or text.endswith((".pt", ".pth", ".bin")) or os.path.exists(text)


def _from_file(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here
        raise ValueError(f"{path} is no readable torch file (damaged, or not from torch.save): {error}") from error
    # a training checkpoint holds the model's state under "model" or "state_dict"
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state_dict: expected a mapping of names to tensors")
    return path, state
