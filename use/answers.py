"""How a finished network is asked, by --predict and --export alike."""

from runs.files import Failure
from runs.settings import complete


def load_to_ask(path, hooks, mirror):
    """The network in a model.pt. Raises Failure where it is to be asked about mirror images (`mirror`), but was trained
    without them, and where one of `hooks` is not its network and so would not be used."""
    import models

    network = models.load(path, hooks=hooks)
    own = network.settings.get("network"), network.settings.get("network_sha256")
    for hook in hooks.named:
        if (hook.function, hook.sha256) != own:
            raise Failure(f"{hook} is not the network in {path}. Leave it out, or name its model with --model.")
    trained = network.settings.get("epochs")  # here, not elsewhere
    if mirror and trained and not complete(network.settings)["mirror"]:
        raise Failure(f"{path} was trained with --no-mirror, so it knows no mirror images. Leave out --mirror.")
    return network


def answers(network, images, mirror=False):
    """The float32 logits (N, classes) of uint8 images (N, S, S, 3); with `mirror` the mean of those of each image and
    of its mirror image."""
    from train import evaluate

    views = (images, images.flip(2)) if mirror else (images,)
    return sum(evaluate(network, each, network.mean, network.std) for each in views) / len(views)
