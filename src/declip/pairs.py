"""What a recipe may say about its pairs: where they are, in what order they come, how views are made of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from declip.terms import Probability, Section


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Sources = Annotated[list[str], BeforeValidator(_as_list)]


class ImageViews(Section):
    """How an image view is made. The defaults are a weak view: a random crop and nothing else."""

    crop_scale: tuple[float, float] = Field(
        (0.5, 1.0),
        description="area of the random crop, as a share of the image's; above 1, at most 4, the crop reaches outside "
        "of the image, where it has the colour of the image's border, so that things come smaller as well as larger",
    )
    crop_ratio: tuple[float, float] = Field((0.75, 4 / 3), description="aspect ratio of the random crop")
    flip: Probability = Field(0.0, description="probability of a horizontal flip")
    jitter: Probability = Field(0.0, description="probability of colour jitter")
    brightness: float = Field(0.4, ge=0, description="strength of the jitter in brightness")
    contrast: float = Field(0.4, ge=0, description="strength of the jitter in contrast")
    saturation: float = Field(0.4, ge=0, description="strength of the jitter in saturation")
    hue: float = Field(0.1, ge=0, le=0.5, description="strength of the jitter in hue, as a share of the colour circle")
    grayscale: Probability = Field(0.0, description="probability of dropping the colours")
    blur: Probability = Field(0.0, description="probability of a Gaussian blur")
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="radius of the blur in pixels")
    convolve: Probability = Field(
        0.0,
        description="probability of mixing the view with a random convolution of itself, 1, 3 or 5 pixels wide "
        "(RandConv), made on the training device: shapes stay, textures and colours change",
    )

    @model_validator(mode="after")
    def _crops_can_be_drawn(self) -> ImageViews:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 4:
            raise ValueError("crop_scale is the smallest area and the largest, above 0 and at most 4")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError("crop_ratio is the smallest ratio and the largest, above 0")
        return self


class CaptionViews(Section):
    """How the text views of a pair are made."""

    pool: Literal["first", "random", "turn", "each"] = Field(
        "random",
        description="which of a pair's captions a text view shows: always the first; one drawn anew; all in turn, one "
        "an epoch; or each, so that an image with five captions is five pairs of an epoch",
    )
    independent: bool = Field(True, description="with pool=random: each text view draws its own caption from the pool")
    mask: Probability = Field(0.15, description="share of tokens that the masked view hides (BERT's 80/10/10 rule)")
    synonym: float = Field(1.0, ge=0, description="augmented view: relative frequency of replacing a word by a synonym")
    insertion: float = Field(
        0.0, ge=0, description="augmented view: relative frequency of inserting a synonym of a word (DeCLIP has none)"
    )
    swap: float = Field(1.0, ge=0, description="augmented view: relative frequency of swapping two words")
    deletion: float = Field(1.0, ge=0, description="augmented view: relative frequency of deleting words")
    deletion_share: Probability = Field(0.1, description="share of the words that a deletion drops")
    equal: Literal["caption", "pair"] = Field(
        "caption",
        description="which pairs show equal captions, for terms that ask: those whose captions of the moment are, or "
        "those that have the same captions altogether",
    )
    sentences: bool = Field(
        False,
        description="joined and single views draw from the sentences of a pair's captions (which end at a full stop or "
        "a new line) instead of whole captions: for long ones",
    )
    joined_most: int = Field(5, gt=0, description="a joined view is 1 to so many of a pair's captions, in random order")
    repeats: Literal["augmented", "same"] = Field(
        "augmented",
        description="single views of a pair with fewer captions than there are such views, and all sampled views but "
        "the first of a pair with one: with changed words, as in the augmented view, or the same once more (COSMOS)",
    )


class Data(Section):
    train: Sources = Field(
        [],
        description="training pairs: parquet files, tar shards, caption tables beside images, image folders, Hugging "
        "Face datasets on disk, demo:NAME; patterns as {000..099}.tar and *.parquet",
    )
    weights: list[float] = Field(
        [], description="how often pairs of each source of train come, relative to one another (default: by size)"
    )
    validation: Sources = Field([], description="pairs that the held-out score is computed on during training")
    holdout: float = Field(0.1, ge=0, lt=1, description="share of the training pairs held out when validation is empty")
    set_aside: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training pairs that a run never sees, neither to learn nor to choose, taken before "
        "anything is held out and by holdout_by; declip compare judges on them",
    )
    holdout_by: Literal["key", "picture"] = Field(
        "key",
        description="which pairs stay on one side when some are held out or set aside: those of equal keys; or also "
        "those whose pictures are copies of each other, for which every picture is looked at once",
    )
    fraction: float = Field(1.0, gt=0, le=1, description="train on this share of the pairs only (nested subsets)")
    fraction_seed: int = Field(0, description="which subset a fraction takes")
    image: str | None = Field(None, description="name of the image column (found by itself if not given)")
    captions: Sources = Field([], description="names of the caption columns (found by themselves if not given)")
    label: str | None = Field(None, description="name of the label column (found by itself if not given)")
    key: str | None = Field(None, description="name of the key column (found by itself if not given)")
    image_root: str | None = Field(
        None, description="folder that a caption table's file names start from (default: the table's own)"
    )
    templates: Sources = Field(
        ["a photo of a {}."], description="captions of an image folder's pictures; {} is the name of the class"
    )
    shuffle_window: int = Field(
        65536, gt=0, description="pairs that are shuffled with one another: about as many lie open at a time"
    )
    keep_apart: Literal["nothing", "captions", "images"] = Field(
        "nothing", description="equal captions (or images) that are kept out of one batch, as they are false negatives"
    )
    images: ImageViews = Field(ImageViews(), description="how image views are made")
    second_images: ImageViews | None = Field(
        None, description="how the second image view is made, say more strongly; not set: as the first"
    )
    local_images: ImageViews = Field(
        ImageViews(crop_scale=(0.05, 0.4)),
        description="how the small crops of terms.teacher_contrast are made",
    )
    local_size: int | None = Field(
        None,
        gt=0,
        description="their side in pixels (default: three sevenths of the view's, in whole patches of the tower)",
    )
    mix: float = Field(
        0.0,
        ge=0,
        description="mix the pictures of a batch two by two, in shares drawn from Beta(mix, mix) at each step: a mixed "
        "picture belongs to both captions, in these shares (mixup); what is kept of resting layers is mixed, else "
        "pixels; 0 = never",
    )
    view_size: int | None = Field(
        None,
        gt=0,
        description="side of the image views in pixels (default: model.image.image_size). A crop shows things larger "
        "than the whole image does: a tower that takes any size judges best at one larger than it learned at (Touvron "
        "et al. 2019, arXiv:1906.06423), and steps on smaller views cost less",
    )
    strong_images: ImageViews | None = Field(
        None,
        description="image self-supervision gets two views of its own, made so (SLIP); not set: it shares the others",
    )
    augment_on: Literal["worker", "device"] = Field(
        "worker",
        description="where colours, blur and flip of image views are made: in the loader processes, or in batches on "
        "the training device, for a GPU that waits for its loader; the views are the same but for rounding",
    )
    text: CaptionViews = Field(CaptionViews(), description="how text views are made")
    workers: int = Field(1, ge=0, description="loader processes; 0 loads in the training process")
    cache_gb: float = Field(1.0, ge=0, description="keep decoded images in memory when all fit in this many GB")
    index_folder: str | None = Field(
        None,
        description="folder for indices of shards that lie where nothing can be written (default: the cache folder's)",
    )
    disk_gb: float = Field(50.0, gt=0, description="copies of remote shards are kept up to this many GB")
    retries: int = Field(5, ge=0, description="how often a failed read from a remote place is tried again")
    broken_limit: float = Field(0.01, ge=0, le=1, description="stop when more than this share of the pairs is broken")

    @model_validator(mode="after")
    def _small_crops_are_not_convolved(self) -> Data:
        if self.local_images.convolve:
            raise ValueError("local_images.convolve: small crops are not convolved; set data.images.convolve")
        return self
