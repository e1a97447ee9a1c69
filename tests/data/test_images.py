"""Image views against torchvision's own transforms, and their statistics."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from pictures import difference, picture
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional

from declip.data import images
from declip.data.colours import Jitter
from declip.data.decode import Pixels, decode_image
from declip.data.images import STRONG, WEAK, View, draw_view, eval_view, make_view, make_views, random_view
from declip.pairs import ImageViews

# Evaluation view


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (100, 71), (71, 100), (333, 90), (33, 40), (20, 20)])
def test_eval_view_is_resize_and_centre_crop(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    wanted = functional.center_crop(functional.resize(Image.fromarray(image), 64), [64, 64])
    view = eval_view(image, 64)
    assert view.shape == (64, 64, 3)
    assert view.dtype == np.uint8
    assert view.flags.c_contiguous
    assert difference(view, wanted)[1] <= 1


def test_eval_view_of_a_thread_stays_small() -> None:
    assert eval_view(picture(4, 5000), 64).shape == (64, 64, 3)


def test_eval_view_never_shares_memory() -> None:
    image = picture(64, 64)
    assert not np.shares_memory(eval_view(image, 64), image)


# Crop


@pytest.mark.parametrize("size", [32, 64, 100])
def test_crop_and_resize_equal_torchvision(size: int) -> None:
    image = picture(80, 90)
    rng = np.random.default_rng(1)
    for _ in range(60):
        height, width = int(rng.integers(1, 81)), int(rng.integers(1, 91))
        box = (int(rng.integers(81 - height)), int(rng.integers(91 - width)), height, width)
        wanted = functional.resized_crop(Image.fromarray(image), *box, [size, size])
        assert difference(make_view(image, size, View(box)), wanted)[1] <= 1
        flipped = make_view(image, size, View(box, flip=True))
        np.testing.assert_array_equal(flipped, make_view(image, size, View(box))[:, ::-1])


@pytest.mark.parametrize("shape", [(64, 64), (100, 60), (40, 200)])
@pytest.mark.parametrize("views", [WEAK, STRONG], ids=["weak", "strong"])
def test_crops_are_distributed_as_torchvisions(shape: tuple[int, int], views: ImageViews) -> None:
    height, width = shape
    rng = np.random.default_rng(2)
    torch.manual_seed(2)  # torchvision draws from PyTorch's global generator
    ours = np.array([draw_view(height, width, views, rng).box for _ in range(2000)])
    image = Image.fromarray(picture(height, width))
    scale, ratio = list(views.crop_scale), list(views.crop_ratio)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(2000)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for ours_of, theirs_of in [
        (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]),
        (ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]),
        (ours[:, 0], theirs[:, 0]),
        (ours[:, 1], theirs[:, 1]),
    ]:
        # Kolmogorov-Smirnov distance; samples of one distribution are further apart than this once in a thousand times.
        values = np.concatenate([ours_of, theirs_of])
        shares = [np.searchsorted(np.sort(sample), values, side="right") / 2000 for sample in (ours_of, theirs_of)]
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * np.sqrt(2 / 2000)


@pytest.mark.parametrize(("shape", "box"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))])
def test_thin_images_fall_back_to_the_centre(shape: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    assert draw_view(*shape, ImageViews(crop_scale=(0.9, 1.0)), np.random.default_rng(0)).box == box


@pytest.mark.parametrize("shape", [(64, 64), (100, 60), (40, 80)])
def test_crops_beyond_the_image_have_the_colour_of_its_border(shape: tuple[int, int]) -> None:
    height, width = shape
    image = picture(height, width)
    image[:2], image[-2:], image[:, :2], image[:, -2:] = (9, 8, 7), (9, 8, 7), (9, 8, 7), (9, 8, 7)
    image[0, 0] = 255  # one pixel changes no median
    views, rng = ImageViews(crop_scale=(0.4, 2.0)), np.random.default_rng(5)
    ground = np.full((5 * height, 5 * width, 3), (9, 8, 7), np.uint8)
    ground[2 * height : 3 * height, 2 * width : 3 * width] = image
    boxes = np.array([draw_view(height, width, views, rng).box for _ in range(3000)])
    for top, left, tall, wide in boxes[:200].tolist():
        from_ground = View((top + 2 * height, left + 2 * width, tall, wide))
        np.testing.assert_array_equal(
            make_view(image, 32, View((top, left, tall, wide))), make_view(ground, 32, from_ground)
        )
    areas = boxes[:, 2] * boxes[:, 3] / (height * width)
    assert abs(areas.mean() - 1.2) < 0.03
    for start, crop, side in [(boxes[:, 0], boxes[:, 2], height), (boxes[:, 1], boxes[:, 3], width)]:
        larger = crop > side
        assert ((start >= 0) & (start + crop <= side))[~larger].all()  # within the image
        assert ((start <= 0) & (start + crop >= side))[larger].all()  # the whole image within it
        room = (crop - side)[larger]
        assert abs((-start[larger] / np.maximum(room, 1))[room > 2].mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    "wrong",
    [{"crop_scale": (0.5, 4.1)}, {"crop_scale": (1.0, 0.5)}, {"crop_scale": (0.0, 1.0)}, {"crop_ratio": (2, 1)}],
)
def test_crops_that_cannot_be_drawn_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is the smallest"):
        ImageViews(**wrong)


def test_one_pixel() -> None:
    image = np.full((1, 1, 3), 9, np.uint8)
    assert (random_view(image, 8, ImageViews(flip=1.0), np.random.default_rng(0)) == 9).all()


# Whole views


def colours_in_torchvision(image: Image.Image, jitter: Jitter, as_floats: bool) -> Image.Image:
    """Torchvision's colour jitter, on the PIL image or on a float tensor; its hue of a PIL image has 8 bits only."""
    values = functional.to_tensor(image) if as_floats else image
    for operation in jitter.order:
        name = ("brightness", "contrast", "saturation", "hue")[operation]
        values = getattr(functional, f"adjust_{name}")(values, jitter[operation])
    return functional.to_pil_image(values) if as_floats else values


