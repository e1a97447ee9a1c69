"""The peer: CLIP trained in a plain loop, the way a user of open_clip writes it."""

from __future__ import annotations

import io
import random
import time
from typing import Any

import open_clip
import torch
from torch.utils.data import DataLoader, Dataset

from declip.data.sources import Source
from declip.model.pretrained import LoadedModel
from declip.model.towers import model_config
from declip.recipe import Recipe
from declip.training.optimizer import learning_rate
from declip.training.pairs import open_pairs, total_steps


class Pairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A pair as PIL, torchvision's transforms and open_clip's tokenizer give it, one of its captions at random."""

    def __init__(self, source: Source, recipe: Recipe) -> None:
        from torchvision import transforms

        self.pairs = [(source[index].image, source[index].captions) for index in range(len(source))]
        views = recipe.data.images
        colours = transforms.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(recipe.model.image.image_size, scale=views.crop_scale),
                transforms.RandomApply([colours], views.jitter),
                transforms.RandomHorizontalFlip(views.flip),
                transforms.ToTensor(),
                transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
            ]
        )
        self.tokenize = open_clip.SimpleTokenizer(context_length=recipe.model.text.context_length)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        image, captions = self.pairs[index]
        pixels = self.transform(Image.open(io.BytesIO(image)).convert("RGB"))
        return pixels, self.tokenize(random.choice(captions))[0]


def build_peer(recipe: Recipe) -> tuple[open_clip.CLIP, open_clip.ClipLoss, torch.optim.AdamW]:
    """open_clip's model of the recipe's towers, its loss, and AdamW with open_clip's groups."""
    model = open_clip.CLIP(**model_config(recipe.model))
    gains = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    options = recipe.optimizer
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": matrices, "weight_decay": options.weight_decay}]
    return model, open_clip.ClipLoss(), torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)


def train_peer(recipe: Recipe) -> tuple[LoadedModel, dict[str, Any]]:
    """Train the recipe's towers on its pairs for as many pairs; returns the model and a summary like `train`'s."""
    torch.manual_seed(recipe.seed)
    random.seed(recipe.seed)
    source, _ = open_pairs(recipe.data)
    steps, batch_size = total_steps(recipe, len(source)), recipe.schedule.batch_size
    model, criterion, optimizer = build_peer(recipe)
    loader = DataLoader(Pairs(source, recipe), batch_size, shuffle=True, drop_last=True)
    step, started = 0, time.perf_counter()
    while step < steps:
        for images, tokens in loader:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, recipe)
            features = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
            loss = criterion(*features, model.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)
            step += 1
            if step == steps:
                break
    seconds = time.perf_counter() - started
    size = recipe.model.image.image_size
    statistics = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    preprocess = open_clip.image_transform(size, is_train=False, interpolation="bilinear", **statistics)
    tokenizer = open_clip.SimpleTokenizer(context_length=recipe.model.text.context_length)
    summary = {"pairs_seen": steps * batch_size, "seconds": seconds, "samples_per_second": steps * batch_size / seconds}
    return LoadedModel("open_clip loop", model.eval(), preprocess, tokenizer), summary
