"""Every error that a user's input can cause. Each message says what was given, what was expected and what to do."""


class TestregError(Exception):
    """Base of all errors of this package."""

    __test__ = False  # or pytest takes the name for a test class


class NoOutliers(TestregError):
    """The model has no high-norm artefact patches on these images: there is nothing to patch."""


class UnsupportedModel(TestregError):
    """No family describes this model, or the model cannot take registers."""


class BadCheckpoint(TestregError):
    """A path or hub name does not hold a checkpoint that can be read or written."""


class BadPlan(TestregError):
    """A register plan does not fit the model, or its values are out of range."""


class BadImages(TestregError):
    """There are no, too few, or only unreadable calibration images."""


class BadText(TestregError):
    """There is no, too little, or only unreadable text, or its tokens are not the model's."""


class RegistersLeftOut(UserWarning):
    """A patched model is being written without its registers."""


class RegistersStretched(UserWarning):
    """An image is far larger, or smaller, than those that its number of registers was measured at."""


class AnotherModel(UserWarning):
    """A plan acts on other weights than those that it was found on."""


class ImagesSkipped(UserWarning):
    """Some of the images given cannot be used; the others are."""


class ImagesDark(UserWarning):
    """Some of the images given are nearly only black."""


class ImagesRepeated(UserWarning):
    """Many of the images given are the same."""


class FamilyLeftOut(UserWarning):
    """A package brings a family that cannot be had, or whose name is taken; the others are there."""


class RandomNumbers(UserWarning):
    """A model draws random numbers in evaluation mode too."""


class Harmful(TestregError):
    """No setting removes the artefact without changing the model more than the guard allows."""
