"""The shipped recipes: one for every method and tower, with the published numbers and presets that differ as said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from declip.errors import InputError
from declip.recipe import Recipe, load_recipe, parse_recipe, shipped
from declip.training.optimizer import learning_rate
from declip.training.pairs import total_steps

OF_DECLIP = ("clip", "slip", "filip", "declip", "defilip")  # methods that its public code has
METHODS = (*OF_DECLIP, "siglip", "cosmos", "best")
PUBLISHED = ("vit-b32", "vit-b16", "rn50")
SMALL = ("", "vit-ti", "vit-s")
# Which supervision each method has (the published table): terms beside the contrastive one.
TERMS = {
    "clip": {"contrastive"},
    "slip": {"contrastive", "simclr"},
    "filip": {"token_wise"},
    "declip": {"contrastive", "simsiam", "masked_language", "nearest_neighbour"},
    "defilip": {"contrastive", "simsiam", "masked_language", "nearest_neighbour", "token_wise"},
    "siglip": {"sigmoid"},
    "cosmos": {"contrastive", "teacher_contrast"},
    "best": {"contrastive", "simclr"},
}


def name(method: str, tower: str) -> str:
    return f"{method}-{tower}" if tower else method


def test_what_of_a_tower_learns_is_not_the_weights_to_say(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[model.image]\ntune = "last"\ntune_layers = 5\nimage_size = 224\n')
    start = ["model.image.init=weights.safetensors", "model.image.timm_model_name=resnet50"]
    image = load_recipe(own, start).model.image
    assert (image.tune, image.tune_layers) == ("last", 5)
    assert image.image_size == load_recipe("clip", start).model.image.image_size


def test_every_method_has_every_tower() -> None:
    expected = {name(method, tower) for method in METHODS for tower in (*SMALL, *PUBLISHED)}
    assert set(shipped()) == expected | {"declip-88m", "declip-88m-rn50", "efficientnet-lite0-minilm", "best-small"}


@pytest.mark.parametrize("tower", [*SMALL, *PUBLISHED])
@pytest.mark.parametrize("method", METHODS)
def test_terms(method: str, tower: str) -> None:
    recipe = load_recipe(name(method, tower))
    assert recipe.name == name(method, tower)
    assert recipe.about
    assert recipe.terms.active().keys() == TERMS[method]
    size = recipe.model.image.image_size
    assert size == 224 if tower in PUBLISHED else 64 <= size <= 128
    if method == "best":
        return
    assert load_recipe(name(method, tower), ["method=paper"]).terms.active().keys() == TERMS[method]
    if method != "siglip":
        assert load_recipe(name(method, tower), ["method=reference"]).terms.active().keys() == TERMS[method]


def test_best_is_at_most_as_costly_as_declip() -> None:
    """The same towers and views, of terms one instead of three; nobody has published it, so that it has no presets."""
    declip = load_recipe("declip")
    for found in (load_recipe("best"), load_recipe("best-small")):
        assert (found.model.image, found.model.text) == (declip.model.image, declip.model.text)
        assert (found.image_views, len(found.text_views)) == (declip.image_views, len(declip.text_views))
        assert found.terms.active().keys() == TERMS["best"]
        assert found.terms.simclr.width <= declip.terms.simsiam.width
    with pytest.raises(InputError, match="has no preset method=paper"):
        load_recipe("best", ["method=paper"])


@pytest.mark.parametrize("tower", PUBLISHED)
@pytest.mark.parametrize("method", [*OF_DECLIP, "siglip"])
def test_published_optimisation(method: str, tower: str) -> None:
    """128,001 steps of 4,096; two groups of rates and decays; warm-up from 1e-4 over 2,500 steps."""
    recipe = load_recipe(name(method, tower))
    peak, decay = (5e-4, 0.5) if method in ("slip", "filip") else (1e-3, 0.1)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (peak, decay)
    assert (recipe.optimizer.betas, recipe.optimizer.eps, recipe.optimizer.clip_norm) == ((0.9, 0.98), 1e-8, 0)
    steps = total_steps(recipe, 15_388_848)
    assert (steps, recipe.schedule.batch_size) == (128_001, 4096)

    def published(k: int) -> float:  # step 1 … 128,001
        if k < 2500:
            return 1e-4 + (peak - 1e-4) * (k - 1) / 2499
        return peak * (1 + math.cos(math.pi * (k - 2500) / (128_001 - 2500))) / 2

    for k in (1, 2, 1250, 2499, 2500, 2501, 64_000, 128_000, 128_001):
        assert learning_rate(k - 1, steps, recipe) == pytest.approx(published(k), rel=1e-9, abs=1e-15), k
    if peak == 1e-3:
        assert learning_rate(63_999, steps, recipe) == pytest.approx(5.16e-4, rel=1e-3)


@pytest.mark.parametrize("method", ["best", "reference"])
def test_cosmos_as_published_for_cc3m(method: str) -> None:
    recipe = load_recipe("cosmos-vit-b16", [] if method == "best" else ["method=reference"])
    terms, optimizer = recipe.terms, recipe.optimizer
    assert terms.contrastive is not None
    assert terms.teacher_contrast is not None
    assert (recipe.image_views, recipe.local_views, len(recipe.text_views)) == (2, 6, 8)
    assert terms.contrastive.texts == terms.teacher_contrast.texts == recipe.text_views
    assert terms.teacher_contrast.seen_by_average == ["joined", "joined_2"]
    assert (terms.contrastive.weight, terms.teacher_contrast.weight) == (1, 1)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.betas, optimizer.eps) == (5e-4, 0.5, (0.9, 0.98), 1e-8)
    assert (optimizer.ema_decay(88_000), optimizer.clip_norm) == (0.999, 0)
    assert total_steps(recipe, 2_823_019) * recipe.schedule.warmup == pytest.approx(2000, rel=0.01)
    assert optimizer.ema_update == ("before" if method == "reference" else "after")
    assert recipe.pads_captions == (method == "reference")


@pytest.mark.parametrize("tower", [*SMALL, *PUBLISHED])
@pytest.mark.parametrize("method", OF_DECLIP)
def test_reference_is_the_public_code(method: str, tower: str) -> None:
    recipe = load_recipe(name(method, tower), ["method=reference"])
    model, terms = recipe.model, recipe.terms
    assert recipe.method == "reference"
    assert (model.logit_scale_range, model.freeze_patch_embedding, model.views_apart) == ((3.0, 6.0), True, True)
    assert (model.normalization, model.quick_gelu) == ("imagenet", True)
    assert (model.text.model_extra or {})["proj_bias"] is True
    assert recipe.schedule.start_lr == pytest.approx(1e-4 / recipe.optimizer.lr)
    # SLIP and FILIP do not cap the factor itself.
    assert model.logit_scale_cap == (None if method in ("slip", "filip") else 100)
    assert recipe.optimizer.decay_embeddings
    assert recipe.data.text.pool == "first"
    strong = recipe.data.strong_images if method == "slip" else recipe.data.images
    if method != "clip":
        assert strong is not None
        assert (strong.crop_scale, strong.jitter, strong.grayscale, strong.blur, strong.flip) == (
            (0.2, 1.0),
            *(0.8, 0.2, 0.5, 0.5),
        )
        assert (strong.brightness, strong.contrast, strong.saturation, strong.hue) == (0.4, 0.4, 0.4, 0.1)
    if method in ("clip", "slip"):
        assert (recipe.data.images.crop_scale, recipe.data.images.jitter) == ((0.5, 1.0), 0)
    if method in ("declip", "defilip"):
        assert terms.contrastive is not None
        assert terms.nearest_neighbour is not None
        assert (terms.contrastive.weight, terms.contrastive.texts) == (0.4, ["masked", "augmented"])
        assert terms.contrastive.multi_view is None
        neighbour = terms.nearest_neighbour
        assert (neighbour.texts, neighbour.images, neighbour.queue_size) == (["masked", "augmented"], 2, 65536)
        assert (neighbour.exclude_own, neighbour.random_start, neighbour.weight) == (False, True, 0.2)
        assert terms.simsiam is not None
        assert (terms.simsiam.width, terms.simsiam.bottleneck, terms.simsiam.weight) == (1024, 512, 0.2)
    if method in ("filip", "defilip"):
        words = terms.token_wise
        assert words is not None
        assert (words.top_k, words.mask_padding, words.texts, words.dim) == (16, False, ["masked"], 256)
        assert words.logit_scale_range == (3.0, 6.0)
        assert words.weight == (1.0 if method == "filip" else 0.2)
        assert recipe.pads_captions
    if method == "slip":
        assert terms.simclr is not None
        assert (terms.simclr.temperature, terms.simclr.width, terms.simclr.dim) == (0.1, 4096, 256)
        assert (recipe.image_views, recipe.self_views) == (3, (1, 2))


@pytest.mark.parametrize("method", ["declip", "defilip"])
def test_paper_differs_from_the_code_as_the_paper_says(method: str) -> None:
    """A clean caption, a weight of its own for the other pairs of views, neighbours of the caption alone."""
    terms = load_recipe(f"{method}-vit-b32", ["method=paper"]).terms
    assert terms.contrastive is not None
    assert terms.nearest_neighbour is not None
    assert terms.contrastive.texts == ["caption", "augmented"]
    assert terms.contrastive.weight * (terms.contrastive.multi_view or 0) == pytest.approx(0.2)
    assert terms.nearest_neighbour.texts == ["caption"]


def test_towers_of_the_published_sizes() -> None:
    """Parameters as counted in the public code: text tower and joint width included."""
    import torch

    from declip.model.towers import build_towers

    counts = {"clip-vit-b32": 151_278_337 - 512, "clip-rn50": 104_106_849 - 512 - (2048 * 1024 + 1024)}
    for recipe, count in counts.items():
        with torch.device("meta"):
            clip = build_towers(load_recipe(recipe).model)
        # Without the row of the mask token, which is ours, and without the ResNet's layer that is dead at 224 px.
        assert sum(p.numel() for p in clip.parameters()) == count, recipe
    assert load_recipe("filip-vit-b32").model.embed_dim == 768
    assert load_recipe("declip-88m").model.embed_dim == 3072
    assert load_recipe("declip-rn50").model.embed_dim == 1024


def test_declip_88m() -> None:
    vit, resnet = load_recipe("declip-88m"), load_recipe("declip-88m-rn50")
    assert [r.optimizer.kind for r in (vit, resnet)] == ["sgd", "sgd"]
    for recipe in (vit, resnet):
        neighbour = recipe.terms.nearest_neighbour
        assert neighbour is not None
        assert (recipe.method, neighbour.exclude_own, neighbour.random_start) == ("reference", False, True)
        assert recipe.model.views_apart
    assert total_steps(vit, 88_000_000) == 300_001
    assert (vit.optimizer.lr, vit.optimizer.momentum, vit.schedule.batch_size) == (0.2, 0.9, 10240)
    assert (vit.optimizer.weight_decay, resnet.optimizer.weight_decay) == (0.0, 1e-4)
    assert (vit.optimizer.logit_scale_lr, resnet.optimizer.logit_scale_lr) == (0.0, 1e-4)
    assert vit.terms.contrastive is not None
    assert resnet.terms.contrastive is not None
    assert (vit.terms.contrastive.weight, resnet.terms.contrastive.weight) == (0.6, 0.4)


# What a recipe may not ask for


@pytest.mark.parametrize(
    ("recipe", "overrides", "says"),
    [
        ("siglip", ["method=reference"], "recipe siglip has no preset method=reference: it has method=paper."),
        ("declip-88m", ["method=best"], "recipe declip-88m has no preset method=best: it has none."),
        ("clip", ["method=newest"], "method = 'newest' is wrong"),
        ("siglip", ["model.logit_bias_init=none"], "terms.sigmoid needs a bias: set model.logit_bias_init"),
        ("clip", ["terms.sigmoid.weight=1"], "terms.sigmoid needs a bias"),
        (
            "clip",
            ["terms.contrastive=none", "terms.text_conditioned.weight=1", "model.logit_bias_init=-3"],
            "terms.text_conditioned orders what a search has found, and no term teaches the embeddings",
        ),
        ("clip", ["terms.simclear.weight=1"], "there is no field terms.simclear; the nearest is terms.simclr"),
        ("clip", ["terms.contrastive.images=3"], "terms.contrastive.images = 3 is wrong"),
        ("clip", ['terms.contrastive.texts=["shouted"]'], "terms.contrastive.texts.0 = 'shouted' is wrong"),
        ("clip", ["terms.simsiam.weight=-1"], "terms.simsiam.weight = -1 is wrong"),
        ("filip", ["terms.token_wise.top_k=0"], "terms.token_wise.top_k = 0 is wrong"),
        ("declip", ["data.mix=0.3"], "data.mix does not go with terms.nearest_neighbour: leave one of them out"),
        ("clip", ["data.mix=0.3", "schedule.batch_size=9"], "two by two: schedule.batch_size has to be even"),
        ("declip-vit-b33", [], "There is no recipe 'declip-vit-b33': give a TOML file or one of declip-vit-b3"),
    ],
)
def test_refused(recipe: str, overrides: list[str], says: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe(recipe, overrides)
    assert says in str(error.value)


def test_other_overrides_come_after_the_preset() -> None:
    recipe = load_recipe("declip", ["terms.contrastive.weight=0.7", "method=reference"])
    assert recipe.terms.contrastive is not None
    assert (recipe.terms.contrastive.weight, recipe.terms.contrastive.texts) == (0.7, ["masked", "augmented"])


def views(terms: dict[str, Any], **data: Any) -> Recipe:
    return parse_recipe({"terms": terms, "data": data, "model": {"logit_bias_init": -10.0}})


@pytest.mark.parametrize(
    ("recipe", "pair", "own", "total"),
    [
        (views({"contrastive": {}}), 1, (0, 1), 1),
        (views({"contrastive": {"images": 2}}), 2, (0, 1), 2),
        (views({"contrastive": {}, "simsiam": {}}), 2, (0, 1), 2),
        (views({"contrastive": {}, "simclr": {}}, strong_images={}), 1, (1, 2), 3),
        (views({"contrastive": {"images": 2}, "simsiam": {}}, strong_images={}), 2, (2, 3), 4),
        (views({"sigmoid": {}}, strong_images={}), 1, (1, 2), 1),
        (views({"token_wise": {"images": 2}}), 2, (0, 1), 2),
    ],
)
def test_image_views(recipe: Recipe, pair: int, own: tuple[int, int], total: int) -> None:
    assert (recipe.pair_views, recipe.self_views, recipe.image_views) == (pair, own, total)


def test_text_views() -> None:
    assert views({"contrastive": {"texts": ["augmented"]}, "masked_language": {}}).text_views == ["masked", "augmented"]
    assert views({"contrastive": {}, "nearest_neighbour": {"enqueue": ["augmented"]}}).text_views == [
        "caption",
        "augmented",
    ]


def test_what_a_trained_model_compares() -> None:
    assert load_recipe("filip").similarity == "token_wise"
    assert load_recipe("defilip").similarity == load_recipe("siglip").similarity == "embedding"


def test_siglip_starts_as_published() -> None:
    """Temperature exp(ln 10) = 10 and bias -10 (SigLIP, §3.2); for small batches the bias is another by default."""
    from declip.model.towers import build_towers

    recipes = [load_recipe(name("siglip", tower)) for tower in PUBLISHED]
    assert {(recipe.model.logit_scale_init, recipe.model.logit_bias_init) for recipe in recipes} == {(2.3026, -10.0)}
    clip = build_towers(load_recipe("siglip", ["method=paper"]).model)
    assert clip.logit_bias.item() == -10
    assert clip.logit_scale.exp().item() == pytest.approx(10, rel=1e-4)
    assert load_recipe("siglip").model.logit_bias_init == -5
