"""What a call of the guided pipeline asks for: the labels of its images, and how strongly they are guided there."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .classifier_free import Reference
from .components import config_of
from .inputs import Labels, label_tensor
from .several_classifiers import joint_labels, joint_scales, members_of


class Conditions(NamedTuple):
    """What the images of one call are guided by.

    Args:
        labels: of the images; None draws them unguided.
        scales: w of each step: one for all images, or (B,); a float 0 is off.
        guide: (x_t, t, x_0) to log f, (B,); None where there is none.
        guided: of each step, whether it follows the guide.
        references: predictions to guide away from.
    """

    labels: Tensor | None
    scales: Sequence[float | Tensor]
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    guided: Sequence[bool] = ()
    references: Sequence[Reference] = ()

    def guide_at(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """The guide, where a step follows it."""
        return self.guide if self.guide is not None and self.guided[index] else None

    def repeated(self, times: int) -> "Conditions":
        """Those of so many draws of each image, side by side."""
        labels = None if self.labels is None else self.labels.repeat_interleave(times, dim=0)
        scales = [s.repeat_interleave(times) if isinstance(s, Tensor) else s for s in self.scales]
        return self._replace(labels=labels, scales=scales)


def labels_of_call(
    class_labels: Labels | None,
    guidance_scale: Any,
    unet: Any,
    classifier: Any,
    num_classes: int | None,
    id2label: dict[int, str],
) -> Tensor | None:
    """The labels of the images; None for unguided ones of a UNet without classes.

    Args:
        class_labels: of the caller.
        guidance_scale: of the caller.
        unet: of the pipeline.
        classifier: of the pipeline; None where it has none.
        num_classes: K.
        id2label: names of the classes.

    Raises:
        ValueError: for labels that the networks cannot be given, or none where they need some.
    """
    conditional = config_of(unet, "num_class_embeds") is not None
    if class_labels is None:
        if conditional:
            raise ValueError(
                "`class_labels` must be given, got None: the UNet is class-conditional; ask for some of its "
                f"{num_classes} classes."
            )
        if guidance_scale is not None and not (isinstance(guidance_scale, int | float) and guidance_scale == 0):
            raise ValueError(
                f"`class_labels` must be given to be guided to, got None with a `guidance_scale` of "
                f"{guidance_scale!r}; name classes, or leave the scale out for unguided images."
            )
        return None
    if classifier is None and not conditional:
        raise ValueError(
            f"`class_labels` needs a classifier, or a UNet with class embeddings, got {class_labels!r} without; open "
            "the pipeline with `classifier=`, or leave the labels out for unguided images."
        )
    members = members_of(classifier)
    if members:
        labels = joint_labels(class_labels, members, joint_scales(guidance_scale, members))
    else:
        labels = label_tensor(class_labels, num_classes, id2label)
    if conditional and labels.is_floating_point():
        raise ValueError(
            "`class_labels` must be classes, one per image, for a class-conditional UNet, whose embeddings do not mix, "
            f"got {class_labels!r}; give indices or names."
        )
    return labels


def scale_of_call(guidance_scale: Any, labels: Tensor | None, classifier: Any, default: float) -> Any:
    """w of a call: the one given, or the default one, where there is something to be guided by.

    Args:
        guidance_scale: of the caller.
        labels: of the images.
        classifier: of the pipeline; None where it has none.
        default: w where a call gives none.

    Raises:
        ValueError: for a scale without a classifier.
    """
    if labels is None or (classifier is None and guidance_scale is None):
        return 0.0
    if members := members_of(classifier):  # the scales are in the labels' terms
        return 1.0 if any(scale.any() for scale in joint_scales(guidance_scale, members).values()) else 0.0
    if classifier is None and guidance_scale != 0:
        raise ValueError(
            f"`guidance_scale` needs a classifier, got {guidance_scale!r} without; open the pipeline with "
            "`classifier=`, or leave the scale out."
        )
    return default if guidance_scale is None else guidance_scale
