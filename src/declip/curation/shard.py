"""One tar shard of a pack: its members named so that webdataset and open_clip read them as we do."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from declip.curation.fingerprints import reason
from declip.data.decode import opened_image, pixels_of
from declip.data.sources import BrokenPair, Pair, Source
from declip.data.sources.tar_index import IMAGES
from declip.files import write_atomically

Report = dict[str, Any]
"""``{"file", "pairs", "bytes", "sha256", "left_out": [{"shard", "place", "key", "reason"}, …]}``."""

# What open_clip takes for an image; whatever else there is goes as jpg, as every reader looks at the bytes.
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_IMAGE_NAME = re.compile(rf"\.({'|'.join(sorted(IMAGES))})$", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_KEY_BYTES = 200  # a file's name may have 255
_CHECKED = 64  # pixels a side that an image is decoded at which is only checked
_TIME = 1577836800  # 2020: the time of all members, as equal pairs are to make equal shards


@dataclass(frozen=True, slots=True)
class Images:
    """How images are kept. resize: pixels of the longest shorter side (None: any); quality: of JPEGs that are made."""

    resize: int | None
    quality: int

    def pack(self, data: bytes) -> tuple[bytes, str]:
        """An image's bytes as they are kept, and the extension for them; raises ValueError where they are broken.

        What is small enough is kept as it is. JPEGs are decoded at a reduced scale, at least twice the one wanted:
        every byte is read, so damage shows, at a fraction of the time.
        """
        try:
            with opened_image(data) as image:
                extension = _EXTENSIONS.get(image.format or "", "jpg")
                fits = self.resize is None or min(image.size) <= self.resize
                side = _CHECKED if fits else 2 * (self.resize or 1)
                image.draft("RGB", (side, side))
                if fits:
                    image.load()
                    return data, extension
                return self._smaller(Image.fromarray(pixels_of(image))), "jpg"
        except ValueError as error:
            raise ValueError(reason(data, error.__cause__ or error)) from error

    def _smaller(self, image: Image.Image) -> bytes:
        scale = (self.resize or 1) / min(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


def kept_pair(source: Source, index: int, images: Images) -> tuple[Pair, bytes, str]:
    """A pair, its image as it is kept, and the extension for it. Raises BrokenPair where it cannot be used."""
    pair = source[index]
    if not pair.captions and pair.label is None:
        raise BrokenPair(pair.key, pair.where, "it has neither a caption nor a label")
    try:
        return pair, *images.pack(pair.image)
    except ValueError as error:
        raise BrokenPair(pair.key, pair.where, str(error)) from None


def write_shard(path: Path, source: Source, indices: range, images: Images, seen: Callable[[], None]) -> Report:
    """Write pairs to a tar, whole or not at all. seen: called before each pair, and may raise to stop."""
    left_out: list[dict[str, str]] = []
    names: dict[str, int] = {}

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
            for index in indices:
                seen()
                try:
                    pair, image, extension = kept_pair(source, index, images)
                except BrokenPair as error:
                    row = {"shard": path.name, "place": error.where, "key": error.key, "reason": error.reason}
                    left_out.append({name: valid(value) for name, value in row.items()})
                    continue
                name = _free(safe_key(pair.key), names)
                for kind, data in {extension: image, **_texts(pair, name)}.items():
                    member = tarfile.TarInfo(f"{name}.{kind}")
                    member.size, member.mtime = len(data), _TIME
                    tar.addfile(member, io.BytesIO(data))

    write_atomically(path, write, several=True)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    pairs = len(indices) - len(left_out)
    size = path.stat().st_size
    return {"file": path.name, "pairs": pairs, "bytes": size, "sha256": digest, "left_out": left_out}


def _texts(pair: Pair, name: str) -> dict[str, bytes]:
    """The members beside the image. Of several captions .txt has the first, as open_clip reads no others.

    A label that is no number goes into .json: webdataset takes .cls for a number, and drops the pair where it is none.
    """
    members: dict[str, str] = {}
    fields: dict[str, Any] = {}
    if pair.captions:
        members["txt"] = pair.captions[0]
    if len(pair.captions) > 1:
        fields["captions"] = [valid(text) for text in pair.captions]
    if pair.label is not None:
        if pair.label.isascii() and pair.label.isdecimal():
            members["cls"] = pair.label
        else:
            fields["label"] = valid(pair.label)
    if pair.key != name:
        fields["key"] = valid(pair.key)
    if fields:
        members["json"] = json.dumps(fields, ensure_ascii=False)
    return {kind: valid(text).encode() for kind, text in members.items()}


def valid(text: str) -> str:
    """Text that has an encoding: half characters, as a broken JSON file has them, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def safe_key(key: str) -> str:
    """A key as the name of members: no dot, as what follows is an extension, and nothing that leads out of a folder."""
    name = _CONTROL.sub("_", _IMAGE_NAME.sub("", valid(key))).replace(".", "_")
    parts = [part for part in name.split("/") if part]
    return "/".join(parts).encode()[:_KEY_BYTES].decode("utf-8", "ignore").rstrip("/") or "pair"


def _free(name: str, names: dict[str, int]) -> str:
    """The name, numbered where the shard has it already. names: those it has, and the number that each last gave."""
    free = name
    while free in names:
        names[name] += 1
        free = f"{name}_{names[name]}"
    names[free] = 1
    return free
