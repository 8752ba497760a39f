"""The licences that the Hub knows, and what Meta's ask of those who redistribute its weights.

Identifiers: https://huggingface.co/docs/hub/repositories-licenses. Meta's terms: section 1.b of each agreement, at
https://www.llama.com/llama3/license and its successors.
"""

from typing import NamedTuple

from hf_llama3.conversion import CheckpointInfo
from hf_llama3.errors import UserError
from hf_llama3.presets import PRESETS, config_of

_IDENTIFIERS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl
lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
IDENTIFIERS = frozenset(_IDENTIFIERS.split())


class MetaLicense(NamedTuple):
    name: str  # of the model, as the agreement writes it
    built_with: str  # what a page about the model must say
    prefix: str  # how the name of a derived model must begin
    link: str

    @property
    def notice(self) -> str:
        """The line that a NOTICE file must contain."""
        owner = "Copyright © Meta Platforms, Inc. All Rights Reserved."
        return f"{self.name} is licensed under the {self.name} Community License, {owner}"


META = {
    "llama3": MetaLicense("Meta Llama 3", "Built with Meta Llama 3", "Llama 3", "https://www.llama.com/llama3/license"),
    "llama3.1": MetaLicense("Llama 3.1", "Built with Llama", "Llama", "https://www.llama.com/llama3_1/license"),
    "llama3.2": MetaLicense("Llama 3.2", "Built with Llama", "Llama", "https://www.llama.com/llama3_2/license"),
    "llama3.3": MetaLicense("Llama 3.3", "Built with Llama", "Llama", "https://www.llama.com/llama3_3/license"),
}


def check_license(license: str, front_matter: dict | None = None):
    """Check that the Hub knows the licence, or that the front matter names one of its own."""
    if license not in IDENTIFIERS:
        near = sorted(known for known in IDENTIFIERS if known.startswith(license.lower()[:4]))
        listed = ", ".join(near[:5] or ["apache-2.0", "mit", "llama3.1", "other"])
        raise UserError(f"--license must be an identifier of the Hub, such as {listed}, got {license!r}")
    if license == "other" and "license_name" not in (front_matter or {}):
        keys = "license: other, license_name and license_link"
        raise UserError(f"--license other needs a name; write {keys} into the front matter of the folder's README.md")


def license_of_meta(info: CheckpointInfo, version: str) -> str | None:
    """Return the licence of Meta's weights if a model has the shape and vocabulary of a released Llama 3."""
    released = version.removesuffix(".0")
    for name in PRESETS:
        shape = config_of(name)
        if name.startswith(f"{released}-") and all(
            info.config[key] == shape[key]
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size")
        ):
            return f"llama{released}"
    return None
