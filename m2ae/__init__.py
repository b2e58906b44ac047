"""M2AE: multimodal masked autoencoders and joint-embedding models, built on m2ae_kernels.

`import m2ae` is light: torch is imported with the first name that needs it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2ae.config import ConnectorConfig, M2AEConfig
    from m2ae.models.connector import MoEConnector
    from m2ae.models.m2ae import M2AE

__all__ = ["M2AE", "ConnectorConfig", "M2AEConfig", "MoEConnector", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "M2AE":
        from m2ae.models.m2ae import M2AE

        return M2AE
    if name == "MoEConnector":
        from m2ae.models.connector import MoEConnector

        return MoEConnector
    if name in ("ConnectorConfig", "M2AEConfig"):
        from m2ae import config

        return getattr(config, name)
    raise AttributeError(f"module 'm2ae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
