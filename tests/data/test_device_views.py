"""Views finished on the device against those of a loader process, and what they must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from declip.data import device_views
from declip.data.batch import Batch
from declip.data.decoded import open_images
from declip.data.device_views import DRAWS, augment, finish_views, pack
from declip.data.images import STRONG, WEAK, Jitter, Pixels, View, draw_view, make_view
from declip.data.loader import BatchMaker, make_loader
from declip.data.sources import open_sources
from declip.pairs import ImageViews
from declip.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
WILD = STRONG.model_copy(update={"jitter": 1.0, "brightness": 1.0, "contrast": 1.5, "saturation": 2.0, "hue": 0.5})
ON_DEVICE = "data.augment_on=device"


def picture(height: int, width: int) -> Pixels:
    """Smooth colours with some noise, a white part and a grey one."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = (smooth + rng.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)
    noisy[: height // 4, : width // 3] = 255
    noisy[-height // 4 :, : width // 3] = 90
    return noisy


def drawn(views: ImageViews, count: int, seed: int, image: Pixels) -> list[View]:
    rng = np.random.default_rng(seed)
    return [draw_view(image.shape[0], image.shape[1], views, rng) for _ in range(count)]


def crops(image: Pixels, size: int, views: list[View]) -> torch.Tensor:
    return torch.from_numpy(np.stack([make_view(image, size, View(view.box)) for view in views]))


def draws(views: list[View]) -> torch.Tensor:
    return torch.tensor([pack(view) for view in views])


def on_device(image: Pixels, size: int, views: list[View]) -> Pixels:
    return augment(crops(image, size, views), draws(views)).numpy()


def apart(one: Pixels, other: Pixels) -> np.ndarray:
    """Grey levels between them, at each value."""
    return np.abs(one.astype(int) - other.astype(int))


# The same draws


@pytest.mark.parametrize("views", [WEAK, STRONG, WILD], ids=["weak", "strong", "wild"])
@pytest.mark.parametrize("size", [16, 64])
def test_same_crop_same_view(views: ImageViews, size: int) -> None:
    """From the same rounded crop: the same numbers but for a rare rounding of a half."""
    some = drawn(views, 100, 1, picture(80, 90))
    from_crop = crops(picture(80, 90), size, some)
    whole = (0, 0, size, size)
    wanted = [
        make_view(crop.numpy(), size, view._replace(box=whole)) for crop, view in zip(from_crop, some, strict=True)
    ]
    levels = apart(augment(from_crop, draws(some)).numpy(), np.stack(wanted))
    assert levels.max() <= 1
    assert (levels > 0).mean() < 2e-4


@pytest.mark.parametrize(("size", "shape"), [(64, (80, 90)), (64, (64, 64)), (96, (150, 130))])
def test_same_draws_same_view(size: int, shape: tuple[int, int]) -> None:
    """The same numbers but for a rare rounding of a half."""
    image = picture(*shape)
    views = drawn(STRONG, 200, 2, image)
    levels = apart(on_device(image, size, views), np.stack([make_view(image, size, view) for view in views]))
    assert levels.max() <= 1
    assert (levels > 0).mean() < 1e-3


JITTER = Jitter(1.0, 1.0, 1.0, 0.0, (0, 1, 2, 3))
ALONE = {
    "nothing": View((0, 0, 64, 64)),
    "jitter of nothing": View((0, 0, 64, 64), JITTER),
    "flip": View((0, 0, 64, 64), flip=True),
    "grayscale": View((0, 0, 64, 64), grayscale=True),
    "no blur": View((0, 0, 64, 64), sigma=0.0),
    "blur": View((0, 0, 64, 64), sigma=1.3),
    "grayscale and blur": View((0, 0, 64, 64), grayscale=True, sigma=1.3),
    **{
        f"{name} {by}": View((0, 0, 64, 64), JITTER._replace(**{name: by}))
        for name in JITTER._fields[:3]
        for by in (0, 2)
    },
    **{
        f"hue {by:.2f}": View((0, 0, 64, 64), JITTER._replace(hue=by))
        for by in (-0.5, -0.3, -1 / 6, -0.1, 0.1, 0.2, 0.5)
    },
}


@pytest.mark.parametrize("name", ALONE)
def test_each_operation_alone(name: str) -> None:
    image, view = picture(64, 64), ALONE[name]
    levels = apart(on_device(image, 64, [view])[0], make_view(image, 64, view))
    assert levels.max() <= (name not in ("nothing", "jitter of nothing", "no blur", "flip"))
    assert (levels > 0).mean() < 1e-3


def test_neighbours_in_the_batch_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(80, 90)
    views = drawn(WILD, 60, 3, image)
    together = on_device(image, 32, views)
    alone = np.concatenate([on_device(image, 32, [view]) for view in views])
    np.testing.assert_array_equal(together, alone)
    monkeypatch.setattr(device_views, "_PIXELS_AT_A_TIME", 7 * 32**2)
    np.testing.assert_array_equal(together, on_device(image, 32, views))


def test_nothing_is_drawn_here() -> None:
    image = picture(80, 90)
    views = drawn(WILD, 20, 4, image)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = on_device(image, 32, views)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, on_device(image, 32, views))


# The same distribution


def test_same_distribution() -> None:
    """Other draws on either path: colours, colourfulness, contrast, sharpness and side are distributed alike."""
    count, image = 1500, picture(40, 44)
    here = on_device(image, 32, drawn(STRONG, count, 5, image)).astype(float)
    there = np.stack([make_view(image, 32, view) for view in drawn(STRONG, count, 6, image)]).astype(float)
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "red": lambda x: x[..., 0].mean((1, 2)),
        "green": lambda x: x[..., 1].mean((1, 2)),
        "blue": lambda x: x[..., 2].mean((1, 2)),
        "colourfulness": lambda x: x.std(-1).mean((1, 2)),
        "contrast": lambda x: x.mean(-1).std((1, 2)),
        "sharpness": lambda x: np.abs(np.diff(x.mean(-1), axis=2)).mean((1, 2)),
        "side": lambda x: (x[:, :, :16] - x[:, :, 16:]).mean((1, 2, 3)),
    }
    for name, measure in measures.items():
        one, other = measure(here), measure(there)
        values = np.concatenate([one, other])
        shares = [np.searchsorted(np.sort(sample), values, side="right") / count for sample in (one, other)]
        # Kolmogorov-Smirnov distance that two samples of one distribution exceed once in a thousand times.
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * np.sqrt(2 / count), name