@pytest.mark.parametrize("grayscale", [False, True])
@pytest.mark.parametrize("size", [48, 64, 80])
@pytest.mark.parametrize(("as_floats", "mean_limit", "limit"), [(True, 1, 6), (False, 3, 15)], ids=["float", "pil"])
def test_whole_views_equal_torchvision(
    size: int, grayscale: bool, as_floats: bool, mean_limit: float, limit: int
) -> None:
    image = picture(64, 64)
    rng = np.random.default_rng(3)
    views = STRONG.model_copy(update={"jitter": 1.0, "blur": 1.0, "grayscale": float(grayscale)})
    means = []
    for _ in range(20):
        view = draw_view(64, 64, views, rng)
        assert view.jitter is not None
        assert view.sigma is not None
        wanted = functional.resized_crop(Image.fromarray(image), *view.box, [size, size])
        wanted = colours_in_torchvision(wanted, view.jitter, as_floats)
        if grayscale:
            wanted = functional.rgb_to_grayscale(wanted, 3)
        wanted = wanted.filter(ImageFilter.GaussianBlur(view.sigma))
        wanted = functional.hflip(wanted) if view.flip else wanted
        mean, largest = difference(make_view(image, size, view), wanted)
        means.append(mean)
        assert largest <= limit
    assert max(means) < mean_limit


def test_jitter_is_drawn_as_described() -> None:
    rng = np.random.default_rng(4)
    jitters = [draw_view(64, 64, ImageViews(jitter=1.0, contrast=1.5), rng).jitter for _ in range(4000)]
    drawn = [jitter for jitter in jitters if jitter is not None]
    assert len(drawn) == 4000
    for field, low, high in [("brightness", 0.6, 1.4), ("contrast", 0.0, 2.5), ("hue", -0.1, 0.1)]:
        values = np.array([getattr(jitter, field) for jitter in drawn])
        assert low <= values.min()
        assert values.max() <= high
        wanted = np.linspace(low, high, 11)[1:-1]
        np.testing.assert_allclose(np.quantile(values, np.linspace(0.1, 0.9, 9)), wanted, atol=0.04 * (high - low))
    orders = {order: sum(jitter.order == order for jitter in drawn) for order in {jitter.order for jitter in drawn}}
    assert len(orders) == 24
    assert min(orders.values()) > 100


# Views


@pytest.mark.parametrize("size", [24, 64, 70])
@pytest.mark.parametrize("views", [WEAK, STRONG], ids=["weak", "strong"])
def test_views_are_contiguous_and_leave_the_image_alone(views: ImageViews, size: int) -> None:
    image = picture(50, 64)
    before = image.copy()
    image.flags.writeable = False
    rng = np.random.default_rng(5)
    for _ in range(20):
        view = random_view(image, size, views, rng)
        assert view.shape == (size, size, 3)
        assert view.dtype == np.uint8
        assert view.flags.c_contiguous
        assert view.flags.writeable
    np.testing.assert_array_equal(image, before)


def test_views_depend_on_the_generator_alone() -> None:
    image = picture(64, 64)

    def make(seed: int) -> list[Pixels]:
        rng = np.random.default_rng(seed)
        return [random_view(image, 64, STRONG, rng) for _ in range(5)]

    first, again, other = make(6), make(6), make(7)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any((one != two).any() for one, two in zip(first, other, strict=True))
    assert (first[0] != first[1]).any()


def test_rates_are_the_published_ones() -> None:
    rng = np.random.default_rng(8)
    drawn = [draw_view(64, 64, STRONG, rng) for _ in range(5000)]
    rates = {
        "jitter": (np.mean([view.jitter is not None for view in drawn]), 0.8),
        "grayscale": (np.mean([view.grayscale for view in drawn]), 0.2),
        "blur": (np.mean([view.sigma is not None for view in drawn]), 0.5),
        "flip": (np.mean([view.flip for view in drawn]), 0.5),
    }
    for name, (found, wanted) in rates.items():
        assert abs(found - wanted) < 0.03, name
    sigmas = [view.sigma for view in drawn if view.sigma is not None]
    assert min(sigmas) >= 0.1
    assert max(sigmas) <= 2.0
    assert abs(np.mean(sigmas) - 1.05) < 0.05


