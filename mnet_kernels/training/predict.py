"""What a trained checkpoint is for: test it again, and classify image files."""

import dataclasses

import torch

from . import TrainingError, checkpoint, data, folder, require
from .config import AMP_DTYPES, Config, build_model, implementation, use_backend
from .engine import Trainer


def _load(args):
    """The checkpoint, its configuration on this machine, and the weights that the run delivered."""
    state = checkpoint.load(args.checkpoint, checkpoint.MODEL_KEYS, "there is no checkpoint {}")
    # Mixed precision as trained; the rest of the machine's side is this machine's.
    amp = state["config"]["amp"]
    changes = {
        "device": args.device, "backend": args.backend, "mode": "auto", "processes": 1, "compile": "off", "ema": 0.0,
        "accumulate": 1, "limit_train": None, "implementation": implementation(args.backend, "auto", args.device, amp),
    }  # fmt: skip
    if args.res is not None:
        changes["res"] = args.res
    try:
        config = dataclasses.replace(Config(**state["config"]), **changes)
    except TypeError as exc:
        raise TrainingError(f"{args.checkpoint} does not fit this version of the program: {exc}") from exc
    weights = state["model"]
    if state.get("ema"):  # last.pt has both; best.pt only the ones to use
        weights = {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}
    return state, config, weights


def evaluate(args):
    """Accuracy and loss on the test images, as lines of text, class by class."""
    state, config, weights = _load(args)
    changes = {name: getattr(args, name) for name in ("data", "batch_size") if getattr(args, name) is not None}
    config = dataclasses.replace(config, **changes)
    dataset = data.load(config.data, None, args.workers)
    classes = state["inputs"]["classes"]
    if list(dataset.classes) != classes:
        raise TrainingError(
            f"{config.data} has the classes {', '.join(dataset.classes)}; the checkpoint was trained on "
            f"{', '.join(classes)}"
        )
    with use_backend(config.backend, config.mode):
        trainer = Trainer(config, dataset)
        trainer.model.load_state_dict(weights)
        loss, right, count = trainer.score(trainer.model)
    width = max(len("class"), *map(len, classes))
    lines = [f"{'class':{width}}  images  accuracy"]
    for name, hits, images in zip(classes, right.tolist(), count.tolist(), strict=True):
        lines.append(f"{name:{width}}  {images:6}  " + (f"{100 * hits / images:6.2f} %" if images else "       -"))
    accuracy = 100 * right.sum().item() / count.sum().item()
    lines.append(
        f"test accuracy {accuracy:.2f} %, loss {loss:.4f}: {dataset.test_count} images of {config.data} at "
        f"{config.res} px, weights after epoch {state['epoch']}"
    )
    return lines


def _transform(inputs, res):
    """From a PIL image to the network's input: as the test images of training were treated."""
    if not inputs["grey"]:
        return folder.eval_transform(res)
    v2 = require("torchvision.transforms.v2", "predict")

    def square(image):
        """The middle square: these sets have square images."""
        return v2.functional.center_crop(image, [min(image.size)] * 2)

    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Resize((res, res), antialias=True)]
    steps += [v2.Normalize(inputs["mean"], inputs["std"]), v2.ToPureTensor()]
    return v2.Compose([square, *steps, lambda image: image.expand(3, -1, -1)])


@torch.no_grad()
def probabilities(state, config, weights, paths):
    """Class probabilities [len(paths), classes] float32 of image files."""
    inputs = state["inputs"]
    transform = _transform(inputs, config.res)
    mode = "L" if inputs["grey"] else "RGB"
    model = build_model(config.model, len(inputs["classes"]), config.width, config.stem_stride)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device=config.device, memory_format=layout)
    model.load_state_dict(weights)
    model.eval()
    dtype = AMP_DTYPES[config.amp]
    rows = []
    with use_backend(config.backend, config.mode):
        for path in paths:
            image = transform(folder.read_image(path, mode))[None].to(config.device).contiguous(memory_format=layout)
            with torch.autocast(config.device, dtype=dtype, enabled=dtype is not None):
                rows.append(model(image).float().softmax(1).cpu())
    return torch.cat(rows)


def predict(args):
    """A table of the most probable classes of each image, as lines of text."""
    state, config, weights = _load(args)
    classes = state["inputs"]["classes"]
    found = probabilities(state, config, weights, args.images)
    name = max(len("image"), *map(len, args.images))
    width = max(len("class"), *map(len, classes))
    lines = [f"{'image':{name}}  {'class':{width}}  probability"]
    for path, row in zip(args.images, found, strict=True):
        values, indices = row.topk(min(args.top, len(classes)))
        for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
            label = "" if rank else path
            lines.append(f"{label:{name}}  {classes[index]:{width}}  {100 * value:9.2f} %")
    return lines
