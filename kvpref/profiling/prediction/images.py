"""Images at the beginning of made-up prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from kvpref.records.groups import Group
from kvpref.records.images import PlacedImage


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptStart:
    """Images and the tokens up to the end of the last one, as made by a model's processor."""

    input_ids: tuple[int, ...]
    images: tuple[PlacedImage, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens up to the end of the last image."""
        return len(self.input_ids)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of images."""
        return sum(placed.image.num_tokens for placed in self.images)

    def images_of(self, group: int) -> tuple[PlacedImage, ...]:
        """The same images with different keys for each group."""
        return tuple(
            placed._replace(image=replace(placed.image, key=f"{group} {placed.image.key}")) for placed in self.images
        )

    def free_ids(self, count: int) -> list[int]:
        """Token ids that are not image placeholders."""
        taken = set(self.input_ids)
        return [token for token in range(count + len(taken)) if token not in taken][:count]


def most_images(groups: Iterable[Group]) -> PromptStart | None:
    """The beginning of the prompt with the most image tokens; None if there are no images."""
    with_images = [group.sequences[0] for group in groups if group.sequences[0].images]
    if not with_images:
        return None
    most = max(with_images, key=lambda sequence: sum(placed.image.num_tokens for placed in sequence.images))
    return PromptStart(input_ids=most.input_ids[: most.images[-1].runs[-1][1]], images=most.images)