def test_probability_zero_and_one() -> None:
    rng = np.random.default_rng(9)
    for _ in range(200):
        never = draw_view(64, 64, ImageViews(flip=1.0), rng)
        assert never.flip
        assert never.jitter is None
        assert not never.grayscale
        assert never.sigma is None
        always = draw_view(64, 64, ImageViews(jitter=1.0, grayscale=1.0, blur=1.0), rng)
        assert not always.flip
        assert always.jitter is not None
        assert always.grayscale
        assert always.sigma is not None


def test_identity() -> None:
    image = picture(64, 64)
    whole = ImageViews(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    np.testing.assert_array_equal(random_view(image, 64, whole, np.random.default_rng(0)), image)
    still = View((0, 0, 64, 64), Jitter(1.0, 1.0, 1.0, 0.0, (3, 2, 1, 0)))
    np.testing.assert_array_equal(make_view(image, 64, still), image)


# Views of encoded images

LARGE = ImageViews(crop_scale=(0.5, 2.0))


def photo(height: int, width: int, kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    """An encoded picture that is no sharper than photographs are at their pixels."""
    image = Image.fromarray(picture(height // 2, width // 2)).resize((width, height), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def whole_views(data: bytes, size: int, options: list[ImageViews], seed: int) -> tuple[list[View], list[Pixels]]:
    """The slow way: the views drawn and made of the whole decoded image."""
    image, rng = decode_image(data), np.random.default_rng(seed)
    views = [draw_view(image.shape[0], image.shape[1], view, rng) for view in options]
    return views, [make_view(image, size, view) for view in views]


@pytest.mark.parametrize("size", [224, 100, 64])
@pytest.mark.parametrize("options", [[WEAK], [STRONG, STRONG], [LARGE], []], ids=["weak", "strong", "large", "none"])
@pytest.mark.parametrize(
    "data",
    [photo(300, 400), photo(300, 400, "PNG"), photo(300, 400, mode="CMYK"), photo(300, 400, mode="L", quality=90)],
    ids=["JPEG", "PNG", "CMYK", "grey"],
)
def test_views_of_bytes_are_those_of_the_image(data: bytes, options: list[ImageViews], size: int) -> None:
    """Exactly where a crop needs all pixels, as it always does at 224."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        views, wanted = whole_views(data, size, options, seed)
        both = make_views(data, size, options, rng)
        made = [pixels for pixels, _ in both]
        assert [view for _, view in both] == views
        assert len(made) == len(wanted)
        reducible = min((side for view in views for side in view.box[2:]), default=0) >= 2 * size
        for ours, theirs in zip(made, wanted, strict=True):
            if not reducible:
                np.testing.assert_array_equal(ours, theirs)
            assert difference(ours, theirs)[0] < 8  # the crop's edges are rounded to the pixels of the reduced image
            assert ours.flags.c_contiguous
        np.testing.assert_array_equal(rng.random(3), after_drawing(300, 400, options, seed))


def after_drawing(height: int, width: int, options: list[ImageViews], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    for view in options:
        draw_view(height, width, view, rng)
    return rng.random(3)


@pytest.mark.parametrize("orientation", [1, 2, 5, 6, 8])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}], ids=str)
@pytest.mark.parametrize(("size", "reduction"), [(200, 2), (100, 4), (50, 8)])
def test_reduced_decoding_moves_nothing(
    size: int, reduction: int, options: dict[str, Any], orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The view of a reduced image is that of the whole image with the crop's edges rounded to reduced pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    height, width = (474, 650) if orientation == 1 else (480, 656)
    data = photo(height, width, exif=exif, quality=90, **options)
    shapes = []

    def reduced_only(image: Pixels, size: int, view: View) -> Pixels:
        shapes.append(image.shape)
        return make_view(image, size, view)

    monkeypatch.setattr(images, "make_view", reduced_only)
    large = ImageViews(crop_scale=(0.85, 1.0), crop_ratio=(0.7, 1.45))
    image = decode_image(data)
    for seed in range(4):
        (view,), _ = whole_views(data, size, [large], seed)
        ((ours, _),) = make_views(data, size, [large], np.random.default_rng(seed))
        top, left, height, width = view.box
        edges = [reduction * round(edge / reduction) for edge in (top, left, top + height, left + width)]
        assert np.abs(np.subtract(edges, (top, left, top + height, left + width))).max() <= reduction / 2
        box = (edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1])
        mean, _ = difference(ours, make_view(image, size, view._replace(box=box)))
        assert mean < 2
    assert {shape[:2] for shape in shapes} == {tuple(-(-side // reduction) for side in image.shape[:2])}


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpegs_have_no_views(progressive: bool) -> None:
    data = photo(474, 650, progressive=progressive)
    for share in (0.02, 0.5, 0.95):
        with pytest.raises(ValueError, match="the image cannot be decoded"):
            make_views(data[: int(share * len(data))], 64, [WEAK], np.random.default_rng(0))
