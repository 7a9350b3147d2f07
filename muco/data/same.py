"""What counts as the same: contents, targets and samples. Of images, :func:`muco.images.image_digest` says it."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from muco.dialogue import Content, Sample
from muco.images import image_digest

ImageKey = Callable[..., Hashable]  # image_digest, or SameImage where keys are only compared


def content_key(content: Content, where: str = "", *, image_key: ImageKey = image_digest) -> tuple[str, Hashable]:
    """Equal for contents of the same text and the same images in the same order."""
    return content.text, tuple(image_key(image, where=where) for image in content.images)


def target_key(content: Content, where: str = "", *, image_key: ImageKey = image_digest) -> tuple[str, Hashable]:
    """Equal for targets that are right or wrong together: white space around the text does not count."""
    text, images = content_key(content, where, image_key=image_key)
    return text.strip(), images


def sample_key(sample: Sample, source: int, index: int, *, image_key: ImageKey = image_digest) -> Hashable:
    """Equal for samples about the same thing, whose targets are therefore no negatives of one another.

    With images: for the same images, whatever the source, the name of the file or the id. Without: for the same id in
    the same source; and without an id a sample equals itself only.

    Raises:
        ImageError: If an image cannot be read.
    """
    if sample.images:
        return tuple(image_key(image, where=sample.place) for image in sample.images)
    return (source, "id", sample.id) if sample.id is not None else (source, "row", index)
