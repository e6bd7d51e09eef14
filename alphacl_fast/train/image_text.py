"""Images and texts, as in CLIP and SigLIP: ``--recipe image_text``.

``--objective infonce`` (or any other of the family) contrasts a batch's images with its texts, and
``siglip`` judges every pair by itself. Pairs with the same text are not negatives of each other.
The texts are the captions of ``--dataset captions``, or sentences with the class names of any other
data set. Sources: Radford et al., arXiv:2103.00020; Zhai et al., arXiv:2303.15343.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from alphacl_fast import siglip_loss

from .config import Config
from .data import Data, labels_of
from .evaluation import extract
from .models import Net, build
from .process_context import ProcessContext
from .recipe import Recipe, build_loss

TEXT_BYTES = 128  # longer texts are cut
TEXT_LAYERS, TEXT_HEADS = 2, 4
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("{}", "a photo of {}", "an image of {}", "this is {}")


class TextTower(nn.Module):
    """Map tokens (n, length) to embeddings (n, out_dim): a small transformer over bytes."""

    def __init__(self, width: int, out_dim: int):
        super().__init__()
        self.token = nn.Embedding(257, width)
        self.place = nn.Parameter(0.02 * torch.randn(TEXT_BYTES, width))
        layer = nn.TransformerEncoderLayer(
            width, TEXT_HEADS, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, TEXT_LAYERS, enable_nested_tensor=False)
        self.out = nn.Linear(width, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        there = tokens > 0
        x = self.token(tokens) + self.place[: tokens.shape[1]]
        x = self.layers(x, src_key_padding_mask=~there) * there.unsqueeze(2)
        return self.out(x.sum(1) / there.sum(1, keepdim=True))


class TwoTowers(nn.Module):
    """Map images and tokens to their embeddings (n, 128)."""

    def __init__(self, net: Net, text_width: int):
        super().__init__()
        self.encoder, self.projector = net.encoder, net.projector
        self.text = TextTower(text_width, net.projector[-1].out_features)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.projector(self.encoder(images)), self.text(tokens)


class SigLip(nn.Module):
    """`siglip_loss` with the logarithm of its scale, and its bias, as parameters.

    Args:
        config: gives the first scale, 1/temperature; the first bias, −log of the batch size
            (−10.4 for the paper's batches of 32K, where it takes −10); and the backend.
        group: process group of the loss, or None.
    """

    def __init__(self, config: Config, group: str | None):
        super().__init__()
        learnt = config.learn_temperature
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)), learnt)
        self.bias = nn.Parameter(torch.tensor(-math.log(config.batch_size)), learnt)
        self.options = {"backend": config.backend, "process_group": group}

    def forward(self, z1: Tensor, z2: Tensor, ids: Tensor | None = None) -> Tensor:
        scale = self.log_scale.exp()
        return siglip_loss(z1, z2, scale=scale, bias=self.bias, ids=ids, **self.options)


class ImageText(Recipe):
    """One view of every image, and its text."""

    views, indexed = 1, True

    def __init__(self, data: Data, context: ProcessContext):
        self.texts = texts(data)
        self.tokens = torch.stack([tokens_of(text) for group in self.texts for text in group])
        self.tokens = self.tokens[:, : int((self.tokens > 0).sum(1).max())]
        self.labels = torch.tensor(labels_of(data.views))
        super().__init__(data, context)

    def build_net(self) -> TwoTowers:
        net = build(self.config)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed)
            return TwoTowers(net, self.config.text_width)

    def build_loss(self) -> nn.Module:
        config, device = self.config, self.data.device
        if config.objective != "siglip":
            return build_loss(config, device, self.context)
        group = "world" if self.context.size > 1 else None
        return self.tried(lambda: SigLip(config, group), tuple)

    def embed(self, part: tuple) -> tuple[Tensor, Tensor]:
        images, index = part
        # Every text of an image takes its turn over the images of its label.
        per_label = len(self.texts[0])
        tokens = self.tokens[self.labels[index] * per_label + index % per_label]
        device = self.data.device
        return self.forward(
            images.to(device, non_blocking=True), tokens.to(device, non_blocking=True)
        )

    def value(self, z1: Tensor, z2: Tensor, parts: list[tuple]) -> Tensor:
        labels = self.labels[torch.cat([part[-1] for part in parts])]
        return self.loss(z1, z2, labels.to(self.data.device, non_blocking=True))

    def measured(self) -> dict[str, float]:
        if self.config.objective != "siglip":
            return super().measured()
        return {"scale": self.loss.log_scale.exp().item(), "bias": self.loss.bias.item()}

    @torch.no_grad()
    def figures(self, net: TwoTowers, images: Dataset) -> dict[str, float]:
        """Match images with the texts of the labels that they have.

        Returns:
            "zero_shot": the share of images whose nearest text is theirs; "retrieval": the share
            of texts whose nearest image is theirs.
        """

        def image_tower(x):
            return net.projector(net.encoder(x))

        mode = net.training
        net.eval()
        found, labels = extract(images, {"": image_tower}, self.data)
        known = labels.unique()
        per_label, device = len(self.texts[0]), self.data.device
        tokens = self.tokens.view(len(self.texts), per_label, -1)[known.cpu()].flatten(0, 1)
        prompts = torch.cat([net.text(part.to(device)) for part in tokens.split(256)])
        net.train(mode)
        prompts = F.normalize(F.normalize(prompts.float()).view(len(known), per_label, -1).mean(1))
        similarity = F.normalize(found[""]) @ prompts.T
        nearest_text, nearest_image = similarity.argmax(1), similarity.argmax(0)
        return {
            "zero_shot": (known[nearest_text] == labels).float().mean().item(),
            "retrieval": (labels[nearest_image] == known).float().mean().item(),
        }


def texts(data: Data) -> list[list[str]]:
    """List the texts of every label, the same number for each."""
    if data.config.dataset == "captions":
        return [[text] for text in data.classes]
    names = DIGITS if data.config.dataset == "digits" else data.classes
    return [[template.format(name) for template in TEMPLATES] for name in names]


def tokens_of(text: str) -> Tensor:
    """Map a text to the bytes of its UTF-8 form plus 1, and 0 where it has ended: (TEXT_BYTES,)."""
    found = torch.zeros(TEXT_BYTES, dtype=torch.long)
    values = torch.tensor([byte + 1 for byte in text.encode()[:TEXT_BYTES]], dtype=torch.long)
    found[: len(values)] = values
    return found