# Devices


class Dtypes(TorchDispatchMode):
    """Notes the types of all that is computed on a device other than the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "meta":
            self.seen.add(result.dtype)
        return result


def test_the_device_is_never_asked() -> None:
    """A tensor on the meta device has no values: reading one raises. And Apple's devices have no float64."""
    image = picture(80, 90)
    views = drawn(WILD, 50, 7, image)
    with Dtypes() as dtypes:
        views_there = augment(crops(image, 32, views).to("meta"), draws(views))
    assert (views_there.shape, views_there.dtype, views_there.device.type) == ((50, 32, 32, 3), torch.uint8, "meta")
    assert torch.float32 in dtypes.seen
    assert torch.float64 not in dtypes.seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same_views() -> None:
    image = picture(80, 90)
    views = drawn(STRONG, 100, 8, image)
    there = augment(crops(image, 64, views).cuda(), draws(views)).cpu().numpy()
    levels = apart(there, on_device(image, 64, views))
    assert levels.max() <= 1
    assert (levels > 0).mean() < 1e-3


# Batches


def maker(recipe: Recipe, **ranks: int) -> BatchMaker:
    source = open_sources(recipe.data.train, recipe.data)
    return BatchMaker(open_images(source, recipe.data.cache_gb, 1.0), recipe, 16, 77, full_captions=True, **ranks)


def assert_same(one: Batch, other: Batch) -> None:
    assert one.draws is not None
    assert other.draws is not None
    assert torch.equal(one.draws, other.draws)
    for name in ("images", "tokens", "sample_ids"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(finish_views(one).images, finish_views(other).images)


@pytest.mark.parametrize("cache_gb", [0, 1])
@pytest.mark.parametrize("method", ["declip", "clip"])
def test_batches_of_both_paths_are_the_same(tiny: MakeRecipe, method: str, cache_gb: int) -> None:
    """With CLIP: views of two kinds, as SLIP has them. Images decoded anew or kept."""
    slip = ["terms.simclr.weight=1", "data.strong_images.flip=0.5", "data.strong_images.jitter=1"]
    more = [f"data.cache_gb={cache_gb}", *(slip if method == "clip" else [])]
    for number in (0, 3):
        there = maker(tiny(method, *more)).make(number)
        crop = maker(tiny(method, *more, ON_DEVICE)).make(number)
        assert there.draws is None
        assert crop.draws is not None
        assert crop.draws.shape == (*there.images.shape[:2], DRAWS)
        here = finish_views(crop)
        assert here.draws is None
        assert apart(crop.images.numpy(), there.images.numpy()).mean() > 5
        assert apart(here.images.numpy(), there.images.numpy()).mean() < 1e-3
        assert torch.equal(here.tokens, there.tokens)
        assert torch.equal(here.sample_ids, there.sample_ids)
        assert finish_views(there) is there


def test_workers_and_ranks_do_not_matter(tiny: MakeRecipe) -> None:
    recipe = tiny("declip", ON_DEVICE)
    alone = list(make_loader(maker(recipe), 0, 6, 0))
    for one, other in zip(alone[2:], make_loader(maker(recipe), 2, 6, 2), strict=True):
        assert_same(one, other)
    parts = [finish_views(maker(recipe, rank=rank, ranks=2).make(1)).images for rank in (0, 1)]
    assert torch.equal(torch.cat(parts, 1), finish_views(alone[1]).images)


def test_draws_stay_on_the_cpu(tiny: MakeRecipe) -> None:
    sent = maker(tiny("declip", ON_DEVICE)).make(0).to(torch.device("meta"))
    assert sent.draws is not None
    assert (sent.draws.device.type, sent.images.device.type, sent.tokens.device.type) == ("cpu", "meta", "meta")
    assert finish_views(sent).images.shape == sent.images.shape
