"""Optional parts of the package: which extra brings what, and one clear line where it is not installed.

=========  =======================================================================================================
extra      for
=========  =======================================================================================================
(none)     probes, attacks and threats on activations of your own, and the organisms that are made here
``lm``     language models: read at a site, moved, prefixed, adapted; probes pushed to and pulled from the hub
``facts``  writing ``elk_stress/testbeds/facts.json`` anew
=========  =======================================================================================================
"""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["MissingExtra", "need"]

# what each extra installs, as it is imported
_MODULES = {"lm": ("transformers", "huggingface_hub", "peft", "gguf")}


class MissingExtra(ImportError):
    """Something that only an extra brings is not installed; the message names the extra."""


def need(extra: str, purpose: str) -> None:
    """Refuse what cannot work here, before any work is done.

    Args:
        extra: ``lm``.
        purpose: what needs it, as the subject of a sentence.

    Raises:
        MissingExtra: a package of the extra is not installed.
    """
    missing = [module.replace("_", "-") for module in _MODULES[extra] if find_spec(module) is None]
    if missing:
        raise MissingExtra(
            f"{purpose} needs the extra {extra} ({', '.join(missing)} not installed): pip install 'elk-stress[{extra}]'"
        )
