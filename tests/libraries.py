"""What the fork server of `forks` imports: the libraries that take seconds, and nothing of testreg."""

from contextlib import suppress

import torchvision_stub

torchvision_stub.install()  # before anything imports transformers

from transformers import AutoImageProcessor, AutoModel, ViTModel  # noqa: E402, F401 - and with them torch

with suppress(ImportError):
    import timm  # noqa: F401
