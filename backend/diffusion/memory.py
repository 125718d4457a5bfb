"""Networks take turns on a device that has no room for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from protocol.errors import KilnError


@dataclass(frozen=True)
class Place:
    """Where networks work. dtype: of the large ones. offload: each is on the device only while it works, else in main memory."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    offload: bool = False

    @contextmanager
    def at_work(self, *networks: nn.Module) -> Iterator[None]:
        """Without gradients. KilnError "out-of-memory" where the device's memory is full."""
        try:
            with torch.inference_mode():
                for network in networks:
                    network.to(self.device)
                yield
        except torch.OutOfMemoryError:
            raise KilnError(
                "out-of-memory", "The GPU's memory is full.", "Close what else uses the GPU, or choose a smaller model."
            ) from None
        finally:
            if self.offload and self.device != "cpu":
                for network in networks:
                    network.to("cpu")
                torch.cuda.empty_cache()
