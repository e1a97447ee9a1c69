"""What a recipe may say about each loss term: one section a term, one field a choice.

Where the DeCLIP paper and its public code differ, the difference is one field here; its description says why the
default is what it is. `method=reference` and `method=paper` set all of them at once.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

SingleView = Literal["single", "single_2", "single_3", "single_4", "single_5", "single_6"]
JoinedView = Literal["joined", "joined_2"]
TextView = Literal["caption", "masked", "augmented", JoinedView, SingleView]
"""What a text view shows: a caption as it is, with hidden or changed words, several captions joined, one of many."""
TEXT_VIEWS: tuple[str, ...] = get_args(TextView)
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class Term(Section):
    """What all terms have."""

    weight: float = Field(1.0, ge=0, description="weight in the loss")
    fade_from: float = Field(
        1.0,
        ge=0,
        le=1,
        description="from this share of the run on the weight falls, in a line, to 0 at the end; 1 = it never does",
    )


class _Pairs(Term):
    """A term between image views and text views."""

    images: Literal[1, 2] = Field(1, description="how many image views take part")
    texts: list[TextView] = Field(["caption"], min_length=1, description="which text views take part")


class _Equals(_Pairs):
    """A term that tells right pairs from wrong ones."""

    equal_captions: Literal["negatives", "positives"] = Field(
        "negatives",
        description="what pairs that show equal captions are to one another in a batch (data.text.equal says which do)",
    )


class Contrastive(_Equals):
    """InfoNCE between every image view and every text view (CLIP; DeCLIP's multi-view supervision)."""

    multi_view: float | None = Field(
        None,
        ge=0,
        description="weight of the mean of all other pairs of views beside the first pair's 1 (the paper's own weight "
        "for its multi-view loss); not set: the mean over all pairs of views, as in the code",
    )


class Sigmoid(_Equals):
    """A yes or no for every image and every text instead of a softmax (SigLIP); needs model.logit_bias_init."""

    per: Literal["texts", "images"] = Field(
        "texts",
        description="the loss is summed over a batch and divided by how many texts there are (FLAIR; SigLIP, which has "
        "one of each), or by the images, so that several texts of an image weigh as many",
    )


class TokenWise(_Pairs):
    """Each image patch against its best word, each word against its best patch (FILIP)."""

    dim: int = Field(256, gt=0, description="width that patches and words are mapped to")
    top_k: int | None = Field(
        None,
        gt=0,
        description="keep only this many tokens of the side that is searched, as the code does (16); not set: all, as "
        "in the FILIP paper",
    )
    mask_padding: bool = Field(
        True,
        description="padding takes no part (the code counts all 77 positions, most of them padding)",
    )
    logit_scale_init: float = Field(2.6593, description="start of the term's own logit scale, as a logarithm")
    logit_scale_range: tuple[float, float] = Field((0.0, 4.6052), description="the term's logit scale is kept in here")


class SimSiam(Term):
    """Image self-supervision: the two image views predict each other (SimSiam)."""

    weight: float = Field(0.2, ge=0, description="weight in the loss")
    width: int = Field(1024, gt=0, description="width of the projector")
    bottleneck: int = Field(512, gt=0, description="width of the predictor's hidden layer")


class SimCLR(Term):
    """Image self-supervision: two views of an image find each other among all others (SimCLR's NT-Xent; SLIP)."""

    temperature: float = Field(0.1, gt=0, description="what cosine similarities are divided by")
    width: int = Field(4096, gt=0, description="width of the head's two hidden layers")
    dim: int = Field(256, gt=0, description="width of the head's output")


class MaskedLanguage(Term):
    """Text self-supervision: predict the masked tokens of the masked text view."""

    weight: float = Field(0.2, ge=0, description="weight in the loss")
    vocabulary: Literal["all", "used"] = Field(
        "all", description="tokens to choose from: the whole vocabulary, or those that the training captions use"
    )


class NearestNeighbour(Term):
    """Each image also matches the text most like its own caption, among the latest texts in a queue."""

    weight: float = Field(0.2, ge=0, description="weight in the loss")
    images: Literal[1, 2] = Field(2, description="how many image views take part")
    texts: list[TextView] = Field(
        ["caption"],
        min_length=1,
        description="the text views whose neighbours are sought: the caption's, as in the paper; the code seeks the "
        "augmented view's too",
    )
    enqueue: list[TextView] | None = Field(
        None,
        min_length=1,
        description="the text views that enter the queue; not set: those whose neighbours are sought",
    )
    queue_size: int = Field(65536, gt=0, description="how many text embeddings the queue holds")
    top_k: int = Field(
        1, gt=0, description="how many neighbours of each text the image is to match, each by a loss of its own"
    )
    exclude_own: bool = Field(
        True, description="a sample never finds itself or its own other captions (the code does not exclude them)"
    )
    queue_per_rank: bool = Field(
        False, description="with several ranks, each has a queue of its own texts alone, as in the code"
    )
    random_start: bool = Field(
        False, description="fill the queue with random directions and search them at once, as the code does"
    )

    @model_validator(mode="after")
    def _there_are_as_many(self) -> NearestNeighbour:
        if self.top_k > self.queue_size:
            raise ValueError(f"top_k = {self.top_k} are more neighbours than queue_size = {self.queue_size} holds")
        return self


class TeacherContrast(Term):
    """Each view finds, among all, what a moving average of the weights (optimizer.ema_half_life) makes of its pair."""

    images: Literal[1, 2] = Field(2, description="how many image views take part, of both")
    texts: list[TextView] = Field(["caption"], min_length=1, description="which text views take part")
    teacher_texts: list[TextView] | None = Field(
        None, min_length=1, description="the text views that the average sees; not set: the same"
    )
    local_images: int = Field(
        0,
        ge=0,
        le=8,
        description="so many small crops of each image (data.local_images), which only this term sees; not the average",
    )
    weights: tuple[float, float, float, float] = Field(
        (0.5, 0.0, 0.0, 0.5),
        description="of images with the average's images, images with its texts, texts with its images, texts with its "
        "texts (COSMOS with cross-attention: 0.25 each)",
    )
    own_view: bool = Field(
        True, description="a view also meets what the average makes of the very same view, as in COSMOS"
    )
    cross_attention: bool = Field(
        False,
        description="embeddings first look into the tokens of the other side (COSMOS whole); the parts across "
        "modalities can then be met without any alignment, so that few pairs gain little",
    )
    mask_padding: bool = Field(
        True, description="with cross-attention: padding is not looked at (COSMOS's code looks at all 77 positions)"
    )
    logit_scale_init: float = Field(2.6593, description="start of the term's own logit scale, as a logarithm")
    logit_scale_range: tuple[float, float] = Field((0.0, 4.6052), description="the term's logit scale is kept in here")

    @property
    def seen_by_average(self) -> list[TextView]:
        """The text views that the average sees."""
        return self.texts if self.teacher_texts is None else self.teacher_texts

    @model_validator(mode="after")
    def _has_parts(self) -> TeacherContrast:
        if min(self.weights) < 0 or not any(self.weights):
            raise ValueError("weights are none below 0 and one above it at least")
        if not self.own_view and self.weights[0] and self.images == 1 and not self.local_images:
            raise ValueError("own_view = false leaves one image view nothing to meet: set images = 2")
        if not self.own_view and self.weights[3] and len({*self.texts, *self.seen_by_average}) == 1:
            raise ValueError("own_view = false leaves one text view nothing to meet: name two in texts")
        return self


class TextConditioned(Term):
    """Each text pools the patches that it speaks of, and a yes or no says whether it is theirs (FLAIR).

    Needs model.logit_bias_init; for about 100,000 pairs and more.
    """

    texts: list[TextView] = Field(["caption"], min_length=1, description="which text views take part")


class Distillation(Term):
    """Embeddings and similarities like a teacher's, which has gone over all pairs once before the first step."""

    teacher: str = Field(
        "start",
        description="who teaches: whatever declip evaluate opens; a file of embeddings (.npz, .safetensors) with "
        "images, a row a pair, and maybe texts, a row a caption, those of a pair one after the other; or start, the "
        "towers as they started, whose pooled features are then held near what they were",
    )
    images: Literal[1, 2] = Field(1, description="how many image views take part")
    features: float = Field(
        1.0, ge=0, description="weight of 1 - cosine between the embedding, mapped to the teacher's width, and its own"
    )
    similarities: float = Field(
        1.0,
        ge=0,
        description="weight of the divergence of the batch's similarities from the teacher's, where it has images and "
        "texts in one space",
    )

    @property
    def texts(self) -> list[TextView]:
        """The text views that take part."""
        return ["caption"]

    @model_validator(mode="after")
    def _teaches(self) -> Distillation:
        if not self.features and not self.similarities:
            raise ValueError("features and similarities are both 0, nothing is left to learn: leave the term out")
        return self


class Terms(Section):
    contrastive: Contrastive | None = Field(None, description="image-text InfoNCE over views")
    sigmoid: Sigmoid | None = Field(None, description="image-text sigmoid loss over views")
    token_wise: TokenWise | None = Field(None, description="patches against words")
    simsiam: SimSiam | None = Field(None, description="image self-supervision without negatives")
    simclr: SimCLR | None = Field(None, description="image self-supervision with negatives")
    masked_language: MaskedLanguage | None = Field(None, description="text self-supervision")
    nearest_neighbour: NearestNeighbour | None = Field(None, description="captions of similar pairs")
    teacher_contrast: TeacherContrast | None = Field(None, description="what an average of the weights makes of a pair")
    text_conditioned: TextConditioned | None = Field(None, description="texts pool the patches that they speak of")
    distillation: Distillation | None = Field(None, description="what a larger model, or the start, makes of the pairs")

    def active(self) -> dict[str, Section]:
        """The terms that take part, by name; a weight of zero takes no part."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: term for name, term in found.items() if term is not None and term.weight > 0}
